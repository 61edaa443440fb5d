"""nanobit/tasks/play.py: a game of tic-tac-toe against a model, on one screen."""

import re

from conftest import run, token_files
from scripted_models import save, stdin

from nanobit.tasks import game

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
