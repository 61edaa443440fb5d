"""
The state of a run, read from its files only: status(run_dir) is what monitor.py shows, read_run(run_dir) what
pictures.py draws. What is missing or damaged is left out, so that it works beside a run that writes.
"""

import functools
import json
import math
import os
import platform
import re
import shutil
import statistics
import time

import config
from nanobit import record

LOGGED = (  # what status() takes over from the newest training line
    "epoch tokens loss lr weight_decay stage grad_norm tokens_per_sec step_ms mfu memory_gb gpu_util"
).split()


def number(value):
    """Return value if it is a finite number, else None."""
    return value if record.is_number(value) else None


def column(rows, key):
    """the finite numbers under a key, oldest first"""
    return [row[key] for row in rows if number(row.get(key)) is not None]


@functools.cache
def defaults():
    return config.assignments(config.DEFAULT)


def is_setting(name, value):
    """Return whether a setting may have this value. Of a name that this version lacks only the kind of value
    is known."""
    if name not in defaults():
        return record.is_number(value) or type(value) in (str, bool)
    want = type(defaults()[name])
    return record.is_number(value) if want in (int, float) else type(value) is want


def read_config(run_dir):
    """Return what config.json holds: settings, {name: value}; pid, host and device; params, {kind: number}.
    What is missing, damaged or of another type is left out."""
    try:
        with open(os.path.join(run_dir, "config.json"), encoding="utf-8") as file:
            found = json.load(file)
        settings = config.with_ratios({name: entry["value"] for name, entry in found["settings"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {"settings": {}}
    facts = {"settings": {name: value for name, value in settings.items() if is_setting(name, value)}}
    for name, kind in (("pid", int), ("host", str), ("device", str)):
        if type(found.get(name)) is kind:
            facts[name] = found[name]
    if type(found.get("params")) is dict:
        facts["params"] = {name: number(value) for name, value in found["params"].items()}
    return facts


def checkpoints(run_dir):
    """Return {step: folder} of those with a manifest, oldest first."""
    return {step: run_dir.step_dir(run_dir, step) for step in reversed(run_dir.steps(run_dir))}


def read_run(run_dir):
    """what a run has written: config; rows (of training), evals, health, routers, events, greedy, lists;
    starts, the times at which a process began; checkpoints"""

    scalars, health, events = (
        record.read(run_dir, name) for name in (record.SCALARS, record.BITNET, record.EVENTS)
    )
    return dict(
        config=read_config(run_dir),
        rows=[row for row in scalars if "loss" in row],
        evals=[row for row in scalars if row.get("val_loss") is not None],
        health=[{"step": row["step"]} | row["total"] for row in health],
        routers=[row["total"] for row in record.read(run_dir, record.ROUTER)],
        events=events,
        greedy=[row for row in record.read(run_dir, record.SAMPLES) if row["mode"] == "greedy"],
        starts=column([row for row in events if row.get("event") in ("start", "resume")], "time"),
        checkpoints=checkpoints(run_dir),
    )


# judging


JUMP = 8  # standard errors that noise rarely reaches: in 1 to 4 of 1,000 windows of 50 lines


def trend(values, window):
    """Return how the newest values move: {word, lines, change, error, jump}, or None for fewer than 6.

    change: the mean of the newest `lines` = window // 2 values less that of as many before; error: its
    standard error; jump: how far the mean of the newest 5 lies above the lowest mean of 5 in the window, 0 if
    noise may do that. word: rising after a jump, else falling or rising if the change is more than twice its
    error, else flat.

    The variance of single values is half the mean square of the differences between neighbours, which a
    trend does not inflate (von Neumann et al., "The mean square successive difference", 1941). For the jump,
    which would inflate it, it comes from their median: 0.954 of the standard deviation.
    """
    k = min(window, len(values)) // 2
    if k < 3:
        return None
    old, new = values[-2 * k : -k], values[-k:]
    squares = [(b - a) ** 2 for half in (old, new) for a, b in zip(half, half[1:])]
    change, error = statistics.mean(new) - statistics.mean(old), math.sqrt(statistics.mean(squares) / k)
    both = old + new
    means = [sum(both[i : i + 5]) / 5 for i in range(len(both) - 4)]
    noise = statistics.median(abs(b - a) for a, b in zip(both, both[1:])) / 0.954 / math.sqrt(5)
    jump = means[-1] - min(means)
    jump = jump if jump > max(JUMP * noise, 0.01 * abs(min(means))) else 0.0
    word = "flat" if abs(change) <= 2 * error else "falling" if change < 0 else "rising"
    return dict(word="rising" if jump else word, lines=k, change=change, error=error, jump=jump)


def is_alive(run_config):
    """whether the process of a run is there; None where this machine cannot know"""
    pid, here = run_config.get("pid"), platform.node()
    if type(pid) is not int or pid < 1 or run_config.get("host", here) != here:
        return None
    if os.name == "nt":  # os.kill(pid, 0) would send Ctrl-C there
        return None
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            is_zombie = file.read().rpartition(") ")[2].startswith("Z")  # ended, but nobody waited for it
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's process, or a system without /proc
        return True
    return not is_zombie and pid != os.getpid()  # in a new container pids begin anew


def pulse(run, alive, now):
    """(state, why it ended, seconds since the last line, seconds after which that is too long)"""
    events, began = run["events"], max(run["starts"], default=math.inf)
    newest = max(column(run["rows"] + events, "time"), default=None)
    age = None if newest is None else max(0.0, now - newest)
    times = [began, *(t for t in column(run["rows"], "time") if t > began)]
    gaps = [b - a for a, b in zip(times, times[1:])]
    # the first gap has compiling and an evaluation in it, the newest have evaluations, samples and saves
    limit = max(60, 5 * statistics.median(gaps), 2 * max(gaps[:1] + gaps[-50:])) if gaps else 1800
    kinds = ("start", "resume", "interrupt", "finish", "failed")
    end = next((row for row in reversed(events) if row.get("event") in kinds), {})
    if end.get("event") == "finish":
        return "finished", end.get("why"), age, limit
    if end.get("event") == "interrupt":
        return "interrupted", f"signal {end.get('signal')}", age, limit
    if end.get("event") == "failed":
        return "failed", end.get("what"), age, limit
    if age is None and alive is None:
        return "empty", None, age, limit
    if alive is False:
        return "dead process", None, age, limit
    return "stopped writing" if age is not None and age > limit else "training", None, age, limit


def steady(run):
    """the training lines but the first of each process, which warms up"""
    times = [number(row.get("time")) or 0 for row in run["rows"]]
    first = {next((i for i, t in enumerate(times) if t > start), None) for start in run["starts"]}
    return [row for i, row in enumerate(run["rows"]) if i not in first]


def anomalies(run):
    """the anomaly events, one of each step and kind: a step that was made again may have reported it twice"""
    odd = {(row["step"], row.get("what")): row for row in run["events"] if row.get("event") == "anomaly"}
    return list(odd.values())


def repetition(run):
    """mean repetition of the greedy samples of each step that has some, oldest first"""
    steps = sorted({row["step"] for row in run["greedy"]})
    found = [column([row for row in run["greedy"] if row["step"] == step], "repetition") for step in steps]
    return [statistics.mean(values) for values in found if values]


def disk_need_gb(run, step):
    """1e9 bytes that the checkpoints still to come take, those of the schedule, 4 and 8 bytes a
    parameter as in checkpoint.check_disk, or None"""
    settings, params = run["config"]["settings"], (run["config"].get("params") or {}).get("total")
    every, end, keep = (settings.get(key) for key in ("save_every", "max_steps", "keep_last"))
    if None in (every, end, keep, params):
        return None
    left = max(0, (end - 1) // every - step // every if every else 0) + (step < end)
    held = sum(os.path.exists(os.path.join(folder, "trainer.pt")) for folder in run["checkpoints"].values())
    trainers = min(left, max(1, keep - held)) if keep else left  # one is written before another is pruned
    return (4 * left + 8 * trainers) * params / 1e9  # fp32 weights, two numbers each for AdamW


def status(run_dir, window=50):
    """what is known of a run, as plain values named as in its files, None where it is not known: seconds,
    GB of 1e9 bytes, fractions from 0 to 1, losses in nats per token; loss_trend is trend() of the loss"""
    run, now = read_run(run_dir), time.time()
    rows, evals, settings = run["rows"], run["evals"], run["config"]["settings"]
    alive = is_alive(run["config"])
    state, why, age, limit = pulse(run, alive, now)
    last, health, sample = (run[key][-1] if run[key] else {} for key in ("rows", "health", "greedy"))
    # of the events, those of the last process: others may be about steps that were made again
    began = max(run["starts"], default=0)
    since = [row for row in run["events"] if (number(row.get("time")) or 0) >= began]
    step = max((row["step"] for row in (*rows[-1:], *evals[-1:], *since)), default=0)
    max_steps, minutes = settings.get("max_steps"), settings.get("max_minutes")
    step_ms = column(steady(run)[-10:], "step_ms")  # without evaluations and saves
    eta = max(0, max_steps - step) * statistics.median(step_ms) / 1e3 if max_steps and step_ms else None
    if eta is not None and minutes and began:
        eta = min(eta, max(0.0, began + 60 * minutes - now))
    trained = [row for row in evals if row["step"] > 0]  # as best.json: the initial weights are no result
    best = min(trained or evals, key=lambda row: row["val_loss"], default=None)
    odd, losses = anomalies(run), column(rows, "loss")
    saved = next(reversed(run["checkpoints"]), None)
    saved_at = os.path.getmtime(run["checkpoints"][saved]) if run["checkpoints"] else None
    found = dict(
        run_id=os.path.basename(os.path.abspath(run_dir)),  # a copy has the name of its folder
        run_dir=run_dir,
        state=state,
        why=why,
        pid=run["config"].get("pid"),
        pid_alive=alive,
        last_line_age=age,
        step=step,
        max_steps=max_steps,
        progress=step / max_steps if max_steps else None,
        eta_seconds=0.0 if state == "finished" else eta,
        **{key: number(last.get(key)) for key in LOGGED},
        # the older half of a run is left out: its beginning falls, which hides what comes after it
        loss_trend=trend(losses, min(window, len(losses) // 2)),
        val_loss=evals[-1]["val_loss"] if evals else None,
        val_step=evals[-1]["step"] if evals else None,
        best=best and {key: best[key] for key in ("step", "val_loss")},
        checkpoint=saved_at and {"step": saved, "age": max(0.0, now - saved_at)},
        anomalies={"count": len(odd), "last": odd[-3:]},
        ternary=settings.get("ternary"),
        bitnet={key: number(value) for key, value in health.items()} or None,
        n_expert=settings.get("n_expert"),
        router=run["routers"][-1] if run["routers"] else None,
        device=run["config"].get("device"),
        disk_free_gb=shutil.disk_usage(run_dir).free / 1e9,
        disk_need_gb=0.0 if state == "finished" else disk_need_gb(run, step),
        sample={key: sample.get(key) for key in ("step", "prompt", "generated_text")} if sample else None,
        repetition=(repetition(run) or [None])[-1],
    )
    return record.plain(found | {"warnings": warnings(run, found, limit, window)})


def warnings(run, now, limit, window):
    """what is wrong or may soon be, in words, with what to do; now: the fields of status()"""
    settings, rows, faults = run["config"]["settings"], run["rows"], []
    is_running, age = now["state"] != "finished", now["last_line_age"]
    silent = "nothing was written" if age is None else f"nothing written for {clock(age)}"
    saved = now["checkpoint"]
    resume_hint = "repeat the command with --resume=auto, it "
    resume_hint += f"continues from step {saved['step']:,}" if saved else "starts over, as no step is saved"
    if now["state"] == "dead process":
        faults.append(
            f"dead process: {silent}, and process {now['pid']} was killed, by a person, a lack of memory or "
            f"the end of the machine; {resume_hint}"
        )
    if now["state"] == "failed":
        what = now["why"] or "by an error that is not known"
        remedy = f"; {resume_hint}"
        if "out of memory" in what.lower():
            total = settings.get("total_batch_size")  # of a run that did not set it, it would shrink too
            remedy = f"; lower batch_size, with --total_batch_size={total or '...'}, and {resume_hint}"
        elif re.match(r"\w+: ", what):  # an exception; other errors name their remedy
            remedy = f"; the traceback is where the run printed; once its cause is gone, {resume_hint}"
        elif ";" in what:
            remedy = ""
        faults.append(f"failed: {what}{remedy}")
    if now["state"] == "stopped writing":
        where = "is still there" if now["pid_alive"] else "may be on another machine"
        faults.append(
            f"stopped writing: {silent}, {clock(limit)} is long for it; process {now['pid']} {where}: "
            f"if it does not compute (top, nvidia-smi), end it and {resume_hint}"
        )

    horizon = rows[-window]["step"] if len(rows) >= window else 0
    recent = [row for row in anomalies(run) if row["step"] > horizon]
    skips = [row for row in recent if (row.get("what") or "").startswith("not finite")]
    skipped = sum(row.get("steps") or 1 for row in skips)
    if now["state"] != "failed" and (skipped or (rows and now["loss"] is None)):
        faults.append(
            f"not finite: {skipped or 1} steps skipped after step {horizon:,}; if more come, continue with "
            "a lower learning_rate or longer warmup_steps: five in a row end the run"
        )
    if is_running and any(row.get("what") == "save failed" for row in recent):
        faults.append("save failed: see train.log, free disk space; the run continues and tries again")
    if (now["disk_need_gb"] or 0) > now["disk_free_gb"]:
        faults.append(
            f"disk: the checkpoints to come take about {now['disk_need_gb']:.3g} GB, "
            f"{now['disk_free_gb']:.3g} GB are free; free some, or continue with a larger save_every"
        )

    # the decay counts as ahead while the rate is in the upper half of its way down
    lr, peak, low = now["lr"], settings.get("learning_rate"), settings.get("min_lr_ratio")
    is_late = None not in (lr, peak, low) and lr < peak * (1 + low) / 2
    warm, loss = settings.get("warmup_steps") or 0, now["loss_trend"]
    is_due = is_running and settings and len(rows) >= window and rows[-window]["step"] > warm
    if is_due and loss and loss["word"] != "falling":
        what = "most of the learning rate's decay is ahead: wait for it, the loss falls with it"
        if is_late or settings.get("schedule") == "constant":
            what = "stop here, or look with a longer --window whether it still falls"
        is_rising = loss["jump"] or loss["change"] > 5 * loss["error"]  # more than noise on a plateau
        if is_rising:
            what = "lower learning_rate and continue from an earlier step (--resume=STEP_FOLDER --run_id=NEW)"
        faults.append(f"{'rising' if is_rising else 'plateau'}: the loss is {moves(loss)}; {what}")
    best, later = now["best"], column(run["evals"], "val_loss")[-2:]
    if len(later) == 2 and min(later) > best["val_loss"]:
        before = column([row for row in rows if row["step"] <= best["step"]], "loss")
        after = column([row for row in rows if row["step"] > best["step"]], "loss")
        k = min(len(before), len(after), window)
        training = trend(before[-k:] + after[-k:], 2 * k)
        if training and training["word"] == "falling":
            faults.append(
                f"overfitting: val_loss was best, {best['val_loss']:.4f}, at step {best['step']:,}, and is "
                f"{later[-1]:.4f} while the training loss falls; use that checkpoint, or train with more "
                "data, a smaller model or dropout; --patience=3 ends such a run by itself"
            )
    repeats = repetition(run)
    usual = statistics.mean(repeats[-4:-1]) if len(repeats) > 1 else 1.0
    if len(repeats) > 1 and repeats[-1] > usual + 0.1:
        faults.append(
            f"repetition: {repeats[-1]:.2f} of the 4-grams of the greedy samples, {usual:.2f} before; if "
            "the top_k samples of samples.jsonl repeat too, look for duplicate data or lower learning_rate"
        )
    speeds = column(steady(run), "tokens_per_sec")
    recent, usual = (statistics.median(part or [0]) for part in (speeds[-5:], speeds))
    if is_running and len(speeds) >= 15 and recent < 0.8 * usual:
        faults.append(
            f"throughput: {recent:,.0f} tokens/s of late, the run's median is {usual:,.0f}; look for "
            "another process on the device, heat, a slow disk"
        )

    health, flip_rates = now["bitnet"] or {}, column(run["health"], "flip_rate")
    zero, near, flip = (health.get(key) for key in ("zero", "near_threshold", "flip_rate"))
    if zero is not None and not 0.25 <= zero <= 0.55:
        remedy = "lower weight_decay" if zero > 0.5 else "lower learning_rate, or look at the initial weights"
        faults.append(f"ternary: {zero:.1%} of the codes are 0, 30 to 45 % is usual; {remedy}")
    if near is not None and near > 0.15:
        faults.append(f"ternary: {near:.1%} of the weights are near a threshold, usual is 6 %; lower lr")
    flips = trend(flip_rates, window) if is_due and len(flip_rates) >= window else None
    if flips and (flip or 0) > 0.001 and flips["word"] in ("rising", "flat" if is_late else ""):
        faults.append(
            f"ternary: the flip rate, {flip:.4f} a line, is {flips['word']} and should fall with the rate; "
            f"lower {'min_lr_ratio' if is_late else 'learning_rate'}"
        )
    dead = [row.get("dead") or 0 for row in run["routers"][-3:]]
    if is_running and len(dead) == 3 and min(dead) > 0:
        faults.append(
            f"dead experts: {dead[-1]} got no token in three lines; raise router_balance or lower "
            "learning_rate"
        )
    return faults


def moves(loss):
    """Return what trend() has found, in words."""
    if loss["jump"]:
        return f"rising: the last 5 lines average {loss['jump']:.4f} more than the lowest 5 before"
    lines, change = loss["lines"], f"{abs(loss['change']):.4f} {'more' if loss['change'] > 0 else 'less'}"
    found = f"{loss['word']}: the last {lines} lines average {change} than the {lines} before"
    return f"{found}, with a standard error of {loss['error']:.4f}"


def clock(seconds):
    """seconds in words: 12 s, 5 min, 3 h 12 min, 2 d 4 h"""
    if seconds is None:
        return "-"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes, hours = int(seconds / 60), int(seconds / 3600)
    if minutes < 90:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
