"""Tic-tac-toe: the game, its data, and the limits that scores are held against."""

import json
import os
import random

import numpy as np
import pytest
import torch
from conftest import run

from nanobit.tasks import game, tictactoe
from nanobit.tokenizer import CharTokenizer

TOKENIZER = CharTokenizer({"chars": game.CHARS})


class Perfect(torch.nn.Module):
    """A perfect model of random games, from the game tree: the probabilities of the next character after a
    result and moves."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(1, 1)

    def probabilities(self, text):
        """Return {character: probability} after the beginning of a game."""
        if not text:
            return game.random_play(game.EMPTY)
        board = game.board_of(text[1:])
        if game.result(board):
            return {"\n": 1.0}
        after = {s: game.random_play(game.place(board, s))[text[0]] for s in game.free(board)}
        total = sum(after.values())
        if not total:
            return {"\n": 1.0}
        return {str(s + 1): probability / total for s, probability in after.items()}

    def forward(self, ids):
        logits = torch.full((*ids.shape, len(game.CHARS)), -30.0)
        for row, text in enumerate(TOKENIZER.decode(line) for line in ids.tolist()):
            for t in range(len(text)):
                for char, probability in self.probabilities(text[1 : t + 1]).items():
                    logits[row, t, TOKENIZER.ids[char]] = float(np.log(max(probability, 1e-12)))
        return logits


def test_known_numbers_of_the_game():
    """The rules give the known numbers: 255,168 games, 5,478 positions, a draw with perfect play; random play
    gives 58.5, 28.8 and 12.7 % of wins for X, for O and of draws."""
    boards, games = {game.EMPTY}, 0

    def walk(board):
        nonlocal games
        boards.add(board)
        if game.result(board):
            games += 1
        else:
            for square in game.free(board):
                walk(game.place(board, square))

    walk(game.EMPTY)
    assert (games, len(boards), game.value(game.EMPTY)) == (255_168, 5_478, 0)
    assert [round(game.random_play(game.EMPTY)[r], 3) for r in "XOD"] == [0.585, 0.288, 0.127]


@pytest.mark.parametrize(
    "ask, side, losses", [("win", "X", 0), ("win", "O", 8.8), ("not_lose", "X", 0), ("not_lose", "O", 0.42)]
)
def test_a_perfect_model_reaches_the_limits(ask, side, losses):
    """A perfect model of random games loses as often as the computed limit, and its moves are legal."""
    lost = game.OTHER[side]
    assert round(100 * game.limits(ask, side, "random")[lost], 1 if ask == "win" else 2) == losses
    shares, moved, legal = tictactoe.match(
        Perfect(), TOKENIZER, 0, ask, side, "random", 1500, random.Random(0), {}
    )
    exact = game.limits(ask, side, "random")[lost]  # wins and draws depend on how ties are broken, too
    assert abs(shares[lost] - exact) < 4 * (max(exact * (1 - exact), 1e-4) / 1500) ** 0.5  # 4 standard errors
    assert sum(shares.values()) == pytest.approx(1)
    assert legal == moved > 1500


def test_unmasked_moves_of_a_perfect_model_are_legal():
    """Without a mask the moves of a perfect model are legal, the end of a game is not a move, and an illegal
    move counts."""
    generator = torch.Generator().manual_seed(0)
    legal, moved = tictactoe.unmasked(Perfect(), TOKENIZER, 0, 50, generator)
    assert legal == moved > 250
    blind = Perfect()
    blind.probabilities = lambda text: {"5": 1.0}
    legal, moved = tictactoe.unmasked(blind, TOKENIZER, 0, 50, generator)
    assert (legal, moved) == (50, 100)


def test_a_token_that_is_no_character_is_a_wrong_move():
    """An unused id of a padded vocabulary counts as an illegal move, and does not shift the other answers."""

    class Padded(Perfect):
        def forward(self, ids):
            logits = super().forward(ids)
            first = ids[:, 2] == TOKENIZER.ids["1"] if ids.shape[1] > 2 else torch.zeros(len(ids), dtype=bool)
            unused = torch.where(first, 9.0, -30.0)[:, None, None].expand(*ids.shape, 1)
            return torch.cat((logits, unused), -1)

    answers = tictactoe.answers(Padded(), TOKENIZER, 0, ["12", "21"], "win")
    assert [legal for _, legal in answers] == [False, True]
    legal, moved = tictactoe.unmasked(Padded(), TOKENIZER, 0, 200, torch.Generator().manual_seed(0))
    assert 0 < legal < moved


def test_score_of_a_perfect_model():
    """The score reports all eight match-ups, with shares near the limits of a perfect model."""
    result, lines = tictactoe.score(Perfect(), TOKENIZER, 0, 100, 0)
    assert result["accuracy"] == 1
    assert result["n"] > 500
    assert result["legal_greedy"] == 1
    assert len(result["matches"]) == 8
    for row in result["matches"]:
        assert row["wins"] + row["draws"] + row["losses"] == pytest.approx(1)
        exact = row["perfect_model"]["losses"]
        assert abs(row["losses"] - exact) <= 5 * (max(exact * (1 - exact), 1e-4) / 100) ** 0.5
    assert any("not_lose" in line and "perfect" in line for line in lines)


def test_games_of_the_data_set(tmp_path):
    """Each game of the data set ends with its first win, begins with its result, and is in one split only."""
    run("prepare/tictactoe.py", "--games=20000", f"--data_dir={tmp_path}")
    folder = tmp_path / "tictactoe"
    games = {}
    for split in ("train", "val"):
        ids = np.fromfile(folder / f"{split}_00000.bin", "<u2").tolist()
        text = TOKENIZER.decode(ids)
        assert text[0] == "\n"
        assert text[-1] == "\n"
        games[split] = text.strip().split("\n")
        for line in games[split]:
            result, moves = line[0], line[1:]
            board = game.board_of(moves)
            assert len(set(moves)) == len(moves) == 9 - board.count(".")
            assert game.result(board) == result
            assert not game.result(game.board_of(moves[:-1]))
    assert not set(games["train"]) & set(games["val"])
    assert len(games["train"]) + len(games["val"]) == 20000
    assert 150 < len(games["val"]) < 800
    won = sum(line[0] == "X" for line in games["train"]) / len(games["train"])
    assert abs(won - 0.585) < 0.02
    meta = json.load(open(os.path.join(folder, "meta.json"), encoding="utf-8"))
    assert meta["task"] == "tictactoe"
    assert meta["tokenizer"]["chars"] == game.CHARS
