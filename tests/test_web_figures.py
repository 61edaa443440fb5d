"""figures.js: what a page shows of its model, in a browser."""

import json
import math
import os

import torch
from conftest import ROOT
from parts import part_of
from web_browser import api, needs_browser

import quant
from nanobit import weights
from nanobit.export import hf
from nanobit.export.web import html_file

pytest_plugins = ["web_browser"]
pytestmark = needs_browser
# [[a color for each code]] of the picture, and of the legend
COLORS = """() => {
  const canvas = byId("matrix");
  const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const colors = [-1, 0, 1].map((code) => {
    const i = 4 * drawn.codes.indexOf(code);
    return `rgb(${data.slice(i, i + 3).join(", ")})`;
  });
  return [colors, all("#legend i").map((place) => getComputedStyle(place).backgroundColor)];
}"""


def about_of(path):
    """Return what a page shows of its model."""
    return json.loads(html_file.elements(path)["about"])


def facts_of(page):
    """Open the tab of facts; return {term: text}."""
    page.get_by_role("tab", name="What it is").click()
    return dict(
        page.locator("#facts div").evaluate_all(
            "(all) => all.map((f) => [...f.children].map((e) => e.textContent))"
        )
    )


def test_what_it_is(pages, open_page):
    """The arrow keys select the second tab: sizes, layers, the codes of a matrix as they are, and the loss
    curve with both axes and a text for those who do not see it."""
    page = open_page(pages["adder"])
    page.get_by_role("tab", name="Try it").focus()
    page.keyboard.press("ArrowRight")
    tab = page.get_by_role("tab", name="What it is")
    api.expect(tab).to_be_focused()
    assert tab.get_attribute("aria-selected") == "true"
    assert page.locator("[role=tab][tabindex='-1']").all_text_contents() == ["Try it"]
    assert page.locator("#try").is_hidden()
    facts = page.text_content("#facts")
    assert "526,848" in facts
    assert "4,000 steps on arithmetic" in facts
    assert f"{os.path.getsize(pages['adder']) / 1e6:.2f} MB" in facts
    about = about_of(pages["adder"])
    assert page.locator("#layers tr").count() == len(about["layers"])
    name = "blocks.1.ffn.up_proj.weight"
    page.get_by_label("Matrix").first.select_option(name)
    codes, scale = hf.codes_of(weights.trained(f"{ROOT}/models/adder")[0], name)
    api.expect(page.locator("#matrix-text")).to_contain_text(f"code divided by {scale.item():.4f}")
    rows, columns = codes.shape
    assert f"{rows} rows (outputs), {columns} columns (inputs); " in page.text_content("#matrix-text")
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


def test_facts(pages, open_page):
    """The facts are those of the model, each number for a reader, and the loss stands there once."""
    page = open_page(pages["adder"])
    facts = facts_of(page)
    about = about_of(pages["adder"])
    assert [*facts] == [
        *("Kind", "Parameters", "Of these -1, 0 or +1", "Weights", "This file", "Training"),
        *("Validation loss", "Score: accuracy", "Layers", "Attention heads", "Vocabulary", "Context"),
    ]
    assert facts["Of these -1, 0 or +1"] == f"{about['ternary_parameters']:,}"
    bits = 8 * about["bytes"] / about["parameters"]
    assert facts["Weights"] == f"{about['bytes'] / 1e6:.2g} MB, {bits:.2f} bits for each parameter"
    assert facts["Validation loss"] == f"{about['val_loss']:.4f} nats per token"
    rows = page.locator("#layers tr").evaluate_all(
        "(rows) => rows.map((row) => [...row.children].map((cell) => cell.textContent))"
    )
    expected = [
        [name, " x ".join(map(str, shape)), f"{math.prod(shape):,}", kind]
        for name, shape, kind in about["layers"]
    ]
    assert rows == expected


def test_figures(pages, open_page):
    """The curve goes from the left to the right and falls as the loss does, as wide as the page; the picture
    has the colors of the legend, also after a change of the page's."""
    page = open_page(pages["adder"])
    facts_of(page)
    api.expect(page.locator("#matrix-text")).to_contain_text("rows")
    model = json.loads(html_file.elements(pages["adder"])["model"])
    seen = []
    for width, scheme in ((1200, "light"), (700, "dark")):
        page.set_viewport_size(dict(width=width, height=800))
        api.expect(page.locator("#curve svg")).to_have_attribute(
            "width", str(page.evaluate("byId('curve').clientWidth"))
        )
        page.emulate_media(color_scheme=scheme)
        page.wait_for_function(f"() => {{ const [a, b] = ({COLORS})(); return String(a) === String(b); }}")
        seen.append(page.evaluate(COLORS)[0])
    assert seen[0] != seen[1]
    points = [
        tuple(map(float, point.split(",")))
        for point in page.get_attribute("#curve polyline", "points").split(" ")
    ]
    losses = [loss for _, loss in about_of(pages["adder"])["curve"]]
    assert points == sorted(points)
    assert points[losses.index(max(losses))][1] == min(y for _, y in points)
    assert points[losses.index(min(losses))][1] == max(y for _, y in points)
    assert f"guessing: {math.log(model['vocab_size']):.2f}" in page.locator("#curve text").all_text_contents()


def test_a_float_model(open_page, tmp_path):
    """A float model without a curve has no figure of one, and nothing is said to be ternary; its matrices are
    shown by the codes that quant.py would make of them."""
    part = part_of(ternary=False)
    html_file.write(part, str(tmp_path / "x.html"))
    page = open_page(str(tmp_path / "x.html"))
    facts = facts_of(page)
    assert facts["Kind"] == "float"
    assert not {"Of these -1, 0 or +1", "Validation loss"} & facts.keys()
    assert "" not in facts.values()
    assert page.locator("#ternary").is_hidden()
    assert page.locator("#curve-section").is_hidden()
    names = page.locator("#matrix-name option").all_text_contents()
    assert names == [name for name, shape, _ in about_of(tmp_path / "x.html")["layers"] if len(shape) == 2]
    name = "blocks.0.ffn.up_proj.weight"
    page.select_option("#matrix-name", name)
    codes, _ = quant.ternarize(html_file.values(tmp_path / "x.html")[name].float())
    api.expect(page.locator("#matrix-text")).to_contain_text("128 rows")
    api.expect(page.locator("#matrix-text")).to_contain_text("this model is not ternary")
    shares = [f"{value}: {(codes == int(value)).float().mean():.1%}" for value in ("-1", "0", "+1")]
    assert page.locator("#legend span").all_text_contents() == shares
