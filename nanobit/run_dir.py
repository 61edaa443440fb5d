"""The folder of a run: its lock, config.json, best.json, the folders of its checkpoints, how to resume it."""

import atexit
import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from importlib import metadata

import config
from nanobit import cli, files, record, terminal
from nanobit.cli import RANK, WORLD, fail
from nanobit.terminal import command_line


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
    return sorted((int(name[5:]) for name in names if re.fullmatch(r"step_\d{6,}", name)), reverse=True)


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

        def hook(kind, error, trace):
            print_error(kind, error, trace)
            note(f"{kind.__name__}: {error}")

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
        """Write config.json: every setting with its origin, versions, git commit, process, and the facts that
        train.py knows."""
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

    def finished(self, cfg, step, patience):
        """Return what ended the run if it is at its end, at this step and with these settings, or ''.
        patience: the setting then."""
        end = record.last(self.path, record.EVENTS)
        if end.get("event") != "finish" or end["step"] != step:
            return ""
        out_of_patience = end["why"] == "patience" and cfg.patience == patience
        return end["why"] if step >= cfg.max_steps or out_of_patience else ""


def git_commit():
    """Return the commit of this repository, or None if git does not know it."""
    command = ["git", "-C", cli.ROOT, "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):  # git is not installed
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def opening(cfg, facts):
    """Return what a run prints first: the settings that differ from the defaults, model, device and length.
    facts: as for write_config."""
    defaults = config.assignments(config.DEFAULT)
    values = config.settings_of(cfg)
    changed = [f"{name}={values[name]!r}" for name in defaults if values[name] != defaults[name]]
    params = facts["params"]
    model = f"{params['total']:,} parameters, {params['ternary']:,} ternary"
    if cfg.n_expert:
        model += f", {params['active']:,} active per token"
    device = facts["device"]
    batch = f"{cfg.accumulation} x {cfg.batch_size} x {cfg.seq_len}"
    if WORLD > 1:
        device = f"{WORLD} x {device}"
        batch = f"{WORLD} x {batch}"
    compiled = "compiled: the first step takes longer" if facts["compile"] else "not compiled"
    total = cfg.max_steps * cfg.total_batch_size
    return (
        f"{textwrap.fill('settings: ' + ', '.join(changed), 100, subsequent_indent='  ')}\n"
        f"model: {model}\n"
        f"device: {device}, {facts['dtype']}, {compiled}\n"
        f"length: {cfg.max_steps:,} steps of {cfg.total_batch_size:,} tokens ({batch}), {total:,} in all"
    )
