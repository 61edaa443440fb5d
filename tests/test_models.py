"""models/: the trained models of the repository are small, load, answer, and have the score of their card."""

import json
import os
import re
import shlex

import pytest
import torch
from conftest import ROOT, result_of, run
from scripted_models import stdin

from nanobit import weights
from nanobit.infer.restore import restore

MODELS = os.path.join(ROOT, "models")
NAMES = sorted(entry.name for entry in os.scandir(MODELS) if entry.is_dir())
LIMIT = 4_000_000  # bytes of all models together: what a clone has to load
ENDINGS = (".md", ".json", ".safetensors", ".model", ".txt")  # nothing that runs when it is loaded


def path_of(name):
    return os.path.join(MODELS, name)


def card_of(name):
    """Return the text of the card of a model."""
    with open(os.path.join(path_of(name), "README.md"), encoding="utf-8") as file:
        return file.read()


def test_there_are_three():
    """A model that adds, one that plays and one that writes."""
    assert NAMES == ["adder", "stories", "tictactoe"]


def test_they_are_small_and_hold_data_only():
    """All files together have at most 4 MB, and none holds code."""
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(MODELS) for name in names]
    assert sum(map(os.path.getsize, paths)) <= LIMIT
    assert not [path for path in paths if not path.endswith(ENDINGS)]


@pytest.mark.parametrize("name", NAMES)
def test_a_card_names_its_origin(name):
    """A card has a licence, the commit, the command, the data and the score."""
    card = card_of(name)
    assert re.search(r"^license: ", card, re.M)
    assert re.search(r"commit [0-9a-f]{7,40}\b", card)
    assert "python train.py config/train_" in card
    assert re.search(r"^## Score$", card, re.M)
    assert re.search(r"^## Data and licences?$", card, re.M)


@pytest.mark.parametrize("name", NAMES)
def test_score_of_the_card(name, tmp_path):
    """The commands of the card's small sample give the numbers beside them, on every CPU nearly."""
    block, numbers = re.search(r"```bash\n([^`]*)```\n+```json\n(.*?)```", card_of(name), re.S).groups()
    for line in block.strip().splitlines():
        script, *flags = shlex.split(line)[1:]
        out, _ = run(script, *flags, f"--data_dir={tmp_path}")
    measured = result_of(out)
    for key, value in json.loads(numbers).items():
        assert measured[key] == pytest.approx(value, abs=0.01), key


@pytest.mark.parametrize("name", NAMES)
def test_transformers_computes_the_same(name):
    """The logits of transformers are ours to the last bit."""
    transformers = pytest.importorskip("transformers", reason="the readers of exports: requirements-dev.txt")
    part, _ = weights.trained(path_of(name))
    ours = restore(part, torch.device("cpu"), packed=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path_of(name), dtype=torch.float32).eval()
    ids = torch.arange(2, 12)[None]
    with torch.no_grad(), torch._dynamo.config.patch(disable=True):  # parts of its code are compiled
        assert torch.equal(theirs(ids).logits, ours(ids))


def test_the_adder_adds():
    """Sums of two digits come out right."""
    for question, answer in (("12+34=", "46"), ("7+58=", "65"), ("99+99=", "198")):
        flags = [f"--prompt={question}", "--temperature=0"]
        assert run("sample.py", f"--ckpt={path_of('adder')}", *flags)[0] == f"{question}{answer}\n"


def test_the_player_plays(tmp_path):
    """The model takes free squares only, and does not lose against somebody who takes the lowest free one."""
    moves = "\n".join("123456789") * 9 + "\nn\n"  # the taken ones are refused
    flags = ["--play", "--side=O", "--ask=not_lose"]
    out, _ = run("sample.py", f"--ckpt={path_of('tictactoe')}", *flags, patch=stdin(tmp_path, moves))
    taken = re.findall(r"the model takes (\d)", out)
    assert len(taken) == len(set(taken)) >= 3
    assert "you win" not in out


def test_the_stories_continue():
    """A prompt is continued by at least a few words, the same each time."""
    flags = ["--prompt=Once upon a time", "--max_new_tokens=40"]
    texts = [run("sample.py", f"--ckpt={path_of('stories')}", *flags)[0] for _ in range(2)]
    assert texts[0] == texts[1]
    assert texts[0].startswith("Once upon a time")
    assert len(texts[0].split()) > 10
