"""The folder of a run: its lock, config.json, best.json, its checkpoints, and how it is resumed.

runs/<run_id>/checkpoints/step_000500/
    checkpoint.pt    format, step, tokens, config, tokenizer, model: all that using the model needs
    trainer.pt       optimizer, best, counters: all that resuming needs besides
    manifest.json    bytes and sha256 of each file, written last: without it the folder is not a checkpoint
"""

import atexit
import contextlib
import hashlib
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import metadata

import config
from nanobit import cli, files, record, terminal
from nanobit.cli import RANK, WORLD, fail
from nanobit.terminal import command_line

FORMAT = 2  # of a checkpoint. 1: one optimizer, no scaler; its weights are read, it is not resumed
MODEL = "checkpoint.pt"
TRAINER = "trainer.pt"
CODE = ("train.py", "model.py", "quant.py", "nanobit", "config/__init__.py")  # of which a run is made


@dataclass
class Origin:
    """The checkpoint that a run continues from."""

    folder: str | None = None  # its step folder; None: the run starts
    is_own: bool = False  # it is of this run, not of another one; also if this run starts over
    skipped: list = field(default_factory=list)  # (step, fault) of newer checkpoints


@contextlib.contextmanager
def reading():
    """Exit with 1 if a file cannot be read now: using an older checkpoint would lose what was trained."""
    try:
        yield
    except OSError as error:
        fail(
            f"{error.filename} cannot be read now ({error.strerror}); repair that and run the same command "
            "again, or name the folder of another checkpoint",
            code=1,
        )


def step_dir(run_dir, step):
    """Return the folder of the checkpoint of a step."""
    return os.path.join(run_dir, "checkpoints", f"step_{step:06d}")


def has_manifest(run_dir, step):
    """Return whether the checkpoint of a step exists, without a look at its content."""
    return os.path.exists(os.path.join(step_dir(run_dir, step), "manifest.json"))


def step_folders(run_dir):
    """Return the steps of a run that have a folder, newest first. Raises OSError if that cannot be read."""
    folder = os.path.join(run_dir, "checkpoints")
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    own = [name for name in names if re.fullmatch("step_([0-9]{6}|[1-9][0-9]{6,})", name)]  # see step_dir
    return sorted((int(name[5:]) for name in own), reverse=True)


def steps(run_dir):
    """Return the steps of a run that have a manifest, newest first."""
    return [step for step in step_folders(run_dir) if has_manifest(run_dir, step)]


class RunDir:
    """The folder of the run that this process trains: a path and, from open() on, a lock."""

    def __init__(self, path):
        self.path = path
        self.lock = None
        self.bar = None
        self.trackers = None  # the module, once a tracker is on

    def open(self):
        """Make the folders and lock them until this process ends. Exits with 2 if they cannot be written, or
        if another process trains this run."""
        is_new = not os.path.isdir(self.path)
        try:
            for name in ("metrics", "samples", "checkpoints"):
                os.makedirs(os.path.join(self.path, name), exist_ok=True)
            self.lock = files.lock(os.path.join(self.path, ".lock"))
        except BlockingIOError as error:
            owner = error.strerror
            fail(f"{self.path} is being trained by {owner}; wait for it, or choose another --run_id=")
        except OSError as error:
            problem = f"cannot write {self.path} ({error.strerror})"
            fail(f"out_dir: {problem}; choose another folder with --out_dir=")
        if is_new:
            atexit.register(self.remove_if_empty)

    def remove_if_empty(self):
        """Remove the folder if no file was written into it: the run ended before it began."""
        if any(not name.startswith(".lock") for _, _, names in os.walk(self.path) for name in names):
            return
        self.lock.release()  # Windows deletes nothing that is open
        with contextlib.suppress(OSError):
            shutil.rmtree(self.path)

    def move_aside(self):
        """Rename the folder, start an empty one, and return the new name of the old one."""
        self.lock.release()  # Windows does not rename a folder with an open file
        moved = files.set_aside(self.path)
        self.open()
        return moved

    def start_log(self, cfg, step):
        """Show a progress bar on a terminal, and start the trackers."""
        self.cfg = cfg
        self.bar = terminal.progress_bar(cfg.max_steps, step, hidden=RANK > 0)
        if RANK == 0 and config.trackers(cfg):
            from nanobit import trackers

            self.trackers = trackers
            self.mirrors = trackers.start(cfg, self.path, step, warn=self.log)
            # however the run ends, the last lines of the trackers show the reason
            atexit.register(trackers.finish, self.mirrors)

    def log(self, text):
        """Write a line to train.log, and to stderr above the bar; on rank 0 only."""
        if RANK == 0:
            record.append_text(self.path, text)
            self.bar.write(text, file=sys.stderr)

    def write(self, name, **row):
        """Append a line of JSON to the record, and hand it to the trackers."""
        record.append(self.path, name, **row)
        if self.trackers:
            self.trackers.mirror(self.mirrors, self.cfg, name, row)

    def show_step(self, row):
        """Log the line of an update; row: that of scalars.jsonl."""
        step = row["step"]
        end = self.cfg.max_steps
        rates = f"lr {row['lr']:.2e}  wd {row['weight_decay']:g}  stage {row['stage']}"
        pace = f"{row['tokens_per_sec'] or 0:,.0f} tok/s"
        eta = self.bar.format_interval((end - step) * (row["step_ms"] or 0) / 1e3)
        self.log(
            f"step {step}/{end}  {step / end:.1%}  loss {row['loss']:.4f}  {rates}  "
            f"grad {row['grad_norm']:.2f}  {pace}  eta {eta}"
        )
        self.bar.set_description_str(f"loss {row['loss']:.3f} {pace} ", refresh=False)

    def log_evaluation(self, step, loss, seconds):
        """Log a validation loss in nats per token, and record it."""
        perplexity = math.exp(min(loss, 700.0))  # e^700 is about the largest that a float holds
        self.write(record.SCALARS, step=step, val_loss=loss, val_perplexity=perplexity)
        text = f"val_loss {loss:.4f}  perplexity {perplexity:.4g}  {seconds:.1f} s"
        self.log(f"eval {step}/{self.cfg.max_steps}  {text}")

    def show_sample(self, step, row):
        """Show a greedy sample above the bar, shortened to a line; row: that of samples.jsonl."""
        if row["mode"] == "greedy" and not self.bar.disable:
            text = terminal.printable((row["prompt"] + row["generated_text"]).strip())
            self.bar.write(f"sample {step}/{self.cfg.max_steps}  {text[:160]}", file=sys.stderr)

    def event(self, kind, **fields):
        """Append an event to the record."""
        record.event(self.path, kind, **fields)

    def end_log(self):
        """Close the bar and the trackers."""
        self.bar.close()
        if self.trackers:
            self.trackers.finish(self.mirrors)

    def note_failures(self, state):
        """From now on, record an event `failed` with the error if an error ends this process."""
        print_error = sys.excepthook

        def note(what):
            # an error after the end of the run costs nothing
            if record.last(self.path, record.EVENTS).get("event") not in ("interrupt", "finish"):
                self.event("failed", step=state.step, what=" ".join(what.split()))

        def hook(error_type, error, trace):
            print_error(error_type, error, trace)
            note(f"{error_type.__name__}: {error}")

        sys.excepthook = hook
        cli.on_fail.append(note)

    def write_best(self, best):
        """Write best.json, {step, val_loss} of the best evaluation, or remove it if there is none yet. Return
        whether that succeeded: a full disk costs a warning and leaves the former file."""
        path = os.path.join(self.path, "best.json")
        try:
            if best:
                files.write_json(path, best)
            elif os.path.exists(path):
                os.remove(path)
        except OSError as error:
            print(f"warning: {path} is not written: {error.strerror}", file=sys.stderr)
            return False
        return True

    def write_config(self, cfg, facts):
        """Write config.json: settings and their origin, versions, git commit, process, facts of train.py."""
        settings = config.settings_of(cfg).items()
        versions = {name: metadata.version(name) for name in ("torch", "numpy")}
        content = dict(
            settings={k: {"value": v, "origin": cfg.origin.get(k, "derived")} for k, v in settings},
            versions=versions | {"python": sys.version.split()[0]},
            git_commit=git_commit(),
            pid=os.getpid(),
            host=platform.node(),
        )
        files.write_json(os.path.join(self.path, "config.json"), content | facts)

    def resume_command(self):
        """Return the command that resumes the run with the settings of its config.json, quoted for the shell.
        It works without an active virtual environment. For several nodes "..." stands for how they meet."""
        command = [sys.executable.removeprefix(os.getcwd() + os.sep)]
        if WORLD > 1:
            on_this_node = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD))
            command += ["-m", "torch.distributed.run", f"--nproc_per_node={on_this_node}"]
            if on_this_node < WORLD:
                command.append("...")
        script = os.path.join(os.path.dirname(sys.argv[0]), "train.py")
        return command_line([*command, script, f"--resume={self.path}"])

    def report_skips(self, cfg, state, skipped, worst_row):
        """Report the steps skipped since the last report. Five in a row end the run with exit code 1, and
        name the last good checkpoint. skipped: all of them; worst_row: the longest row."""
        new_skips = skipped - state.skips_reported
        if new_skips:
            self.event("anomaly", step=state.step, what="not finite, skipped", steps=new_skips)
            self.log(f"warning: {new_skips} steps skipped, their loss or gradient was not finite")
            state.skips_reported = skipped
        if worst_row < 5:
            return
        from nanobit import checkpoint  # here: a run that ends well reads none

        folder, _ = checkpoint.newest(self.path, resumable=True)
        remedy = "no checkpoint was saved before; start again with a lower learning_rate"
        if folder:
            command = f"{self.resume_command()} --learning_rate={cfg.learning_rate / 2:g}"
            remedy = f"the last finite checkpoint is {folder}; with a lower rate: {command}"
        fail(f"{worst_row} steps in a row were not finite by step {state.step}; {remedy}", code=1)

    def finished(self, cfg, step, patience):
        """Return what ended the run if it is at its end, at this step and with these settings, or ''.
        patience: the setting then."""
        end = record.last(self.path, record.EVENTS)
        if end.get("event") != "finish" or end["step"] != step:
            return ""
        out_of_patience = end["why"] == "patience" and cfg.patience == patience
        return end["why"] if step >= cfg.max_steps or out_of_patience else ""


def git_commit(root=cli.ROOT):
    """Return the commit of the repository, or None if git does not know it. If the code of a run has been
    changed since, new files included, a hash of it follows, as in 1f0c...+3ab94d21."""

    def git(*command):
        done = subprocess.run(["git", "-C", root, *command], capture_output=True, text=True)
        return done.stdout.strip()

    with contextlib.suppress(OSError):  # git is not installed
        commit = git("rev-parse", "HEAD")
        if not git("status", "--porcelain", "--", *CODE):
            return commit or None
        names = git("ls-files", "--cached", "--others", "--exclude-standard", "--", *CODE).split("\n")
        paths = {name: os.path.join(root, name) for name in names}
        content = {name: files.sha256(path) for name, path in paths.items() if os.path.exists(path)}
        return f"{commit}+{hashlib.sha256(record.to_json(content).encode()).hexdigest()[:8]}"
