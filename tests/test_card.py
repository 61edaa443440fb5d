"""The model card of an export, from runs made by hand."""

import json
import re
import shutil
import subprocess

import pytest
from conftest import CHARS, settings

import config
from model import Transformer
from nanobit import checkpoint, saving
from nanobit.export import card
from nanobit.record import EVENTS, SCALARS


def run_of(root, name, losses, step=7, **changes):
    """Return (part, run_dir) of a run with these {step: validation loss} and a checkpoint at `step`."""
    values = config.assignments(config.DEFAULT) | vars(settings(run_id=name, **changes))
    del values["origin"]
    folder = root / name
    (folder / "metrics").mkdir(parents=True)
    each = {key: dict(value=value, origin="x") for key, value in values.items()}
    (folder / "config.json").write_text(json.dumps(dict(settings=each)))
    rows = [json.dumps(dict(step=at, val_loss=loss)) + "\n" for at, loss in losses.items()]
    (folder / SCALARS).write_text("".join(rows))
    weights = Transformer(settings(**changes)).state_dict()
    spec = dict(kind="char", sha256="x", eot=0, chars=CHARS)
    part = dict(format=checkpoint.FORMAT, config=values, tokenizer=spec, model=weights, step=step, tokens=448)
    saving.save(str(folder), step, part, {})
    return part, str(folder)


def written(tmp_path, part, run_dir, **how):
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "model.safetensors").write_bytes(b"x" * 1000)
    card.write(part, str(tmp_path / "out"), run_dir, **how)
    return (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("ternary", [True, False])
def test_the_numbers_of_a_card(tmp_path, ternary):
    """A card counts a tied head once, gives steps as steps and bytes as bits, and reports master weights as
    such."""
    part, run_dir = run_of(tmp_path, "a", {7: 3.0}, ternary=ternary, tie_embeddings=True)
    part["model"]["head.weight"] = part["model"]["embed.weight"]
    total = Transformer(settings(ternary=ternary)).counts()["total"]
    text = written(tmp_path, part, run_dir)
    assert f"of {total:,} parameters" in text
    assert "for 7 steps, 448 tokens of `tiny`" in text
    assert f"has 1,000 bytes, {8000 / total:.2f} bits for each parameter" in text
    assert "Float master weights" not in text
    assert ("Float master weights" in written(tmp_path, part, run_dir, latent=True)) == ternary


def test_the_twin_is_of_the_same_experiment(tmp_path):
    """The price of ternary weights is given only with a twin of the same start and length."""
    part, run_dir = run_of(tmp_path, "a", {7: 3.0})
    run_of(tmp_path, "longer", {7: 2.0}, ternary=False, max_steps=99)
    tuned, tuned_dir = run_of(tmp_path, "tuned", {7: 2.0}, ternary=False, init_from="runs/big")
    assert "twin" not in written(tmp_path, part, run_dir)
    text = written(tmp_path, tuned, tuned_dir)
    assert "began with the weights of another" in text
    assert "runs/big" not in text
    run_of(tmp_path, "twin", {5: 1.0, 7: 2.5}, ternary=False)
    text = written(tmp_path, part, run_dir)
    assert "Its twin `twin` (float" in text
    assert "has 2.5000: this one is +0.5000 from it" in text


def test_a_curve_ends_where_the_checkpoint_is(tmp_path):
    """A card shows the losses up to its checkpoint, and none if all are later."""
    text = written(
        tmp_path, *run_of(tmp_path, "a", {step: 4 - step / 100 for step in range(1, 100)}, step=50)
    )
    rows = [line for line in text.split("\n") if line.startswith("| ") and line[2].isdigit()]
    assert len(rows) == card.LIMIT
    assert rows[0] == "| 1 | 3.9900 |"
    assert rows[-1] == "| 50 | 3.5000 |"
    assert "validation loss" not in written(tmp_path, *run_of(tmp_path, "late", {100: 3.0}, step=50))


@pytest.mark.parametrize("n_expert", [0, 4])
def test_the_commands_of_a_card_can_be_typed(tmp_path, n_expert):
    """A shell passes on the prompt of a card as it is; a mixture, which cannot be read back, gets no
    command."""
    part, run_dir = run_of(tmp_path, "a", {7: 3.0}, n_expert=n_expert)
    part["config"]["sample_prompts"] = ["it's $HOME `x`"]
    text = written(tmp_path, part, run_dir)
    assert ("sample.py --ckpt=FOLDER" in text) == (not n_expert) == ("dequantized" not in text)
    assert n_expert or """--prompt='it'"'"'s $HOME `x`'""" in text
    assert 'tokenizer("it\'s $HOME `x`"' in text


def test_settings_that_changed_during_a_run_are_stated(tmp_path):
    """A card gives each setting with its former values, of the steps that lead to the checkpoint only."""
    part, run_dir = run_of(tmp_path, "a", {7: 3.0}, step=50, learning_rate=5e-3)
    events = [
        dict(event="start", step=0),
        dict(event="resume", step=40, changed=dict(dropout=0.5)),  # dropped by the next
        dict(event="resume", step=30, changed=dict(learning_rate=1e-3, batch_size=2)),
        dict(event="resume", step=45, changed=dict(learning_rate=2e-3)),
        dict(event="resume", step=60, changed=dict(beta1=0.5)),
    ]
    (tmp_path / "a" / EVENTS).write_text("".join(json.dumps(row) + "\n" for row in events))
    text = written(tmp_path, part, run_dir)
    assert "learning_rate = 0.005  # 0.001 up to step 30, 0.002 up to step 45\n" in text
    assert "# 2 up to step 30\n" in text
    assert "0.5" not in text
    assert "another run" not in text
    (tmp_path / "a" / EVENTS).write_text("".join(json.dumps(row) + "\n" for row in events[2:]))
    assert "Its first 30 steps are those of another run." in written(tmp_path, part, run_dir)


def test_text_of_a_checkpoint_stays_text(tmp_path):
    """A script, an image link or a code fence in a checkpoint is shown as text in a card."""
    part, run_dir = run_of(tmp_path, "a", {7: 3.0})
    bad = "x`\n```\n<script>![a](http://b/c.png)</script>\x1b[2J"
    part["config"] |= dict(run_id=bad, dataset=bad, sample_prompts=[bad], data_dir="x", schedule=bad)
    text = written(tmp_path, part, run_dir)
    outside, fences = [], 0
    for line in text.split("\n"):
        fences += line.startswith("```")
        if fences % 2 == 0 and not line.startswith("```"):
            outside.append(re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", line))
    assert fences == 6
    assert "\x1b" not in text
    assert not any("<" in line or "![" in line for line in outside), outside
    if not shutil.which("bash"):
        pytest.skip("needs bash, to read the command as a user's shell does")
    command = next(line for line in text.split("\n") if line.startswith("python sample.py"))
    shown = subprocess.run(["bash", "-c", f"printf %s {command.split(' ', 3)[3]}"], capture_output=True)
    assert shown.stdout.decode() == f"--prompt={bad}--temperature=0"
