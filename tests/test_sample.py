"""
sample.py as a child process: streaming, the chat, the game; and how far cached logits are from others.

    python tests/test_sample.py runs/demo        the same measurement on a checkpoint, in float32
"""

import os
import pty
import re
import select
import signal
import sys
import time
from types import SimpleNamespace

import faults
import parts
import pytest
import torch
from conftest import CHARS, ROOT, run, settings, token_files
from fork import Script
from scripted_models import asked, save, scripted, sentencepiece_spec, stdin

from model import Transformer
from nanobit import checkpoint, data
from nanobit.generate import KVCache
from nanobit.infer.restore import restore
from nanobit.tasks import game
from nanobit.tokenizer import TextStream, make_tokenizer


@torch.no_grad()
def cache_divergence(model, prompts, new_tokens, batch_size=20):
    """Compare greedy continuations of prompts (N, T) with a KV cache and without, where each token costs a
    forward of the whole text, for batch_size texts together. As long as the two texts of a prompt are the
    same their logits are compared; when they part, the gap between the two tokens in the uncached logits is
    kept. Returns a dict: texts, positions compared, spread (std of the logits), median_diff and max_diff
    (largest difference of any logit of a position), differ (texts that part), gaps (one for each of
    those)."""
    diffs, gaps = [], []
    for plain in prompts.split(batch_size):
        cache, fresh = KVCache(prompts.shape[1] + new_tokens), plain
        same = torch.ones(len(plain), dtype=torch.bool)
        for _ in range(new_tokens):
            cached, uncached = model(fresh, cache=cache)[:, -1], model(plain)[:, -1]  # (N, V)
            diffs.append((cached - uncached).abs().amax(-1)[same])
            fresh, token = cached.argmax(-1, keepdim=True), uncached.argmax(-1, keepdim=True)
            parts = same & (fresh != token)[:, 0]
            gaps += (uncached.gather(-1, token) - uncached.gather(-1, fresh))[parts, 0].tolist()
            same &= ~parts
            plain = torch.cat((plain, token), 1)
    diffs = torch.cat(diffs)
    found = dict(texts=len(prompts), positions=len(diffs), spread=uncached.std().item())
    found |= dict(median_diff=diffs.median().item(), max_diff=diffs.max().item())
    return found | dict(differ=len(gaps), gaps=gaps)


def chain(n, length):
    """Return n texts (n, length) of a Markov chain over the 28 ids, always the same."""
    generator = torch.Generator().manual_seed(1)
    chances = torch.randn(28, 28, generator=generator).mul(2).softmax(-1)
    ids = torch.randint(28, (n, 1), generator=generator)
    for _ in range(length - 1):
        ids = torch.cat((ids, torch.multinomial(chances[ids[:, -1]], 1, generator=generator)), 1)
    return ids


def trained(ternary):
    """Return a small model trained for 60 steps on that chain, so that its logits have a spread."""
    torch.manual_seed(0)
    model, ids = Transformer(settings(ternary=ternary, seq_len=32)), chain(256, 25)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for step in range(60):
        some = ids[step % 8 * 32 :][:32]
        model(some[:, :-1], some[:, 1:])[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("ternary, bound", [(False, 1e-5), (True, 0.1)])
def test_cached_text_is_the_uncached_one(ternary, bound):
    """Text with a cache is the text without: a cache read at a wrong position would move logits by about
    their spread.

    The two ways multiply matrices of other shapes, whose fp32 sums differ in the last bits: about 1e-6 in
    a float model. In a ternary one such a bit may move an activation over the edge of an int8 rounding,
    and the step is then 1/127 of the token's largest: rare, but thousands of times larger (DESIGN,
    section 5).
    """
    found = cache_divergence(trained(ternary), chain(456, 8)[256:], 24, batch_size=200)
    assert found["texts"] == 200
    assert found["spread"] > 1
    assert found["max_diff"] <= bound
    assert all(gap <= bound for gap in found["gaps"])
    assert found["positions"] >= (200 - found["differ"]) * 24


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


@pytest.mark.parametrize("make", [parts.sentencepiece, parts.tiktoken])
def test_bytes_that_make_no_character_are_shown_in_time(make):
    """A byte is held back for three tokens at most, in bounded memory, and whole characters after such bytes
    are printed whole."""
    spec = make()
    tokenizer = make_tokenizer(spec)
    whole = tokenizer.encode_on("\U0001f600")
    byte, stream = whole[-1], TextStream(tokenizer, [spec["eot"]])
    shown = [stream.add(byte) for _ in range(1000)]
    assert not any(shown[:3])
    assert set(shown[3:]) == {"\ufffd"}
    assert len(stream.window) < 16
    assert "".join(map(stream.add, whole)) + stream.end() == "\ufffd" * 3 + "\U0001f600"


def test_chat_keeps_its_history(ckpt, tmp_path):
    """The history of a chat fits the context, commands stay out of it, and so does a message with an unknown
    character."""
    lines = ["ab", "/help", "/nonsense", "aBc", "", "/reset", "cd", "abcdefghijklmnop", "x"]
    patch = scripted("[2, 3]") + stdin(tmp_path, "\n".join(lines))
    out, err = run("sample.py", ckpt, "--chat", "--max_new_tokens=4", patch=patch)
    assert out == "bc\n" * 5
    history = [[0, 1, 2], [0, 1, 2, 2, 3], [0, 3, 4], [*range(5, 17)], [*range(8, 17), 2, 3, 24]]
    assert asked(err) == history
    assert err.count("oldest text is forgotten") == 1
    assert err.count("message ignored: ") == 1
    assert "no character 'B'" in err
    assert "no command /nonsense" in err
    assert "/reset   empty" in err


@pytest.mark.parametrize("begins", [[], [1]])
def test_chat_shows_the_model_the_lines_of_the_screen(begins, tmp_path):
    """A message and its continuation are lines of their own, an empty message changes nothing, after the end
    of a text another begins, and a word alone ends the chat."""
    spec = sentencepiece_spec(tmp_path) | ({"bos": begins[0]} if begins else {})
    tokenizer, ckpt = make_tokenizer(spec), save(tmp_path / "run", spec, 2, seq_len=64)
    on, sat = tokenizer.encode_on, tokenizer.encode_on(" sat")
    ended, end, last = ("[2, 9]", [2, *begins], "/quit") if begins else ("[]", [], "exit")
    patch = scripted(f"{sat} + {ended}") + stdin(tmp_path, f"at\n\nexit now\n{last}\nthe\n")
    out, err = run("sample.py", ckpt, "--chat", "--prompt=the c", patch=patch)
    assert out == "the c\n sat\n sat\n sat\n"
    first = [*(begins or [2]), *tokenizer.encode("the c"), *on("\nat\n")]
    second = [*first, *sat, *end]
    third = [*second, *sat, *end, *(tokenizer.encode("exit now\n") if end else on("\nexit now\n"))]
    assert asked(err) == [first, second, third]


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


class Terminal:
    """Run sample.py on a terminal."""

    def __init__(self, *args, patch=""):
        self.leader, self.follower = pty.openpty()
        patch = faults.in_terminal(os.ttyname(self.follower)) + patch
        self.child = Script(os.path.join(ROOT, "sample.py"), args, ROOT, patch, TERM="dumb")

    def wait(self, text):
        """Return what is shown until this text is."""
        shown, deadline = "", time.time() + 60
        while text not in shown:
            ready = select.select([self.leader], [], [], max(0, deadline - time.time()))[0]
            if not ready:
                self.child.kill()
            assert ready, f"{text!r} did not come: {shown}"
            shown += os.read(self.leader, 1).decode(errors="replace")
        return shown

    def type(self, text):
        os.write(self.leader, text.encode())

    def interrupt(self):
        time.sleep(0.5)  # Python's input() does not see a signal between its prompt and its first wait
        self.child.kill(signal.SIGINT)

    def ended(self):
        """Return the exit code, and what was shown last."""
        os.close(self.follower)
        shown = b""
        while select.select([self.leader], [], [], 60)[0]:
            try:
                shown += os.read(self.leader, 4096)
            except OSError:  # the other end is closed
                break
        os.close(self.leader)
        return self.child.wait(30)[0], shown.decode()


def test_chat_on_a_terminal(tmp_path):
    """A paste is one message, Ctrl-C stops the turn and keeps its text, then ends the chat with 130; Ctrl-D
    ends it with 0; no traceback."""
    ckpt = save(tmp_path / "run", token_files.char_tokenizer(CHARS), seq_len=64)
    endless = scripted("iter(lambda: time.sleep(0.05) or 2, None)")
    terminal = Terminal(ckpt, "--chat", patch=endless)
    terminal.wait("> ")
    terminal.type("ab\ncd\n")
    terminal.wait("asked [0, 1, 2, 0, 3, 4] ")
    terminal.wait("bbb")
    terminal.interrupt()
    terminal.wait("> ")
    terminal.type("x\n")
    terminal.wait("asked [0, 1, 2, 0, 3, 4, 2, 2, 2")
    terminal.wait("b")
    terminal.interrupt()
    terminal.wait("> ")
    terminal.type("/help\n")
    assert "not trained to answer" in terminal.wait("> ")
    terminal.interrupt()
    code, shown = terminal.ended()
    assert code == 130
    assert "Traceback" not in shown
    terminal = Terminal(ckpt, "--chat")
    terminal.wait("> ")
    terminal.type("\x04")
    code, shown = terminal.ended()
    assert code == 0
    assert "Traceback" not in shown


LIKES_LOW_SQUARES = """
import torch, model
def forward(self, idx, targets=None, cache=None):
    return torch.tensor([-9.0] * 4 + [*range(9, 0, -1)]).expand(*idx.shape, 13)
model.Transformer.forward = forward
"""


def test_play(ckpt, tmp_path):
    """The model takes free squares only, illegal wishes are counted, a wrong input does not end the game,
    both sides can be played, and another model is refused."""
    player = save(tmp_path / "player", token_files.char_tokenizer(game.CHARS))
    typed = stdin(tmp_path, "4\np\n1\nzz\n5\n6\ny\nq\n")
    out, err = run("sample.py", player, "--play", patch=LIKES_LOW_SQUARES + typed)
    assert re.findall(r"the model takes (\d)", out) == ["1", "2"]
    assert " O | O | 3\n X | X | X\n 7 | 8 | 9\nyou win\n 1 | 2 | 3" in out
    chances = re.findall(r"^  (\d) +([\d.]+)%(   taken)?$", out, re.M)
    assert [square for square, _, _ in chances] == list("123456789")
    assert [square for square, _, taken in chances if taken] == ["1", "4"]
    assert 99 < sum(float(chance) for _, chance, _ in chances) < 101
    assert float(chances[0][1]) > 60
    assert "square 1 is taken; free are 2, 3, 5" in err
    assert "'zz' is not a square" in err
    assert out.endswith("not a free square in 1 of its 2 moves\n")
    typed, how = stdin(tmp_path, "p\n"), ["--side=O", "--ask=not_lose"]
    out, _ = run("sample.py", player, "--play", *how, patch=LIKES_LOW_SQUARES + typed)
    assert out.startswith("the model takes 1\n X | 2 | 3")
    assert out.count("then X wins  33.3%") == 9
    err = run("sample.py", ckpt, "--play", code=2)[1]
    assert err.splitlines()[-1].startswith("error: ckpt = ")  # after the line that says which step it is
    assert "'tiny', not on games of tic-tac-toe" in err


def main(ckpt, new_tokens="32"):
    """Print cache_divergence for a checkpoint and 200 prompts of 32 tokens from its validation split."""
    part = checkpoint.load(checkpoint.locate(ckpt))
    model, cfg = restore(part, "cpu"), SimpleNamespace(**part["config"])
    new_tokens = min(int(new_tokens), cfg.seq_len // 2)
    cfg.seq_len = min(32, cfg.seq_len // 2)
    windows = data.Windows(cfg, data.meta(cfg), "val").fixed(200 * cfg.seq_len, 200, torch.device("cpu"))
    found = cache_divergence(model, next(windows)[0], new_tokens)
    gaps = found.pop("gaps")
    found["explained"] = sum(gap <= found["max_diff"] for gap in gaps)
    found["largest_gap"] = max(gaps, default=0.0)
    for name, value in found.items():
        print(f"{name:12} {value:.3g}" if type(value) is float else f"{name:12} {value:,}")


if __name__ == "__main__":
    main(*sys.argv[1:])
