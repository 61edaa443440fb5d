"""
The state of a run, from the files it writes: progress, losses, ternary health, warnings with a remedy.

    python monitor.py                              the runs of runs/, one line each
    python monitor.py runs/demo                    one screen
    python monitor.py runs/demo --watch            again every 10 s, until Ctrl-C
    python monitor.py runs/demo --json             one JSON object
    python monitor.py runs/demo --plot=out.png     losses, rates, ternary fractions; of several runs too
    python monitor.py runs/demo --codes=out.png    a ternary matrix settling, checkpoint by checkpoint

It only reads, so it works beside a run that trains, and on one that ended long ago.
"""

import math
import os
import shutil
import signal
import sys
import textwrap
import time

import config
import pictures
import record
import terminal
from config import fail
from status import clock, status

FLAGS = {
    "watch": (False, "show it again and again, in place on a terminal; Ctrl-C ends it"),
    "every": (10.0, "seconds from one showing to the next"),
    "json": (False, "one JSON object; several runs are a list under `runs`"),
    "plot": ("", "a picture to write: losses, rates and ternary fractions of the runs; '' = none"),
    "codes": ("", "a picture to write: one matrix's codes at each checkpoint; '' = none"),
    "matrix": ("blocks.0.attn.q_proj", "the matrix of --codes"),
    "window": (50, "log lines that trends are judged by: their newer half against the older"),
}


def show(value, form=""):
    """a value in a format, - where it is not known"""
    return "-" if value is None else format(value, form)


def screen(now, width):
    """the state of a run as lines of at most `width` characters"""
    state = now["state"] + (f" ({now['why']})" if now["why"] else "")
    step = f"{now['step']:,} of {show(now['max_steps'], ',')}, {show(now['progress'], '.1%')}"
    if now["state"] != "finished":
        step += f", {clock(now['eta_seconds'])} to go"
    loss, best, health, saved = now["loss_trend"], now["best"], now["bitnet"], now["checkpoint"]
    rows = [("state", f"{state}, last line {clock(now['last_line_age'])} ago"), ("step", step)]
    moves = f", {loss['word']}: {loss['change']:+.4f} +-{loss['error']:.4f}" if loss else ""
    rows.append(("loss", show(now["loss"], ".4f") + moves))
    if best:
        at_best = f"best {best['val_loss']:.4f} at step {best['step']:,}"
        rows.append(("val_loss", f"{now['val_loss']:.4f} at step {now['val_step']:,}, {at_best}"))
    decay, stage = show(now["weight_decay"], "g"), show(now["stage"])
    rows.append(("lr", f"{show(now['lr'], '.2e')}, weight_decay {decay}, stage {stage}"))
    speed = f"{show(now['tokens_per_sec'], ',.0f')} tokens/s, {show(now['step_ms'], ',.4g')} ms a step"
    rows.append(("speed", speed + (f", MFU {now['mfu']:.1%}" if now["mfu"] is not None else "")))
    busy = f", {now['gpu_util']:.0%} busy" if now["gpu_util"] is not None else ""
    rows.append(("device", f"{show(now['device'])}, {show(now['memory_gb'], '.2f')} GB{busy}"))
    if health:
        zero, plus, minus, near = (
            show(health.get(key), ".1%") for key in ("zero", "plus", "minus", "near_threshold")
        )
        flips = f"{show(health.get('flip_rate'), '.2%')} flipped, {near} near a threshold"
        rows.append(("codes", f"0 {zero}, +1 {plus}, -1 {minus}; {flips}"))
    if now["router"]:
        load, entropy, dead = (now["router"].get(key) for key in ("load_max", "entropy", "dead"))
        even = f" (even {math.log(now['n_expert']):.2f})" if now["n_expert"] else ""
        most = f"busiest expert {show(load, '.2f')} x the mean"
        rows.append(("routers", f"{most}, entropy {show(entropy, '.2f')}{even}, {show(dead)} dead"))
    rows.append(("checkpoint", f"step {saved['step']:,}, {clock(saved['age'])} old" if saved else "none"))
    need = f", {now['disk_need_gb']:.3g} GB of checkpoints to come" if now["disk_need_gb"] else ""
    rows.append(("disk", f"{now['disk_free_gb']:.3g} GB free{need}"))
    if now["anomalies"]["count"]:
        shown = "; ".join(f"step {row['step']:,}: {row.get('what')}" for row in now["anomalies"]["last"])
        rows.append(("anomalies", f"{now['anomalies']['count']}; {shown}"))
    if now["sample"]:
        text, prompt = repr(now["sample"]["generated_text"]), repr(now["sample"]["prompt"])
        text = f"{prompt[:40]} -> {text[:120]}, repetition {show(now['repetition'], '.2f')}"
        rows.append(("sample", f"step {now['sample']['step']:,}: {text}"))
    lines = [now["run_id"][:width]]
    for label, value in rows + [("warning", text) for text in now["warnings"]]:
        how = dict(initial_indent=f"{label:11}", subsequent_indent=" " * 11, break_on_hyphens=False)
        lines += textwrap.wrap(value, width, **how)
    return lines


def table(found, width):
    """several runs, one line each, below a line of headings"""
    rows = [("run_id", "state", "step", "%", "loss", "val", "age")]
    for now in found:
        step, share = f"{now['step']}/{show(now['max_steps'])}", show(now["progress"], ".0%")
        losses, age = (show(now[key], ".3f") for key in ("loss", "val_loss")), clock(now["last_line_age"])
        state = now["state"].split()[0]
        rows.append(
            (
                os.path.basename(now["run_dir"])[: width - 52],
                state,
                step,
                share,
                *losses,
                " ".join(age.split()[:2]),
            )
        )
    return [f"{a:{width - 52}} {b:11} {c:>13} {d:>4} {e:>6} {f:>6} {g:>6}" for a, b, c, d, e, f, g in rows]


def split(argv):
    """(folders, flags) of a command line; the value in `--key value` belongs to its flag"""
    folders, flags, args = [], [], list(argv)
    while args:
        arg = args.pop(0)
        (flags if arg.startswith("-") else folders).append(arg)
        default = FLAGS.get(arg.lstrip("-").replace("-", "_"), ("",))[0]
        is_value = args and (type(default) is not bool or args[0].lower() in ("true", "false"))
        if arg.startswith("--") and "=" not in arg and is_value and not args[0].startswith("-"):
            flags.append(args.pop(0))
    return folders, flags


def is_run(path):
    """whether a folder is one of a run, or an empty one, which may become one"""
    names = os.listdir(path)
    return not names or "config.json" in names or "metrics" in names


def check(cfg, folders):
    """exit with 2, and a line for each fault, where the command asks for what cannot be"""
    faults = []
    for path in folders:
        if not os.path.isdir(path):
            faults.append(f"{path} is no run: no such folder; `python monitor.py` lists those of out_dir")
        elif not is_run(path):
            faults.append(
                f"{path} is no run: it has no config.json and no metrics; did you mean a folder in it?"
            )
    if not folders and not os.path.isdir(cfg.out_dir):
        faults.append(f"out_dir = {cfg.out_dir!r} is no folder; name a run, or where they are")
    if cfg.every <= 0:
        faults.append(f"every = {cfg.every} must be more than 0 seconds")
    if cfg.window < 6:
        faults.append(f"window = {cfg.window} must be at least 6 log lines")
    for key, path in (("plot", cfg.plot), ("codes", cfg.codes)):
        if path and not path.endswith((".png", ".pdf", ".svg")):
            faults.append(f"{key} = {path!r} must end in .png, .pdf or .svg")
        if path and not os.path.isdir(os.path.dirname(path) or "."):
            faults.append(f"{key} = {path!r}: there is no folder {os.path.dirname(path)}; make it first")
        if path and (not folders or key == "codes" and len(folders) > 1):
            faults.append(f"--{key} needs {'one run' if key == 'codes' else 'a run'}: the folder of it")
    if faults:
        fail(*faults)


def main(argv):
    folders, flags = split(argv)
    cfg = config.load(flags, __doc__, FLAGS, only=("out_dir",), check_run=False)
    on_terminal = sys.stdout.isatty()
    while True:
        check(cfg, folders)
        inside = (
            [] if folders else [os.path.join(cfg.out_dir, name) for name in sorted(os.listdir(cfg.out_dir))]
        )
        run_dirs = folders or [path for path in inside if os.path.isdir(path) and is_run(path)]
        found = [status(path, cfg.window) for path in run_dirs]
        size = shutil.get_terminal_size((80, 50))
        width = max(60, min(80, size.columns))
        if cfg.plot:
            pictures.plot(run_dirs, cfg.plot)
            print(f"wrote {cfg.plot}", file=sys.stderr)
        if cfg.codes:
            pictures.plot_codes(run_dirs[0], cfg.matrix, cfg.codes)
            print(f"wrote {cfg.codes}", file=sys.stderr)
        if cfg.json:
            lines = [record.to_json(found[0] if len(folders) == 1 else {"runs": found})]
        elif folders:
            lines = [line for now in found for line in [*screen(now, width), ""]][:-1]
        else:
            lines = table(found, width) if found else [f"no run in {cfg.out_dir}"]
        if cfg.watch and on_terminal and not cfg.json:  # from the top left over what is there: no flicker
            shown = "".join(f"{line}\033[K\n" for line in lines[: size.lines - 1])
            print(f"\033[H{shown}\033[J", end="", flush=True)
        else:
            print(*lines, sep="\n", end="\n\n" if cfg.watch and not cfg.json else "\n", flush=True)
        if not cfg.watch:
            return
        time.sleep(cfg.every)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    terminal.end_with_reader()
    sys.stdout.reconfigure(errors="backslashreplace")  # samples may hold what the terminal cannot show
    try:
        main(sys.argv[1:])
    except OSError as error:
        name = error.filename or "the picture"
        fail(f"{name}: {error.strerror}; it must read the run and write the picture")
