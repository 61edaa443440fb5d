"""Run folders with random models, and models that write from a script, for the tests of sample.py."""

import hashlib
import re

import pytest
import torch
from conftest import settings

from model import Transformer
from nanobit import checkpoint, saving


def save(folder, spec, eot=0, **changes):
    """Write a run folder with a random model that uses this tokenizer; return --ckpt=."""
    torch.manual_seed(0)
    cfg = settings(**dict(vocab_size=len(spec.get("chars", range(285)))) | changes)
    config = {key: value for key, value in vars(cfg).items() if key != "origin"}
    part = dict(format=checkpoint.FORMAT, step=1, tokens=0, config=config, tokenizer=spec | {"eot": eot})
    saving.save(str(folder), 1, part | {"model": Transformer(cfg).state_dict()}, {})
    return f"--ckpt={folder}"


def sentencepiece_spec(tmp_path):
    """Return a small SentencePiece model, of the kind that prepare/ trains."""
    spm = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("the cat sat on the mat and the dog sat on the cat\n" * 50)
    options = dict(vocab_size=285, model_type="bpe", byte_fallback=True, minloglevel=2)
    options |= dict(normalization_rule_name="identity", remove_extra_whitespaces=False)
    spm.SentencePieceTrainer.train(input=f"{tmp_path}/text", model_prefix=f"{tmp_path}/text", **options)
    content = (tmp_path / "text.model").read_bytes()
    return dict(kind="sentencepiece", content=content, sha256=hashlib.sha256(content).hexdigest())


def stdin(tmp_path, text):
    """Return a patch for conftest.run: the child reads this text from stdin."""
    path = tmp_path / "stdin"
    path.write_bytes(text.encode())
    return f"import os; os.dup2(os.open({str(path)!r}, 0), 0)\n"


def scripted(body):
    """Return a patch for conftest.run: this body, a generator over `ids` (the prompt's) and `n`, writes in
    place of the model; stderr shows what it was asked."""
    lines = "import sys, time, torch; from nanobit import generate as module\n"
    lines += "def generate(model, idx, n, **how):\n    ids = idx[0].tolist()\n"
    lines += f"    print('asked', ids, n, file=sys.stderr, flush=True)\n    for token in {body}:\n"
    return lines + "        yield torch.tensor([[token]])\nmodule.generate = generate\n"


def asked(err):
    """Return the ids that a scripted model was asked to continue, one list a turn."""
    return [[int(i) for i in ids.split(", ")] for ids in re.findall(r"asked \[(.*?)\]", err)]
