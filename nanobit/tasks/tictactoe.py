"""Score a model on tic-tac-toe, with two ways of asking it for a move.

A game is a line of text: its result (X or O won, D drawn), then the squares 1 to 9 as played, X first. The
training games are random, so that a perfect model knows how likely each result is under random play:

    win       the most likely move in games that the asker won: argmax P(move | result, moves so far)
    not_lose  the move after which the opponent's win is least likely: argmin P(opponent's result | moves,
              move), by Bayes' rule from the model's probability of the moves under each of the three results

Both expect a random opponent; `game.limits` computes what a perfect model reaches."""

import itertools
import random
from collections import Counter

import torch

from nanobit.tasks import game
from nanobit.tasks.game import ASKS, OPPONENTS, OTHER, RESULTS, board_of, free, to_move
from nanobit.tasks.text import progress


@torch.no_grad()
def next_logprobs(model, tokenizer, eot, games):
    """Return log probabilities, (N, V) of the next token and (N,) of games: texts of one length."""
    ids = torch.tensor([[eot, *tokenizer.encode(text)] for text in games])
    logprobs = model(ids.to(model.embed.weight.device)).log_softmax(-1).cpu().double()  # (N, T, V)
    return logprobs[:, -1], logprobs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].sum(-1)


def ask_model(model, tokenizer, eot, histories, ask):
    """Return (scores (N, 9) of the squares, higher is better; log probabilities (N, V) of the next token
    after the wished result) for histories: the moves so far, texts of one length, the model to move."""
    side = to_move(board_of(histories[0]))
    squares = tokenizer.encode("123456789")
    results = side if ask == "win" else RESULTS
    logprobs = {r: next_logprobs(model, tokenizer, eot, [r + moves for moves in histories]) for r in results}
    wished, _ = logprobs[side]
    if ask == "win":
        return wished[:, squares], wished
    joint = {r: after + so_far[:, None] for r, (after, so_far) in logprobs.items()}  # log P(r, moves, next)
    loses = joint[OTHER[side]] - torch.logsumexp(torch.stack(list(joint.values())), 0)
    return -loses[:, squares], wished


def square_of(tokenizer, token):
    """Return the square 0 to 8 of a token, or -1 for any other token."""
    return "123456789".find(tokenizer.decode([token]) or "none")


def answers(model, tokenizer, eot, histories, ask):
    """Return [(the best free square, whether the most likely token is a free square)]; see ask_model."""
    scores, wished = ask_model(model, tokenizer, eot, histories, ask)
    pairs = []
    for moves, row, token in zip(histories, scores, wished.argmax(-1).tolist()):
        squares = free(board_of(moves))
        best = max(squares, key=lambda square: row[square])
        pairs.append((best, square_of(tokenizer, token) in squares))
    return pairs


def match(model, tokenizer, eot, ask, side, opponent, n, rng, seen):
    """Play n games side by side. Return ({result: share}, the model's moves while a win was still possible,
    those of them whose most likely token was legal). seen {moves: answer} collects the model's answers."""
    games = [""] * n
    ended = Counter()
    moved = legal = 0
    for turn in "XOXOXOXOX":
        if turn == side:
            if new := sorted(set(games) - seen.keys()):
                seen |= zip(new, answers(model, tokenizer, eot, new, ask))
            # after a result that has become impossible, no token is likely
            hopeful = [moves for moves in games if game.random_play(board_of(moves))[side]]
            moved += len(hopeful)
            legal += sum(seen[moves][1] for moves in hopeful)
            squares = [seen[moves][0] for moves in games]
        else:
            squares = [rng.choice(game.choices(board_of(moves), opponent)) for moves in games]
        games = [moves + str(square + 1) for moves, square in zip(games, squares)]
        results = [game.result(board_of(moves)) for moves in games]
        ended.update(results)
        games = [moves for moves, r in zip(games, results) if not r]
    return {r: ended[r] / n for r in RESULTS}, moved, legal


@torch.no_grad()
def unmasked(model, tokenizer, eot, n, generator):
    """Return (legal moves, moves) of n games that the model plays against itself, every token drawn at
    temperature 1 and nothing masked. An illegal move ends its game, as a result does."""
    ids = torch.full((n, 1), eot)
    boards = [game.EMPTY] * n
    legal = moved = 0
    while boards:
        logits = model(ids.to(model.embed.weight.device))[:, -1].float().cpu()
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids = torch.cat((ids, drawn), 1)
        if ids.shape[1] == 2:
            continue  # that was the result
        moved += len(boards)
        going = []
        for row, token in enumerate(drawn[:, 0].tolist()):
            square = square_of(tokenizer, token)
            if square in free(boards[row]):
                legal += 1
                boards[row] = game.place(boards[row], square)
                if not game.result(boards[row]):
                    going.append(row)
        ids = ids[going]
        boards = [boards[row] for row in going]
    return legal, moved


def score(model, tokenizer, eot, games, seed):
    """Return (results for the JSON line, lines of text to print) of `games` games in each match-up."""
    generator = torch.Generator().manual_seed(seed)
    good, n = unmasked(model, tokenizer, eot, games, generator)
    lines = [
        f"legal moves, drawn at temperature 1, nothing masked: {good / n:.3%} of {n:,}",
        f"{games:,} games each; in brackets a perfect model of random games (ties broken evenly)",
        f"{'ask':8}  {'as':2}  {'against':7}  {'wins':>15}  {'draws':>15}  {'losses':>15}",
    ]
    rng = random.Random(seed)
    matches, moved, legal = [], 0, 0
    seen = {ask: {} for ask in ASKS}
    for ask, side, opponent in progress("matches", list(itertools.product(ASKS, "XO", OPPONENTS))):
        shares, m, k = match(model, tokenizer, eot, ask, side, opponent, games, rng, seen[ask])
        moved += m
        legal += k
        exact = game.limits(ask, side, opponent)
        order = dict(wins=side, draws="D", losses=OTHER[side])
        row = dict(ask=ask, side=side, opponent=opponent)
        row |= {name: shares[r] for name, r in order.items()}
        matches.append(row | {"perfect_model": {name: exact[r] for name, r in order.items()}})
        cells = (f"{shares[r]:6.1%} ({exact[r]:6.1%})" for r in order.values())
        lines.append(f"{ask:8}  {side:2}  {opponent:7}  " + "  ".join(cells))
    lines.append(f"most likely token legal, when a win was possible: {legal / moved:.3%} of {moved:,}")
    return dict(accuracy=good / n, n=n, legal_greedy=legal / moved, matches=matches), lines
