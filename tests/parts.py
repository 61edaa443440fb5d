"""Parts of checkpoints with tokenizers of each kind, for the tests of what writes them for others."""

import base64
import io
import os

import pytest
import torch
from conftest import CHARS, settings

import config
from model import Transformer

CHAR = dict(kind="char", sha256="x", eot=0, chars=CHARS)
NUL = dict(kind="char", sha256="x", eot=3, chars="the\0 ca12,\n")
TEXTS = [
    "the cat",
    "",
    " ",
    "  two  spaces",
    "a line\nand\n\nanother ",
    "12 birds, 1212",
    "na\u00efve \u65e5\u672c \U0001f642",
    "\ttab",
]


def part_of(tokenizer=CHAR, **changes):
    """Return a checkpoint's part of a random model, whose weights are no longer those it was made with."""
    cfg = settings(**dict(n_embd=64, ffn_dim=128, n_layer=2, n_head=4, n_kv_head=2, seq_len=64) | changes)
    torch.manual_seed(0)
    model = Transformer(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p) * p.abs().mean()
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    if cfg.tie_embeddings:
        weights["head.weight"] = weights["embed.weight"]
    values = config.assignments(config.DEFAULT) | {
        key: value for key, value in vars(cfg).items() if key not in ("origin",)
    }
    return dict(config=values, tokenizer=tokenizer, model=weights, step=7, tokens=448)


def sentencepiece(**changes):
    spm = pytest.importorskip("sentencepiece")
    text = ["the cat sat on the mat", "a dog, 12 birds and the cat", "once  upon a time"] * 30
    out = io.BytesIO()
    how = dict(
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    spm.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=out, **how | changes)
    return dict(kind="sentencepiece", sha256="x", eot=2, content=out.getvalue())


def llama_like():
    """Return a tokenizer whose texts begin with another token than they end with, as those of public
    Llamas."""
    return sentencepiece() | dict(bos=1)


def llama_folder(path):
    """Make path the folder of a small Llama of another origin, with a tokenizer that has a bos."""
    transformers = pytest.importorskip("transformers", reason="the readers of exports: requirements-dev.txt")
    torch.manual_seed(0)
    sizes = dict(vocab_size=320, hidden_size=32, intermediate_size=64, max_position_embeddings=64)
    sizes |= dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    how = transformers.LlamaConfig(**sizes, rms_norm_eps=1e-3, rope_theta=500.0)
    transformers.LlamaForCausalLM(how).save_pretrained(path)
    with open(os.path.join(path, "tokenizer.model"), "wb") as file:
        file.write(llama_like()["content"])


def tiktoken(pattern=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"):
    """Return a byte-level BPE with its own merges, named as GPT-2's."""
    tokens = [bytes([b]) for b in range(256)]
    tokens += [b"th", b"the", b" t", b" the", b"at", b"cat", b" cat", b"12", b"1212"]
    content = b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))
    spec = dict(kind="tiktoken", sha256="x", name="gpt2", content=content, pattern=pattern)
    return spec | dict(special={"<|endoftext|>": len(tokens)}, eot=len(tokens))
