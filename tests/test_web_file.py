"""html_file.py: what a page holds, and that data stays data."""

import base64
import hashlib
import html.parser
import json
import os
import re

import pytest
import torch
from conftest import ROOT
from parts import CHAR, part_of
from web_pages import page_of

import quant
from nanobit import weights
from nanobit.export import card, hf
from nanobit.export.web import html_file, node
from nanobit.record import SCALARS
from nanobit.terminal import printable

HOSTILE = "</script><img src=x onerror=alert(1)>\u2028<!--<script>{{weights}}&amp;\"'\\"
SCRIPTS = [name for name in sorted(os.listdir(node.HERE)) if name.endswith(".js")]


class Elements(html.parser.HTMLParser):
    """The elements of a page as a browser finds them: tags with attributes, and texts by id or tag."""

    def __init__(self, path):
        super().__init__()
        self.tags = []
        self.texts = {}
        self.place = None
        with open(path, encoding="utf-8") as file:
            self.feed(file.read())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.place = dict(attrs).get("id", tag)

    def handle_endtag(self, tag):
        self.tags.append((f"/{tag}", {}))
        self.place = None

    def handle_data(self, data):
        self.texts[self.place] = self.texts.get(self.place, "") + data


def test_hostile_text_stays_text(tmp_path):
    """What looks like HTML in names, prompts, scores and the characters of the tokenizer opens and closes no
    element, and comes back as it was."""
    plain = Elements(page_of(tmp_path, part_of()))
    spec = CHAR | dict(chars=HOSTILE + CHAR["chars"])
    part = part_of(spec, vocab_size=len(spec["chars"]))
    part["config"] |= dict(run_id=HOSTILE, dataset=HOSTILE, sample_prompts=[HOSTILE, "\ud800"])
    hostile = Elements(page_of(tmp_path, part, name=HOSTILE, score={HOSTILE: 0.5}))
    policy = {"http-equiv": "Content-Security-Policy"}.items()
    same = [[tag for tag in page.tags if not policy <= tag[1].items()] for page in (plain, hostile)]
    assert same[0] == same[1]
    about = json.loads(hostile.texts["about"])
    assert hostile.texts["title"] == about["name"] == printable(HOSTILE)
    assert about["dataset"] == HOSTILE
    assert about["prompts"] == [HOSTILE, "\ud800"]
    assert about["score"] == {HOSTILE: 0.5}
    assert json.loads(hostile.texts["tokenizer"])["chars"] == spec["chars"]
    for name in ("about", "model", "tokenizer"):
        assert "<" not in hostile.texts[name]
        assert hostile.texts[name].isascii()


def test_the_policy_allows_what_the_page_holds_only(tmp_path):
    """Nothing but one script and one style, by their hashes, and a worker of a Blob may run or be loaded."""
    page = Elements(page_of(tmp_path, part_of()))
    content = [
        attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    hashes = {}
    for name in ("script", "style"):
        digest = hashlib.sha256(page.texts[name].encode()).digest()
        hashes[name] = f"'sha256-{base64.b64encode(digest).decode()}'"
    expected = {"default-src 'none'", f"script-src {hashes['script']}", f"style-src {hashes['style']}"}
    expected |= {"worker-src blob:", "base-uri 'none'", "form-action 'none'"}
    assert [set(text.split("; ")) for text in content] == [expected]
    assert [attrs for tag, attrs in page.tags if tag == "script" and "type" not in attrs] == [{}]
    assert not [attrs for _, attrs in page.tags if {"src", "href", "style", "onclick"} & attrs.keys()]


def test_scripts_can_stand_in_a_page():
    """The scripts are ASCII in lines of 110 columns, hold nothing that ends or hides an element, and those of
    the worker share no name at their top."""
    names = []
    for name in SCRIPTS:
        text = html_file.read(name)
        assert text.isascii(), name
        assert max(map(len, text.splitlines())) <= 110, name
        if name != "verify.js":  # which runs outside of pages
            assert not re.search(r"</script|<!--|<script|\{\{[a-z]+\}\}", text), name
        if name in html_file.WORKER:
            names += re.findall(r"^(?:function\*?|class|const|let) (\w+)", text, re.M)
    assert len(names) == len(set(names))
    assert len(html_file.read("model.js").splitlines()) <= 350


@pytest.mark.parametrize("embed, step", [("int8", 0.5 / 127), ("f16", 2**-11)])
@pytest.mark.parametrize("ternary", [True, False])
def test_weights_of_a_page(ternary, embed, step, tmp_path):
    """A page has the codes and the scale of each ternary matrix to the last bit, norms in fp32, other floats
    in float16, and embedding and head as asked."""
    part = part_of(ternary=ternary, tie_embeddings=False, vocab_multiple=16)
    path = page_of(tmp_path, part, embed)
    tensors = json.loads(html_file.elements(path)["model"])["tensors"]
    held = html_file.values(path)
    assert [*held] == [*part["model"]]
    for name, w in part["model"].items():
        w = w[: len(held[name])]
        if ternary and name.endswith("_proj.weight"):
            codes, scale = quant.ternarize(w)
            assert tensors[name]["scale"] == scale.item()
            assert torch.equal(held[name], codes.double() / scale.double())
        elif w.dim() == 1:
            assert torch.equal(held[name], w.double())
        elif name in ("embed.weight", "head.weight"):
            assert len(w) == 28
            assert ((held[name] - w).abs() <= 1.001 * step * w.abs().amax(-1, keepdim=True)).all()
        else:
            assert torch.equal(held[name], w.half().double())
    assert all(tensor["offset"] % 8 == 0 for tensor in tensors.values())


def test_the_page_of_an_export_is_that_of_its_run(tmp_path):
    """A page made from a folder for transformers is the same file, to the last byte, each time."""
    part = part_of() | dict(curve=[[0, 3.5], [7, 2.5]])
    hf.write(part, str(tmp_path / "folder"))
    exported, _ = weights.trained(str(tmp_path / "folder"))
    pages = []
    for made_from in (part, part, exported):
        with open(page_of(tmp_path, made_from), "rb") as file:
            pages.append(file.read())
    assert pages[0] == pages[1] == pages[2]


def test_what_a_page_shows(tmp_path):
    """The facts of a page are those of the model: counts without padding, the curve, the loss of its step."""
    part = part_of(vocab_multiple=64) | dict(curve=[[0, 3.5], [7, 2.5]])
    about = json.loads(
        html_file.elements(page_of(tmp_path, part, name="x", score=dict(accuracy=0.5)))["about"]
    )
    ternary = sum(w.numel() for name, w in part["model"].items() if name.endswith("_proj.weight"))
    norms = sum(w.numel() for w in part["model"].values() if w.dim() == 1)
    assert (about["name"], about["kind"], about["ternary"]) == ("x", "text", True)
    assert about["ternary_parameters"] == ternary
    assert about["parameters"] == ternary + norms + 28 * 64
    assert (about["step"], about["val_loss"], about["curve"]) == (7, 2.5, [[0, 3.5], [7, 2.5]])
    assert about["score"] == dict(accuracy=0.5)
    assert about["layers"][0] == ["embed.weight", [28, 64], "int8"]
    later = page_of(tmp_path, part | dict(step=9))
    assert json.loads(html_file.elements(later)["about"])["val_loss"] is None  # the last is of step 7


@pytest.mark.parametrize("name, kind, limit", [("adder", "arithmetic", 0.4), ("tictactoe", "tictactoe", 0.8)])
def test_the_pages_of_models(name, kind, limit, tmp_path):
    """The pages of models/ know what they are for, have the name, score and curve of the card, and are small
    (limit in MB)."""
    folder = os.path.join(ROOT, "models", name)
    part, _ = weights.trained(folder)
    path = page_of(tmp_path, part, "int8", *card.read(folder))
    about = json.loads(html_file.elements(path)["about"])
    assert os.path.getsize(path) < limit * 1e6
    assert (about["name"], about["kind"]) == (name, kind)
    assert {"val_loss", "accuracy"} == about["score"].keys()
    assert about["curve"][-1] == [about["step"], about["val_loss"]]


@pytest.mark.parametrize(
    "text, expected",
    [
        ('# `a b`\n\n```json\n[1]\n```\n```json\n{"a": 1, "b": 0.5}\n```\n', ("a b", dict(a=1, b=0.5))),
        ('# x\n```json\n{"a": true}\n```\n```json\n{"a": {}}\n```\n', ("x", {})),
        ('# x\n```json\n{"a": 1\n```\n', ("x", {})),
        ('# x\n```json\n{"a": NaN}\n```\n', ("x", {})),
        ("text", ("", {})),
        ("\udcff", ("", {})),
        (None, ("", {})),
    ],
)
def test_the_score_of_a_card(text, expected, tmp_path):
    """A card gives its heading and the first object of numbers; a folder without one gives neither."""
    if text is not None:
        (tmp_path / "README.md").write_text(text, encoding="utf-8", errors="surrogateescape")
    assert card.read(str(tmp_path)) == expected


def test_only_pages_are_ours(tmp_path):
    """is_ours is true for a page that was written, false for another file, a folder and nothing."""
    path = page_of(tmp_path, part_of())
    assert html_file.is_ours(path)
    other = b'<script type="application/json" id="model">{"tensors": {}}</script>'
    for name, content in (("a.html", other), ("b.html", b"\xff\x00"), ("c.html", b"")):
        (tmp_path / name).write_bytes(content)
        assert not html_file.is_ours(str(tmp_path / name))
    assert not html_file.is_ours(str(tmp_path))
    assert not html_file.is_ours(str(tmp_path / "missing.html"))


def test_what_a_page_cannot_hold_is_refused(tmp_path, monkeypatch, capsys):
    """Experts, weights beyond float16 and a page that is too large are one error each; nothing is written."""
    huge = part_of(ternary=False)
    huge["model"]["blocks.0.attn.q_proj.weight"][0, 0] = 1e5
    monkeypatch.setattr(html_file, "LIMIT", 1000)
    for part, says in ((part_of(n_expert=4), "mixture of experts"), (huge, "65,504"), (part_of(), "0 MB")):
        with pytest.raises(SystemExit) as stop:
            page_of(tmp_path, part)
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert says in err
        assert err.count("error: ") == 1
    assert os.listdir(tmp_path) == []


def test_a_long_curve_is_thinned(tmp_path):
    """At most 200 points are kept, the first and the last of them, and none after the checkpoint."""
    (tmp_path / "metrics").mkdir()
    rows = [json.dumps(dict(step=step, val_loss=9 - step / 1000)) + "\n" for step in range(1000)]
    (tmp_path / SCALARS).write_text("".join(rows))
    curve = card.points(str(tmp_path), 700)
    assert len(curve) == 200
    assert curve[0] == [0, 9.0]
    assert curve[-1] == [700, 8.3]


@pytest.mark.parametrize("curve", [[[0, "x"]], [[0]], 5, [[0.5, 1.0]], [["<", 1.0]]])
def test_a_damaged_curve_is_an_error(curve, tmp_path, capsys):
    """A config.json whose curve is not pairs of step and loss is not read."""
    hf.write(part_of(), str(tmp_path / "x"))
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    config["nanobit"]["curve"] = curve
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        weights.trained(str(tmp_path / "x"))
    assert "config.json cannot be read" in capsys.readouterr().err
