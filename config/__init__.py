"""Load and check settings: config/default.py, then the config files, then the flags, wherever they stand."""

import contextlib
import difflib
import glob
import json
import os
import re
import runpy
import signal
import sys
from pathlib import PurePath
from types import ModuleType, SimpleNamespace

from nanobit import cli, files, terminal
from nanobit.cli import ROOT, WORLD, Flag, coerce, fail

DEFAULT = os.path.join(ROOT, "config", "default.py")
VALIDATION = ("tokenize_on_fly", "eval_tokens")  # the settings that select the windows of an evaluation
SHAPE = (  # what a run takes over from the run that init_from names
    "n_layer n_head n_kv_head n_embd ffn_dim n_expert n_expert_active vocab_size vocab_multiple "
    "rope_theta norm_eps tie_embeddings seq_len"
).split()
RATIOS = {"stage2_lr": "stage2_lr_ratio", "min_lr": "min_lr_ratio"}  # former settings and their successors
DTYPES = ("auto", "float32", "bfloat16", "float16")
HEADS = ("float32", "bfloat16", "int8")  # of a model that is used: only the first is exact
CHOICES = {
    "device": ("auto", "cpu", "cuda", "cuda:1", "mps"),
    "dtype": DTYPES,
    "optimizer": ("adamw", "muon"),
    "schedule": ("two_stage", "bitnet", "wsd", "cosine", "linear", "constant"),
}
RANGES = {  # those of the other numbers: at least 0
    "(0, 1048576]": "batch_size",
    "(0, inf)": "seq_len n_layer n_head n_kv_head n_embd ffn_dim vocab_multiple rope_theta "
    "norm_eps adam_eps log_every",
    "[0, 1)": "beta1 beta2 muon_momentum dropout",
    "(0, 1]": "stage_boundary decay_fraction",
    cli.SEED: "seed",
}


def settings_of(cfg):
    """Return {setting: value}, without what belongs to one command line."""
    return {name: value for name, value in vars(cfg).items() if name not in ("origin", "json")}


def trackers(cfg):
    """Return the names of the trackers that are on, which are also those of their packages."""
    return [name for name in ("tensorboard", "wandb", "trackio") if getattr(cfg, name)]


def assignments(path):
    """Return {name: value} of a config file, without names that start with _, functions and modules."""
    rows = runpy.run_path(path).items()
    return {k: v for k, v in rows if not (k.startswith("_") or callable(v) or isinstance(v, ModuleType))}


def sections():
    """Return {section: {setting: Flag}} of default.py, in its order."""
    values = assignments(DEFAULT)
    ranges = {name: within for within, names in RANGES.items() for name in names.split()}
    text = open(DEFAULT, encoding="utf-8").read().split("\n\n", 1)[1]
    result = {}
    for title, name, comment in re.findall(r"^# (.*)$|^(\w+) = .*  # (.*)$", text, re.M):
        if title:
            rows = result[title] = {}
        else:
            rows[name] = Flag(values[name], comment, CHOICES.get(name, ()), ranges.get(name, "[0, inf)"))
    return result


def with_ratios(settings):
    """Return the saved settings of a run with ratios instead of the rates that earlier versions saved. Such a
    rate stays beside its ratio if the product is not the same float."""
    settings = dict(settings)
    peak = settings.get("learning_rate")
    for former, ratio in RATIOS.items():
        rate = settings.get(former)
        if ratio not in settings and type(rate) is type(peak) is float:
            settings[ratio] = rate / peak if peak else 1.0
            if settings[ratio] * peak == rate:
                del settings[former]
    return settings


def saved(path):
    """Return (content, {setting: value}) of a run's config.json. Raises ValueError if it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        return content, with_ratios({name: row["value"] for name, row in content["settings"].items()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        remedy = "name the config file and flags of that run, with --resume=auto"
        raise ValueError(f"{path} cannot be read ({terminal.printable(reason)}); {remedy}") from None


def run_settings(path, given, known):
    """Return (file, known settings) of the run that a `resume` path lies in, without those of one command,
    and without its length if one is given. Raises ValueError if it is missing or cannot be read."""
    folder = os.path.abspath(path)
    is_best = os.path.basename(folder) == "best" and not os.path.exists(folder)  # as in checkpoint.locate
    if is_best or os.path.isfile(folder):  # checkpoint.pt
        folder = os.path.dirname(folder)
    if os.path.basename(os.path.dirname(folder)) == "checkpoints":  # a step folder
        folder = os.path.dirname(os.path.dirname(folder))
    if not os.path.isdir(folder):
        raise ValueError(f"resume = {path!r} does not exist; give a run folder, or name a config file")
    parent, run_id = os.path.split(folder)  # it may have been moved or renamed since
    out_dir = parent.removeprefix(os.getcwd() + os.sep)
    source = os.path.join(out_dir, run_id, "config.json")
    lengths = given & {"max_steps", "total_tokens"}
    if lengths and not os.path.exists(source):  # a step folder that was copied alone
        return source, {}
    _, values = saved(source)
    left_out = {"resume", "init_from", "verify_data"}
    if lengths:
        left_out |= {"max_steps", "total_tokens"}
    elif values.get("total_tokens"):  # max_steps was derived from it
        left_out.add("max_steps")
    values |= dict(out_dir=out_dir, run_id=run_id)
    return source, {name: value for name, value in values.items() if name in known and name not in left_out}


def read_file(path):
    """Return (path, settings) of a config file. Raises ValueError if it is missing or cannot be run."""
    here = os.path.join(ROOT, path)
    fault = "does not exist"
    if os.path.isfile(path) and path.endswith(".py"):
        try:
            return path, assignments(path)
        except Exception as error:  # the file is the user's own code
            fault = f"cannot be read: {type(error).__name__}: {error}"
    elif os.path.isfile(path) and os.path.basename(path) == "config.json":
        fault = f"is not Python; --resume={os.path.dirname(path) or '.'} takes the settings of that run"
    elif os.path.isfile(path):
        fault = "is not Python: expected NAME.py with lines such as max_steps = 100"
    elif os.path.isdir(path):
        fault = f"is a folder; if it is a run: --resume={path}"
    elif "=" in path:
        fault = f"is not a file; did you mean --{path}? A value with spaces needs quotes"
    elif os.path.isfile(here):
        fault += f": paths are relative to the current folder; first cd {ROOT}, or give {here}"
    elif near := difflib.get_close_matches(path, glob.glob("config/[!_d]*.py"), n=1, cutoff=0.4):
        fault += f"; did you mean {near[0]}?"
    raise ValueError(f"config file {path} {fault}")


def path_fault(path, flags):
    """Return the fault of a path on the command line of a script that takes flags only."""
    existing = filter(os.path.exists, (path, os.path.join("runs", path)))
    near = [f"did you mean --{name}={x}?" for x in existing for name in ("ckpt", "files") if name in flags]
    return f"{path}: this script takes no file, only flags; {next(iter(near), '--help lists them')}"


def put(cfg, known, name, value, source):
    """Set one setting; yield the fault if its name or type is wrong."""
    if RATIOS.get(name) in known:
        ratio = ""
        if isinstance(value, (int, float)) and cfg.learning_rate:
            ratio = f"; here {value / cfg.learning_rate:.6g}"
        yield f"{source}: {name} is now {RATIOS[name]} = {name} / learning_rate{ratio}"
    elif name not in known:
        yield f"{source}: {cli.unknown(name, known)}"
    else:
        if known[name].many:
            value = [*getattr(cfg, name), value]
        try:
            setattr(cfg, name, coerce(name, value, type(known[name].default)))
            cfg.origin[name] = source
        except TypeError as error:
            yield f"{source}: {error}"


def load(argv=None, doc="", flags=None, only=None, derive=lambda cfg: (), takes_paths=False):
    """Return the settings of a command line: an object with attributes and `origin`, {name: source}. Exits
    with 2 and one `error:` line per fault; with --help, prints `doc` and all settings and exits with 0.
    argv: None = of this program. flags: {name: Flag} of the script itself; they shadow settings. only: names
    of the settings that it takes, none from files; None = all, those of a run. derive: may change cfg before
    the settings are compared, and yields faults. takes_paths: keep other arguments as cfg.paths."""
    if argv is None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        terminal.end_with_output()
        argv = sys.argv[1:]
    flags = flags or {}
    shown = {"options": flags}
    for title, rows in sections().items():
        taken = [name for name in rows if name not in flags and (only is None or name in only)]
        shown[title] = {name: rows[name] for name in taken}
    known = {name: flag for rows in shown.values() for name, flag in rows.items()}
    if "--help" in argv or "-h" in argv:
        cli.print_help(doc, shown, takes_files=only is None)
        raise SystemExit(0)
    cfg = SimpleNamespace(**{name: flag.default for name, flag in known.items()})
    cfg.origin = dict.fromkeys(known, "default")
    paths, given, faults = cli.split(argv, known)
    if takes_paths:
        cfg.paths, paths = paths, []
    elif only is not None and paths:
        faults.append(path_fault(paths.pop(), flags))
    typed = {name: value for name, value, _ in given}
    readers = [(read_file, path) for path in paths]
    if only is None and not paths and typed.get("resume", "") not in ("", "auto"):
        readers = [(run_settings, typed["resume"], typed.keys(), known)]
    layers = []
    for reader, *args in readers:
        try:
            source, values = reader(*args)
            layers.append([(name, value, source) for name, value in values.items()])
        except ValueError as error:
            faults.append(str(error))
    for layer in [*layers, given]:
        # a former rate is compared with the learning_rate beside it, which comes first
        for row in sorted(layer, key=lambda row: row[0] in RATIOS):
            faults += put(cfg, known, *row)
    faults += cli.check(cfg, known)
    faults += derive(cfg)
    if only is None and len(layers) == len(readers):
        cfg.run_id = cfg.run_id or PurePath((paths or ["default"])[-1]).stem
        faults += [*take_shape(cfg), *contradictions(cfg)]
        if not (faults or cfg.max_steps):
            faults.append("the run has no length; name a config file (config/train_simple.py) or --max_steps")
    if faults:
        fail(*faults)
    return cfg


def take_shape(cfg):
    """Give shape settings at their defaults the values of the run or Llama that init_from names; the others
    are compared when its weights are read. Yields the fault of a seq_len that a Llama does not have."""
    source = f"init_from {cfg.init_from}"
    if files.is_hf_folder(cfg.init_from):
        from nanobit.export import llama  # only for such a folder: train.py needs no other part of an export

        shape, positions = llama.shape(cfg.init_from)
        if cfg.seq_len > positions:
            shape["seq_len"] = positions
            if cfg.origin["seq_len"] != "default":
                yield f"seq_len = {cfg.seq_len} is more than the {positions:,} positions of {source}"
    else:
        shape = run_shape(cfg)
    unset = {name: value for name, value in shape.items() if cfg.origin[name] == "default"}
    vars(cfg).update(unset)
    cfg.origin |= dict.fromkeys(unset, source)


def run_shape(cfg):
    """Return {setting: value} of the shape of the run that init_from names, {} if there is none."""
    shape = {}
    with contextlib.suppress(ValueError):  # whoever reads its weights reports it
        if cfg.init_from:
            _, shape = run_settings(cfg.init_from, set(), SHAPE)
    return {name: value for name, value in shape.items() if type(value) is type(getattr(cfg, name))}


def divide_batch(cfg):
    """Derive cfg.total_batch_size (tokens) and cfg.accumulation (micro-steps); yield the fault of a rest."""
    micro = cfg.batch_size * cfg.seq_len * WORLD
    total = cfg.total_batch_size = cfg.total_batch_size or micro
    cfg.accumulation, rest = divmod(total, micro)
    if not rest:
        return
    devices = f" x {WORLD} devices" if WORLD > 1 else ""
    product = f"batch_size {cfg.batch_size} x seq_len {cfg.seq_len}{devices}"
    remedy = f"use total_batch_size = {max(1, round(total / micro)) * micro}"
    sequences, rest = divmod(total, cfg.seq_len * WORLD)
    if not rest:
        fits = max(n for n in range(1, min(cfg.batch_size, sequences, 2**20) + 1) if sequences % n == 0)
        remedy += f", or batch_size = {fits}, which does not change the experiment"
    yield f"total_batch_size = {total:,} is not a multiple of {product} = {micro:,} tokens; {remedy}"


def contradictions(cfg):
    """Yield all contradictions among the settings of a run; derive max_steps and those of divide_batch."""
    if cfg.dtype == "float16" and (cfg.n_expert or cfg.fsdp):
        yield "dtype = 'float16' does not work with n_expert or fsdp; use bfloat16 or float32"
    if cfg.max_steps and cfg.total_tokens:
        yield f"max_steps = {cfg.max_steps}, total_tokens = {cfg.total_tokens}: set one of them to 0"
    if cfg.init_from and cfg.resume not in ("", "auto"):
        yield "resume and init_from exclude each other: resume continues a run, init_from begins at step 0"
    if cfg.tokenize_on_fly and os.name == "nt":
        yield "tokenize_on_fly does not work on Windows; let the preparation end first, or use WSL2"
    if cfg.tokenize_on_fly and cfg.eval_every and not cfg.eval_tokens:
        yield "eval_tokens = 0 (all) does not work with tokenize_on_fly; set it, or set eval_every = 0"
    if cfg.patience > 0 and cfg.eval_every <= 0:
        yield f"patience = {cfg.patience} needs evaluations; set eval_every"
    if cfg.n_expert > 0 and not 1 <= cfg.n_expert_active <= cfg.n_expert:
        yield f"n_expert_active = {cfg.n_expert_active} must be from 1 to n_expert = {cfg.n_expert}"
    sizes = (cfg.batch_size, cfg.seq_len, cfg.n_embd, cfg.n_head, cfg.n_kv_head)
    if min(sizes) <= 0 or cfg.total_batch_size < 0:
        return
    head_size, rest = divmod(cfg.n_embd, cfg.n_head)
    if rest:
        yield f"n_embd = {cfg.n_embd} is not divisible by n_head = {cfg.n_head}"
    elif head_size % 2:
        yield f"n_embd / n_head = {head_size} is odd; rotary positions need an even head size"
    if cfg.n_head % cfg.n_kv_head:
        yield f"n_head = {cfg.n_head} is not divisible by n_kv_head = {cfg.n_kv_head}"
    if cfg.ternary and max(cfg.n_embd, cfg.ffn_dim) * 127 >= 2**24:
        yield f"n_embd = {cfg.n_embd}, ffn_dim = {cfg.ffn_dim}: a ternary layer has at most 132,104 inputs"
    yield from divide_batch(cfg)
    cfg.max_steps = cfg.max_steps or -(-cfg.total_tokens // cfg.total_batch_size)
