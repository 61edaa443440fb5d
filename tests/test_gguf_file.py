"""The file for llama.cpp: read by llama.cpp and by the gguf package."""

import importlib.util

import numpy as np
import pytest
from conftest import CHARS
from parts import CHAR, NUL, TEXTS, llama_like, part_of, sentencepiece, tiktoken

import quant
from nanobit.export import gguf_file, verify
from nanobit.tokenizer import bos_of

cyllama = pytest.mark.skipif(
    importlib.util.find_spec("cyllama") is None, reason="needs cyllama: requirements-dev.txt"
)


@cyllama
@pytest.mark.parametrize(
    "changes, make",
    [
        ({}, lambda: CHAR),
        (dict(ternary=False, tie_embeddings=False, rope_theta=500.0, norm_eps=1e-3), llama_like),
        (dict(n_head=2, n_kv_head=1), tiktoken),
        (dict(ternary=False, n_expert=4, n_expert_active=2), lambda: CHAR),
    ],
)
def test_llama_cpp_computes_the_same(changes, make, tmp_path):
    """llama.cpp computes the logits of the run from a file of any shape and tokenizer."""
    spec = make()
    vocab_size = 320 if make is llama_like else 266 if make is tiktoken else len(CHARS)
    part = part_of(spec, vocab_size=vocab_size, **changes)
    part["config"]["sample_prompts"] = ["the cat", "a"] if spec is CHAR else TEXTS[2:]
    gguf_file.write(part, str(tmp_path / "x.gguf"), "f32", "f32")
    found = verify.gguf(part, str(tmp_path / "x.gguf"), "f32", "f32")
    assert found["good"]
    assert found["max_difference"] < 1e-4
    assert found["logits_std"] > 0.01
    gguf_file.write(part, str(tmp_path / "x.gguf"), "f16", "f16")
    assert verify.gguf(part, str(tmp_path / "x.gguf"), "f16", "f16")["good"]


@pytest.mark.parametrize("make", [lambda: NUL, sentencepiece, tiktoken, llama_like])
def test_what_a_file_says_of_tokens(make, tmp_path):
    """A file names bos, end of text and context of the model; the end of text is a control token, and
    padding is unused."""
    gguf = pytest.importorskip("gguf")
    spec, path = make(), str(tmp_path / "x.gguf")
    part = part_of(spec, vocab_size=400)
    gguf_file.write(part, path, "f16", "f16")
    fields = gguf.GGUFReader(path).fields
    says = lambda name: fields[name].contents()  # noqa: E731
    assert says("tokenizer.ggml.eos_token_id") == spec["eot"]
    assert says("tokenizer.ggml.add_bos_token") is True
    assert says("tokenizer.ggml.bos_token_id") == bos_of(spec)
    kinds, names = says("tokenizer.ggml.token_type"), says("tokenizer.ggml.tokens")
    assert kinds[spec["eot"]] == gguf.TokenType.CONTROL
    assert kinds[-1] == gguf.TokenType.UNUSED
    assert len(kinds) == len(set(names)) == 400
    assert "\0" not in names[spec["eot"]]
    assert says("llama.context_length") == part["config"]["seq_len"]


def test_the_default_type():
    """The default type is one whose blocks fit the widths of the model."""
    assert gguf_file.default_type(part_of(n_embd=256, ffn_dim=512)) == "tq2_0"
    assert gguf_file.default_type(part_of()) == "q2_0"
    assert gguf_file.default_type(part_of(ffn_dim=96)) == "f16"
    assert gguf_file.default_type(part_of(n_embd=256, ffn_dim=512, ternary=False)) == "f16"


@pytest.mark.parametrize("kind", ["tq2_0", "tq1_0", "q2_0"])
def test_codes_are_in_the_file(kind, tmp_path):
    """A reader decodes the codes and the scale of each matrix to the bit."""
    gguf = pytest.importorskip("gguf")
    width = 64 if kind == "q2_0" else 256
    part = part_of(n_embd=width, ffn_dim=2 * width, n_layer=1)
    path = str(tmp_path / "x.gguf")
    gguf_file.write(part, path, kind, "q8_0")
    w = part["model"]["blocks.0.ffn.gate_proj.weight"]
    codes, s = quant.ternarize(w)
    if kind == "q2_0":  # the package cannot read it: decoded by hand
        raw = gguf_file.q2_0(codes.numpy(), 1 / s.item()).reshape(-1, 18)
        scale = raw[:, :2].copy().view(np.float16)[:, 0]
        parts = [(raw[:, 2:] >> shift & 3).astype(int) - 1 for shift in (0, 2, 4, 6)]
        decoded = np.stack(parts, -1).reshape(codes.shape)
        assert (decoded == codes.numpy()).all()
        assert (scale == np.float16(1 / s.item())).all()
        assert open(path, "rb").read().find(raw.tobytes()) > 0
        return
    found = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_gate.weight")
    decoded = gguf.quants.dequantize(found.data, found.tensor_type)
    assert found.tensor_type.name == kind.upper()
    assert (decoded == codes.numpy() * np.float32(np.float16(1 / s.item()))).all()


@pytest.mark.parametrize(
    "changes, kind, says",
    [
        ({}, "q4_0", "q2_0"),
        ({}, "q5_0", "q2_0"),
        (dict(tokenizer=CHAR | dict(chars="ab \u2581")), "f16", "U+2581 are one"),
        (dict(tokenizer=tiktoken() | dict(name="cl100k_base"), vocab_size=266), "f16", "'cl100k_base'"),
        (dict(n_embd=48), "f16", "embed = 'q8_0' has blocks of 32"),
    ],
)
def test_what_no_file_of_llama_cpp_holds(changes, kind, says, capsys):
    """A type that would round codes again, names that are not unique, and a tokenizer that llama.cpp splits
    otherwise are refused."""
    with pytest.raises(SystemExit):
        gguf_file.check(part_of(**changes), kind, "q8_0")
    assert says in capsys.readouterr().err
