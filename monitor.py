"""The state of a run, from the files it writes: progress, losses, ternary health, warnings with a remedy.

    python monitor.py                              the runs of runs/, one line each
    python monitor.py runs/demo                    one screen; `demo` works too
    python monitor.py runs/demo --watch            again every 10 s, until Ctrl-C
    python monitor.py runs/demo --json             one JSON object
    python monitor.py runs/demo --plot=out.png     losses, rates, ternary fractions; of several runs too
    python monitor.py runs/demo --codes=out.png    a ternary matrix settling, checkpoint by checkpoint

It only reads, so it works beside a run that trains, and on one that ended long ago."""

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
from nanobit.monitor.status import status
from nanobit.monitor.trends import clock, moves
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


def known(values, **forms):
    """Return values of a dict as one text, by {name: format}, without those that are not known."""
    return ", ".join(form.format(values[key]) for key, form in forms.items() if values.get(key) is not None)


def step_of(now, separator, form):
    """Return the step of a run and, if it is known, its last one, with a separator between them."""
    step = form.format(now["step"])
    return f"{step}{separator}{form.format(now['max_steps'])}" if now["max_steps"] else step


def screen(now, width):
    """Return the state of a run (see status()) as lines of at most `width` characters."""
    lines = [printable(now["run_id"])[:width]]
    for label, value in [*screen_rows(now), *(("warning", text) for text in now["warnings"])]:
        style = dict(initial_indent=f"{label:11}", subsequent_indent=" " * 11, break_on_hyphens=False)
        if value:
            lines += textwrap.wrap(printable(value), width, **style)
    return lines


def screen_rows(now):
    """Yield (label, text) of the rows of a screen, the text '' if nothing is known."""
    state = now["state"]
    if now["why"] and state != "failed":  # that is a whole sentence, and among the warnings
        state += f" ({now['why']})"
    age = now["last_line_age"]
    yield "state", state if age is None else f"{state}, last line {clock(age)} ago"
    progress = now | dict(of=step_of(now, " of ", "{:,}"))
    if now["eta_seconds"] and now["state"] not in ("finished", "failed"):
        progress["to_go"] = clock(now["eta_seconds"])
    yield "step", known(progress, of="{}", progress="{:.1%}", epoch="epoch {:.2f}", to_go="{} to go")
    trend = now["loss_trend"] and moves(now["loss_trend"])
    yield "loss", known(dict(loss=now["loss"], trend=trend), loss="{:.4f}", trend="{}")
    if now["best"]:
        best = "best {val_loss:.4f} at step {step:,}".format(**now["best"])
        yield "val_loss", f"{now['val_loss']:.4f} at step {now['val_step']:,}, {best}"
    yield "lr", known(now, lr="{:.2e}", weight_decay="weight_decay {:g}", stage="stage {:g}")
    forms = dict(tokens_per_sec="{:,.0f} tokens/s", step_ms="{:,.4g} ms a step", mfu="MFU {:.1%}")
    yield "speed", known(now, **forms)
    yield "device", known(now, device="{}", memory_gb="{:.2f} GB", gpu_util="{:.0%} busy")
    forms = dict(zero="0 {:.1%}", plus="+1 {:.1%}", minus="-1 {:.1%}")
    forms |= dict(flip_rate="{:.2%} changed since the last line", near_threshold="{:.1%} near a threshold")
    yield "codes", known(now["bitnet"] or {}, **forms)
    forms = dict(load_max="busiest expert {:.2f} x the mean", entropy="entropy {:.2f}", dead="{:g} dead")
    if now["n_expert"]:
        forms["entropy"] += f" (even {math.log(now['n_expert']):.2f})"
    yield "routers", known(now["router"] or {}, **forms)
    saved = now["checkpoint"]
    yield "checkpoint", f"step {saved['step']:,}, {clock(saved['age'])} old" if saved else "none"
    disk = dict(free=now["disk_free_gb"], need=now["disk_need_gb"] or None)
    yield "disk", known(disk, free="{:.3g} GB free", need="{:.3g} GB of checkpoints to come")
    odd_steps = now["anomalies"]
    if odd_steps["count"]:
        last = "; ".join(f"step {row['step']:,}: {row.get('what')}" for row in odd_steps["last"])
        yield "anomalies", f"{odd_steps['count']}; {last}"
    if now["sample"]:
        prompt = repr(now["sample"]["prompt"])[:40]
        sample = f"step {now['sample']['step']:,}: {prompt} -> {now['sample']['generated_text']!r:.120}"
        yield "sample", known(now | {"sample": sample}, sample="{}", repetition="repetition {:.2f}")


def table(states, width):
    """Return several runs as lines, one each, below a line of headings; a narrow one has fewer columns."""
    rows = [("run_id", "state", "step", "%", "loss", "val", "age")]
    for now in states:
        numbers = [known(now, progress="{:.0%}"), known(now, loss="{:.3f}"), known(now, val_loss="{:.3f}")]
        age = " ".join(clock(now["last_line_age"]).split()[:2])
        state = now["state"].split()[0]
        rows.append((printable(now["run_id"]), state, step_of(now, "/", "{}"), *numbers, age))
    if width < 76:
        rows = [row[:3] + row[4:6] for row in rows]
    sizes = [max(map(len, column)) for column in zip(*rows)]
    sizes[0] = max(8, min(sizes[0], width - sum(sizes[1:]) - len(sizes) + 1))
    aligned = [f"{{:<{size}.{size}}}" for size in sizes[:2]] + [f"{{:>{size}.{size}}}" for size in sizes[2:]]
    return [" ".join(aligned).format(*row) for row in rows]


def is_run(path):
    """Return whether a folder is one of a run, or an empty one, which may become one."""
    names = os.listdir(path)
    return not names or "config.json" in names or "metrics" in names


def check(cfg, folders):
    """Exit with 2, and a line for each fault, if a run, or the folder of a picture, is missing."""
    faults = []
    for path in folders:
        if not os.path.isdir(path):
            faults.append(f"{path} is not a run: no such folder; `python monitor.py` lists those of out_dir")
        elif not is_run(path):
            faults.append(f"{path} is not a run: it has no config.json or metrics; name a folder in it")
    if not folders and not os.path.isdir(cfg.out_dir):
        faults.append(f"out_dir = {cfg.out_dir!r} is not a folder; name a run, or the folder of runs")
    pictures = (("plot", cfg.plot, "a run", folders), ("codes", cfg.codes, "one run", len(folders) == 1))
    for key, path, needed, is_given in pictures:
        if path and not path.endswith((".png", ".pdf", ".svg")):
            faults.append(f"{key} = {path!r} must end in .png, .pdf or .svg")
        if path and not os.path.isdir(os.path.dirname(path) or "."):
            faults.append(f"{key} = {path!r}: {os.path.dirname(path)} does not exist; make it first")
        if path and not is_given:
            faults.append(f"--{key} needs {needed}: the folder of it")
    if faults:
        fail(*faults)


def main(argv=None):
    cfg = config.load(argv, __doc__, FLAGS, only=("out_dir",), takes_paths=True)
    places = [(path, os.path.join(cfg.out_dir, path)) for path in cfg.paths]
    folders = [next(filter(os.path.isdir, either), either[0]) for either in places]
    on_terminal = sys.stdout.isatty() and not cfg.json
    while True:
        check(cfg, folders)
        run_dirs = folders
        if not folders:
            paths = (os.path.join(cfg.out_dir, name) for name in sorted(os.listdir(cfg.out_dir)))
            run_dirs = [path for path in paths if os.path.isdir(path) and is_run(path)]
        size = shutil.get_terminal_size((80, 50))
        lines = shown(cfg, folders, run_dirs, max(60, min(80, size.columns)))
        if cfg.watch and on_terminal:  # from the top left over what is there: no flicker
            text = "".join(f"{line}\033[K\n" for line in lines[: size.lines - 1])
            print(f"\033[H{text}\033[J", end="", flush=True)
        else:
            print(*lines, sep="\n", flush=True)
        if not cfg.watch:
            return
        if not on_terminal and not cfg.json:
            print(flush=True)
        time.sleep(cfg.every)


def shown(cfg, folders, run_dirs, width):
    """Write the pictures; return the lines to print about the runs, of which the command names `folders`."""
    if cfg.plot:
        plots.plot(run_dirs, cfg.plot)
        print(f"wrote {cfg.plot}", file=sys.stderr)
    if cfg.codes:
        number = plots.plot_codes(run_dirs[0], cfg.matrix, cfg.codes)
        print(f"wrote {cfg.codes}, with {number}", file=sys.stderr)
    states = [status(path, cfg.window) for path in run_dirs]
    if cfg.json:
        return [record.to_json(states[0] if len(folders) == 1 else {"runs": states})]
    if folders and not cfg.plot and not cfg.codes:
        return [line for now in states for line in [*screen(now, width), ""]][:-1]
    return table(states, width) if states else [f"no run in {cfg.out_dir}"]


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        name = error.filename2 or error.filename or "the picture"
        fail(f"{printable(name)}: {error.strerror}; it must read the run and write the picture")
