"""What is wrong with a run or may soon be, in words, with what to do about it: warnings()."""

import re
import statistics

from nanobit.monitor.run_files import column
from nanobit.monitor.trends import anomalies, clock, moves, repetition, steady, trend


def warnings(run, now, limit, window):
    """Return a sentence for each fault of a run: read_run() of it, the fields of status(), the seconds of
    silence that are too long, and the number of lines that trends are judged by."""
    settings = run["config"]["settings"]
    warm = settings.get("warmup_steps") or 0
    is_running = now["state"] != "finished"
    is_due = is_running and settings and len(run["rows"]) >= window and run["rows"][-window]["step"] > warm
    faults = [process(run, now, limit), *steps(run, now, window)]
    if is_due:
        faults.append(loss(run, now))
    faults += quality(run, now, window)
    if is_running:
        faults.append(throughput(run))
    faults += codes(run, now, window, is_due)
    dead = [row.get("dead") or 0 for row in run["routers"][-3:]]
    if is_running and len(dead) == 3 and min(dead) > 0:
        remedy = "raise router_balance or lower learning_rate"
        faults.append(f"dead experts: {dead[-1]} got no token in three lines; {remedy}")
    return [text for text in faults if text]


def process(run, now, limit):
    """Return what to do about a process that has ended, or seems to have, or None."""
    age = now["last_line_age"]
    saved = now["checkpoint"]
    silent = "nothing was written" if age is None else f"nothing written for {clock(age)}"
    start = f"continues from step {saved['step']:,}" if saved else "starts over, as no step is saved"
    resume = f"repeat the command with --resume=auto, it {start}"
    if now["state"] == "dead process":
        end = f"process {now['pid']} was killed, by a person, a lack of memory or the end of the machine"
        return f"dead process: {silent}, and {end}; {resume}"
    if now["state"] == "stopped writing":
        where = "still exists" if now["pid_alive"] else "may be on another machine"
        check = f"process {now['pid']} {where}: if it does not compute (top, nvidia-smi), end it and {resume}"
        return f"stopped writing: {silent}, {clock(limit)} is long for it; {check}"
    if now["state"] != "failed":
        return None
    error = now["why"] or "by an error that is not known"
    if "out of memory" in error.lower():
        # the batch of a run that did not set total_batch_size would shrink too
        total = run["config"]["settings"].get("total_batch_size") or "..."
        return f"failed: {error}; lower batch_size, with --total_batch_size={total}, and {resume}"
    if re.match(r"\w+: ", error):  # an exception; other errors name their remedy
        traceback = "the traceback is where the run printed; once its cause is gone"
        return f"failed: {error}; {traceback}, {resume}"
    if ";" in error:
        return f"failed: {error}"
    return f"failed: {error}; {resume}"


def steps(run, now, window):
    """Yield what to do about skipped steps and failed saves of the last `window` lines, and a full disk."""
    horizon = run["rows"][-window]["step"] if len(run["rows"]) >= window else 0
    recent = [row for row in anomalies(run) if row["step"] > horizon]
    skips = [row for row in recent if (row.get("what") or "").startswith("not finite")]
    skipped = sum(row.get("steps") or 1 for row in skips)
    is_lost = run["rows"] and now["loss"] is None
    if now["state"] != "failed" and (skipped or is_lost):
        remedy = "continue with a lower learning_rate or longer warmup_steps: five in a row end the run"
        yield f"not finite: {skipped or 1} steps skipped after step {horizon:,}; if more come, {remedy}"
    if now["state"] != "finished" and any(row.get("what") == "save failed" for row in recent):
        yield "save failed: see train.log, free disk space; the run continues and tries again"
    need = now["disk_need_gb"] or 0
    if need > now["disk_free_gb"]:
        room = f"the checkpoints to come take about {need:.3g} GB, {now['disk_free_gb']:.3g} GB are free"
        yield f"disk: {room}; free some, or continue with a larger save_every"


def is_late(run, now):
    """Return whether the learning rate is in the lower half of its way down; False if that is not known."""
    peak = run["config"]["settings"].get("learning_rate")
    low = run["config"]["settings"].get("min_lr_ratio")
    return None not in (now["lr"], peak, low) and now["lr"] < peak * (1 + low) / 2


def loss(run, now):
    """Return what to do about a training loss that does not fall, or None."""
    recent = now["loss_trend"]
    if not recent or recent["word"] == "falling":
        return None
    if recent["jump"] or recent["change"] > 5 * recent["error"]:  # more than noise on a plateau
        remedy = "lower learning_rate and continue from an earlier step (--resume=STEP_FOLDER --run_id=NEW)"
        return f"rising: the loss is {moves(recent)}; {remedy}"
    remedy = "most of the learning rate's decay is ahead: wait for it, the loss falls with it"
    if is_late(run, now) or run["config"]["settings"].get("schedule") == "constant":
        remedy = "stop here, or look with a longer --window whether it still falls"
    return f"plateau: the loss is {moves(recent)}; {remedy}"


def quality(run, now, window):
    """Yield what to do about overfitting, and about samples that repeat themselves."""
    best = now["best"]
    later = column(run["evals"], "val_loss")[-2:]
    if len(later) == 2 and min(later) > best["val_loss"]:
        before = column([row for row in run["rows"] if row["step"] <= best["step"]], "loss")
        after = column([row for row in run["rows"] if row["step"] > best["step"]], "loss")
        k = min(len(before), len(after), window)
        training = trend(before[-k:] + after[-k:], 2 * k)
        if training and training["word"] == "falling":
            was_best = f"val_loss was best, {best['val_loss']:.4f}, at step {best['step']:,}"
            text = f"{was_best}, and is {later[-1]:.4f} while the training loss falls; use that checkpoint,"
            yield f"overfitting: {text} or more data, a smaller model or dropout; --patience=3 ends such runs"
    repeats = repetition(run)
    if len(repeats) > 1 and repeats[-1] > statistics.mean(repeats[-4:-1]) + 0.1:
        usual = statistics.mean(repeats[-4:-1])
        share = f"{repeats[-1]:.2f} of the 4-grams of the greedy samples, {usual:.2f} before"
        remedy = "if the top_k samples repeat too, look for duplicate data or lower learning_rate"
        yield f"repetition: {share}; {remedy}"


def throughput(run):
    """Return what to do if the newest five lines are much slower than the run, or None."""
    speeds = column(steady(run), "tokens_per_sec")
    if len(speeds) < 15 or statistics.median(speeds[-5:]) >= 0.8 * statistics.median(speeds):
        return None
    recent = f"{statistics.median(speeds[-5:]):,.0f} tokens/s in the last five lines"
    usual = f"the run's median is {statistics.median(speeds):,.0f}"
    return f"throughput: {recent}, {usual}; look for another process on the device, heat, a slow disk"


def codes(run, now, window, is_due):
    """Yield what to do about unusual fractions of codes and, if it is due, a flip rate that does not fall."""
    health = now["bitnet"] or {}
    zero = health.get("zero")
    near = health.get("near_threshold")
    if zero is not None and not 0.25 <= zero <= 0.55:
        remedy = "" if zero > 0.5 else ", or look at the initial weights"
        yield f"ternary: {zero:.1%} of the codes are 0, about 31 % is usual; lower learning_rate{remedy}"
    if near is not None and near > 0.15:
        yield f"ternary: {near:.1%} of the weights are near a threshold, usual is 6 %; lower learning_rate"
    rate = health.get("flip_rate") or 0
    rates = column(run["health"], "flip_rate")
    if is_due and len(rates) >= window and rate > 0.001:
        word = trend(rates, window)["word"]
        if word == "rising" or (word == "flat" and is_late(run, now)):
            name = "min_lr_ratio" if is_late(run, now) else "learning_rate"
            text = f"the flip rate, {rate:.4f} a line, is {word} and should fall with the rate"
            yield f"ternary: {text}; lower {name}"
