"""nanobit/prepare/examples.py: the preparations of text to score."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import CHARS, ROOT, run

from nanobit.prepare import examples
from nanobit.tokenizer import make_tokenizer

CHAR = make_tokenizer({"kind": "char", "chars": CHARS})
PAIR = dict(
    sentence_good="a cat sits", sentence_bad="a cat sit", UID="agreement_1", linguistics_term="agreement"
)


def write_lines(path, *rows):
    os.makedirs(path.parent, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_task(folder):
    meta = json.loads((folder / "meta.json").read_text())
    return meta, [json.loads(line) for line in (folder / "task.jsonl").read_text().splitlines()]


def test_tasks_from_local_files(tmp_path):
    """All files are read in order, only the columns of the score are kept, and another data set is not
    replaced."""
    write_lines(tmp_path / "b.jsonl", dict(text="two words", id=7))
    write_lines(tmp_path / "a.jsonl", dict(text=" \u00e9t\u00e9 last\n"), dict(text="one two"))
    run("prepare/lambada.py", f"--files={tmp_path}/*.jsonl", f"--data_dir={tmp_path}/data")
    meta, rows = read_task(tmp_path / "data/lambada")
    assert [row["text"] for row in rows] == ["\u00e9t\u00e9 last", "one two", "two words"]
    assert meta["task"] == "lambada"
    assert meta["examples"] == 3
    assert meta["complete"] is True
    write_lines(tmp_path / "pairs/x.jsonl", PAIR | dict(field="syntax"))
    where = (f"--files={tmp_path}/pairs/x.jsonl", f"--data_dir={tmp_path}/data")
    run("prepare/blimp.py", *where, "--name=pairs")
    assert read_task(tmp_path / "data/pairs") == (meta | read_task(tmp_path / "data/pairs")[0], [PAIR])
    _, err = run("prepare/blimp.py", *where, "--name=lambada", code=2)
    assert "holds another data set" in err
    assert read_task(tmp_path / "data/lambada")[0] == meta


@pytest.mark.parametrize(
    "script, content, says",
    [
        (
            "lambada",
            '{"text": "a b"}\n{"txt": "a b"}\n',
            "x.jsonl, line 2: no text in column 'text'; it has txt",
        ),
        ("lambada", '{"text": " "}\n', "line 1: no text in column 'text'"),
        ("lambada", '{"text": 3}\n', "line 1: no text in column 'text'"),
        ("lambada", '["a b"]\n', "line 1: no text in column 'text'; it is ['a b']"),
        ("lambada", '{"text": "alone "}\n', "line 1: 'alone' is one word"),
        ("lambada", '{"text": "a b"}\n{"text": "a\n', "x.jsonl, line 2: not JSON"),
        ("lambada", '{"text": "a \u00e9"}\n'.encode("latin-1"), "x.jsonl, line 1: not JSON"),
        ("lambada", "", "no text in 1 file"),
        ("lambada", None, "matches no file"),
        ("blimp", json.dumps(PAIR | dict(UID="")), "line 1: no text in column 'UID'"),
        ("blimp", '{"sentence_good": "a"}', "no text in column 'sentence_bad'; it has sentence_good"),
    ],
)
def test_wrong_rows_are_refused(tmp_path, script, content, says):
    """A row that cannot be scored stops the preparation with one line, and nothing is written."""
    if content is not None:
        (tmp_path / "x.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    where = (f"--files={tmp_path}/x.jsonl", f"--data_dir={tmp_path}/data")
    _, err = run(f"prepare/{script}.py", *where, code=2)
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    assert says in err, err
    assert not os.path.exists(tmp_path / "data")


def test_flags_that_exclude_each_other_are_refused():
    """--files excludes the flags of the hub; --help works from a child process."""
    _, err = run("prepare/blimp.py", "--files=x", "--repo=y", "--config=z", "--name=", code=2)
    assert err.count("error: ") == 3
    assert "--repo and --files exclude each other" in err
    for script in ("prepare/lambada.py", "prepare/blimp.py"):
        shown = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert f"python {script}" in shown.stdout, shown.stderr
        assert "--revision=" in shown.stdout, shown.stderr


def local_hub(folder, kind, **configs):
    """Write a folder laid out as a repository of the hub: {config: (split, rows)}."""
    import datasets

    readme = "---\nconfigs:\n"
    for name, (split, rows) in configs.items():
        readme += f"- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {name}/*.{kind}\n"
        os.makedirs(folder / name)
        table = datasets.Dataset.from_list(rows)
        (table.to_json if kind == "jsonl" else table.to_parquet)(folder / name / f"0.{kind}")
    (folder / "README.md").write_text(readme + "---\n")


def test_tasks_from_a_folder_like_the_hub(tmp_path, capsys):
    """All paradigms, the given split and configuration are read, without a bar in a log."""
    pytest.importorskip("datasets", reason="the package datasets is not installed")
    patch = f"import os; os.environ |= dict(HF_HUB_OFFLINE='1', HF_HOME={str(tmp_path / 'home')!r})"
    words, where = [dict(text="un deux"), dict(text="trois quatre")], f"--data_dir={tmp_path}/data"
    local_hub(tmp_path / "words", "jsonl", en=("test", [dict(text="one two")]), fr=("test", words))
    _, err = run("prepare/lambada.py", f"--repo={tmp_path}/words", "--config=fr", where, patch=patch)
    assert read_task(tmp_path / "data/lambada")[1] == words
    assert err == ""
    assert "--revision=" in read_task(tmp_path / "data/lambada")[0]["source"]
    with pytest.raises(SystemExit):
        examples.rows(SimpleNamespace(repo=str(tmp_path / "words"), split="test", revision=""), "it")
    assert "error: config = 'it' of" in capsys.readouterr().err
    other, more = PAIR | dict(UID="agreement_2"), dict(field="syntax")
    local_hub(tmp_path / "pairs", "parquet", one=("train", [PAIR, PAIR]), two=("train", [other | more]))
    run("prepare/blimp.py", f"--repo={tmp_path}/pairs", where, patch=patch)
    assert read_task(tmp_path / "data/blimp")[1] == [PAIR, PAIR, other]
    assert examples.config_names(SimpleNamespace(config="two")) == ["two"]
