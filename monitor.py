"""
The state of a run, from the files it writes: progress, losses, ternary health, warnings with a remedy.

    python monitor.py                              the runs of runs/, one line each
    python monitor.py runs/demo                    one screen; `demo` alone will do
    python monitor.py runs/demo --watch            again every 10 s, until Ctrl-C
    python monitor.py runs/demo --json             one JSON object
    python monitor.py runs/demo --plot=out.png     losses, rates, ternary fractions; of several runs too
    python monitor.py runs/demo --codes=out.png    a ternary matrix settling, checkpoint by checkpoint

It only reads, so it works beside a run that trains, and on one that ended long ago.
"""

import math
import os
import shutil
import sys
import textwrap
import time

import config
from nanobit import record
from nanobit.cli import Flag, fail
from nanobit.monitor import plots
from nanobit.monitor.status import clock, moves, status
from nanobit.terminal import printable

FLAGS = {
    "watch": Flag(False, "show it again and again, in place on a terminal; Ctrl-C ends it"),
    "every": Flag(10.0, "seconds between two screens", within="(0, inf)", only_with="watch"),
    "json": Flag(False, "print one JSON object; several runs are a list under `runs`"),
    "plot": Flag("", "a picture to write: losses, rates and ternary fractions of the runs; '' = none"),
    "codes": Flag("", "a picture to write: one matrix's codes at each checkpoint; '' = none"),
    "matrix": Flag("blocks.0.attn.q_proj", "the matrix of the picture", only_with="codes"),
    "window": Flag(50, "log lines for trends: their newer half against the older", within="[6, inf)"),
}


def known(*parts):
    """Return (value, format) pairs as one text, without those whose value is not known."""
    return ", ".join(form.format(value) for value, form in parts if value is not None)


def screen(now, width):
    """the state of a run as lines of at most `width` characters"""
    state = now["state"]
    if now["why"] and state != "failed":  # that is a whole sentence, and among the warnings
        state += f" ({now['why']})"
    loss, best, saved, router = now["loss_trend"], now["best"], now["checkpoint"], now["router"]
    health = now["bitnet"] or {}
    age, eta = now["last_line_age"], now["eta_seconds"]
    step = f"{now['step']:,}" + (f" of {now['max_steps']:,}" if now["max_steps"] else "")
    rows = [
        ("state", known((state, "{}"), (age if age is None else clock(age), "last line {} ago"))),
        (
            "step",
            known(
                (step, "{}"),
                (now["progress"], "{:.1%}"),
                (now["epoch"], "epoch {:.2f}"),
                (clock(eta) if eta and state not in ("finished", "failed") else None, "{} to go"),
            ),
        ),
        ("loss", known((now["loss"], "{:.4f}"), (loss and moves(loss), "{}"))),
    ]
    if best:
        at_best = f"best {best['val_loss']:.4f} at step {best['step']:,}"
        rows.append(("val_loss", f"{now['val_loss']:.4f} at step {now['val_step']:,}, {at_best}"))
    rates = ((now["lr"], "{:.2e}"), (now["weight_decay"], "weight_decay {:g}"), (now["stage"], "stage {:g}"))
    speed = ((now["tokens_per_sec"], "{:,.0f} tokens/s"), (now["step_ms"], "{:,.4g} ms a step"))
    rows.append(("lr", known(*rates)))
    rows.append(("speed", known(*speed, (now["mfu"], "MFU {:.1%}"))))
    device = ((now["device"], "{}"), (now["memory_gb"], "{:.2f} GB"), (now["gpu_util"], "{:.0%} busy"))
    rows.append(("device", known(*device)))
    forms = dict(zero="0 {:.1%}", plus="+1 {:.1%}", minus="-1 {:.1%}")
    forms |= dict(flip_rate="{:.2%} changed since the last line", near_threshold="{:.1%} near a threshold")
    rows.append(("codes", known(*((health.get(key), form) for key, form in forms.items()))))
    if router:
        even = f" (even {math.log(now['n_expert']):.2f})" if now["n_expert"] else ""
        busy = (router.get("load_max"), "busiest expert {:.2f} x the mean")
        entropy = (router.get("entropy"), "entropy {:.2f}" + even)
        rows.append(("routers", known(busy, entropy, (router.get("dead"), "{:g} dead"))))
    rows.append(("checkpoint", f"step {saved['step']:,}, {clock(saved['age'])} old" if saved else "none"))
    need = (now["disk_need_gb"] or None, "{:.3g} GB of checkpoints to come")
    rows.append(("disk", known((now["disk_free_gb"], "{:.3g} GB free"), need)))
    if now["anomalies"]["count"]:
        shown = "; ".join(f"step {row['step']:,}: {row.get('what')}" for row in now["anomalies"]["last"])
        rows.append(("anomalies", f"{now['anomalies']['count']}; {shown}"))
    if now["sample"]:
        text, prompt = repr(now["sample"]["generated_text"]), repr(now["sample"]["prompt"])
        text = f"step {now['sample']['step']:,}: {prompt[:40]} -> {text[:120]}"
        rows.append(("sample", known((text, "{}"), (now["repetition"], "repetition {:.2f}"))))
    lines = [printable(now["run_id"])[:width]]
    for label, value in rows + [("warning", text) for text in now["warnings"]]:
        how = dict(initial_indent=f"{label:11}", subsequent_indent=" " * 11, break_on_hyphens=False)
        lines += textwrap.wrap(printable(value), width, **how) if value else []
    return lines


def table(found, width):
    """several runs, one line each, below a line of headings; a narrow one has fewer columns"""
    rows = [("run_id", "state", "step", "%", "loss", "val", "age")]
    for now in found:
        step = f"{now['step']}" + (f"/{now['max_steps']}" if now["max_steps"] else "")
        losses = [known((now[key], "{:.3f}")) for key in ("loss", "val_loss")]
        age = " ".join(clock(now["last_line_age"]).split()[:2])
        name, state = printable(os.path.basename(os.path.abspath(now["run_dir"]))), now["state"].split()[0]
        rows.append((name, state, step, known((now["progress"], "{:.0%}")), *losses, age))
    rows = rows if width >= 76 else [row[:3] + row[4:6] for row in rows]
    sizes = [max(map(len, column)) for column in zip(*rows)]
    sizes[0] = max(8, min(sizes[0], width - sum(sizes[1:]) - len(sizes) + 1))
    aligned = [str.ljust, str.ljust, *[str.rjust] * 5]
    return [
        " ".join(align(cell[:size], size) for align, cell, size in zip(aligned, row, sizes)) for row in rows
    ]


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
    for key, path in (("plot", cfg.plot), ("codes", cfg.codes)):
        if path and not path.endswith((".png", ".pdf", ".svg")):
            faults.append(f"{key} = {path!r} must end in .png, .pdf or .svg")
        if path and not os.path.isdir(os.path.dirname(path) or "."):
            faults.append(f"{key} = {path!r}: there is no folder {os.path.dirname(path)}; make it first")
        if path and (not folders or key == "codes" and len(folders) > 1):
            faults.append(f"--{key} needs {'one run' if key == 'codes' else 'a run'}: the folder of it")
    if faults:
        fail(*faults)


def main(argv=None):
    cfg = config.load(argv, __doc__, FLAGS, only=("out_dir",), takes_paths=True)
    folders = cfg.paths
    inside = [os.path.join(cfg.out_dir, path) for path in folders]
    folders = [b if os.path.isdir(b) and not os.path.isdir(a) else a for a, b in zip(folders, inside)]
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
            plots.plot(run_dirs, cfg.plot)
            print(f"wrote {cfg.plot}", file=sys.stderr)
        if cfg.codes:
            shown = plots.plot_codes(run_dirs[0], cfg.matrix, cfg.codes)
            print(f"wrote {cfg.codes}, with {shown}", file=sys.stderr)
        if cfg.json:
            lines = [record.to_json(found[0] if len(folders) == 1 else {"runs": found})]
        elif folders and not cfg.plot and not cfg.codes:
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
    try:
        main()
    except OSError as error:
        name = error.filename2 or error.filename or "the picture"
        fail(f"{printable(name)}: {error.strerror}; it must read the run and write the picture")
