"""Tic-tac-toe without a model: the rules, random and perfect play, and what a perfect model could reach.

A board is nine characters of X, O and . for a free square. A result is X or O (that side won) or D (drawn).
"""

from functools import cache

RESULTS = "XOD"
CHARS = "\n" + RESULTS + "123456789"  # ids 0 to 12; the end of a line is the end of a game
LINES = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))
EMPTY = "." * 9
ASKS = ("win", "not_lose")  # the ways of asking a model for a move, see tictactoe.py
OPPONENTS = ("random", "perfect")
OTHER = {"X": "O", "O": "X"}


def to_move(board):
    """Return 'X' or 'O', whose turn it is."""
    return "XO"[(9 - board.count(".")) % 2]


def place(board, square):
    """Return the board after the player to move takes a square 0 to 8."""
    return board[:square] + to_move(board) + board[square + 1 :]


def free(board):
    """Return the free squares, 0 to 8."""
    return [square for square, taken in enumerate(board) if taken == "."]


def board_of(moves):
    """Return the board after moves, a text of squares 1 to 9."""
    marks = dict(zip(moves, "XOXOXOXOX"))
    return "".join(marks.get(square, ".") for square in "123456789")


@cache
def result(board):
    """Return 'X' or 'O' if that side has a line, 'D' if the board is full, '' if the game continues."""
    for a, b, c in LINES:
        if board[a] != "." and board[a] == board[b] == board[c]:
            return board[a]
    return "" if "." in board else "D"


def draw(board):
    """Return the board as three lines, free squares by their numbers."""
    cells = [taken.replace(".", str(i + 1)) for i, taken in enumerate(board)]
    return "\n".join(" " + " | ".join(cells[row : row + 3]) for row in (0, 3, 6))


def expected(board, squares, outcome):
    """Return {result: probability} if the next move is one of squares, each with the same probability, and
    outcome(board) is that of the board after it."""
    if result(board):
        return {r: float(r == result(board)) for r in RESULTS}
    outcomes = [outcome(place(board, square)) for square in squares]
    return {r: sum(outcome[r] for outcome in outcomes) / len(outcomes) for r in RESULTS}


@cache
def random_play(board):
    """Return {result: probability} if both sides move at random from here."""
    return expected(board, free(board), random_play)


@cache
def value(board):
    """Return 1, 0 or -1: what X gets if both sides play perfectly from here."""
    if result(board):
        return {"X": 1, "O": -1, "D": 0}[result(board)]
    best = max if to_move(board) == "X" else min
    return best(value(place(board, square)) for square in free(board))


@cache
def choices(board, player):
    """Return the squares that a player takes here, each with the same probability. player: one of OPPONENTS,
    or one of ASKS for a perfect model of random games."""
    side = to_move(board)
    score = {
        "random": lambda after: 0,
        "perfect": lambda after: value(after) * {"X": 1, "O": -1}[side],
        "win": lambda after: random_play(after)[side],
        "not_lose": lambda after: -random_play(after)[OTHER[side]],
    }[player]
    scores = {square: score(place(board, square)) for square in free(board)}
    return [square for square in scores if scores[square] > max(scores.values()) - 1e-9]


def limits(ask, side, opponent):
    """Return {result: exact probability} if side is a perfect model of random games, asked in this way."""
    players = {side: ask, OTHER[side]: opponent}

    @cache
    def outcome(board):
        return expected(board, choices(board, players[to_move(board)]), outcome)

    return outcome(EMPTY)
