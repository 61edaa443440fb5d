"""sample.py as a child process: its prompts, its flags, and text that is printed while it is made."""

import os
import re

import pytest
from conftest import run, token_files
from scripted_models import asked, save, scripted, sentencepiece_spec, stdin

from nanobit.tokenizer import make_tokenizer


def test_a_prompt_is_the_same_from_every_source(ckpt, tmp_path):
    """A prompt gives the same texts from a file, from stdin and with float weights; its last newline does not
    count, samples differ, and speeds go to stderr."""
    flags = [ckpt, "--max_new_tokens=12", "--num_samples=2", "--device=cpu"]
    (tmp_path / "text").write_text("ab cd\n")
    out, err = run("sample.py", *flags, f"--prompt_file={tmp_path}/text")
    first, second = out.removesuffix("\n").split("\n---\n")
    assert first.startswith("ab cd")
    assert second.startswith("ab cd")
    assert first != second
    speeds = r"prefill 6 tokens, [\d,]+ tokens/s; decode \d+ tokens, [\d,]+ tokens/s\n"
    assert len(re.findall(speeds, err)) == 2
    assert "outgrew" not in err
    assert run("sample.py", *flags, "--prompt=-", patch=stdin(tmp_path, "ab cd\n"))[0] == out
    assert run("sample.py", *flags, f"--prompt_file={tmp_path}/text", "--packed=False")[0] == out


@pytest.mark.parametrize("new, is_reported", [(11, False), (12, True)])
def test_a_text_that_outgrows_the_context_is_reported(ckpt, new, is_reported):
    """In a context of 16 tokens 6 and 11 more fit, of which the last is not read."""
    patch = scripted(f"[2] * {new}")
    err = run("sample.py", ckpt, "--prompt=ab cd", f"--max_new_tokens={new}", patch=patch)[1]
    assert ("outgrew the context of 16 tokens" in err) == is_reported


def test_a_prompt_that_cannot_be_read_is_one_error(ckpt, tmp_path):
    """A file that is not UTF-8, and an undecodable byte of a flag, are errors without a traceback."""
    (tmp_path / "text").write_bytes(b"\xff")
    err = run("sample.py", ckpt, f"--prompt_file={tmp_path}/text", code=2)[1]
    assert err.startswith("error: prompt_file = ")
    assert "UTF-8" in err
    spec = sentencepiece_spec(tmp_path)
    err = run("sample.py", save(tmp_path / "pieces", spec), "--prompt=a\udcff", code=2)[1]
    assert err.splitlines()[-1].startswith("error: prompt: ")
    assert "surrogates" in err


def test_modes_that_exclude_each_other_are_refused(ckpt):
    """All faults of the modes are reported together."""
    err = run("sample.py", ckpt, "--prompt=-", "--chat", "--play", "--side=Z", "--ask=x", code=2)[1]
    assert "side = 'Z' is unknown; choose one of X, O" in err
    assert "ask = 'x' is unknown; choose one of win, not_lose" in err
    assert "--play and --chat exclude each other" in err
    assert "--prompt and --play exclude each other" in err
    assert "prompt = '-' does not work with --chat" in err
    assert err.count("error: ") == 5


def test_flags_reach_the_model(ckpt):
    """Every flag of sampling arrives at the model."""
    spy = """
import sys, torch; from nanobit import generate as module
def generate(model, idx, n, **how):
    packed = any(type(layer).__name__ == "PackedLinear" for layer in model.modules())
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    seed = how["generator"].initial_seed()
    print(how["temperature"], how["top_k"], how["top_p"], seed, model.head.weight.dtype, dtype, packed)
    yield torch.tensor([[2]])
module.generate = generate
"""
    out, _ = run("sample.py", ckpt, "--prompt=a", patch=spy)
    assert "0.8 0 1.0 1337 torch.float32 torch.float32 True\n" in out
    flags = ["--temperature=0", "--top_k=3", "--top_p=0.5", "--seed=7", "--head=bfloat16", "--dtype=float16"]
    out, _ = run("sample.py", ckpt, "--prompt=a", *flags, "--packed=False", patch=spy)
    assert "0.0 3 0.5 7 torch.bfloat16 torch.float16 False\n" in out


def test_streams_whole_characters_in_linear_time(tmp_path):
    """Text is streamed in whole characters, loses none, and each token costs the same time."""
    spec = sentencepiece_spec(tmp_path)
    ckpt = save(tmp_path / "run", spec, 2)
    said = " cat \U0001f600 sat on \u65e5\u672c"
    new = make_tokenizer(spec).encode(said.strip())
    half = make_tokenizer(spec).encode("\U0001f600")[1:3]
    patch = (
        scripted(f"{new} * 100 + {half}")
        + """
import builtins; from nanobit import tokenizer
real, once, decoded = print, tokenizer.SentencePieceTokenizer.decode, [0]
def bar(*a, **k): real(*a, **(k | {"end": "|"} if k.get("end") == "" else k))
def count(self, ids):
    decoded[0] += len(ids)
    real("decoded", decoded[0], file=sys.stderr)
    return once(self, ids)
builtins.print, tokenizer.SentencePieceTokenizer.decode = bar, count
"""
    )
    out, err = run("sample.py", ckpt, "--prompt=the", "--max_new_tokens=9999", patch=patch)
    pieces = [piece for piece in out.removesuffix("\n").split("|") if piece]
    assert "".join(pieces) == "the" + said * 100 + "\ufffd" * len(half)
    assert len(pieces) == 1 + 100 * (len(new) - 3 - 2 - 2) + 1  # the bytes of a character come together
    assert int(re.findall(r"decoded (\d+)", err)[-1]) < 1500 * len(new)


def test_a_prompt_of_nothing_or_of_what_ends_a_text(ckpt, tmp_path):
    """An empty prompt begins a text; a NUL, by which a char tokenizer ends texts, is not a character."""
    assert asked(run("sample.py", ckpt, "--prompt=", patch=scripted("[2]"))[1]) == [[0]]
    (tmp_path / "text").write_text("a\0b")
    nul = save(tmp_path / "nul", token_files.char_tokenizer("\0ab"))
    err = run("sample.py", nul, f"--prompt_file={tmp_path}/text", code=2)[1]
    assert "no character '\\x00'; it has 'ab'" in err


def test_stdout_of_another_encoding(tmp_path):
    """What the encoding of stdout lacks is shown as an escape."""
    ckpt = save(tmp_path / "run", token_files.char_tokenizer("\n\u65e5a"))
    latin = "sys.stdout.reconfigure(encoding='latin-1')\n"
    assert run("sample.py", ckpt, "--prompt=\u65e5", patch=latin + scripted("[1]"))[0] == "\\u65e5" * 2 + "\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("flag", ["--prompt=a", "--chat"])
def test_stdout_that_is_full(ckpt, tmp_path, flag):
    """Text that cannot be written ends the program with one line and exit code 1."""
    patch = "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), sys.stdout.fileno())\n"
    patch += stdin(tmp_path, "a\n") + scripted("[2]")
    err = run("sample.py", ckpt, flag, patch=patch, code=1)[1]
    assert err.endswith("error: the output cannot be written: No space left on device\n")
    assert err.count("error") == 1
