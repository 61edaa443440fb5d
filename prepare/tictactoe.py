"""Write random games of tic-tac-toe as tokens: the result first (X, O or D), then the squares 1 to 9 as they
were played, one game a line, one token per character.

    python prepare/tictactoe.py

Both sides move at random until one has a line or the board is full. A game is held out for the val split
when a hash of its moves says so, about one in fifty. There are 255,168 different games; short ones come
more often, as they do in random play. 2,000,000 games take ten seconds, 40 MB of disk and 400 MB of memory.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from nanobit import cli  # first: it explains a missing package

# isort: split
import numpy as np
from tqdm import tqdm

import config
from nanobit.prepare import token_files
from nanobit.tasks.game import CHARS, LINES, RESULTS

FLAGS = {
    "name": cli.Flag("tictactoe", "name of the data set"),
    "seed": cli.Flag(1337, "another seed draws other games", within=cli.SEED),
    "games": cli.Flag(2_000_000, "games in all, drawn with replacement", within="[1000, inf)"),
    "val_fraction": cli.Flag(0.02, "share of the different games that is held out", within="(0, 1)"),
}
WON = np.zeros(512, bool)  # by the set of a side's squares, a bit each
for line in LINES:
    squares = sum(1 << square for square in line)
    WON |= np.bitwise_and(np.arange(512), squares) == squares


def random_games(rng, n):
    """Return n games as characters (n, 11) uint8, 0 beyond a game's end: result, moves, newline; and a hash
    (n,) of the moves. A random order of all squares, cut where the game ends, is random play."""
    order = rng.random((n, 9), dtype=np.float32).argsort(1)  # (n, 9): the square of each ply
    taken = np.zeros((2, n), np.int64)
    length = np.full(n, 9)
    winner = np.full(n, ord("D"), np.uint8)
    for ply in range(9):
        side = ply % 2
        taken[side] |= 1 << order[:, ply]
        ends = WON[taken[side]] & (length == 9) & (winner == ord("D"))
        length[ends] = ply + 1
        winner[ends] = ord(RESULTS[side])
    chars = np.zeros((n, 11), np.uint8)
    chars[:, 0] = winner
    plies = np.arange(9) < length[:, None]
    chars[:, 1:10] = np.where(plies, order + ord("1"), 0)
    chars[np.arange(n), length + 1] = ord("\n")
    moves = (np.where(plies, order + 1, 0) * 10 ** np.arange(9)).sum(1).astype(np.uint64)
    return chars, (moves * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(44)  # 20 bits


if __name__ == "__main__":
    cfg = config.load(doc=__doc__, flags=FLAGS, only=("data_dir",))
    source = token_files.source_of("prepare/tictactoe.py", cfg, ("games", "val_fraction", "seed"))
    folder = token_files.open_data_set(cfg.data_dir, cfg.name, source)
    rng = np.random.default_rng(cfg.seed)
    end = np.array([ord("\n")], np.uint8)  # of a game; one precedes the first
    parts = {"train": [end], "val": [end]}
    with tqdm(total=cfg.games, unit="game", unit_scale=True, disable=None) as bar:
        for start in range(0, cfg.games, 100_000):
            chars, hashed = random_games(rng, min(100_000, cfg.games - start))
            held_out = hashed < cfg.val_fraction * 2**20
            for split, rows in (("train", chars[~held_out]), ("val", chars[held_out])):
                parts[split].append(rows[rows > 0])
            bar.update(len(chars))
    if sum(map(len, parts["val"])) == 1:
        cli.fail(f"val_fraction = {cfg.val_fraction}: no game was held out; raise it, or games")
    texts = {split: np.concatenate(rows).tobytes() for split, rows in parts.items()}
    for split, text in texts.items():
        n_games = text.count(b"\n") - 1
        print(f"{folder}: {split}: {n_games:,} games, {len(text):,} tokens")
    token_files.write_characters(folder, texts, CHARS, source, "tictactoe")
