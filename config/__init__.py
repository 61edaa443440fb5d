"""
The checked loader of settings: config/default.py, then the config files, then the flags, wherever they stand.

    cfg = config.load(sys.argv[1:])      one object with attributes; cfg.origin[name]: where a value is from

All faults of a command line are reported together, one `error:` line each, and end the program with exit
code 2.
"""

import ast
import difflib
import glob
import math
import os
import re
import runpy
import sys
import textwrap
from types import ModuleType, SimpleNamespace

from nanobit import terminal
from nanobit.cli import ROOT, WORLD, fail

DEFAULT = os.path.join(ROOT, "config", "default.py")
SCHEDULES = ("two_stage", "bitnet", "wsd", "cosine", "linear", "constant")
DTYPES = ("auto", "float32", "bfloat16", "float16")
RATIOS = {"stage2_lr": "stage2_lr_ratio", "min_lr": "min_lr_ratio"}  # former settings and their successors
# names of nanoGPT, transformers and others
ALIASES = dict(
    pair.split(":")
    for pair in (
        "block_size:seq_len context_length:seq_len max_seq_len:seq_len n_embed:n_embd hidden_size:n_embd "
        "d_model:n_embd intermediate_size:ffn_dim num_layers:n_layer num_hidden_layers:n_layer "
        "num_heads:n_head num_attention_heads:n_head weight_tying:tie_embeddings "
        "tie_word_embeddings:tie_embeddings max_iters:max_steps iters:max_steps lr_decay_iters:max_steps "
        "epochs:total_tokens lr:learning_rate warmup_iters:warmup_steps eval_interval:eval_every "
        "eval_iters:eval_tokens log_interval:log_every save_interval:save_every "
        "gradient_accumulation_steps:total_batch_size grad_accum:total_batch_size precision:dtype "
        "name:run_id out:out_dir init:init_from temp:temperature start:prompt num_tokens:max_new_tokens"
    ).split()
)


def settings_of(cfg):
    """{setting: value}, without where each came from"""
    return {name: value for name, value in vars(cfg).items() if name != "origin"}


def assignments(path):
    """Return {name: value} of a config file, without names that start with _, functions and modules."""
    return {
        key: value
        for key, value in runpy.run_path(path).items()
        if not (key.startswith("_") or callable(value) or isinstance(value, ModuleType))
    }


def with_ratios(settings):
    """Return the saved settings of a run with stage2_lr_ratio and min_lr_ratio. Earlier versions saved the
    rates themselves; such a number stays beside its ratio if the product is not the same float."""
    settings = dict(settings)
    for former, ratio in RATIOS.items():
        rate, peak = settings.get(former), settings.get("learning_rate")
        if ratio not in settings and type(rate) is type(peak) is float:
            settings[ratio] = rate / peak if peak else 1.0
            if settings[ratio] * peak == rate:
                del settings[former]
    return settings


def run_settings(path, given):
    """Return the settings of the run that a `resume` path lies in, and the file they are from: without what
    belongs to one command, and without a length if one of these flags gives another. Raises ValueError with
    one line if there is no such run, or its config.json cannot be read."""
    import json  # here only, so that --help stays quick

    folder = os.path.abspath(path)
    if os.path.isfile(folder):  # checkpoint.pt
        folder = os.path.dirname(folder)
    if os.path.basename(folder) == "best" and not os.path.exists(folder):  # as in checkpoint.locate
        folder = os.path.dirname(folder)
    if os.path.basename(os.path.dirname(folder)) == "checkpoints":  # a step folder
        folder = os.path.dirname(os.path.dirname(folder))
    # the folder may have been moved since, or renamed
    parent, run_id = os.path.split(folder)
    out_dir = parent.removeprefix(os.getcwd() + os.sep)
    source = os.path.join(out_dir, run_id, "config.json")
    if not os.path.isdir(folder):
        raise ValueError(f"resume = {path!r} does not exist; give a run folder, or name a config file")
    lengths = {"max_steps", "total_tokens"}
    if given & lengths and not os.path.exists(source):  # a step folder that was copied alone
        return {}, source
    try:
        with open(source, encoding="utf-8") as file:
            found = with_ratios({key: entry["value"] for key, entry in json.load(file)["settings"].items()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        what = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{source} cannot be read ({terminal.printable(what)}), so the settings of that run are unknown; "
            "name its config file and flags as before, with --resume=auto"
        ) from None
    if given & lengths:
        leave_out = lengths
    else:
        leave_out = {"max_steps"} if found.get("total_tokens") else set()  # it was derived
    leave_out |= {"resume", "init_from", "verify_data"}
    found = {key: value for key, value in found.items() if key not in leave_out}
    return found | dict(out_dir=out_dir, run_id=run_id), source


def comments():
    """[(section, [(name, comment)])] of default.py, in its order"""
    sections = []
    for line in open(DEFAULT, encoding="utf-8").read().split("\n\n", 1)[1].splitlines():
        if line.startswith("# "):
            sections.append((line[2:], []))
        elif " = " in line:
            sections[-1][1].append((line.split(" = ")[0], line.rsplit("  # ", 1)[1]))
    return sections


def print_help(doc, flags, defaults, takes_files):
    """the script's docstring, its own flags, then the settings, each with default and comment"""
    terminal.end_with_output()
    width = min(100, max(50, os.get_terminal_size().columns if sys.stdout.isatty() else 100))
    print(doc.strip())
    sections = [("options", [(name, comment) for name, (_, comment) in flags.items()])]
    for section, rows in comments():
        sections.append((section, [row for row in rows if row[0] in defaults and row[0] not in flags]))
    for section, rows in sections:
        if rows:
            print(f"\n{section}:")
        for name, comment in rows:
            print(f"  --{name}={defaults[name]!r}")
            print(textwrap.fill(comment, width, initial_indent=" " * 6, subsequent_indent=" " * 6))
    print(
        "\n--key=value and --key value are the same, as are - and _ in names; --flag and --no-flag set bools."
    )
    if takes_files:
        print("Flags override config files, which override config/default.py.")


def coerce(key, value, want):
    """value as the type of the default, or TypeError that names both types"""
    if want is float and type(value) is int:  # --learning_rate=1
        value = float(value) if abs(value) < 2**1023 else math.inf
    if want is int and type(value) is float and value.is_integer():  # --max_steps=1e5
        value = int(value)
    if want is float and type(value) is float and not math.isfinite(value):
        raise TypeError(f"{key} = {value} must be finite")
    if type(value) is tuple:
        value = list(value)
    if type(value) is not want or (want is list and not all(type(item) is str for item in value)):
        quoted = f"""a list of strings, in a shell --{key}="['a', 'b']\""""
        shown = {"list": quoted, "bool": "bool (True or False)"}
        shown = shown.get(want.__name__, want.__name__)
        raise TypeError(f"{key} is {shown}, got {type(value).__name__} {value!r}")
    return value


def parse(text, want):
    """the value that a flag's text stands for"""
    if want is str:  # --run_id=123 is a name
        return text
    if want is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def unknown(key, known):
    """Return the fault of a name that is not a setting, with the nearest one that is."""
    if key.startswith("no_") and key[3:] + "_every" in known:  # --no-eval
        return f"no setting named {key}; to switch it off: --{key[3:]}_every=0"
    near = [ALIASES[key]] if ALIASES.get(key) in known else difflib.get_close_matches(key, known, n=1)
    return f"no setting named {key}" + (f"; did you mean {near[0]}?" if near else "; --help lists all")


def renamed(key, rate, learning_rate):
    """Return the fault of a rate that is a fraction of learning_rate today, with that fraction."""
    is_number = isinstance(rate, (int, float)) and learning_rate
    here = f"; here {rate / learning_rate:.6g}" if is_number else ""
    return f"{key} is now {RATIOS[key]} = {key} / learning_rate{here}"


def file_fault(path):
    """Return what is wrong with a config file before it is read, with the remedy, or ''."""
    if os.path.isfile(path):
        if path.endswith(".py"):
            return ""
        is_run = os.path.basename(path) == "config.json"
        remedy = f"; --resume={os.path.dirname(path) or '.'} takes the settings of that run" if is_run else ""
        return f"config file {path} is not Python: expected NAME.py with lines as max_steps = 100{remedy}"
    if os.path.isdir(path):
        return f"{path} is a folder, not a config file; if a run is in it: --resume={path}"
    if "=" in path:
        return f"{path} is not a file; did you mean --{path}?"
    if os.path.isfile(os.path.join(ROOT, path)):
        return (
            f"config file {path} does not exist: paths are relative to the current folder; first cd {ROOT}, "
            f"or give {os.path.join(ROOT, path)}"
        )
    near = difflib.get_close_matches(path, glob.glob("config/train_*.py"), n=1, cutoff=0.4)
    return f"config file {path} does not exist" + (f"; did you mean {near[0]}?" if near else "")


def split(argv, types):
    """Return (config files, [(name, text, flag as typed)], faults) of a command line."""
    files, given, faults, args = [], [], [], list(argv)

    def is_value(text):
        return text and not text.startswith("-") and not text.endswith(".py") and not os.path.exists(text)

    while args:
        arg = args.pop(0)
        if not arg.startswith("-"):
            files.append(arg)
            continue
        key, eq, text = arg.lstrip("-").partition("=")
        key, following = key.replace("-", "_"), args[0] if args else ""
        n = 2 if following == "=" else 1
        value = "".join(args[:n]).removeprefix("=")
        is_before = not eq and following.startswith("=") and (n == 2 or types.get(key) is not str)
        if (is_before and is_value(value)) or (eq and not text and is_value(following)):
            del args[:n]
            faults.append(f"{arg} {following}: no spaces around =, as --{key}={value}")
            continue
        if not eq and types.get(key) is bool:
            text = args.pop(0) if following.lower() in ("true", "false") else "True"
        elif not eq and types.get(key.removeprefix("no_")) is bool:
            key, text = key[3:], "False"
        elif not eq and key in types:
            if not args or following.startswith("--"):
                faults.append(f"{arg} needs a value: {arg}=...")
                continue
            text = args.pop(0)
        elif not eq and is_value(following):  # of a name that is unknown
            text = args.pop(0)
        given.append((key, text, arg))
    return files, given, faults


def load(argv, doc="", flags=None, only=None, check_run=True):
    """the settings of a command line, as an object with attributes and `origin` {name: where the value came
    from}.

    flags: {name: (default, comment)} of the script's own; they shadow a setting of the same name.
    only: names of the settings this script takes, none of them from files; None = all, and config files.
    check_run: also check that the settings agree with each other, as a run needs it.

    Exits with 2 and one `error:` line per fault; --help prints `doc` and all settings, exits with 0.
    """
    flags = flags or {}
    values = assignments(DEFAULT)
    if only is not None:
        values = {key: values[key] for key in only}
    values |= {key: default for key, (default, _) in flags.items()}
    if "--help" in argv or "-h" in argv:
        print_help(doc, flags, values, takes_files=only is None)
        raise SystemExit(0)
    types = {key: type(value) for key, value in values.items()}
    origin = dict.fromkeys(values, "default")
    files, given, faults = split(argv, types)

    def put(key, value, source):
        if RATIOS.get(key) in types:
            faults.append(f"{source}: {renamed(key, value, values['learning_rate'])}")
            return
        if key not in types:
            faults.append(f"{source}: {unknown(key, types)}")
            return
        try:
            values[key], origin[key] = coerce(key, value, types[key]), source
        except TypeError as error:
            faults.append(f"{source}: {error}")

    def is_former(item):  # a former rate is compared with the learning_rate beside it, which comes first
        return item[0] in RATIOS

    resume = ([""] + [text for key, text, _ in given if key == "resume"])[-1]
    if only is None and not files and resume not in ("", "auto"):
        found, source = {}, ""
        try:
            found, source = run_settings(resume, {key for key, _, _ in given})
        except ValueError as error:
            faults.append(str(error))
        for key in [key for key in found if key in types]:
            put(key, found[key], source)
    if files and only is not None:
        name = next((name for name in ("ckpt", "files") if name in flags), None)
        paths = [path for path in (files[0], os.path.join("runs", files[0])) if os.path.exists(path)]
        hint = f"did you mean --{name}={paths[0]}?" if name and paths else "--help lists them"
        faults.append(f"{files[0]}: this script takes no file, only flags; {hint}")
        files = []
    for path in files:
        if fault := file_fault(path):
            faults.append(fault)
            continue
        try:
            found = assignments(path)
        except Exception as error:  # the file is the user's own code: whatever it raises is its fault
            faults.append(f"config file {path}: {type(error).__name__}: {error}")
            continue
        for key, value in sorted(found.items(), key=is_former):
            put(key, value, path)
    for key, text, arg in sorted(given, key=is_former):
        put(key, parse(text, types.get(key)), arg)
    if not 0 <= values.get("seed", 0) < 2**63:
        faults.append(f"seed = {values['seed']} must be at least 0 and less than 2^63")
    for key in ("out_dir", "data_dir"):
        if values.get(key) == "":
            faults.append(f"{key} = '' is not a folder; . is the one the command runs in")
    for key in ("run_id", "name"):
        if key in values and (values[key] in (".", "..") or set(values[key]) & set("/\\")):
            faults.append(f"{key} = {values[key]!r} is not the name of a folder, but a path")
        elif key in values and not values[key].isprintable():
            faults.append(f"{key} = {values[key]!r} has a line break or control character; leave it out")
    if check_run and values.get("init_from"):
        take_shape(values, origin, faults)
    cfg = SimpleNamespace(**values, origin=origin)
    if only is None and not cfg.run_id:
        names = [os.path.splitext(os.path.basename(path))[0] for path in files]
        cfg.run_id = names[-1] if names else "default"
    if check_run and not any(map(file_fault, files)):
        check(cfg, faults)
    if faults:
        fail(*faults)
    return cfg


def take_shape(values, origin, faults):
    """Give the shape settings that nobody has set the values of the Llama whose folder init_from names; what
    was set is compared when its weights are read."""
    from nanobit.export import llama  # which imports this module

    if not llama.is_folder(values["init_from"]):
        return
    shape, positions = llama.shape(values["init_from"])
    source = f"init_from {values['init_from']}"
    for key, value in shape.items():
        if origin[key] == "default":
            values[key], origin[key] = value, source
    if values["seq_len"] > positions and origin["seq_len"] == "default":
        values["seq_len"], origin["seq_len"] = positions, source
    elif values["seq_len"] > positions:
        faults.append(f"seq_len = {values['seq_len']} is more than the {positions:,} positions of {source}")


def need_flags(cfg, *names):
    """exit with 2 where a flag that a script cannot do without is missing"""
    missing = [name for name in names if cfg.origin[name] == "default"]
    if missing:
        fail(*(f"--{name}=... is missing; --help says what it is" for name in missing))


def check(cfg, faults):
    """add to faults all contradictions among the settings of a run, and derive cfg.max_steps,
    cfg.total_batch_size (tokens) and cfg.accumulation (micro-steps per step)"""
    before = len(faults)

    def need(ok, text):
        if not ok:
            faults.append(text)
        return ok

    for key in (
        "batch_size seq_len n_layer n_head n_kv_head n_embd ffn_dim vocab_multiple rope_theta norm_eps "
        "adam_eps log_every"
    ).split():
        need(getattr(cfg, key) > 0, f"{key} = {getattr(cfg, key)} must be more than 0")
    for key in (
        "total_batch_size max_steps total_tokens max_minutes vocab_size learning_rate weight_decay "
        "grad_clip warmup_steps stage2_lr_ratio stage2_weight_decay min_lr_ratio eval_every sample_every "
        "save_every keep_last patience sample_tokens eval_tokens n_expert router_balance router_z"
    ).split():
        need(getattr(cfg, key) >= 0, f"{key} = {getattr(cfg, key)} must not be negative")
    for key in ("beta1", "beta2", "muon_momentum", "dropout"):
        need(0 <= getattr(cfg, key) < 1, f"{key} = {getattr(cfg, key)} must be at least 0 and less than 1")
    for key in ("stage_boundary", "decay_fraction"):
        need(
            0 < getattr(cfg, key) <= 1,
            f"{key} = {getattr(cfg, key)} is a fraction of max_steps: more than 0, at most 1",
        )
    if len(faults) == before:  # the numbers are in range
        need(
            cfg.n_embd % cfg.n_head == 0, f"n_embd = {cfg.n_embd} is not divisible by n_head = {cfg.n_head}"
        ) and need(
            cfg.n_embd // cfg.n_head % 2 == 0,
            f"n_embd / n_head = {cfg.n_embd // cfg.n_head} is odd; rotary positions need an even head size",
        )
        need(
            cfg.n_head % cfg.n_kv_head == 0,
            f"n_head = {cfg.n_head} is not divisible by n_kv_head = {cfg.n_kv_head}",
        )
        need(
            not cfg.ternary or max(cfg.n_embd, cfg.ffn_dim) * 127 < 2**24,
            f"n_embd = {cfg.n_embd}, ffn_dim = {cfg.ffn_dim}: sums over more than 132,103 are not exact",
        )
        need(
            not cfg.n_expert or 1 <= cfg.n_expert_active <= cfg.n_expert,
            f"n_expert_active = {cfg.n_expert_active} must be from 1 to n_expert = {cfg.n_expert}; set both, "
            "or n_expert = 0 for none",
        )
        micro = cfg.batch_size * cfg.seq_len
        each, micro = f"batch_size {cfg.batch_size} x seq_len {cfg.seq_len}", micro * WORLD
        each += f" x {WORLD} devices" if WORLD > 1 else ""
        total = cfg.total_batch_size or micro
        remedy = f"use {max(1, round(total / micro)) * micro}"
        if total % micro and total % (cfg.seq_len * WORLD) == 0:
            sequences = total // cfg.seq_len // WORLD
            fits = next(n for n in range(min(cfg.batch_size, sequences), 0, -1) if sequences % n == 0)
            remedy += f", or batch_size = {fits}, which does not change the experiment"
        need(
            total % micro == 0,
            f"total_batch_size = {total:,} is not a multiple of {each} = {micro:,} tokens; {remedy}",
        )
        cfg.total_batch_size, cfg.accumulation = total, total // micro
    need(
        cfg.schedule in SCHEDULES,
        f"schedule = {cfg.schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}",
    )
    need(
        cfg.dtype != "float16" or not (cfg.n_expert or cfg.fsdp),
        f"dtype = 'float16' is not for n_expert = {cfg.n_expert}, fsdp = {cfg.fsdp}; use bfloat16 or float32",
    )
    need(cfg.dtype in DTYPES, f"dtype = {cfg.dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    need(
        re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", cfg.device),
        f"device = {cfg.device!r} is unknown; choose one of auto, cpu, cuda, cuda:1, mps",
    )
    need(
        cfg.optimizer in ("adamw", "muon"), f"optimizer = {cfg.optimizer!r} is unknown; choose adamw or muon"
    )
    lengths = f"max_steps = {cfg.max_steps}, total_tokens = {cfg.total_tokens}"
    if not cfg.max_steps and not cfg.total_tokens:
        need(
            faults,
            f"{lengths}: the run has no length; name a config file (config/train_simple.py) or set one",
        )
    elif cfg.max_steps and cfg.total_tokens:
        need(False, f"{lengths}: both give the length of the run; set the one that is not meant to 0")
    elif not faults:
        cfg.max_steps = cfg.max_steps or -(-cfg.total_tokens // cfg.total_batch_size)
    if cfg.resume and cfg.init_from:
        need(
            cfg.resume == "auto",
            "resume and init_from exclude each other: resume continues a run, init_from begins at step 0",
        )
    if cfg.tokenize_on_fly:
        need(
            os.name != "nt",
            "tokenize_on_fly does not work on Windows, where a file that is open cannot be renamed: let the "
            "preparation end first, or use WSL2",
        )
    if cfg.tokenize_on_fly and cfg.eval_every:
        need(
            cfg.eval_tokens > 0,
            "eval_tokens = 0 (all) cannot go with tokenize_on_fly, whose validation set still grows: set it, "
            "or --eval_every=0",
        )
    if cfg.patience:
        need(cfg.eval_every > 0, f"patience = {cfg.patience} needs evaluations: set eval_every")
