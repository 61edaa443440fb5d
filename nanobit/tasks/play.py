"""Play tic-tac-toe against a model on the terminal."""

import sys

from nanobit.tasks import game
from nanobit.tasks.tictactoe import answers, ask_model


def show_probabilities(model, tokenizer, eot, moves, ask):
    """Print what the model thinks of each square, asked for a move in the user's place."""
    board = game.board_of(moves)
    scores, wished = ask_model(model, tokenizer, eot, [moves], ask)
    print(f"the model in your place, asked to {ask}:")
    for square, token in enumerate(tokenizer.encode("123456789")):
        row = f"  {square + 1} {wished[0, token].exp():6.1%}"
        if ask == "not_lose":
            row += f"   then {game.OTHER[game.to_move(board)]} wins {(-scores[0, square]).exp():6.1%}"
        if board[square] != ".":
            row += "   taken"
        print(row)
    print(flush=True)


def ask_square(model, tokenizer, eot, moves, ask, read_line):
    """Return the free square '1' to '9' that the user takes after moves, or 'q' to end."""
    board = game.board_of(moves)
    squares = [str(square + 1) for square in game.free(board)]
    print(game.draw(board), flush=True)
    while True:
        line = read_line(f"{game.to_move(board)} takes (p: the model's probabilities, q: end) ")
        line = "q" if line is None else line.strip().lower()
        if line in [*squares, "q"]:
            return line
        if line == "p":
            show_probabilities(model, tokenizer, eot, moves, ask)
        elif line in list("123456789"):
            print(f"square {line} is taken; free are {', '.join(squares)}", file=sys.stderr)
        else:
            print(f"{line!r} is not a square; type one of {', '.join(squares)}, p or q", file=sys.stderr)


def play(model, tokenizer, eot, side, ask, read_line):
    """Play games until the user ends them. read_line(prompt) returns a line, or None at the end of stdin."""
    moves, asked, illegal = "", 0, 0
    while True:
        board = game.board_of(moves)
        result = game.result(board)
        if result:
            print(game.draw(board))
            print({side: "you win", game.OTHER[side]: "the model wins", "D": "a draw"}[result], flush=True)
            line = read_line("another game? [Y/n] ")
            if line is None or line.strip().lower() not in ("", "y", "yes"):
                break
            moves = ""
        elif game.to_move(board) == side:
            square = ask_square(model, tokenizer, eot, moves, ask, read_line)
            if square == "q":
                break
            moves += square
        else:
            square, is_legal = answers(model, tokenizer, eot, [moves], ask)[0]
            asked += 1
            illegal += not is_legal
            moves += str(square + 1)
            print(f"the model takes {square + 1}")
    if asked:
        print(f"the model's most likely token was not a free square in {illegal} of its {asked} moves")
