"""Compare recipes by paired experiments: each variant and the unchanged config on the same seeds.

    python compare.py config/train_simple.py --try="optimizer=muon" --try="optimizer=muon learning_rate=4e-3"
    python compare.py config/train_simple.py --try="optimizer=muon" --seeds=4,5,6,7,8     fresh seeds
    python compare.py config/train_simple.py --try="weight_decay=0" --minutes=5 --twin --n_layer=1

Two runs of one seed and shape begin with the same weights and read the same tokens in the same order, so that
their difference varies less than their losses do. Settings outside of --try apply to all runs.

The runs are made by train.py, one at a time, in runs/compare/<run_id>/. The same command continues what was
interrupted; a finished run is found again by its settings and is not repeated. Each run has a fixed number of
steps: seed and resume are set here, patience and max_minutes are off. results.jsonl has a row for each run,
differences.png shows the differences over the steps (with matplotlib). Losses are those of the last
evaluation, in nats per token.

Ctrl-C saves the current run and prints how to continue; a second one exits immediately. If stdout is not a
terminal, or with --json, its last line is one JSON object with the tables."""

import importlib.util
import os
import re
import shlex
import statistics
import sys
import textwrap
from types import SimpleNamespace
from typing import NamedTuple

import config
from nanobit import record, terminal
from nanobit.cli import JSON, Flag, fail
from nanobit.compare import report, runs
from nanobit.monitor.trends import clock

FLAGS = {
    "try": Flag(
        [],
        'settings of a variant, in one pair of quotes, as "optimizer=muon beta1=0.8"; once for each variant',
        required=True,
        many=True,
    ),
    "seeds": Flag("3", "a number n = the seeds 1 to n; a list with commas = these seeds, as 4,5,6"),
    "minutes": Flag(0.0, "train all for the steps that the unchanged config makes in this time; 0 = its own"),
    "twin": Flag(False, "also train the float twin of each variant, and print the ternary-float gaps"),
    "json": JSON,
}


class Variant(NamedTuple):
    """What a row of the table is about: a name, and the settings of its runs."""

    name: str  # of a float twin that of its ternary twin
    is_twin: bool
    cfg: SimpleNamespace

    @property
    def label(self):
        return report.label_of(self.name, self.is_twin)


def seeds_of(text):
    """Return the seeds of '3' (1 to 3), '4,5' or '7,'; [] if the text is none of these."""
    if re.fullmatch(r"[1-9][0-9]?|100", text):
        return list(range(1, int(text) + 1))
    if re.fullmatch(r"([0-9]{1,18},)+([0-9]{1,18})?", text):
        return [int(number) for number in text.split(",") if number]
    return []


def derive(cfg):
    """Make cfg.seeds a list, and leave the length open if --minutes sets it; yield the faults."""
    seeds = seeds_of(cfg.seeds)
    if not 1 <= len(set(seeds)) == len(seeds) <= 100:
        yield f"seeds = {cfg.seeds!r} must be a number from 1 to 100, or seeds with commas, as 4,5,6 or 7,"
    cfg.seeds = seeds
    decided = {"seed": "use --seeds", "resume": "leave it out: a comparison always continues"}
    decided |= dict.fromkeys(("max_minutes", "patience"), "leave it out: all runs have the same length")
    if cfg.minutes:
        decided |= dict.fromkeys(("max_steps", "total_tokens"), "leave it out, or leave out --minutes")
        vars(cfg).update(max_steps=1, total_tokens=0)
    for name, remedy in decided.items():
        if cfg.origin[name].startswith("-"):
            yield f"{cfg.origin[name]}: a comparison sets {name} itself; {remedy}"
    if not cfg.eval_every:
        yield "eval_every = 0: a comparison needs the validation loss; set eval_every"
    if cfg.twin and not cfg.ternary:
        yield "ternary = False: --twin compares a ternary model with its float twin; leave one out"


def load_variant(argv, text, earlier):
    """Return the Variant of a --try, checked with the whole command line. Exits with 2 if it has a fault."""
    try:
        words = ["--" + word.lstrip("-") for word in shlex.split(text)]
    except ValueError as error:
        fail(f"{text}: not settings with spaces between them: {error}")
    names = {word[2:].partition("=")[0].replace("-", "_").removeprefix("no_") for word in words}
    if shared := sorted(names & {*FLAGS, "run_id", "out_dir"}):
        fail(f"{shared[0]} is the same for all variants; give it outside of --try")
    cfg = config.load([*argv, *words], flags=FLAGS, derive=derive)
    if same := [variant.name for variant in earlier if runs.compared(variant.cfg) == runs.compared(cfg)]:
        fail(f"its settings are those of the variant {same[0]!r}; leave it out")
    return Variant(" ".join(word[2:] for word in words), False, cfg)


def load_variants(argv, cfg):
    """Return the Variants: the unchanged config, those of --try, and the float twins. Exits with 2, after all
    faults are printed, if any has one."""
    variants = [Variant(report.BASE, False, cfg)]
    faulty = []
    for text in getattr(cfg, "try"):
        try:
            variants.append(load_variant(argv, text, variants))
        except SystemExit:
            faulty.append(text)
            print(f"error: the line above is about --try={text!r}", file=sys.stderr)
    if faulty:
        raise SystemExit(2)
    if cfg.twin:
        for name, _, own in list(variants):
            variants.append(Variant(name, True, SimpleNamespace(**vars(own) | {"ternary": False})))
    return variants


def set_length(folder, variants):
    """Give all variants the tokens of the steps that the unchanged config makes in --minutes. They are timed
    once, in a run of 100 steps that stays in the folder, so that the same command has the same length."""
    cfg = variants[0].cfg
    off = dict.fromkeys(("eval_every", "sample_every", "save_every"), 0)
    settings = runs.compared(cfg) | off | dict(max_steps=100, max_minutes=cfg.minutes / 4, log_every=10)
    path = runs.path_of(folder, "speed", settings, seed=1)
    code, error = runs.train(path, settings, 1)
    if error:
        fail(error, code=max(1, code))
    times = [row["step_ms"] for row in record.read(path, record.SCALARS) if row.get("step_ms")]
    if not times:
        fail(f"minutes = {cfg.minutes}: too short to time two steps; raise it")
    steps = max(1, round(60e3 * cfg.minutes / statistics.median(times)))
    print(f"{cfg.minutes:g} minutes are {steps:,} steps of the unchanged config", file=sys.stderr)
    for variant in variants:
        variant.cfg.max_steps = -(-steps * cfg.total_batch_size // variant.cfg.total_batch_size)


def run_all(folder, variants):
    """Train all runs that have not ended, one seed after the other. Return the rows of results.jsonl."""
    todo = [
        (variant, seed, runs.path_of(folder, variant.label, runs.compared(variant.cfg), seed))
        for seed in variants[0].cfg.seeds
        for variant in variants
    ]
    progress = runs.Progress(todo)
    print(f"{len(todo)} runs in {folder}, {len(progress.left)} of them to train", file=sys.stderr)
    rows = []
    for number, (variant, seed, path) in enumerate(todo, 1):
        error = ""
        if is_new := path in progress.left:
            progress.start(path, f"{number}/{len(todo)}")
            code, error = runs.train(path, runs.compared(variant.cfg), seed, progress.show)
            if code == 2 and variant is variants[0]:
                progress.bar.close()
                fail(error)
        row = runs.row_of(path, variant, seed, error)
        rows.append(row)
        runs.save_rows(os.path.join(folder, "results.jsonl"), rows)
        if is_new:
            outcome = f"failed: {row['failed']}" if row["failed"] else f"val_loss {row['val_loss']:.4f}"
            text = f"run {number} of {len(todo)}, {variant.label}, seed {seed}: {outcome}"
            progress.bar.write(f"{text}; time left: {clock(progress.end())}", file=sys.stderr)
    progress.bar.close()
    return rows


def main(argv=None):
    cfg = config.load(argv, __doc__, FLAGS, derive=derive)
    if argv is None:
        argv = sys.argv[1:]
    variants = load_variants(argv, cfg)
    terminal.survive_lost_output()
    folder = os.path.join(cfg.out_dir, "compare", cfg.run_id)
    os.makedirs(folder, exist_ok=True)
    runs.listen()
    try:
        if cfg.minutes:
            set_length(folder, variants)
        warnings = report.mismatched_settings({name: own for name, _, own in variants})
        for text in warnings:
            print(f"warning: {text}", file=sys.stderr)
        rows = run_all(folder, variants)
    except runs.Stopped:
        command = terminal.command_line(
            [sys.executable.removeprefix(os.getcwd() + os.sep), sys.argv[0], *argv]
        )
        print(f"stopped by signal {runs.received[0]}; to continue: {command}", file=sys.stderr)
        sys.exit(128 + runs.received[0])
    result = dict(folder=folder, seeds=cfg.seeds, steps=cfg.max_steps) | report.results(rows)
    result["warnings"] = warnings + result["warnings"]
    length = f"seeds {cfg.seeds}, {cfg.max_steps:,} steps of the unchanged config"
    print(f"{len(variants)} variants, {length}; losses in nats per token\n")
    notes = [textwrap.fill(text, 100, subsequent_indent="  ") for text in report.notes(result)]
    print(*report.tables(result), "", *notes, "", sep="\n")
    picture = "no picture (pip install matplotlib)"
    if importlib.util.find_spec("matplotlib"):
        picture = os.path.join(folder, "differences.png")
        report.draw(rows, picture)
    print(f"wrote {os.path.join(folder, 'results.jsonl')}, {picture}")
    record.print_result(result, cfg.json)
    if not result["variants"][0]["seeds"]:
        sys.exit(1)  # the unchanged config never finished: there is nothing to compare with


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        fail(f"{error}; choose another --out_dir=, or free disk space if it is full", code=1)
