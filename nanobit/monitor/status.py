"""The state of a run by its files: status(run_dir) is what monitor.py shows."""

import math
import os
import platform
import shutil
import statistics
import time

from nanobit.monitor.advice import warnings
from nanobit.monitor.run_files import column, number, read_run
from nanobit.monitor.trends import anomalies, newest, repetition, steady, trend
from nanobit.record import plain

LOGGED = (  # what status() takes from the newest training line
    "epoch tokens loss lr weight_decay stage grad_norm tokens_per_sec step_ms mfu memory_gb gpu_util"
).split()
BEGINS_OR_ENDS = ("start", "resume", "interrupt", "finish", "failed")  # events of a process


def is_alive(run_config):
    """Return whether the process of a run exists, or None if this machine cannot know."""
    pid = run_config.get("pid", 0)
    here = platform.node()
    # on Windows os.kill(pid, 0) would send Ctrl-C
    if pid < 1 or run_config.get("host", here) != here or os.name == "nt":
        return None
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            is_zombie = file.read().rpartition(") ")[2].startswith("Z")  # ended, but nobody waited for it
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's process, or a system without /proc
        return True
    return not is_zombie and pid != os.getpid()  # a new container counts pids from 1 again


def silence(run, now):
    """Return the seconds since the newest line, None without one, and how many of them are too long."""
    began = max(run["starts"], default=math.inf)
    times = [began, *(t for t in column(run["rows"], "time") if t > began)]
    gaps = [b - a for a, b in zip(times, times[1:])]
    limit = 1800
    if gaps:
        # the first gap has compiling and an evaluation in it, the newest have evaluations, samples and saves
        limit = max(60, 5 * statistics.median(gaps), 2 * max(gaps[:1] + gaps[-50:]))
    written = column(run["rows"] + run["events"], "time")
    return (max(0.0, now - max(written)) if written else None), limit


def state_of(run, alive, age, limit):
    """Return the state of a run, and why it ended or None. alive: see is_alive; age, limit: see silence."""
    end = newest([row for row in run["events"] if row["event"] in BEGINS_OR_ENDS])
    ended = dict(finish=("finished", end.get("why")), failed=("failed", end.get("what")))
    ended["interrupt"] = ("interrupted", f"signal {end.get('signal')}")
    if end.get("event") in ended:
        return ended[end["event"]]
    if alive is False:
        return "dead process", None
    if age is None and alive is None:
        return "empty", None
    if (age or 0) > limit:
        return "stopped writing", None
    return "training", None


def eta_seconds(run, step, now):
    """Return the seconds from `step` to the end of a run by its step times and max_minutes, or None."""
    settings = run["config"]["settings"]
    step_ms = column(steady(run)[-10:], "step_ms")  # without evaluations and saves
    began = max(run["starts"], default=0)
    if not settings.get("max_steps") or not step_ms:
        return None
    seconds = max(0, settings["max_steps"] - step) * statistics.median(step_ms) / 1e3
    if settings.get("max_minutes") and began:
        seconds = min(seconds, max(0.0, began + 60 * settings["max_minutes"] - now))
    return seconds


def disk_need_gb(run, step):
    """Return the 1e9 bytes that the checkpoints of the schedule after `step` take, or None: 4 bytes a
    parameter for the weights, 8 for what resumes a run."""
    settings = run["config"]["settings"]
    params = run["config"].get("params", {}).get("total")
    every, end, keep = (settings.get(key) for key in ("save_every", "max_steps", "keep_last"))
    if None in (every, end, keep, params):
        return None
    left = int(step < end)
    if every:
        left += max(0, (end - 1) // every - step // every)
    trainers = left
    if keep:  # one is written before another is pruned
        folders = run["checkpoints"].values()
        held = sum(os.path.exists(os.path.join(folder, "trainer.pt")) for folder in folders)
        trainers = min(left, max(1, keep - held))
    return (4 * left + 8 * trainers) * params / 1e9


def newest_step(run):
    """Return the step that a run has reached. Events of earlier processes may be of steps that were made
    again."""
    began = max(run["starts"], default=0)
    recent = [row for row in run["events"] if (number(row.get("time")) or 0) >= began]
    rows = (newest(run["rows"]), newest(run["evals"]), *recent)
    return max((row["step"] for row in rows if row), default=0)


def loss_facts(run, window):
    """Return the newest training line, the newest and the best evaluation, and the trend of the loss."""
    last_row, last_eval = newest(run["rows"]), newest(run["evals"])
    losses = column(run["rows"], "loss")
    trained = [row for row in run["evals"] if row["step"] > 0] or run["evals"]  # as in best.json
    best = min(trained, key=lambda row: row["val_loss"], default={})
    facts = {key: number(last_row.get(key)) for key in LOGGED}
    # without the older half of a run: its beginning falls, which hides what comes after it
    facts["loss_trend"] = trend(losses, min(window, len(losses) // 2))
    facts |= dict(val_loss=last_eval.get("val_loss"), val_step=last_eval.get("step"))
    facts["best"] = {key: best[key] for key in ("step", "val_loss") if key in best} or None
    return facts


def record_facts(run, now):
    """Return the newest of what a run writes beside its losses: checkpoint, health, anomalies, sample."""
    last_folder = list(run["checkpoints"].items())[-1:]
    saved = [dict(step=step, age=max(0.0, now - os.path.getmtime(folder))) for step, folder in last_folder]
    facts = dict(checkpoint=newest(saved) or None, router=newest(run["routers"]) or None)
    facts["bitnet"] = {key: number(value) for key, value in newest(run["health"]).items()} or None
    odd_steps = anomalies(run)
    facts["anomalies"] = dict(count=len(odd_steps), last=odd_steps[-3:])
    sample = newest(run["greedy"])
    shown = ("step", "prompt", "generated_text")
    facts["sample"] = {key: sample[key] for key in shown if key in sample} or None
    facts["repetition"] = next(reversed(repetition(run)), None)
    return facts


def status(run_dir, window=50):
    """Return what is known of a run, as plain values named as in its files, None if not known: seconds, GB of
    1e9 bytes, fractions from 0 to 1, losses in nats per token; loss_trend is trend() of the loss."""
    run = read_run(run_dir)
    now = time.time()
    alive = is_alive(run["config"])
    age, limit = silence(run, now)
    state, why = state_of(run, alive, age, limit)
    step = newest_step(run)
    facts = dict(run_id=os.path.basename(os.path.abspath(run_dir)))  # a copy has the name of its folder
    facts |= dict(run_dir=run_dir, state=state, why=why, pid_alive=alive, last_line_age=age, step=step)
    facts |= {key: run["config"].get(key) for key in ("pid", "device")}
    facts |= {key: run["config"]["settings"].get(key) for key in ("max_steps", "ternary", "n_expert")}
    facts["progress"] = step / facts["max_steps"] if facts["max_steps"] else None
    facts |= loss_facts(run, window) | record_facts(run, now)
    facts |= dict(eta_seconds=eta_seconds(run, step, now), disk_need_gb=disk_need_gb(run, step))
    facts["disk_free_gb"] = shutil.disk_usage(run_dir).free / 1e9
    if state == "finished":
        facts |= dict(eta_seconds=0.0, disk_need_gb=0.0)
    return plain(facts | {"warnings": warnings(run, facts, limit, window)})
