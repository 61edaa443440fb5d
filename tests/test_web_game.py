"""game.js: the board of a page, in a browser, and its rules in Node."""

import random
import re

import pytest
import torch
from conftest import ROOT
from web_browser import api, needs_browser
from web_pages import js, needs_node

from nanobit import weights
from nanobit.infer.restore import restore
from nanobit.tasks import game, tictactoe
from nanobit.tokenizer import make_tokenizer

pytest_plugins = ["web_browser"]

TOOK = r"The model took \d \((<1|\d+)%\)\. "
# a question waits until answer() gives the same numbers for all squares
LATE = """() => {
  window.asked = [];
  window.answer = () => {
    const question = asked.find(({isAnswered}) => !isAnswered);
    question.isAnswered = true;
    const {texts, resolve} = question;
    resolve({logprobs: texts.map(() => Array(13).fill(0)), sums: texts.map(() => 0)});
    return new Promise((resolve) => setTimeout(resolve));
  };
  ask = ({texts}) => new Promise((resolve) => asked.push({texts, resolve}));
}"""
ENDS = re.compile(r"You win!|The model wins\.|A draw\.")


def wait(page):
    """Wait until a person can move or the game has ended; return whether it has ended."""
    # the text of the turn before stays until the model has answered
    page.wait_for_function("() => game.answers.length > 0 || lineOf(game.moves) || game.moves.length === 9")
    return bool(ENDS.search(page.text_content("#turn")))


@needs_browser
def test_numbers_of_the_board(pages, open_page):
    """The model's moves, and its probabilities of the free squares, are those of Python: whole per cent, and
    the embedding of the page is rounded to int8."""
    part, _ = weights.trained(f"{ROOT}/models/tictactoe")
    tokenizer = make_tokenizer(part["tokenizer"])
    asked = (restore(part, torch.device("cpu"), packed=True), tokenizer, part["tokenizer"]["eot"])
    page = open_page(pages["play"])
    for ask in game.ASKS:
        page.select_option("#ask", ask)
        page.get_by_role("button", name="New game").click()
        page.get_by_label("square 5, empty, ").click()
        api.expect(page.locator("#turn")).to_have_text(re.compile(TOOK + r"Your turn, X\."))
        moves = "5" + re.search(r"took (\d)", page.text_content("#turn"))[1]
        assert moves == f"5{tictactoe.answers(*asked, ['5'], ask)[0][0] + 1}"
        scores, wished = tictactoe.ask_model(*asked, [moves], ask)
        squares = [square for square in range(9) if str(square + 1) not in moves]
        expected = {
            "win": wished[0, tokenizer.encode("123456789")][squares].softmax(-1),
            "not_lose": 1 - (-scores[0, squares]).exp(),
        }[ask]
        shown = [int(text[:-1]) for text in page.locator("#board span").all_text_contents() if text]
        assert shown == pytest.approx([100 * p for p in expected.tolist()], abs=1)
    page.uncheck("#show")
    assert not any(page.locator("#board span").all_text_contents())


@needs_browser
def test_game_by_mouse(pages, open_page):
    """A game is played to its end, with free squares only; the next one begins, as O."""
    page = open_page(pages["play"])
    n = 0
    while not wait(page):
        n += 1
        page.locator("#board button[aria-disabled=false]").first.click()
        api.expect(page.locator("#board button.X")).to_have_count(n)
    assert page.locator("#board button.O").count() in (n, n - 1)
    assert re.fullmatch(r"So far you won \d, drew \d and lost \d\.", page.text_content("#tally"))
    assert page.locator("#turn[aria-live=polite]").count() == 1
    page.locator("#board button").first.click(force=True)  # nothing: the game has ended
    page.select_option("#side", "O")
    api.expect(page.locator("#turn")).to_have_text(re.compile(TOOK + r"Your turn, O\."))
    assert page.locator("#board button.X").count() == 1
    page.get_by_role("button", name="New game").click()
    api.expect(page.locator("#board button.X")).to_have_count(1)


@needs_browser
def test_game_by_keyboard(pages, open_page):
    """The keyboard reaches the board, moves on it by the arrow keys, and plays a game."""
    page = open_page(pages["play"])
    wait(page)
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", "ArrowUp", "ArrowUp", "ArrowLeft", "ArrowUp"):
        page.keyboard.press(key)
    api.expect(page.get_by_label("square 1, empty")).to_be_focused()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Enter")
    for _ in range(8):
        if not wait(page):
            page.keyboard.press("Tab")
            page.keyboard.press("Space")  # on a taken square nothing happens
    assert wait(page)
    assert page.get_by_label("square 1, X").count() == 1


@needs_node
def test_lines():
    """The line of the side that has just moved is that of the rules, after any moves."""
    draw = random.Random(0)
    texts = ["".join(draw.sample("123456789", draw.randint(0, 9))) for _ in range(500)]
    expected = []
    for moves in texts:
        board = game.board_of(moves)
        mark = game.OTHER[game.to_move(board)]
        lines = [line for line in game.LINES if all(board[square] == mark for square in line)]
        expected.append("".join(str(square + 1) for square in lines[0]) if lines else "")
    assert {"".join(str(square + 1) for square in line) for line in game.LINES} <= {*expected}
    assert js("texts.map(lineOf)", ["game.js"], texts=texts) == expected


@needs_browser
def test_how_a_game_ends(pages, open_page):
    """A line or nine moves end a game: the winner, the tally, and on the board the line and the last move."""
    page = open_page(pages["play"])
    wait(page)
    for side, moves, line, turn, tally in (
        ("X", "14253", "123", "You win!", "won 1, drew 0 and lost 0"),
        ("O", "14253", "123", "The model wins.", "won 1, drew 0 and lost 1"),
        ("X", "142567893", "123", "You win!", "won 2, drew 0 and lost 1"),
        ("X", "123546879", "", "A draw.", "won 2, drew 1 and lost 1"),
        ("X", "12354687", "", "Your turn, X.", "won 2, drew 1 and lost 1"),
    ):
        page.evaluate(
            """([side, moves]) => {
              byId("side").value = side;
              game = {moves, answers: []};
              takeTurn();
            }""",
            [side, moves],
        )
        api.expect(page.locator("#turn")).to_have_text(turn)
        assert page.text_content("#tally") == f"So far you {tally}."
        values = "(buttons) => buttons.map((button) => button.value).join('')"
        assert page.locator("#board .won").evaluate_all(values) == line
        assert page.locator("#board .last").evaluate_all(values) == moves[-1]


@needs_browser
def test_what_the_board_shows(pages, open_page):
    """The best square is marked and each is tinted by its probability; the texts that the model continues and
    the meaning of the numbers are those of the way of asking."""
    page = open_page(pages["play"])
    for ask, n, texts in (("win", 9, "X"), ("not_lose", 0, "O, X, D")):
        page.select_option("#ask", ask)
        # the scores of not_lose are below 0
        page.wait_for_function(
            "(n) => game.answers.filter(({score}) => score > 0).length === n && game.answers.length", arg=n
        )
        made = page.evaluate("game.answers.map(({probability}) => probability)")
        highest = max(made)
        tints = page.locator("#board i").evaluate_all("(tints) => tints.map((tint) => +tint.style.opacity)")
        assert tints == pytest.approx([p / highest for p in made], abs=1e-4)
        best = page.locator("#board .best").evaluate_all("(buttons) => buttons.map(({value}) => +value - 1)")
        assert best == [made.index(highest)]
        assert page.text_content("#read") == texts
        assert page.locator("[data-ask]").evaluate_all("(all) => all.map((text) => text.hidden)") == [
            ask != "win",
            ask == "win",
        ]


@needs_browser
def test_only_a_free_square_in_turn_can_be_taken(pages, open_page):
    """A taken square, and any square while the model thinks, takes no move; the arrow keys scroll nothing."""
    page = open_page(pages["play"])
    wait(page)
    states = """() => {
      play("5");
      play("6");
      return [game.moves, ...[...byId("board").children].map((button) => button.ariaDisabled)];
    }"""
    assert page.evaluate(states) == ["5"] + ["true"] * 9
    wait(page)
    moves = page.evaluate("game.moves")
    assert page.text_content("#read") == f"X{moves}"
    page.get_by_label("square 5, X").click(force=True)
    assert page.evaluate("game.moves") == moves
    scrolls = """(key) => byId("board").firstElementChild.dispatchEvent(
      new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}))"""
    assert [page.evaluate(scrolls, key) for key in ("ArrowDown", "ArrowUp", "a")] == [False, False, True]


@needs_browser
def test_answers_that_come_late(pages, open_page):
    """An answer on a former game moves nothing in the next one, and one in another way of asking is asked
    again."""
    page = open_page(pages["play"])
    wait(page)
    page.evaluate(LATE)
    page.select_option("#side", "O")
    page.get_by_role("button", name="New game").click()
    page.evaluate("async () => { await answer(); await answer(); }")
    assert page.evaluate("[game.moves, asked.length]") == ["1", 3]
    page.select_option("#side", "X")
    page.evaluate("asked.length = 0; newGame()")
    page.select_option("#ask", "not_lose")
    page.evaluate("answer()")
    assert page.evaluate("asked.map(({texts}) => texts)") == [["X"], ["O", "X", "D"]]
