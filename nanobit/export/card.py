"""The model card of an export: README.md made from the files of the run, and from nothing else."""

import json
import os
import re
import shlex

import config
from nanobit import run_dir as record
from nanobit import run_files
from nanobit.export import hf
from nanobit.terminal import printable

LIMIT = 10  # rows of the curve


def settings_of(run_dir):
    """{name: value} of a run's config.json, {} where it cannot be read"""
    return run_files.read_config(run_dir)["settings"]


def evaluations(run_dir):
    """{step: validation loss} of a run"""
    return {row["step"]: row["val_loss"] for row in run_files.read_run(run_dir)["evals"]}


def twin_of(run_dir, settings):
    """the run beside this one that differs in `ternary` and in its name only, or None"""
    free = {"run_id", "ternary", "out_dir", "resume"}
    want = {name: value for name, value in settings.items() if name not in free}
    root = os.path.dirname(os.path.abspath(run_dir))
    for name in sorted(os.listdir(root)) if settings else []:
        other = settings_of(os.path.join(root, name))
        same = {key: value for key, value in other.items() if key not in free} == want
        if same and other.get("ternary") != settings.get("ternary"):
            return os.path.join(root, name)
    return None


def code(text):
    """Return text as inline code, which Markdown shows as it is: no HTML, link or image of another's file."""
    text = printable(text) or "-"
    if "`" not in text:
        return f"`{text}`"
    ticks = "`" * (1 + max(map(len, re.findall("`+", text))))
    return f"{ticks} {text} {ticks}"


def shell(text):
    """Return text as one word of a bash command, on one line."""
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + printable(text.replace("\\", "\\\\").replace("'", "\\'")) + "'"


def former_settings(run_dir, step):
    """Return {setting: [(value, the last step made with it)]} of those that changed before `step`, and the
    step at which the run branched off another one, or 0."""
    resumes = []
    events = record.read(run_dir, record.EVENTS) if os.path.isdir(run_dir) else []
    for row in events:
        if row["event"] in ("start", "resume"):  # steps beyond it were dropped, and made again from there
            resumes = [former for former in resumes if former["step"] < row["step"]] + [row]
    former = {}
    for row in resumes:
        if row["step"] < step:
            for name, value in (row.get("changed") or {}).items():
                former.setdefault(name, []).append((value, row["step"]))
    is_branch = resumes and resumes[0]["event"] == "resume"
    return former, resumes[0]["step"] if is_branch else 0


def write(part, out, run_dir, latent=False):
    """README.md in the folder `out`, for the checkpoint `part` of a run; latent: as float master weights"""
    cfg, step = part["config"], part["step"]
    kind = "ternary (BitNet b1.58)" if cfg["ternary"] else "float"
    total = sum(w.numel() for w in {w.data_ptr(): w for w in part["model"].values()}.values())
    losses, settings = evaluations(run_dir), settings_of(run_dir)
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "---", ""]
    lines += [
        f"# {code(cfg['run_id'])}",
        "",
        f"A {kind} language model of {total:,} parameters, trained with nanoBit",
    ]
    lines[-1] += f" for {step:,} steps, {part['tokens']:,} tokens of {code(cfg['dataset'])}."
    lines[-1] += " It began with the weights of another." if cfg["init_from"] else ""
    prompt = cfg["sample_prompts"][0] if cfg["sample_prompts"] else ""
    lines += ["A base model: it goes on with a text, it does not answer.", ""]
    if latent and cfg["ternary"]:
        warning = "**Float master weights, for further training**: as they are, they have not the loss below."
        lines += [warning, ""]
    elif cfg["n_expert"] and cfg["ternary"]:
        lines += [f"Written here are {hf.DEQUANTISED}; the losses below are of one that does.", ""]
    lines += f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")  # this folder
model = AutoModelForCausalLM.from_pretrained(".")
inputs = tokenizer({json.dumps(prompt)}, return_tensors="pt", return_token_type_ids=False)
made = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(made[0], skip_special_tokens=True))
```
""".split("\n")
    if not cfg["n_expert"]:
        command = f"python sample.py --ckpt=FOLDER --prompt={shell(prompt)} --temperature=0"
        lines += ["With nanoBit:", "", "```bash", command, "```", ""]
    if steps := sorted(at for at in losses if at <= step):
        lines += ["| step | validation loss, nats per token |", "|---|---|"]
        shown = sorted({steps[round(i * (len(steps) - 1) / (LIMIT - 1))] for i in range(LIMIT)})
        lines += [f"| {at:,} | {losses[at]:.4f} |" for at in shown] + [""]
    twin = twin_of(run_dir, settings)
    if twin and step in losses and step in evaluations(twin):
        loss, twin_kind = evaluations(twin)[step], "float" if cfg["ternary"] else "ternary"
        lines += [f"Its twin {code(os.path.basename(twin))} ({twin_kind}, the same data in the same order)"]
        lines[-1] += f" has {loss:.4f}: this one is {losses[step] - loss:+.4f} from it."
        lines += [""]
    size = sum(entry.stat().st_size for entry in os.scandir(out) if entry.name.endswith(".safetensors"))
    rows = record.read(run_dir, record.SCALARS) if os.path.isdir(run_dir) else []
    speeds = sorted(row["tokens_per_sec"] for row in rows if row.get("tokens_per_sec"))
    lines += [f"`model.safetensors` has {size:,} bytes, {8 * size / total:.2f} bits for each parameter."]
    if speeds:
        lines += [f"Training ran at {speeds[len(speeds) // 2]:,.0f} tokens/s (median)."]
    default, private = config.assignments(config.DEFAULT), ["run_id", *hf.PRIVATE]
    former, branched = former_settings(run_dir, step)
    lines += ["", "Made by `python train.py` with these settings, the rest as in config/default.py:"]
    lines += ["", "```"]
    for name, value in sorted(cfg.items()):
        olds = former.get(name, []) if name in default else []
        if name not in private and (olds or default.get(name, value) != value):
            was = ", ".join(f"{old!r} up to step {at:,}" for old, at in olds)
            lines.append(printable(f"{name} = {value!r}" + (f"  # {was}" if was else "")))
    lines += ["```", ""]
    if branched:
        lines += [f"Its first {branched:,} steps are those of another run.", ""]
    with open(os.path.join(out, "README.md"), "w", encoding="utf-8") as file:
        file.write("\n".join(lines))
