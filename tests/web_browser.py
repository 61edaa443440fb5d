"""The pages in a browser without a network: what the tests of the scripts of a page share."""

import os
import shutil

import pytest
from conftest import ROOT
from documents import run_here
from parts import part_of, sentencepiece

from nanobit import weights
from nanobit.export.web import html_file

api = pytest.importorskip("playwright.sync_api", reason="drives the browser: requirements-dev.txt")
WAIT = 60_000  # milliseconds: a busy machine runs a page at a tenth of its speed
api.expect.set_options(timeout=WAIT)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")

DOCS = {"adder": "adder", "play": "tictactoe"}  # {page of docs/: model of models/ that it is made from}


@pytest.fixture(scope="session")
def pages(tmp_path_factory):
    """Return {name: path} of pages: those of docs/, one of stories, and an untrained model that talks."""
    folder = tmp_path_factory.mktemp("pages")
    paths = {name: str(folder / f"{name}.html") for name in (*DOCS, "stories", "chat")}
    for name, model in DOCS.items():
        flags = [f"--ckpt={ROOT}/models/{model}", "--format=web", "--embed=f16", f"--out={paths[name]}"]
        run_here("export.py", *flags)
    html_file.write(weights.trained(f"{ROOT}/models/stories")[0], paths["stories"])
    part = part_of(sentencepiece() | dict(chat="user-assistant"), vocab_size=320, n_layer=1, seq_len=128)
    part["config"]["sample_prompts"] = ["the cat"]
    html_file.write(part, paths["chat"])
    return paths


def launch(playwright):
    """Return a browser."""
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0  # its sandbox refuses root
    return playwright.chromium.launch(executable_path=BROWSER, chromium_sandbox=not is_root)


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as playwright:
        browser = launch(playwright)
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
