"""nanobit/export/web/: the pages in a browser without a network, as a person uses them.

python tests/test_web_page.py stories.html    how soon a page is ready, and how fast it writes 200 tokens
"""

import filecmp
import json
import os
import re
import shutil
import sys
import time

import pytest
import torch
from conftest import ROOT
from documents import run_here
from parts import part_of, sentencepiece

from nanobit import weights
from nanobit.export import hf
from nanobit.export.web import html_file
from nanobit.infer.restore import restore
from nanobit.tasks import game, tictactoe
from nanobit.terminal import printable
from nanobit.tokenizer import make_tokenizer

api = pytest.importorskip("playwright.sync_api", reason="drives the browser: requirements-dev.txt")
WAIT = 60_000  # milliseconds: a busy machine runs a page at a tenth of its speed
api.expect.set_options(timeout=WAIT)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")

DOCS = {"adder": "adder", "play": "tictactoe"}  # {page of docs/: model of models/ that it is made from}
HOSTILE = "</script><img src=x onerror=\"document.title='broken'\">{{page}}\u2028<!-- &amp;"
ENDS = re.compile(r"You win!|The model wins\.|A draw\.")
# the contrast of each text with what is behind it, as WCAG 2.1 defines it
CONTRASTS = """() => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = (color) => {
    const [r, g, b] = numbers(color).map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const color = getComputedStyle(element).backgroundColor;
    return numbers(color)[3] === 0 ? behind(element.parentElement) : color;
  };
  const contrasts = [];
  for (const element of document.querySelectorAll("header *, [role=tab], main :enabled, main *, footer")) {
    const isText = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!isText || !element.checkVisibility() || element.matches(":disabled, :disabled *")) continue;
    const {color, fill} = getComputedStyle(element);
    const tint = element.closest("#board button")?.querySelector("i");  // over the background, half clear
    for (const place of tint ? [element, tint] : [element]) {
      const lights = [light(element instanceof SVGElement ? fill : color), light(behind(place))];
      const ratio = (Math.max(...lights) + 0.05) / (Math.min(...lights) + 0.05);
      contrasts.push([ratio, element.outerHTML.slice(0, 80)]);
    }
  }
  return contrasts;
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Return {name: path} of pages: those of docs/, one of stories, and an untrained model that talks."""
    folder = tmp_path_factory.mktemp("pages")
    paths = {name: str(folder / f"{name}.html") for name in (*DOCS, "stories", "chat")}
    for name, model in DOCS.items():
        flags = [f"--ckpt={ROOT}/models/{model}", "--format=web", "--embed=f16", f"--out={paths[name]}"]
        run_here("export.py", *flags)
    html_file.write(weights.trained(f"{ROOT}/models/stories")[0], paths["stories"])
    part = part_of(sentencepiece() | dict(chat="user-assistant"), vocab_size=320, n_layer=1, seq_len=128)
    html_file.write(part, paths["chat"])
    return paths


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as playwright:
        is_root = hasattr(os, "geteuid") and os.geteuid() == 0  # its sandbox refuses root
        browser = playwright.chromium.launch(executable_path=BROWSER, chromium_sandbox=not is_root)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Return a function that opens a page by its path. At the end nothing was requested but the page and its
    worker, and there was no error and no warning."""
    contexts, faults = [], []

    def request(asked, path):
        if not asked.url.startswith("blob:") and asked.url != f"file://{path}":
            faults.append(asked.url)

    def open_page(path, **options):
        options = dict(viewport=dict(width=1200, height=800)) | options
        contexts.append(browser.new_context(offline=True, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT)
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda asked: request(asked, path))
        page.goto(f"file://{path}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults


def write(page, prompt, **settings):
    """Let the model write after a prompt with these settings; return its text."""
    page.locator("#settings").evaluate("(details) => { details.open = true; }")
    for name, value in settings.items():
        page.fill(f"#{name}", str(value))
    page.fill("#prompt", prompt)
    api.expect(page.locator("#go")).to_be_enabled()
    before = page.locator("#answers li").count()
    page.press("#prompt", "Enter")
    api.expect(page.locator("#answers li")).to_have_count(before + 1)
    api.expect(page.locator("#go")).to_be_enabled()
    return page.locator("#answers .new").first.text_content()


def wait(page):
    """Wait until a person can move or the game has ended; return whether it has ended."""
    # the text of the turn before stays until the model has answered
    page.wait_for_function("() => game.answers.length > 0 || lineOf(game.moves) || game.moves.length === 9")
    return bool(ENDS.search(page.text_content("#turn")))


@pytest.mark.parametrize("name", DOCS)
def test_page_of_docs(pages, name):
    """The pages of docs/ are those that the models of the repository give now."""
    rebuild = f"python export.py --ckpt=models/{DOCS[name]} --format=web --embed=f16 --out=docs/{name}.html"
    assert filecmp.cmp(pages[name], f"{ROOT}/docs/{name}.html", shallow=False), rebuild


def test_sums(pages, open_page):
    """Sums are typed or clicked, and answered; the error of a character that the model lacks is shown."""
    page = open_page(pages["adder"])
    assert write(page, "12+34=") == "46"
    assert write(page, " 58 + 7 ") == "65"
    assert page.locator("#answers li").all_text_contents() == ["58+7=65right", "12+34=46right"]
    assert "tokens per second: " in page.text_content("#speed")
    assert page.text_content("#spoken") == "65"
    page.get_by_role("group", name="Examples").get_by_role("button", name="99+99=").click()
    api.expect(page.locator("#answers li").first).to_have_text("99+99=198right")
    page.fill("#prompt", "1+?")
    page.get_by_role("button", name="Calculate").click()
    api.expect(page.get_by_role("alert")).to_contain_text("does not know the character")
    assert page.locator("#answers li").count() == 3
    assert write(page, "7x8=") not in ("", "56")  # it was trained on additions
    assert "wrong, it is 56" in page.locator("#answers li").first.text_content()
    api.expect(page.get_by_role("alert")).to_be_hidden()


def test_text_and_stop(pages, open_page):
    """A text is streamed, the same for the same seed, and can be stopped."""
    page = open_page(pages["stories"])
    assert page.input_value("#prompt") == "Once upon a time"
    texts = [write(page, "Once upon a time", max_new_tokens=12, seed=seed) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0].split()) > 4
    assert "seed: 4" in page.text_content("#speed")
    page.fill("#max_new_tokens", "5000")
    page.press("#prompt", "Enter")
    api.expect(page.locator("#answers .new").first).not_to_be_empty()
    page.get_by_role("button", name="Stop").click()
    api.expect(page.locator("#speed")).to_contain_text("Stopped")
    stopped = page.locator("#answers .new").first.text_content()
    assert 0 < len(stopped) < 5000
    assert write(page, "The dog", max_new_tokens=2)
    page.fill("#top_p", "2")
    page.locator("#settings").evaluate("(details) => { details.open = false; }")
    page.press("#prompt", "Enter")
    api.expect(page.locator("#top_p")).to_be_focused()  # the setting that is out of its range
    assert page.locator("#answers li").count() == 5


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
        api.expect(page.locator("#turn")).to_have_text(re.compile(r"The model took \d .*Your turn"))
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
    api.expect(page.locator("#turn")).to_have_text(re.compile(r"The model took \d .* Your turn, O\."))
    assert page.locator("#board button.X").count() == 1
    page.get_by_role("button", name="New game").click()
    api.expect(page.locator("#board button.X")).to_have_count(1)


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


def test_what_it_is(pages, open_page):
    """The arrow keys select the second tab: sizes, layers, the codes of a matrix as they are, and the loss
    curve with both axes and a text for those who do not see it."""
    page = open_page(pages["adder"])
    page.get_by_role("tab", name="Try it").focus()
    page.keyboard.press("ArrowRight")
    tab = page.get_by_role("tab", name="What it is")
    api.expect(tab).to_be_focused()
    assert tab.get_attribute("aria-selected") == "true"
    assert page.locator("#try").is_hidden()
    facts = page.text_content("#facts")
    assert "526,848" in facts
    assert "4,000 steps on arithmetic" in facts
    assert f"{os.path.getsize(pages['adder']) / 1e6:.2f} MB" in facts
    about = json.loads(html_file.elements(pages["adder"])["about"])
    assert page.locator("#layers tr").count() == len(about["layers"])
    name = "blocks.1.ffn.up_proj.weight"
    page.get_by_label("Matrix").first.select_option(name)
    codes, scale = hf.codes_of(weights.trained(f"{ROOT}/models/adder")[0], name)
    api.expect(page.locator("#matrix-text")).to_contain_text(f"code divided by {scale.item():.4f}")
    shares = [f"{value}: {(codes == int(value)).float().mean():.1%}" for value in ("-1", "0", "+1")]
    assert page.locator("#legend span").all_text_contents() == shares
    picture = page.evaluate("""() => {
      const canvas = document.getElementById("matrix");
      const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      return [canvas.height, canvas.width, [...new Uint32Array(data.buffer)]];
    }""")
    colors = torch.tensor(picture[2]).view(picture[:2])
    assert len(colors.unique()) == 3
    for value in (-1, 0, 1):
        assert len(colors[codes == value].unique()) == 1
    curve = page.get_by_role("img", name="Validation loss, first 2.7802, at step 4,000 1.0816")
    labels = {"validation loss (nats per token)", "training step", "1.5", "4,000"}
    assert labels <= {*curve.locator("text").all_text_contents()}
    assert len(curve.locator("polyline").get_attribute("points").split()) == len(about["curve"]) > 5
    tab.press("ArrowLeft")
    api.expect(page.locator("#try")).to_be_visible()


def test_chat(pages, open_page):
    """A model of conversations answers in turns, answers again, and begins anew."""
    page = open_page(pages["chat"])
    options = dict(max_new_tokens=8, temperature=0.3)
    for seed, question in ((1, "the cat"), (2, "a dog")):
        write(page, question, seed=seed, **options)
    assert page.locator("#answers .given").all_text_contents() == ["the cat", "a dog"]
    answers = page.locator("#answers .new").all_text_contents()
    page.fill("#seed", "9")
    page.get_by_role("button", name="Another answer").click()
    api.expect(page.locator("#speed")).to_contain_text("seed: 9")
    again = page.locator("#answers .new").all_text_contents()
    assert again[0] == answers[0]
    assert again[1] != answers[1]
    page.evaluate("() => { ask = () => Promise.reject(new Error('No memory.')); }")
    page.get_by_role("button", name="Another answer").click()
    api.expect(page.get_by_role("alert")).to_have_text("No memory.")
    api.expect(page.locator("#answers .new")).to_have_text(again)
    assert page.evaluate("messages.length") == 4
    page.get_by_role("button", name="New conversation").click()
    assert page.locator("#answers li").count() == 0
    assert page.get_by_role("alert").is_hidden()
    api.expect(page.locator("#prompt")).to_be_focused()


def test_hostile_texts(open_page, tmp_path):
    """Names and prompts that look like HTML are shown as they are."""
    chars = "\n" + "".join(sorted({*HOSTILE, *"abc"}))
    part = part_of(dict(kind="char", sha256="x", eot=0, chars=chars), vocab_size=len(chars))
    part["config"] |= dict(run_id=HOSTILE, dataset=HOSTILE, sample_prompts=[HOSTILE])
    html_file.write(part, str(tmp_path / "hostile.html"))
    page = open_page(str(tmp_path / "hostile.html"))
    assert page.title() == page.text_content("h1") == printable(HOSTILE)
    write(page, HOSTILE, max_new_tokens=5)
    assert page.locator("#answers .given").text_content() == HOSTILE
    assert page.locator("#examples button").text_content() == HOSTILE
    page.get_by_role("tab", name="What it is").click()
    assert HOSTILE in page.text_content("#facts")
    assert page.locator("img, #answers *:not(li, span)").count() == 0


def test_without_a_worker(pages, browser):
    """A browser that starts no worker shows it in a line."""
    page = browser.new_page()
    page.add_init_script("delete window.Worker")
    page.goto(f"file://{pages['adder']}")
    api.expect(page.get_by_role("alert")).to_contain_text("Worker")
    page.close()


@pytest.mark.parametrize("name", [*DOCS, "stories", "chat"])
def test_phone_and_colors(pages, open_page, name):
    """A narrow screen needs no scrolling to the side, and all texts have a contrast of at least 4.5 (WCAG 2.1
    AA), light and dark."""
    page = open_page(pages[name], viewport=dict(width=360, height=740))
    if name == "play":
        wait(page)
        page.locator("#board button").first.click()
        wait(page)
    else:
        write(page, dict(adder="7x8=").get(name, "the cat"), max_new_tokens=4)
    for tab in ("Try it", "What it is"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (max(map(int, re.findall(r"\d+", background))) < 60) == (scheme == "dark")
            contrasts = page.evaluate(CONTRASTS)
            assert len(contrasts) > 15
            assert min(contrasts)[0] >= 4.5, min(contrasts)


def measure(path):
    """Print the seconds until a page is ready, and its speed as it shows it, for each of five starts."""
    url = f"file://{os.path.abspath(path)}"
    with api.sync_playwright() as playwright:
        for _ in range(5):
            browser = playwright.chromium.launch(executable_path=BROWSER, chromium_sandbox=False)
            page = browser.new_context(offline=True).new_page()
            began = time.perf_counter()
            page.goto(url)
            page.wait_for_selector("#go:enabled:visible, #board button[aria-disabled=false]", timeout=WAIT)
            print(f"ready after {time.perf_counter() - began:.2f} s")
            if page.locator("#form").is_visible():
                write(page, page.input_value("#prompt"), max_new_tokens=200)
                print(page.text_content("#speed"))
            browser.close()


if __name__ == "__main__":
    measure(sys.argv[1])
