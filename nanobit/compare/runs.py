"""The runs of a comparison: each is one of train.py in its own folder, and is found again by its settings."""

import contextlib
import glob
import hashlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time

import config
from nanobit import cli, files, record, terminal

DEFAULTS = config.assignments(config.DEFAULT)
# what a comparison decides itself; total_tokens has become max_steps when the settings are loaded
DECIDED = {"seed", "resume", "max_minutes", "patience", "run_id", "out_dir", "total_tokens"}
DIVERGED = "steps in a row were not finite"  # of RunDir.report_skips
received = []  # the signals that asked this process to stop


class Stopped(Exception):
    """A signal has ended the comparison; the current run is saved."""


def listen():
    """Let SIGINT, SIGTERM and SIGHUP stop the current run, which saves, and then this process."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signum = getattr(signal, name, signal.SIGINT)  # Windows lacks the last one
        if signal.getsignal(signum) != signal.SIG_IGN:  # set by nohup
            signal.signal(signum, lambda signum, frame: received.append(signum))


def compared(cfg):
    """Return {setting: value} of what a run depends on."""
    return {name: getattr(cfg, name) for name in sorted(DEFAULTS.keys() - DECIDED)}


def path_of(folder, name, settings, seed):
    """Return the folder of the run with these settings and this seed: the present one, whatever its name."""
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:10]
    present = glob.glob(os.path.join(glob.escape(folder), f"*-{digest}-seed{seed}"))
    readable = re.sub(r"[^\w.,=+-]+", "_", name)[:80]
    return next(iter(present), os.path.join(folder, f"{readable}-{digest}-seed{seed}"))


def last_step(path):
    """Return the last step that a run has logged, 0 without one."""
    return record.last(path, record.SCALARS, "loss").get("step", 0)


def has_ended(path):
    """Return whether a run needs no more training: it is finished, or it diverged, which would repeat."""
    end = record.last(path, record.EVENTS)
    is_lost = end.get("event") == "failed" and DIVERGED in (end.get("what") or "")
    return end.get("event") == "finish" or is_lost


def train(path, settings, seed, show=lambda: None):
    """Train a run to its end, or continue it, calling show() meanwhile. Return (exit code, last error line or
    '') of train.py, or (0, '') if another process has trained it meanwhile. A signal is passed on to it; then
    Stopped is raised."""
    lock = os.path.join(path, ".lock")
    if files.is_locked(lock):
        print(f"waiting for {path}, which another process trains", file=sys.stderr)
    while files.is_locked(lock) and not received:
        show()
        time.sleep(0.5)
    if received:
        raise Stopped
    if has_ended(path):
        return 0, ""
    out_dir, run_id = os.path.split(path)
    flags = settings | dict(out_dir=out_dir, run_id=run_id, seed=seed, resume="auto")
    command = [sys.executable, os.path.join(cli.ROOT, "train.py")]
    child = subprocess.Popen(
        command + [f"--{name}={value}" for name, value in flags.items()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # so that Ctrl-C reaches it once, from here: a second one would not save
    )
    n_sent = 0
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, text = child.communicate(timeout=0.5)
            break
        if len(received) > n_sent and os.name != "nt":  # Windows has no sessions: it reached both
            if not n_sent:
                print("saving before exit; press Ctrl-C again to quit immediately", file=sys.stderr)
            child.send_signal(received[n_sent])
            n_sent += 1
        show()
    if received:
        raise Stopped
    if child.returncode == 2 and (files.is_locked(lock) or has_ended(path)):
        return train(path, settings, seed, show)  # another process started it first
    return child.returncode, last_error(child.returncode, text)


def last_error(code, text):
    """Return the line that says why train.py ended, from its exit code and stderr; '' after success."""
    if code == 0:
        return ""
    if code < 0:
        return f"killed by signal {-code}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return [f"exit code {code}", *lines, *errors][-1]


def row_of(path, variant, seed, error):
    """Return the row of a run in results.jsonl. error: what ended it now, '' if nothing did."""
    content = files.read_json(os.path.join(path, "config.json"))
    scalars = record.read(path, record.SCALARS)
    lines = [row for row in scalars if "loss" in row]
    evals = [row for row in scalars if "val_loss" in row]
    end = record.last(path, record.EVENTS)
    val_loss = evals[-1]["val_loss"] if evals else None
    if end.get("event") == "failed":
        error = end["what"] or "failed"
        if DIVERGED in error:
            error = error.partition("; ")[0]  # the advice that follows would change the settings of the run
    elif not error and val_loss is None:
        error = "the last validation loss is not finite"
    starts = [0, *(row["step"] for row in lines)]
    # a line of the first step of a process alone has no time
    times = [(row["step"] - start) * row["step_ms"] for row, start in zip(lines, starts) if row["step_ms"]]
    speeds = [row["tokens_per_sec"] for row in lines if row["tokens_per_sec"]]
    return dict(
        run=os.path.basename(path),
        variant=variant.name,
        twin=variant.is_twin,
        seed=seed,
        failed=error,  # "" = it finished
        val_loss=val_loss,
        curve=[[row["step"], row["val_loss"]] for row in evals],
        steps=starts[-1],
        tokens_per_step=variant.cfg.total_batch_size,
        tokens_per_sec=statistics.median(speeds) if speeds else None,
        seconds=sum(times) / 1e3,  # of the updates, without evaluations and saves
        **{name: content.get(name) for name in ("cpu", "threads", "device")},
        torch=content.get("versions", {}).get("torch"),
        commit=content.get("git_commit"),
        settings=compared(variant.cfg),
    )


def save_rows(path, rows):
    """Write rows into a JSONL file, in place of earlier ones of the same runs."""
    present = []
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            for line in file:
                with contextlib.suppress(ValueError):  # half a line: its run makes it again
                    present.append(json.loads(line))
    by_run = {row["run"]: row for row in [*present, *rows]}
    files.write_bytes(path, "".join(record.to_json(row) + "\n" for row in by_run.values()).encode())


class Progress:
    """The runs that are left, on stderr, and their time, estimated from that of the steps made until now."""

    def __init__(self, runs):
        """runs: [(Variant, seed, path)]."""
        steps = {path: variant.cfg.max_steps - last_step(path) for variant, _, path in runs}
        self.left = {path: left for path, left in steps.items() if not has_ended(path)}
        self.made = 0
        self.began = time.monotonic()
        self.bar = terminal.progress_bar(sum(self.left.values()), 0)

    def start(self, path, label):
        """Note the run that is trained next."""
        self.path = path
        self.first = last_step(path)
        self.bar.set_description_str(f"{label} ", refresh=False)

    def show(self):
        """Move the bar, if there is a terminal."""
        if not self.bar.disable:
            self.bar.n = self.made + max(0, last_step(self.path) - self.first)
            self.bar.refresh()

    def end(self):
        """Count the run that was trained. Return the seconds that the others will take, None if no step was
        made from which to estimate them."""
        self.made += max(0, last_step(self.path) - self.first)
        del self.left[self.path]
        to_make = sum(self.left.values())
        self.bar.total = self.made + to_make
        return (time.monotonic() - self.began) * to_make / self.made if self.made else None
