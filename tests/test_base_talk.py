"""Talking with a base model, which continues the lines of the screen; also on a terminal."""

import os
import pty
import select
import signal
import time

import faults
import pytest
from conftest import CHARS, ROOT, run, token_files
from fork import Script
from scripted_models import asked, save, scripted, sentencepiece_spec, stdin

from nanobit.tokenizer import make_tokenizer


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
