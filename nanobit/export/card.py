"""The model card of an export: README.md, made from the files of the run and from nothing else."""

import json
import math
import os
import re
import shlex
import statistics

from nanobit import record
from nanobit.export import hf
from nanobit.monitor import run_files
from nanobit.terminal import printable

LIMIT = 10  # rows of the curve
POINTS = 200  # of the curve in config.json
LATENT = "**Float master weights, for further training**: as they are, they have not the loss below."
# an empty value takes its line away, see write()
CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A {weights} language model of {total:,} parameters, trained with nanoBit \
for {step:,} steps, {tokens:,} tokens of {dataset}.{init}
{use}

{warning}```python
{code}
```

{command}{curve}{twin}`model.safetensors` has {size:,} bytes, {bits:.2f} bits for each parameter.
{speed}
Made by `python train.py` with these settings, the rest as in config/default.py:

```
{settings}
```
{branch}"""

BASE = "A base model: it continues a text, it does not answer."
BASE_CODE = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")  # this folder
model = AutoModelForCausalLM.from_pretrained(".")
inputs = tokenizer({prompt}, return_tensors="pt", return_token_type_ids=False)
made = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(made[0], skip_special_tokens=True))"""
CHAT = "Trained on conversations: it answers. The losses below are those of answers."
CHAT_CODE = """from transformers import pipeline

talk = pipeline("text-generation", model=".")  # this folder
messages = [{"role": "user", "content": "Hello!"}]
made = talk(messages, max_new_tokens=64, do_sample=False)
print(made[0]["generated_text"][-1]["content"])"""


def evaluations(run_dir):
    """Return {step: validation loss} of a run."""
    return {row["step"]: row["val_loss"] for row in run_files.read_run(run_dir)["evals"]}


def thinned(losses, step, n):
    """Return at most n of the steps up to `step` that have a loss, evenly spread, with the first and last."""
    steps = sorted(at for at in losses if at <= step)
    if len(steps) <= n:
        return steps
    return [steps[round(i * (len(steps) - 1) / (n - 1))] for i in range(n)]


def points(run_dir, step):
    """Return the curve of a run up to a step as at most POINTS pairs [step, validation loss]."""
    losses = evaluations(run_dir)
    return [[at, round(losses[at], 5)] for at in thinned(losses, step, POINTS)]


def read(folder):
    """Return (name, {score: number}) of the model card in a folder: its heading, and the first block of JSON
    that is an object of numbers. What is missing is '' or {}."""
    try:
        with open(os.path.join(folder, "README.md"), encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError):
        return "", {}
    headings = re.findall(r"^# (.+)$", text, re.M)
    blocks = re.findall(r"^```json$(.*?)^```$", text, re.M | re.S)
    scores = [score for score in map(numbers_of, blocks) if score]
    return "".join(headings[:1]).strip(" `"), next(iter(scores), {})


def numbers_of(text):
    """Return the object that a JSON text is if it holds numbers only, else {}."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(value, dict):
        return {}
    are_numbers = all(type(item) in (int, float) and math.isfinite(item) for item in value.values())
    return value if are_numbers else {}


def twin_of(run_dir):
    """Return the run beside this one that differs in `ternary` and in its name only, or None."""
    root = os.path.dirname(os.path.abspath(run_dir))
    settings = run_files.read_config(run_dir)["settings"]
    for name in sorted(os.listdir(root)):
        other = run_files.read_config(os.path.join(root, name))["settings"]
        keys = (settings.keys() | other.keys()) - {"run_id", "out_dir", "resume"}
        if [key for key in keys if settings.get(key) != other.get(key)] == ["ternary"]:
            return os.path.join(root, name)
    return None


def code(text):
    """Return text as inline code, which Markdown shows as it is: no HTML, link or image of another's file."""
    text = printable(text) or "-"
    longest = max(map(len, re.findall("`+", text)), default=0)
    ticks = "`" * (longest + 1)
    return f"{ticks} {text} {ticks}" if longest else f"`{text}`"


def shell(text):
    """Return text as one word of a bash command, on one line."""
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + printable(text.replace("\\", "\\\\").replace("'", "\\'")) + "'"


def former_settings(run_dir, step):
    """Return {setting: [(value, the last step made with it)]} of those that changed before `step`, and the
    step at which the run branched off another one, or 0."""
    resumes = []
    for row in record.read(run_dir, record.EVENTS):
        if row["event"] in ("start", "resume"):  # steps beyond it were dropped, and made again from there
            resumes = [former for former in resumes if former["step"] < row["step"]] + [row]
    former = {}
    for row in resumes:
        for name, value in (row.get("changed") or {}).items():
            if row["step"] < step:
                former.setdefault(name, []).append((value, row["step"]))
    return former, next((row["step"] for row in resumes), 0)  # a start has the step 0


def curve(losses, step):
    """Return a table of at most LIMIT validation losses up to a step, or ''."""
    shown = thinned(losses, step, LIMIT)
    if not shown:
        return ""
    rows = "".join(f"| {at:,} | {losses[at]:.4f} |\n" for at in shown)
    return f"| step | validation loss, nats per token |\n|---|---|\n{rows}\n"


def changed_settings(cfg, former):
    """Return the settings that differ from the defaults, or did earlier in the run, one a line."""
    lines = []
    for name, default in sorted(run_files.DEFAULTS.items()):
        olds = ", ".join(f"{old!r} up to step {at:,}" for old, at in former.get(name, []))
        if name not in ("run_id", *hf.PRIVATE) and (olds or cfg.get(name, default) != default):
            lines.append(printable(f"{name} = {cfg[name]!r}  # {olds}").removesuffix("  # "))
    return "\n".join(lines)


def write(part, out, run_dir, latent=False):
    """Write README.md in the folder `out`, for the checkpoint `part` of a run; latent: as master weights."""
    cfg = part["config"]
    step = part["step"]
    total = sum(w.numel() for w in {w.data_ptr(): w for w in part["model"].values()}.values())
    size = sum(entry.stat().st_size for entry in os.scandir(out) if entry.name.endswith(".safetensors"))
    prompt = next(iter(cfg["sample_prompts"]), "")
    former, branched = former_settings(run_dir, step)
    losses = evaluations(run_dir)
    texts = dict.fromkeys(("init", "warning", "command", "twin", "speed", "branch"), "")
    texts["weights"], other = ("ternary (BitNet b1.58)", "float") if cfg["ternary"] else ("float", "ternary")
    if cfg["init_from"]:
        texts["init"] = " It began with the weights of another."
    if latent and cfg["ternary"]:
        texts["warning"] = LATENT + "\n\n"
    elif cfg["n_expert"] and cfg["ternary"]:
        texts["warning"] = f"Written here are {hf.DEQUANTIZED}; the losses below are of one that does.\n\n"
    if "chat" in part["tokenizer"]:
        texts |= dict(use=CHAT, code=CHAT_CODE)
        arguments = "--chat"
    else:
        texts |= dict(use=BASE, code=BASE_CODE.format(prompt=json.dumps(prompt)))
        arguments = f"--prompt={shell(prompt)}"
    if not cfg["n_expert"]:
        command = f"python sample.py --ckpt=FOLDER {arguments} --temperature=0"
        texts["command"] = f"With nanoBit:\n\n```bash\n{command}\n```\n\n"
    twin = twin_of(run_dir)
    twin_loss = twin and evaluations(twin).get(step)
    if twin_loss is not None and step in losses:
        name = f"{code(os.path.basename(twin))} ({other}, the same data in the same order)"
        gap = f"this one is {losses[step] - twin_loss:+.4f} from it"
        texts["twin"] = f"Its twin {name} has {twin_loss:.4f}: {gap}.\n\n"
    rows = record.read(run_dir, record.SCALARS)
    if speeds := [row["tokens_per_sec"] for row in rows if row.get("tokens_per_sec")]:
        texts["speed"] = f"Training ran at {statistics.median_high(speeds):,.0f} tokens/s (median).\n"
    if branched:
        texts["branch"] = f"\nIts first {branched:,} steps are those of another run.\n"
    texts |= dict(name=code(cfg["run_id"]), dataset=code(cfg["dataset"]))
    texts |= dict(curve=curve(losses, step), settings=changed_settings(cfg, former))
    numbers = dict(total=total, step=step, tokens=part["tokens"], size=size, bits=8 * size / total)
    with open(os.path.join(out, "README.md"), "w", encoding="utf-8") as file:
        file.write(CARD.format(**texts, **numbers))
