"""
Tic-tac-toe: the game, players to measure a model against, and two ways of asking a model for a move.

A game is a line of text: its result first (X or O won, D drawn), then the squares 1 to 9 in the order of
play, X first. The training games are random, so a model that knows them perfectly knows, for every
position, how likely each result is under random play. That can be asked for in two ways:

    win       the likeliest move in games that the asker won: argmax P(move | result, moves so far)
    not_lose  the move after which the opponent's win is least likely: argmin P(opponent's result | moves,
              move), by Bayes' rule from the model's chances of the moves under each of the three results

Neither is perfect play, even for a perfect model: it expects a random opponent. `limits` computes from the
game tree what such a model would reach.
"""

import random
import sys
from functools import cache

import torch
from tqdm import tqdm

RESULTS = "XOD"
CHARS = "\n" + RESULTS + "123456789"  # ids 0 to 12; the end of a line is the end of a game
LINES = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))
EMPTY = "." * 9  # a board: nine characters of X, O and .
ASKS = ("win", "not_lose")
OPPONENTS = ("random", "perfect")


def to_move(board):
    """'X' or 'O': whose turn it is"""
    return "XO"[(9 - board.count(".")) % 2]


def other(side):
    return "O" if side == "X" else "X"


def place(board, square):
    """the board after the player to move takes a square 0 to 8"""
    return board[:square] + to_move(board) + board[square + 1 :]


def free(board):
    """the free squares, 0 to 8"""
    return [square for square, taken in enumerate(board) if taken == "."]


def board_of(moves):
    """the board after moves, a text of squares 1 to 9"""
    board = EMPTY
    for move in moves:
        board = place(board, int(move) - 1)
    return board


@cache
def result(board):
    """'X' or 'O' where that side has a line, 'D' where the board is full, '' where the game goes on"""
    for a, b, c in LINES:
        if board[a] != "." and board[a] == board[b] == board[c]:
            return board[a]
    return "" if "." in board else "D"


def draw(board):
    """the board as three lines, free squares by their numbers"""
    cells = [str(i + 1) if taken == "." else taken for i, taken in enumerate(board)]
    return "\n".join(" " + " | ".join(cells[row : row + 3]) for row in (0, 3, 6))


@cache
def chances(board):
    """{result: its chance} when both sides move at random from here"""
    if result(board):
        return {r: float(r == result(board)) for r in RESULTS}
    after = [chances(place(board, square)) for square in free(board)]
    return {r: sum(each[r] for each in after) / len(after) for r in RESULTS}


@cache
def value(board):
    """1, 0 or -1: what X gets when both sides play perfectly from here"""
    if result(board):
        return {"X": 1, "O": -1, "D": 0}[result(board)]
    return (max if to_move(board) == "X" else min)(value(place(board, square)) for square in free(board))


@cache
def choices(board, player):
    """the squares a player may take here, one as likely as another: every free one for 'random', those of
    perfect play for 'perfect', and for an entry of ASKS those a perfect model of random games finds best"""
    squares, side = free(board), to_move(board)
    if player == "random":
        return squares
    if player == "perfect":
        scores = [value(place(board, square)) * (1 if side == "X" else -1) for square in squares]
    elif player == "win":
        scores = [chances(place(board, square))[side] for square in squares]
    else:
        scores = [-chances(place(board, square))[other(side)] for square in squares]
    return [square for square, score in zip(squares, scores) if score > max(scores) - 1e-9]


def limits(ask, side, opponent):
    """{result: its exact chance} when a perfect model of random games, asked in this way, plays side"""

    @cache
    def outcome(board):
        if result(board):
            return {r: float(r == result(board)) for r in RESULTS}
        some = choices(board, ask if to_move(board) == side else opponent)
        after = [outcome(place(board, square)) for square in some]
        return {r: sum(each[r] for each in after) / len(after) for r in RESULTS}

    return outcome(EMPTY)


@torch.no_grad()
def next_logprobs(model, tokenizer, eot, games):
    """natural log chances (N, V) of the next token, and (N,) of what has come so far, for games: texts of
    one length, result first"""
    ids = torch.tensor([[eot, *tokenizer.encode(game)] for game in games])
    logprobs = model(ids.to(model.embed.weight.device)).log_softmax(-1).cpu().double()  # (N, T, V)
    return logprobs[:, -1], logprobs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].sum(-1)


def ask_model(model, tokenizer, eot, histories, ask):
    """(scores (N, 9) of the squares, higher is better; log chances (N, V) of the next token after the
    wished result) for histories: texts of the moves so far, of one length, the model to move in each"""
    side, squares = to_move(board_of(histories[0])), tokenizer.encode("123456789")
    wished, so_far = next_logprobs(model, tokenizer, eot, [side + moves for moves in histories])
    if ask == "win":
        return wished[:, squares], wished
    joint = {side: wished + so_far[:, None]}  # log P(result, moves so far, next)
    for r in set(RESULTS) - {side}:
        after, so_far = next_logprobs(model, tokenizer, eot, [r + moves for moves in histories])
        joint[r] = after + so_far[:, None]
    total = torch.logsumexp(torch.stack([joint[r] for r in RESULTS]), 0)
    return (total - joint[other(side)])[
        :, squares
    ], wished  # -log P(opponent's result | moves so far, square)


def answers(model, tokenizer, eot, histories, ask):
    """[(the best free square 0 to 8, whether the likeliest token of all after the wished result is a free
    square)] for histories as of ask_model"""
    scores, wished = ask_model(model, tokenizer, eot, histories, ask)
    # '' where it is no character of the tokenizer
    likeliest = [tokenizer.decode([token]) for token in wished.argmax(-1).tolist()]
    found = []
    for moves, row, char in zip(histories, scores, likeliest):
        squares = free(board_of(moves))
        found.append(
            (max(squares, key=lambda square: row[square]), char.isdigit() and int(char) - 1 in squares)
        )
    return found


def match(model, tokenizer, eot, ask, side, opponent, n, rng, seen):
    """play n games side by side; returns ({result: share}, moves of the model for which a win was still
    possible, those of them whose likeliest token was legal: after a wish that cannot come true no token is
    likely). seen {moves: answer} remembers what the model has answered to this way of asking: a few hundred
    positions come again and again, and the answer is always the same."""
    games, count, moved, legal = [""] * n, dict.fromkeys(RESULTS, 0), 0, 0
    for turn in "XOXOXOXOX":
        if turn == side:
            new = sorted(set(games) - seen.keys())
            if new:
                seen |= zip(new, answers(model, tokenizer, eot, new, ask))
            hopeful = [moves for moves in games if chances(board_of(moves))[side]]
            moved, legal = moved + len(hopeful), legal + sum(seen[moves][1] for moves in hopeful)
            games = [moves + str(seen[moves][0] + 1) for moves in games]
        else:
            games = [moves + str(rng.choice(choices(board_of(moves), opponent)) + 1) for moves in games]
        for moves in games:
            if result(board_of(moves)):
                count[result(board_of(moves))] += 1
        games = [moves for moves in games if not result(board_of(moves))]
    return {r: count[r] / n for r in RESULTS}, moved, legal


@torch.no_grad()
def unmasked(model, tokenizer, eot, n, generator):
    """(legal moves, moves) of n games that the model plays with itself, every token drawn at temperature 1
    and nothing masked. A move that is no free square ends its game, as a result does."""
    device = model.embed.weight.device
    ids, boards, legal, moved = torch.full((n, 1), eot), [EMPTY] * n, 0, 0
    for ply in range(10):
        logits = model(ids.to(device))[:, -1].float().cpu()
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids = torch.cat((ids, drawn), 1)
        if ply == 0:
            continue  # the result
        going, moved = [], moved + len(boards)
        for row, char in enumerate(tokenizer.decode([token]) for token in drawn[:, 0].tolist()):
            if char.isdigit() and boards[row][int(char) - 1] == ".":
                legal, boards[row] = legal + 1, place(boards[row], int(char) - 1)
                if not result(boards[row]):
                    going.append(row)
        ids, boards = ids[going], [boards[row] for row in going]
        if not going:
            break
    return legal, moved


def score(model, tokenizer, eot, games, seed):
    """(results for the JSON line, lines of text to print) of `games` games in each of the eight match-ups,
    beside what a perfect model of random games would reach"""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    good, n = unmasked(model, tokenizer, eot, games, generator)
    lines = [f"legal moves, drawn at temperature 1, nothing masked: {good / n:.3%} of {n:,}"]
    found, moved, legal = [], 0, 0
    lines.append(f"{games:,} games each; in brackets a perfect model of random games (ties broken evenly)")
    lines.append(f"{'ask':8}  {'as':2}  {'against':7}  {'wins':>15}  {'draws':>15}  {'losses':>15}")
    bar = tqdm(total=8, desc="matches", disable=not sys.stderr.isatty(), leave=False)
    for ask in ASKS:
        seen = {}
        for side in "XO":
            for opponent in OPPONENTS:
                shares, m, k = match(model, tokenizer, eot, ask, side, opponent, games, rng, seen)
                moved, legal = moved + m, legal + k
                exact = limits(ask, side, opponent)
                order = dict(wins=side, draws="D", losses=other(side))
                row = dict(ask=ask, side=side, opponent=opponent)
                row |= {name: shares[r] for name, r in order.items()}
                found.append(row | {"perfect_model": {name: exact[r] for name, r in order.items()}})
                cells = (f"{shares[r]:6.1%} ({exact[r]:6.1%})" for r in order.values())
                lines.append(f"{ask:8}  {side:2}  {opponent:7}  " + "  ".join(cells))
                bar.update()
    bar.close()
    lines.append(f"where a win was possible, the likeliest token was legal: {legal / moved:.3%} of {moved:,}")
    return dict(accuracy=good / n, n=n, legal_greedy=legal / moved, matches=found), lines
