"""nanobit/export/web/: the pages in a browser without a network, as a person uses them.

python tests/test_web_page.py stories.html    how soon a page is ready, and how fast it writes 200 tokens
"""

import filecmp
import os
import re
import sys
import time

import pytest
from conftest import ROOT
from parts import part_of
from web_browser import DOCS, WAIT, api, launch, needs_browser, write

from nanobit.export.web import html_file
from nanobit.terminal import printable

pytest_plugins = ["web_browser"]
pytestmark = needs_browser

HOSTILE = "</script><img src=x onerror=\"document.title='broken'\">{{page}}\u2028<!-- &amp;"
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


@pytest.mark.parametrize("name", DOCS)
def test_page_of_docs(pages, name):
    """The pages of docs/ are those that the models of the repository give now."""
    rebuild = f"python export.py --ckpt=models/{DOCS[name]} --format=web --embed=f16 --out=docs/{name}.html"
    assert filecmp.cmp(pages[name], f"{ROOT}/docs/{name}.html", shallow=False), rebuild


def test_sums(pages, open_page):
    """Sums are typed or clicked, and answered; the error of a character that the model lacks is shown."""
    page = open_page(pages["adder"])
    api.expect(page.locator("#speed")).to_have_text(re.compile(r"The model is ready, after \d+\.\d\d s\."))
    assert page.input_value("#temperature") == "0"
    assert page.locator("[data-for]:visible:not([data-for~=arithmetic])").count() == 0
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
    assert write(page, "7 * 8") not in ("", "56")  # it was trained on additions
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
    page.fill("#seed", "")
    texts = [write(page, "The dog", max_new_tokens=12) for _ in range(2)]
    assert texts[0] != texts[1]  # each has its own seed
    assert re.search(r"seed: \d", page.text_content("#speed"))
    page.fill("#top_p", "2")
    page.locator("#settings").evaluate("(details) => { details.open = false; }")
    page.press("#prompt", "Enter")
    api.expect(page.locator("#top_p")).to_be_focused()  # the setting that is out of its range
    assert page.locator("#answers li").count() == 6


def test_chat(pages, open_page):
    """A model of conversations answers in turns, answers again, and begins anew."""
    page = open_page(pages["chat"])
    assert page.input_value("#prompt") == ""
    options = dict(max_new_tokens=8, temperature=0.3)
    for seed, question in ((1, "the cat"), (2, "a dog")):
        write(page, question, seed=seed, **options)
    assert page.locator("#answers .given").all_text_contents() == ["the cat", "a dog"]
    answers = page.locator("#answers .new").all_text_contents()
    assert page.locator("#answers").bounding_box()["y"] < page.locator("#form").bounding_box()["y"]
    page.fill("#seed", "-1")
    page.get_by_role("button", name="Another answer").click()
    assert page.locator("#answers .new").all_text_contents() == answers
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
    assert page.evaluate("messages.length") == 0
    assert page.get_by_role("alert").is_hidden()
    api.expect(page.locator("#prompt")).to_be_focused()


def test_answers_of_a_chat(pages, open_page):
    """An answer begins without a space; without one a line says so, and the message is in the box again."""
    page = open_page(pages["chat"])
    for pieces, reason, shown in (
        ([" "], "end", "The model gave no answer. Please ask again."),
        ([], "stopped", "Stopped before an answer came."),
        (["a\0"], "length", "The model gave no answer. Please ask again."),
        ([" Hi", " you"], "end", "Hi you"),
    ):
        page.evaluate(
            """([pieces, reason]) => {
              ask = async (question, onText) => {
                pieces.forEach(onText);
                return {reason, new_tokens: 1, decode_seconds: 0};
              };
            }""",
            [pieces, reason],
        )
        is_answer = shown == "Hi you"
        page.fill("#prompt", " Hello ")
        page.get_by_role("button", name="Send").click()
        api.expect(page.locator("#answers .new" if is_answer else "#error")).to_have_text(shown)
        assert page.locator("#answers .new").all_text_contents() == [shown] * is_answer  # with its spaces
        assert page.evaluate("messages.length") == 2 * is_answer
        assert page.input_value("#prompt") == ("" if is_answer else "Hello")


def test_enter(pages, open_page):
    """Enter sends the message, but neither an empty one nor while the model writes; Shift and Enter begin a
    new line."""
    page = open_page(pages["chat"])
    api.expect(page.locator("#go")).to_be_enabled()
    page.evaluate("() => { ask = () => new Promise(() => {}); }")  # the model never ends
    page.fill("#prompt", "  ")
    page.press("#prompt", "Enter")
    assert page.locator("#answers li").count() == 0
    page.fill("#prompt", "a")
    page.press("#prompt", "Shift+Enter")
    assert page.input_value("#prompt") == "a\n"
    page.press("#prompt", "Enter")
    page.fill("#prompt", "b")
    page.press("#prompt", "Enter")
    assert page.locator("#answers .given").all_text_contents() == ["a"]


def test_a_worker_that_stops(pages, open_page):
    """When the worker stops, its question ends, and the line that says so can be seen on a small screen."""
    page = open_page(pages["adder"], viewport=dict(width=360, height=300))
    api.expect(page.locator("#go")).to_be_enabled()
    page.evaluate("() => { worker.postMessage = () => {}; }")
    page.fill("#prompt", "1+2")
    page.press("#prompt", "Enter")
    page.evaluate("() => { scrollTo(0, 9999); worker.onerror({message: 'No memory.'}); }")
    api.expect(page.get_by_role("alert")).to_have_text("The model has stopped. No memory.")
    api.expect(page.get_by_role("alert")).to_be_in_viewport()
    api.expect(page.locator("#go")).to_be_enabled()
    assert page.locator("#answers li").count() == 0


def test_numbers_and_verdicts(pages, open_page):
    """Numbers are short, the speed leaves out the first token, and sums of any length are judged exactly."""
    page = open_page(pages["adder"])
    shares = page.evaluate("[0, 0.001, 0.0049, 0.005, 0.5, 1].map(percent)")
    assert shares == ["0%", "<1%", "<1%", "1%", "50%", "100%"]
    describe = "([done, options]) => describe(done, options)"
    done = dict(reason="length", new_tokens=2001, decode_seconds=0.5)
    expected = "Length reached. New tokens: 2,001, tokens per second: 4,000, seed: 3."
    assert page.evaluate(describe, [done, dict(temperature=0.8, seed=3)]) == expected
    done = dict(reason="end", new_tokens=1, decode_seconds=0)
    expected = "The model ended. New tokens: 1."
    assert page.evaluate(describe, [done, dict(temperature=0, seed=3)]) == expected
    verdict = """(text) => {
      const item = document.createElement("li");
      addVerdict(item, text);
      return item.textContent;
    }"""
    large = 10**20 + 1
    for text, expected in (
        ("9-12=-3", "right"),
        ("12-9=-3", "wrong, it is 3"),
        (f"{large}x{large}={large**2}", "right"),
        ("2+2=4 ", "wrong, it is 4"),
        ("2+2", ""),
    ):
        assert page.evaluate(verdict, text) == expected


def test_hostile_texts(open_page, tmp_path):
    """Names and prompts that look like HTML are shown as they are."""
    chars = "\n" + "".join(sorted({*HOSTILE, *"abc"}))
    part = part_of(dict(kind="char", sha256="x", eot=0, chars=chars), vocab_size=len(chars))
    part["config"] |= dict(run_id=HOSTILE, dataset=HOSTILE, sample_prompts=[HOSTILE, " ", ""])
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


def test_a_promise_that_fails(pages, browser):
    """What fails while nobody waits for it is shown in a line too."""
    page = browser.new_page()
    page.goto(f"file://{pages['adder']}")
    page.evaluate("() => { Promise.reject(new Error('No such matrix.')); }")
    api.expect(page.get_by_role("alert")).to_have_text("No such matrix.")
    page.close()


@pytest.mark.parametrize("name", [*DOCS, "stories", "chat"])
def test_phone_and_colors(pages, open_page, name):
    """A narrow screen needs no scrolling to the side, and all texts have a contrast of at least 4.5 (WCAG 2.1
    AA), light and dark."""
    page = open_page(pages[name], viewport=dict(width=360, height=740))
    if name == "play":
        page.locator("#board button[aria-disabled=false]").first.click()
        page.locator("#board button[aria-disabled=false]").first.wait_for()
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
            browser = launch(playwright)
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
