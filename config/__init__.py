"""
The checked loader of settings: config/default.py, then the config files, then the flags, wherever they stand.

    cfg = config.load(doc=__doc__)      one object with attributes; cfg.origin[name]: where a value is from
"""

import difflib
import glob
import os
import re
import runpy
import signal
import sys
from types import ModuleType, SimpleNamespace

from nanobit import cli, terminal
from nanobit.cli import ROOT, WORLD, Flag, coerce, fail

DEFAULT = os.path.join(ROOT, "config", "default.py")
RATIOS = {"stage2_lr": "stage2_lr_ratio", "min_lr": "min_lr_ratio"}  # former settings and their successors
DTYPES = ("auto", "float32", "bfloat16", "float16")
CHOICES = {
    "device": ("auto", "cpu", "cuda", "cuda:1", "mps"),
    "dtype": DTYPES,
    "optimizer": ("adamw", "muon"),
    "schedule": ("two_stage", "bitnet", "wsd", "cosine", "linear", "constant"),
}
RANGES = {  # those of the other numbers: at least 0
    "(0, inf)": "batch_size seq_len n_layer n_head n_kv_head n_embd ffn_dim vocab_multiple rope_theta "
    "norm_eps adam_eps log_every",
    "[0, 1)": "beta1 beta2 muon_momentum dropout",
    "(0, 1]": "stage_boundary decay_fraction",
    "[0, 9223372036854775808)": "seed",
}


def settings_of(cfg):
    """Return {setting: value}, without the origins."""
    return {name: value for name, value in vars(cfg).items() if name != "origin"}


def assignments(path):
    """Return {name: value} of a config file, without names that start with _, functions and modules."""
    return {
        name: value
        for name, value in runpy.run_path(path).items()
        if not (name.startswith("_") or callable(value) or isinstance(value, ModuleType))
    }


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
    """Return the saved settings of a run with stage2_lr_ratio and min_lr_ratio. Earlier versions saved the
    rates themselves; such a number stays beside its ratio if the product is not the same float."""
    settings = dict(settings)
    peak = settings.get("learning_rate")
    for former, ratio in RATIOS.items():
        rate = settings.get(former)
        if ratio not in settings and type(rate) is type(peak) is float:
            settings[ratio] = rate / peak if peak else 1.0
            if settings[ratio] * peak == rate:
                del settings[former]
    return settings


def run_folder(path):
    """Return the run folder that a `resume` path lies in. Raises ValueError if it does not exist."""
    folder = os.path.abspath(path)
    if os.path.isfile(folder):  # checkpoint.pt
        folder = os.path.dirname(folder)
    if os.path.basename(folder) == "best" and not os.path.exists(folder):  # as in checkpoint.locate
        folder = os.path.dirname(folder)
    if os.path.basename(os.path.dirname(folder)) == "checkpoints":  # a step folder
        folder = os.path.dirname(os.path.dirname(folder))
    if not os.path.isdir(folder):
        raise ValueError(f"resume = {path!r} does not exist; give a run folder, or name a config file")
    return folder


def run_settings(path, given):
    """Return (file, settings) of the run that a `resume` path lies in, without what belongs to one command,
    and without a length if one is given. Raises ValueError if the run or its settings cannot be read."""
    import json  # here only, so that --help stays quick

    # the folder may have been moved or renamed since it was written
    parent, run_id = os.path.split(run_folder(path))
    out_dir = parent.removeprefix(os.getcwd() + os.sep)
    source = os.path.join(out_dir, run_id, "config.json")
    lengths = {"max_steps", "total_tokens"}
    has_length = bool(given & lengths)
    if has_length and not os.path.exists(source):  # a step folder that was copied alone
        return source, {}
    try:
        with open(source, encoding="utf-8") as file:
            rows = json.load(file)["settings"]
        values = with_ratios({name: row["value"] for name, row in rows.items()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{source} cannot be read ({terminal.printable(reason)}), so the settings of that run are not "
            "known; name its config file and flags as before, with --resume=auto"
        ) from None
    left_out = {"resume", "init_from", "verify_data"}
    if has_length:
        left_out |= lengths
    elif values.get("total_tokens"):  # max_steps was derived from it
        left_out.add("max_steps")
    values = {name: value for name, value in values.items() if name not in left_out}
    return source, values | dict(out_dir=out_dir, run_id=run_id)


def file_fault(path):
    """Return what is wrong with a config file before it is read, with the remedy, or ''."""
    if os.path.isfile(path):
        if path.endswith(".py"):
            return ""
        fault = f"config file {path} is not Python: expected NAME.py with lines such as max_steps = 100"
        if os.path.basename(path) == "config.json":
            fault += f"; --resume={os.path.dirname(path) or '.'} takes the settings of that run"
        return fault
    if os.path.isdir(path):
        return f"{path} is a folder, not a config file; if it is a run: --resume={path}"
    if "=" in path:
        return f"{path} is not a file; did you mean --{path}?"
    fault = f"config file {path} does not exist"
    here = os.path.join(ROOT, path)
    if os.path.isfile(here):
        return f"{fault}: paths are relative to the current folder; first cd {ROOT}, or give {here}"
    near = difflib.get_close_matches(path, glob.glob("config/train_*.py"), n=1, cutoff=0.4)
    return f"{fault}; did you mean {near[0]}?" if near else fault


def path_fault(path, flags):
    """Return the fault of a path on the command line of a script that takes flags only."""
    remedy = "--help lists them"
    for name in ("files", "ckpt"):
        for existing in (os.path.join("runs", path), path):
            if name in flags and os.path.exists(existing):
                remedy = f"did you mean --{name}={existing}?"
    return f"{path}: this script takes no file, only flags; {remedy}"


def read_layers(paths, given, known, faults):
    """Return [(file, {name: value})] of the config files, or else of the run that --resume names. Adds what
    cannot be read to faults."""
    layers = []
    texts = {name: text for name, text, _ in given}
    if not paths and texts.get("resume", "") not in ("", "auto"):
        try:
            source, values = run_settings(texts["resume"], texts.keys())
            layers.append((source, {name: value for name, value in values.items() if name in known}))
        except ValueError as error:
            faults.append(str(error))
    for path in paths:
        if fault := file_fault(path):
            faults.append(fault)
            continue
        try:
            values = assignments(path)
        except Exception as error:  # the file is the user's own code: whatever it raises is its fault
            faults.append(f"config file {path}: {type(error).__name__}: {error}")
            continue
        layers.append((path, {name: values[name] for name in sorted(values, key=RATIOS.__contains__)}))
    return layers


def put(cfg, known, name, value, source):
    """Set one setting. Returns what is wrong with it, or ''."""
    if RATIOS.get(name) in known:
        fault = f"{source}: {name} is now {RATIOS[name]} = {name} / learning_rate"
        if isinstance(value, (int, float)) and cfg.learning_rate:
            fault += f"; here {value / cfg.learning_rate:.6g}"
        return fault
    if name not in known:
        return f"{source}: {cli.unknown(name, known)}"
    try:
        setattr(cfg, name, coerce(name, value, type(known[name].default)))
    except TypeError as error:
        return f"{source}: {error}"
    cfg.origin[name] = source
    return ""


def load(argv=None, doc="", flags=None, only=None, derive=None, takes_paths=False):
    """Return the settings of a command line: an object with attributes and `origin`, {name: source}.

    argv: None = of this program; then Ctrl-C and an output that cannot be written end it from now on.
    flags: {name: Flag} of the script itself; they shadow a setting of the same name.
    only: names of the settings that this script takes, none of them from files; None = those of a run, all.
    derive: a function of cfg that may change it before the settings are compared, and returns faults.
    takes_paths: keep the arguments that are not flags as cfg.paths.

    Exits with 2 and one `error:` line per fault. --help prints `doc` and all settings, and exits with 0.
    """
    if argv is None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        terminal.end_with_output()
        argv = sys.argv[1:]
    flags = {name: Flag(*row) for name, row in (flags or {}).items()}
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
    layers = []
    if takes_paths:
        cfg.paths = paths
    elif only is None:
        layers = read_layers(paths, given, known, faults)
    elif paths:
        faults.append(path_fault(paths[0], flags))
    types = {name: type(flag.default) for name, flag in known.items()}
    # a former rate is compared with the learning_rate beside it, which comes first
    for name, text, arg in sorted(given, key=lambda row: row[0] in RATIOS):
        layers.append((arg, {name: cli.parse(text, types.get(name))}))
    for source, values in layers:
        faults += filter(None, [put(cfg, known, name, value, source) for name, value in values.items()])
    faults += cli.check(cfg, known)
    if derive:
        faults += derive(cfg)
    if only is None and not any(map(file_fault, paths)):
        file = os.path.basename((paths or ["default"])[-1])
        cfg.run_id = cfg.run_id or os.path.splitext(file)[0]
        faults += take_shape(cfg)
        faults += contradictions(cfg)
        if not (faults or cfg.max_steps):
            faults.append(
                "the run has no length; name a config file (config/train_simple.py) or set max_steps"
            )
    if faults:
        fail(*faults)
    return cfg


def take_shape(cfg):
    """Give the shape settings that nobody has set the values of the Llama whose folder init_from names; what
    was set is compared when its weights are read. Returns faults."""
    from nanobit.export import llama  # which imports this module

    if not cfg.init_from or not llama.is_folder(cfg.init_from):
        return []
    shape, positions = llama.shape(cfg.init_from)
    source = f"init_from {cfg.init_from}"
    if cfg.seq_len > positions:
        if cfg.origin["seq_len"] != "default":
            return [f"seq_len = {cfg.seq_len} is more than the {positions:,} positions of {source}"]
        shape["seq_len"] = positions
    unset = {name: value for name, value in shape.items() if cfg.origin[name] == "default"}
    vars(cfg).update(unset)
    cfg.origin |= dict.fromkeys(unset, source)
    return []


def shape_faults(cfg):
    """Yield the contradictions among the sizes of the model."""
    head_size, rest = divmod(cfg.n_embd, cfg.n_head)
    if rest:
        yield f"n_embd = {cfg.n_embd} is not divisible by n_head = {cfg.n_head}"
    elif head_size % 2:
        yield f"n_embd / n_head = {head_size} is odd; rotary positions need an even head size"
    if cfg.n_head % cfg.n_kv_head:
        yield f"n_head = {cfg.n_head} is not divisible by n_kv_head = {cfg.n_kv_head}"
    if cfg.ternary and max(cfg.n_embd, cfg.ffn_dim) * 127 >= 2**24:
        yield f"n_embd = {cfg.n_embd}, ffn_dim = {cfg.ffn_dim}: a ternary layer has at most 132,103 inputs"
    if cfg.n_expert > 0 and not 1 <= cfg.n_expert_active <= cfg.n_expert:
        yield f"n_expert_active = {cfg.n_expert_active} must be from 1 to n_expert = {cfg.n_expert}"


def divide_batch(cfg):
    """Derive cfg.total_batch_size (tokens) and cfg.accumulation (micro-steps per step); yield the fault of a
    remainder."""
    micro = cfg.batch_size * cfg.seq_len * WORLD
    total = cfg.total_batch_size or micro
    cfg.total_batch_size = total
    cfg.accumulation, rest = divmod(total, micro)
    if not rest:
        return
    product = f"batch_size {cfg.batch_size} x seq_len {cfg.seq_len}"
    if WORLD > 1:
        product += f" x {WORLD} devices"
    remedy = f"use {max(1, round(total / micro)) * micro}"
    sequences, rest = divmod(total, cfg.seq_len * WORLD)
    if not rest:
        fits = max(n for n in range(1, min(cfg.batch_size, sequences) + 1) if sequences % n == 0)
        remedy += f", or batch_size = {fits}, which does not change the experiment"
    yield f"total_batch_size = {total:,} is not a multiple of {product} = {micro:,} tokens; {remedy}"


def contradictions(cfg):
    """Yield all contradictions among the settings of a run; derive cfg.max_steps, total_batch_size and
    accumulation."""
    sizes = (cfg.batch_size, cfg.seq_len, cfg.n_embd, cfg.n_head, cfg.n_kv_head)
    if min(sizes) > 0 and cfg.total_batch_size >= 0:
        yield from shape_faults(cfg)
        yield from divide_batch(cfg)
    if cfg.dtype == "float16" and (cfg.n_expert or cfg.fsdp):
        yield "dtype = 'float16' does not work with n_expert or fsdp; use bfloat16 or float32"
    if cfg.max_steps and cfg.total_tokens:
        lengths = f"max_steps = {cfg.max_steps}, total_tokens = {cfg.total_tokens}"
        yield f"{lengths}: both give the length of the run; set the one that is not meant to 0"
    elif cfg.total_tokens:
        cfg.max_steps = -(-cfg.total_tokens // max(1, cfg.total_batch_size))
    if cfg.init_from and cfg.resume not in ("", "auto"):
        yield "resume and init_from exclude each other: resume continues a run, init_from begins at step 0"
    if cfg.tokenize_on_fly and os.name == "nt":
        yield "tokenize_on_fly does not work on Windows; let the preparation end first, or use WSL2"
    if cfg.tokenize_on_fly and cfg.eval_every and not cfg.eval_tokens:
        yield "eval_tokens = 0 (all) does not work with tokenize_on_fly; set it, or set eval_every = 0"
    if cfg.patience > 0 and cfg.eval_every <= 0:
        yield f"patience = {cfg.patience} needs evaluations; set eval_every"
