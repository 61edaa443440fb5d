"""What native Windows lacks, taken from the process that calls emulate(): an emulation, not the system.

Blocked: modules, signals, calls and /proc, which exist on other systems only; select on what is not a socket;
renaming and deleting what is open; renaming onto what exists; flushing what is open to read only.
"""

import builtins
import errno
import fcntl
import multiprocessing.popen_fork
import os
import select
import shutil
import signal
import sys

MODULES = "fcntl", "resource", "readline", "termios", "tty", "pty"
SIGNALS = "SIGHUP", "SIGPIPE", "SIGKILL", "SIGQUIT", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGTSTP", "SIGCONT"
CALLS = "sched_getaffinity", "geteuid", "getpgid", "killpg", "setsid"
HERE = os.path.dirname(os.path.abspath(__file__))
PATCH = f"sys.path.insert(0, {HERE!r})\nimport windows\nwindows.emulate()"  # for conftest.run


def refuse_if_open(path):
    """Raise PermissionError if this process holds a file open that is, or lies in, path."""
    path = os.path.realpath(path)
    for number in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():  # Linux only
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:  # the handle of listdir itself
            continue
        if target == path or target.startswith(path + os.sep):
            raise PermissionError(errno.EACCES, "used by another process", path)


def guarded(call, replaces=True):
    """Return a call on paths that fails as on Windows."""

    def guard(path, *args, **options):
        if isinstance(path, (str, os.PathLike)) and "dir_fd" not in options:
            refuse_if_open(path)
            if not replaces and os.path.exists(args[0]):
                raise FileExistsError(errno.EEXIST, "exists", args[0])
        return call(path, *args, **options)

    return guard


def emulate():
    """Take from this process what Windows lacks; os.name and sys.platform stay."""
    flags = fcntl.fcntl

    for name in MODULES:
        sys.modules[name] = None
    for name in [name for name in sys.modules if name.split(".")[0] == "filelock"]:
        del sys.modules[name]  # it chooses its locks when it is imported
    for module, names in ((signal, SIGNALS), (os, CALLS)):
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    process = multiprocessing.popen_fork.Popen
    process.kill = process.terminate  # the same there

    def no_select(*args):
        raise OSError(10038, "an operation was attempted on something that is not a socket")

    def fsync(file, real=os.fsync):
        number = file if isinstance(file, int) else file.fileno()
        is_folder = os.path.isdir(f"/proc/self/fd/{number}")
        if flags(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY and not is_folder:
            raise OSError(errno.EBADF, "bad file descriptor")
        real(file)

    def no_proc(path, *args, real=builtins.open, **options):
        if str(path).startswith("/proc/"):
            raise FileNotFoundError(errno.ENOENT, "no such file or directory", path)
        return real(path, *args, **options)

    def rmtree(path, ignore_errors=False, real=shutil.rmtree, **options):
        try:
            refuse_if_open(path)
        except PermissionError:
            if ignore_errors or options:  # what stays is the caller's to decide
                return
            raise
        real(path, ignore_errors, **options)

    select.select, os.fsync, builtins.open, shutil.rmtree = no_select, fsync, no_proc, rmtree
    os.replace, os.remove, os.unlink = map(guarded, (os.replace, os.remove, os.unlink))
    os.rename = guarded(os.rename, replaces=False)
