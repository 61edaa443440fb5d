"""What the commands share: errors, flags with their checks and their help, optional libraries, the rank."""

import ast
import contextlib
import difflib
import importlib.util
import itertools
import math
import operator
import os
import re
import sys
import textwrap
from typing import Any, NamedTuple

from nanobit import terminal

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
REQUIRED = ("torch", "numpy", "tqdm", "filelock")
ALIASES = """
seq_len block_size context_length max_seq_len, n_embd n_embed hidden_size d_model, ffn_dim intermediate_size,
n_layer num_layers num_hidden_layers, n_head num_heads num_attention_heads, learning_rate lr, dtype precision,
tie_embeddings weight_tying tie_word_embeddings, max_steps max_iters iters lr_decay_iters, prompt start,
warmup_steps warmup_iters, eval_every eval_interval, eval_tokens eval_iters, log_every log_interval,
save_every save_interval, total_batch_size gradient_accumulation_steps grad_accum, run_id name, out_dir out,
init_from init, temperature temp, total_tokens epochs, max_new_tokens num_tokens
"""  # our names, each before those in nanoGPT, transformers and others
ALIASES = {name: ours for ours, *names in map(str.split, ALIASES.split(",")) for name in names}
LOWER = {"[": (operator.ge, "at least"), "(": (operator.gt, "more than")}
UPPER = {"]": (operator.le, "at most"), ")": (operator.lt, "less than")}
SEED = "[0, 9223372036854775808)"  # what torch takes: less than 2^63
on_fail = []  # functions that fail() hands its faults to, as one text, before it exits
LAUNCHER = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {}  # facts of torchrun, not settings
RANK = int(LAUNCHER.get("RANK", 0))
WORLD = int(LAUNCHER.get("WORLD_SIZE", 1))
LOCAL_RANK = int(LAUNCHER.get("LOCAL_RANK", 0))


def fail(*faults, code=2):
    """Print each fault as an `error:` line on stderr and exit, with 2 for a user's mistake."""
    print(*(f"error: {fault}" for fault in faults), sep="\n", file=sys.stderr)
    for note in on_fail:
        note("; ".join(faults))
    raise SystemExit(code)


def explain_missing(error_type, error, trace):
    """Print one line with the remedy if a required module is missing, and exit with 2; an excepthook."""
    if not (issubclass(error_type, ModuleNotFoundError) and error.name in REQUIRED):
        return sys.__excepthook__(error_type, error, trace)
    remedy = "install the requirements first: make setup, or pip install -r requirements.txt"
    venv = os.path.join(ROOT, ".venv")
    if os.path.isdir(venv) and os.path.realpath(sys.prefix) != os.path.realpath(venv):
        script = [f"{venv}\\Scripts\\activate"] if os.name == "nt" else ["source", f"{venv}/bin/activate"]
        remedy = f"activate the environment first: {terminal.command_line(script)}"
    fail(f"{sys.executable} has no module {error.name}; {remedy}")


def library(name, package=""):
    """Return an optional library, imported now. Exits with 2 and the way to install it if it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        fail(f"this needs {package or name}, which is not installed: pip install {package or name}")


def need_packages(names, extra):
    """Exit with 2 if packages are missing, naming all of them and the extra of pyproject.toml with them."""
    if missing := " ".join(name for name in names if not importlib.util.find_spec(name)):
        fail(f'this needs {missing}: pip install {missing}, or here pip install -e ".[{extra}]"')


sys.excepthook = explain_missing  # every command imports this file before torch and numpy


class Flag(NamedTuple):
    """A flag or setting: what --help shows and what the command line is checked against."""

    default: Any  # its type is the type of the flag
    comment: str
    choices: tuple = ()  # all allowed values; cuda:1 stands for any number
    within: str = "[0, inf)"  # for numbers: "(0, 1]" is more than 0, at most 1; "[0, 0] or [0.01, inf)"
    only_with: str = ""  # the modes that it needs, as "plan" or "format=hf"
    not_with: str = ""  # flags that exclude it, as "chat play"
    required: bool = False
    unless: str = ""  # flags that make a required one unnecessary, as "chat play"
    many: bool = False  # may be given several times: a list of the texts, in their order


JSON = Flag(False, "end stdout with one JSON line on a terminal, too; elsewhere that is always so")


def split(argv, flags):
    """Return (paths, [(name, value, flag as typed)], faults) of a command line with these {name: Flag}."""
    types = {name: str if flag.many else type(flag.default) for name, flag in flags.items()}
    paths, given, faults = [], [], []
    args = list(argv)

    def is_value(text):
        return re.match(r"[^-]|-\d", text) and not text.endswith(".py") and not os.path.exists(text)

    while args:
        arg = args.pop(0)
        if not arg.startswith("-"):
            paths.append(arg)
            continue
        name, equals, text = arg.lstrip("-").partition("=")
        name = name.replace("-", "_")
        following = "".join(args[:1])
        n = 1 + (following == "=")  # arguments after a name that are = and a value
        value = "".join(args[:n]).removeprefix("=")
        is_space_before = not equals and following.startswith("=") and (n == 2 or types.get(name) is not str)
        is_space_after = equals and not text and is_value(following)
        if is_space_after or (is_space_before and is_value(value)):
            del args[:n]
            faults.append(f"{arg} {following}: write it without spaces around =: --{name}={value}")
            continue
        if not equals and types.get(name) is bool:
            text = args.pop(0) if following.lower() in ("true", "false") else "True"
        elif not equals and types.get(name.removeprefix("no_")) is bool:
            name = name.removeprefix("no_")
            text = "False"
        elif not equals and name in flags and (not args or following.startswith("--")):
            faults.append(f"{arg} needs a value: {arg}=...")
            continue
        elif not equals and (name in flags or is_value(following)):  # the value of an unknown name, too
            text = args.pop(0)
        value = text
        if types.get(name) is not str:  # --run_id=123 is a name
            with contextlib.suppress(SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
                value = ast.literal_eval(text.capitalize() if types.get(name) is bool else text)
        given.append((name, value, arg))
    return paths, given, faults


def coerce(name, value, wanted):
    """Return value as the type of the default. Raises TypeError, which names both types."""
    if wanted is float and type(value) is int:  # --learning_rate=1
        value = float(value) if abs(value) < 2**1023 else math.inf
    if wanted is int and type(value) is float and value.is_integer():  # --max_steps=1e5
        value = int(value)
    if wanted is float and type(value) is float and not math.isfinite(value):
        raise TypeError(f"{name} = {value} must be finite")
    if type(value) is tuple:
        value = list(value)
    if type(value) is not wanted or (wanted is list and not all(type(item) is str for item in value)):
        in_words = {bool: "bool (True or False)", list: f"""a list of strings: --{name}="['a', 'b']\""""}
        expected = in_words.get(wanted, wanted.__name__)
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__} {value!r}")
    return value


def unknown(name, known):
    """Return the fault of a name that is not known, with the nearest one that is."""
    near = [ALIASES.get(name), *difflib.get_close_matches(name, known, n=1)]
    hints = [f"did you mean {other}?" for other in near if other in known] + ["--help lists all"]
    if name.startswith("no_") and name[3:] + "_every" in known:  # --no-eval
        hints = [f"to switch it off: --{name[3:]}_every=0"]
    return f"no setting named {name}; {hints[0]}"


def range_fault(value, within):
    """Return what a number must be to lie in an interval of Flag.within, or '' if it does."""
    expected = []
    for interval in within.split(" or "):
        low, high = interval[1:-1].split(", ")
        is_above, at_least = LOWER[interval[0]]
        is_below, at_most = UPPER[interval[-1]]
        if is_above(value, float(low)) and is_below(value, float(high)):
            return ""
        words = f"{at_least} {low} and {at_most} {high}".removesuffix(" and less than inf")
        expected.append(words.replace("at least 0 and at most 0", "0"))
    return f"must be {' or '.join(expected)}"


def value_fault(name, value, flag):
    """Return what is wrong with the value of a flag by itself, or ''."""
    if flag.choices and re.sub(r":\d+$", ":1", value) not in flag.choices:
        return f"is unknown; choose one of {', '.join(filter(None, flag.choices))}"
    if type(value) in (int, float):
        return range_fault(value, flag.within)
    if name in ("out_dir", "data_dir") and not value:
        return "must not be empty; use '.' for the current folder"
    if name in ("run_id", "name"):
        if set(value) & set("/\\") or value in (".", "..") or not (value or name == "run_id"):
            return "is not the name of a folder; give a name without / and \\"
        if not value.isprintable():
            return "has a line break or control character; leave it out"
    return ""


def check(cfg, flags):
    """Yield the faults of the flags that were given: values out of range, combinations, missing ones."""

    def is_on(mode):
        name, _, value = mode.partition("=")
        return getattr(cfg, name) == value if value else bool(getattr(cfg, name))

    for name, flag in flags.items():
        if cfg.origin[name] == "default":
            if flag.required and not any(map(is_on, flag.unless.split())):
                expected = " or --".join([f"{name}=...", *flag.unless.split()])
                yield f"--{expected} is missing; --help explains it"
            continue
        if fault := value_fault(name, getattr(cfg, name), flag):
            yield f"{name} = {getattr(cfg, name)!r} {fault}"
        for mode in itertools.filterfalse(is_on, flag.only_with.split()):
            yield f"--{name} only applies together with --{mode}"
        for other in filter(is_on, flag.not_with.split()):
            if getattr(cfg, name):
                yield f"--{name} and --{other} exclude each other; leave one out"


def print_help(doc, sections, takes_files):
    """Print a command's docstring, then each flag of {section: {name: Flag}} with default and comment."""
    width = min(100, max(50, os.get_terminal_size().columns)) if sys.stdout.isatty() else 100
    print(doc.strip())
    for title, flags in sections.items():
        if flags:
            print(f"\n{title}:")
        for name, flag in flags.items():
            print(f"  --{name}={flag.default!r}")
            print(textwrap.indent(textwrap.fill(flag.comment, width - 6), " " * 6))
    print("\n--key=value equals --key value, and - equals _ in names; --flag and --no-flag set bools.")
    if takes_files:
        print("Flags override config files, which override config/default.py.")
