"""html_file.py and export.py --format=web: what a page holds, that data stays data, and --verify."""

import base64
import hashlib
import html.parser
import json
import os
import re

import export_faults
import pytest
import torch
from conftest import ROOT, lines, run, train, write_data
from parts import CHAR, part_of
from web_pages import needs_node

import quant
from nanobit import weights
from nanobit.export import card, hf, verify
from nanobit.export.web import html_file, node
from nanobit.record import SCALARS
from nanobit.terminal import printable

HOSTILE = "</script><img src=x onerror=alert(1)>\u2028<!--<script>{{weights}}&amp;\"'\\"
MATRIX = "blocks.0.attn.q_proj.weight"
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


def page_of(folder, part, *args, **options):
    """Write a page; return its path."""
    path = str(folder / "page.html")
    html_file.write(part, path, *args, **options)
    return path


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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return (data_dir, the folder of a run that was evaluated twice)."""
    folder = tmp_path_factory.mktemp("run")
    data_dir = write_data(folder / "data")
    train(data_dir, str(folder / "runs"), "r", max_steps=6, eval_every=3, sample_every=0)
    return data_dir, str(folder / "runs" / "r")


def export(run_dir, out, *flags, **how):
    """Return (stdout, stderr) of export.py --format=web."""
    return run("export.py", f"--ckpt={run_dir}", "--format=web", f"--out={out}", *flags, **how)


@needs_node
def test_verify_compares_the_page(trained, tmp_path):
    """--verify gives the loss of the page beside ours, and its verdict."""
    data_dir, run_dir = trained
    out, _ = export(run_dir, tmp_path / "x.html", "--verify", f"--data_dir={data_dir}", "--eval_tokens=64")
    result = json.loads(out.strip().split("\n")[-1])
    assert result["good"]
    assert result["same"] == result["tokens"]
    assert result["val_tokens"] == 64
    assert result["reader_val_loss"] == pytest.approx(result["val_loss"], abs=0.01)
    assert os.listdir(tmp_path) == ["x.html"]


def test_verify_without_node(trained, tmp_path):
    """Without Node a line names what was not compared, and the weights are compared all the same."""
    out, _ = export(trained[1], tmp_path / "x.html", "--verify", patch=export_faults.no_node())
    assert "Node is not installed: the page's logits, text and loss were not compared" in out
    result = json.loads(out.strip().split("\n")[-1])
    assert result["good"]
    assert result["reader"] is None


def test_a_bad_export_is_an_exit_code(trained, tmp_path):
    """--verify ends with 1 for what is not good, and the line of JSON says so."""
    patch = export_faults.no_node() + export_faults.no_rounding()
    out, _ = export(trained[1], tmp_path / "x.html", "--verify", patch=patch, code=1)
    assert json.loads(out.strip().split("\n")[-1])["good"] is False


@needs_node
@pytest.mark.parametrize(
    "old, new, says",
    [
        ("", "", "good"),
        ("sum / Math.sqrt(D)", "sum / D", "BAD"),  # in the attention of model.js
        ('"scale": ', '"scale": 1', "BAD"),  # of a ternary matrix
    ],
)
def test_a_changed_page_is_bad(old, new, says, tmp_path, capsys):
    """A script that computes something else than model.py, and another scale than the model's, is bad; that a
    page has no rows of padding is good."""
    part = part_of(vocab_multiple=32)
    path = page_of(tmp_path, part)
    with open(path, encoding="utf-8") as file:
        text = file.read()
    assert old in text
    with open(path, "w", encoding="utf-8") as file:
        file.write(text.replace(old, new, 1))
    assert verify.web(part, path, "int8")["good"] == (says == "good")
    assert says in capsys.readouterr().out


@needs_node
@pytest.mark.parametrize("has_node", [True, False])
@pytest.mark.parametrize("name", ["embed.weight", MATRIX])
def test_a_page_with_other_weights_is_bad(name, has_node, tmp_path, monkeypatch, capsys):
    """Weights that are not those of the model, rounded, are bad, though the page computes with its own as we
    do, and without Node too."""
    part = part_of()
    path = page_of(tmp_path, part)
    monkeypatch.setattr(node, "is_installed", lambda: has_node)
    other = part["model"] | {name: -part["model"][name]}
    assert not verify.web(part | dict(model=other), path, "int8")["good"]
    assert "at most: BAD" in capsys.readouterr().out


@needs_node
def test_a_page_that_does_not_run_is_an_error(tmp_path, capsys):
    """A page whose scripts Node cannot run is one error with Node's message."""
    part = part_of()
    path = page_of(tmp_path, part)
    with open(path, encoding="utf-8") as file:
        text = file.read().replace("class Model {", "class Mode1 {")
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    with pytest.raises(SystemExit) as stop:
        verify.web(part, path, "int8")
    assert stop.value.code == 1
    assert "the page does not run in Node (" in capsys.readouterr().err


def test_exports_have_the_curve_of_their_run(trained, tmp_path):
    """A page, a folder for transformers and a page made from that have the validation losses of the run."""
    pytest.importorskip("tokenizers", reason="writes the folder: requirements-dev.txt")
    run_dir = trained[1]
    run("export.py", f"--ckpt={run_dir}", "--format=hf", f"--out={tmp_path}/folder")
    for ckpt, name in ((run_dir, "a.html"), (f"{tmp_path}/folder", "b.html")):
        export(ckpt, tmp_path / name)
    losses = {row["step"]: row["val_loss"] for row in lines(run_dir, SCALARS) if "val_loss" in row}
    curve = [[step, round(loss, 5)] for step, loss in losses.items()]
    assert len(curve) == 3
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["nanobit"]["curve"] == curve
    assert json.loads(html_file.elements(tmp_path / "a.html")["about"])["curve"] == curve
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


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


def test_the_type_of_the_embedding(trained, tmp_path):
    """--embed takes the types of the format, and int8 is the default."""
    for name, flags in (("default", []), ("int8", ["--embed=int8"]), ("f16", ["--embed=f16"])):
        out, _ = export(trained[1], tmp_path / f"{name}.html", *flags)
        assert f"embedding {name.replace('default', 'int8')}, step 6" in out
    contents = [(tmp_path / f"{name}.html").read_bytes() for name in ("default", "int8", "f16")]
    assert contents[0] == contents[1] != contents[2]


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--format=web", "--out=x"], "must end in .html for --format=web"),
        (["--format=hf", "--out=x.html"], "is the name of a file; --format=hf writes a folder"),
        (["--format=web", "--out=x.html", "--embed=q8_0"], "embed = 'q8_0' does not apply to --format=web"),
        (["--format=gguf", "--out=x.gguf", "--embed=int8"], "embed = 'int8' does not apply to --format=gguf"),
        (["--format=hf", "--out=x", "--embed=f16"], "embed = 'f16' does not apply to --format=hf"),
        (["--format=web", "--out=x.html", "--latent"], "--latent only applies together with --format=hf"),
        (["--format=web", "--out=mine.html", "--force"], "is not an earlier export"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, says, trained, tmp_path):
    """A flag of another format, and a file of the user, is an error, and the file stays."""
    (tmp_path / "mine.html").write_text("mine")
    assert says in run("export.py", f"--ckpt={trained[1]}", *flags, code=2, cwd=tmp_path)[1]
    assert os.listdir(tmp_path) == ["mine.html"]
    assert (tmp_path / "mine.html").read_text() == "mine"
