"""Tokenizers in the terms of others: what AutoTokenizer makes of the files, and what is refused."""

import os
import random

import pytest
from parts import CHAR, NUL, TEXTS, llama_like, part_of, sentencepiece, tiktoken

from nanobit.export import gguf_file, hf, tokenizer_files
from nanobit.tokenizer import bos_of, encode_prompt, make_tokenizer

transformers = pytest.importorskip("transformers", reason="the readers of exports: requirements-dev.txt")


@pytest.mark.parametrize(
    "make",
    [
        lambda: CHAR,
        lambda: NUL,
        sentencepiece,
        llama_like,
        tiktoken,
        lambda: tiktoken(r"\p{N}{1,3}+| ?\p{L}++|[^\p{N}\p{L}]++"),
    ],
)
def test_tokenizers_come_along(make, tmp_path):
    """AutoTokenizer splits any text into the ids of ours, decodes them to it, and knows bos and end of
    text."""
    spec = make()
    ours = make_tokenizer(spec)
    tokenizer_files.write(spec, str(tmp_path), 64)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    rng = random.Random(0)
    texts = TEXTS + ["".join(rng.choice("the cat 12,\n") for _ in range(60)) for _ in range(50)]
    texts += ["a cat", "the\nthe cat "]
    texts = [text for text in texts if not set(text) - set(spec.get("chars", text))]
    for text in texts:
        ids = encode_prompt(ours, bos_of(spec), text)
        assert theirs(text)["input_ids"] == ids, repr(text)
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode([i for i in ids if i != ids[0]])
    assert theirs.pad_token is None
    assert theirs.model_max_length == 64
    assert (theirs.bos_token_id, theirs.eos_token_id) == (bos_of(spec), spec["eot"])
    assert "\0" not in theirs.eos_token, "a tool that prints names would end there"


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(model_type="unigram", vocab_size=280), "is not a BPE model"),
        (dict(normalization_rule_name="nmt_nfkc"), "normalizes text"),
        (dict(remove_extra_whitespaces=True), "normalizes text"),
        (dict(user_defined_symbols=["<sep>"]), "user-defined symbols"),
    ],
)
def test_other_sentencepiece_models_are_refused(changes, says, tmp_path, capsys):
    """A SentencePiece model whose readers would split text otherwise is refused."""
    part = part_of(sentencepiece(**changes), vocab_size=320)
    for write, more in ((hf.write, ()), (gguf_file.write, ("f32", "f32"))):
        with pytest.raises(SystemExit):
            write(part, str(tmp_path / "x"), *more)
        assert says in capsys.readouterr().err
        assert not os.path.exists(tmp_path / "x")
