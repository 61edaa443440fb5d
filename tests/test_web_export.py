"""export.py --format=web: the page of a run, its flags, and --verify."""

import json
import os

import export_faults
import pytest
from conftest import lines, run, train, write_data
from parts import part_of
from web_pages import needs_node, page_of

from nanobit.export import verify
from nanobit.export.web import html_file, node
from nanobit.record import SCALARS


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
@pytest.mark.parametrize("name", ["embed.weight", "blocks.0.attn.q_proj.weight"])
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
