"""Scripts as processes forked from one that has imported torch: 4 of the 6 seconds of a tiny run are imports.

The process forked from (the forkserver of multiprocessing) runs nothing else and has no second thread.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "numpy", "tqdm"])


def main(out, err, cwd, env, script, args, patch):
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # multiprocessing gives its children another one
    sys.stdout, sys.stderr = open(out, "w", encoding="utf-8"), open(err, "w", encoding="utf-8", buffering=1)
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)
    sys.argv = [os.path.basename(script), *args]
    sys.path[:0] = [os.path.dirname(script)]
    exec("import sys\n" + patch, {})
    atexit._clear()
    try:
        runpy.run_path(script, run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())  # train.py has its own, which multiprocessing would pass by
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # as an interpreter does, and multiprocessing does not


class Script:
    """Run a script of the project as a process; patch is Python that runs before it, inside that process; env
    is added to its environment."""

    def __init__(self, script, args, cwd, patch="", **env):
        self.folder = tempfile.TemporaryDirectory()
        self.files = [os.path.join(self.folder.name, name) for name in ("out", "err")]
        what = (*self.files, cwd, os.environ | env, script, args, patch)
        self.process = CONTEXT.Process(target=main, args=what)
        self.process.start()

    def ended(self):
        return self.process.exitcode is not None

    def kill(self, how=signal.SIGKILL):
        os.kill(self.process.pid, how)

    def output(self):
        """Return [stdout, stderr] up to now."""
        texts = []
        for path in self.files:
            with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
                texts.append(file.read())
        return texts

    def wait(self, timeout):
        """Return (exit code, minus the signal that killed it; stdout; stderr) once it has ended, or was
        killed after this many seconds."""
        self.process.join(timeout)
        if not self.ended():
            self.kill()
            self.process.join()
        return self.process.exitcode, *self.output()
