"""
Tic-tac-toe without a model: the rules, random and perfect play, and what a perfect model could reach.

A board is nine characters of X, O and . for a free square. Results are X, O (that side has won) and D
(drawn).
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
    board = EMPTY
    for move in moves:
        board = place(board, int(move) - 1)
    return board


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


def certain(board):
    """Return {result: probability} of a game that has ended."""
    return {r: float(r == result(board)) for r in RESULTS}


def mean(outcomes):
    """Return the mean of a list of {result: probability}."""
    return {r: sum(outcome[r] for outcome in outcomes) / len(outcomes) for r in RESULTS}


@cache
def random_play(board):
    """Return {result: probability} if both sides move at random from here."""
    if result(board):
        return certain(board)
    return mean([random_play(place(board, square)) for square in free(board)])


@cache
def value(board):
    """Return 1, 0 or -1: what X gets if both sides play perfectly from here."""
    if result(board):
        return {"X": 1, "O": -1, "D": 0}[result(board)]
    best = max if to_move(board) == "X" else min
    return best(value(place(board, square)) for square in free(board))


@cache
def choices(board, player):
    """Return the squares that a player takes here, each with the same probability: all free ones for
    'random', those of perfect play for 'perfect', and for an entry of ASKS those that a perfect model of
    random games prefers."""
    squares, side = free(board), to_move(board)
    after = [place(board, square) for square in squares]
    if player == "random":
        return squares
    if player == "perfect":
        scores = [value(board) * {"X": 1, "O": -1}[side] for board in after]
    elif player == "win":
        scores = [random_play(board)[side] for board in after]
    else:
        scores = [-random_play(board)[OTHER[side]] for board in after]
    return [square for square, score in zip(squares, scores) if score > max(scores) - 1e-9]


def limits(ask, side, opponent):
    """Return {result: exact probability} if a perfect model of random games, asked in this way, plays
    side."""
    players = {side: ask, OTHER[side]: opponent}

    @cache
    def outcome(board):
        if result(board):
            return certain(board)
        squares = choices(board, players[to_move(board)])
        return mean([outcome(place(board, square)) for square in squares])

    return outcome(EMPTY)
