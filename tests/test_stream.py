"""nanobit/prepare/stream.py: from documents to token files and back, killed, interrupted and continued."""

import json
import os
import signal
from types import SimpleNamespace

import faults
import prepare_faults
import pytest
from documents import Preparation, documents_of, prepare, read, stopped, text_flags
from parts import sentencepiece
from text_files import written

from nanobit.prepare import sources, stream
from nanobit.tokenizer import with_content


@pytest.fixture(scope="module", params=["char", "sentencepiece", "gpt2"])
def prepared(request, corpus, tmp_path_factory):
    """Return (the folder of a data set made with one of the tokenizers, stdout)."""
    folder = tmp_path_factory.mktemp(request.param)
    flags = text_flags(corpus[0], folder, tokenizer=request.param, vocab_size=330)
    return folder / "text", prepare(*flags, patch=prepare_faults.small_tiktoken())[0]


def test_text_comes_back(corpus, prepared):
    """The decoded documents are the texts that were read, whatever line ends, spaces and rare characters."""
    folder, out = prepared
    found = documents_of(folder)
    assert sorted(found["train"] + found["val"]) == sorted(corpus[1])
    assert 0 < len(found["val"]) < 60
    assert "tokens per byte" in out
    assert f"{len(found['train'])} documents" in out


def test_meta_json_stays_as_it_was(prepared):
    """A data set without bos has the fields, and the end-of-text token before and after each text, as when
    no tokenizer had a bos."""
    ids, meta, tokenizer = read(prepared[0])
    known = "dataset dtype vocab_size tokens bytes shards tokenizer eot source complete documents seconds"
    known += " revision stamp skipped"
    assert list(meta) == known.split()
    for split, texts in documents_of(prepared[0]).items():
        rows = [[*tokenizer.encode(text), meta["eot"]] for text in texts]
        assert ids[split] == sum(rows, [meta["eot"]])


def test_ids_beyond_the_vocabulary_stand_for_nothing(prepared):
    tokenizer = read(prepared[0])[2]
    assert tokenizer.decode([60_000, 5, 60_000]) == tokenizer.decode([5])


@pytest.mark.parametrize("prepared", ["sentencepiece", "gpt2"], indirect=True)
def test_another_tokenizer_under_the_same_name_is_refused(prepared, tmp_path):
    """The tokenizer's file is compared with the sha256 in meta.json: another one would mean other text."""
    spec = read(prepared[0])[1]["tokenizer"]
    (tmp_path / spec["file"]).write_bytes((prepared[0] / spec["file"]).read_bytes() + b"x")
    with pytest.raises(SystemExit):
        with_content(spec, str(tmp_path))


def test_a_tokenizer_file_with_bos_begins_each_text_with_it(corpus, tmp_path):
    """Each text begins with bos, once, also where a killed preparation continues."""
    os.makedirs(tmp_path / "llama")
    (tmp_path / "llama" / "tokenizer.model").write_bytes(sentencepiece()["content"])
    flags = text_flags(corpus[0], tmp_path, tokenizer=tmp_path / "llama", max_documents=60)
    stopped(flags, tmp_path / "text", 1000)
    prepare(*flags, patch=prepare_faults.small())
    found, meta = documents_of(tmp_path / "text"), read(tmp_path / "text")[1]
    assert (meta["bos"], meta["eot"]) == (1, 2)
    assert sorted(found["train"] + found["val"]) == sorted(corpus[1][:60])


def same_shards(one, other):
    """Check that two data sets have the same token files; return their names."""
    names = sorted(name for name in os.listdir(one) if name.endswith(".bin"))
    assert names == sorted(name for name in os.listdir(other) if name.endswith(".bin"))
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    return names


@pytest.mark.parametrize(
    "name, has_workers", [("docs.jsonl", True), ("docs.parquet", False), ("docs.txt", False)]
)
def test_killed_and_continued(corpus, tmp_path, name, has_workers):
    """A preparation that is killed again and again writes the same bytes as one that is not."""
    folder, _ = corpus
    more = dict(files=name, column="text" if "parquet" in name else "body")
    patch = prepare_faults.small(longest=1000)
    prepare(*text_flags(folder, tmp_path / "whole", **more), patch=patch)
    flags = text_flags(folder, tmp_path / "killed", **more)
    place, whole = tmp_path / "killed" / "text", tmp_path / "whole" / "text"
    written = 0
    for _ in range(3):
        child = Preparation(
            flags, place, patch + prepare_faults.hold_at(written + 7000), has_workers=has_workers
        )
        child.until(lambda: child.written() >= written + 3000)  # noqa: B023
        child.kill()
        written = child.written()
        assert stream.read_json(place / "meta.json")["complete"] is False
    out, _ = prepare(*flags, patch=patch)
    assert "continuing after" in out
    assert sorted(os.listdir(place)) == sorted(os.listdir(whole))
    assert len([file for file in same_shards(place, whole) if file.startswith("train")]) > 3
    if name == "docs.txt":  # the parts of one document, joined without a space between
        found = documents_of(whole)
        assert found["train"][0] + found["val"][0] == "".join(corpus[1])
    assert "is complete" in prepare(*flags)[0]


def test_what_an_earlier_version_began_keeps_its_line_ends(tmp_path):
    """A data set has one kind of line ends, that of the version that began it, and reports it if it is
    another than today's."""
    (tmp_path / "a.jsonl").write_text('{"text": "a\\r\\nb"}\n' * 10_000, encoding="utf-8")
    flags = text_flags(tmp_path, tmp_path, "a.jsonl", column="text", val_fraction=0)
    place = tmp_path / "text"
    before = sum(stopped([*flags, "--keep_crlf"], place, 1000)["tokens"].values())
    stamp = sources.stamp([str(tmp_path / "a.jsonl")])
    for name in ("progress.json", "meta.json"):  # as that version wrote them
        found = stream.read_json(place / name)
        source = found["source"].replace(" --keep_crlf=True", "").rpartition(" ")[0]
        found["source"] = f"{source} {stamp}"
        del found["stamp"]
        (place / name).write_text(json.dumps(found))
    stopped(flags, place, before + 5000)
    prepare(*flags, patch=prepare_faults.small())
    assert documents_of(place) == {"train": ["a\r\nb"] * 10_000}
    assert "is complete (an earlier version made it, with the line ends" in prepare(*flags)[0]


def test_hub_killed_and_continued(corpus, tmp_path):
    """A stream of the hub continues at the document after the last one written."""
    folder, documents = corpus
    flags = [f"--repo={folder / 'hub'}", f"--data_dir={tmp_path}", "--workers=1", "--tokenizer=char"]
    child = Preparation(flags, tmp_path / "tinystories", prepare_faults.hold_at(12_000), script="tinystories")
    child.until(lambda: child.written() >= 13_000)
    child.kill()
    prepare(*flags, script="tinystories", patch=prepare_faults.small())
    assert documents_of(tmp_path / "tinystories") == {"train": documents, "val": documents[:20]}


def test_interrupt_reports_how_to_continue(corpus, tmp_path):
    """Ctrl-C ends a preparation and its workers with exit code 130 and without a traceback."""
    flags = text_flags(corpus[0], tmp_path)
    child = Preparation(flags, tmp_path / "text", prepare_faults.slow_writes(), has_workers=True)
    child.until(child.written)
    code, _, err = child.kill(signal.SIGINT)
    assert code == 130
    assert "same command continues" in err
    assert "Traceback" not in err
    assert "leaked" not in err, err


def test_interrupt_before_anything_is_written(corpus, tmp_path):
    """Ctrl-C while the files are checked ends the preparation; it leaves no traceback and no folder."""
    patch = faults.signal_in("prepare.sources", "fingerprint", 1, signal.SIGINT)
    code, out, err = Preparation(text_flags(corpus[0], tmp_path), tmp_path / "text", patch).wait()
    assert (code, out, err) == (-signal.SIGINT, "", "")
    assert not os.path.exists(tmp_path / "text")


def test_a_folder_that_cannot_be_written(corpus, tmp_path):
    """An existing folder in which no file can be made is reported in one line."""
    (tmp_path / "text" / ".lock").mkdir(parents=True)
    _, err = prepare(*text_flags(corpus[0], tmp_path), code=2)
    assert "text cannot be written (Is a directory); choose another --data_dir= or --name=" in err
    assert err.count("\n") == 1


def test_full_disk_loses_nothing(corpus, tmp_path):
    """A disk that fills leaves no torn file, and costs nothing that was written."""
    folder, _ = corpus
    prepare(*text_flags(folder, tmp_path / "whole"), patch=prepare_faults.small())
    flags = text_flags(folder, tmp_path / "full")
    _, err = prepare(*flags, patch=prepare_faults.small() + prepare_faults.full_disk(after=30), code=1)
    assert "No space left" in err
    assert "continues" in err
    assert err.count("\n") == 1
    assert not [name for name in os.listdir(tmp_path / "full" / "text") if ".tmp" in name]
    prepare(*flags, patch=prepare_faults.small())
    same_shards(tmp_path / "whole" / "text", tmp_path / "full" / "text")


def test_disk_too_small(corpus, tmp_path):
    """A disk on which the tokens do not fit is reported before the work."""
    _, err = prepare(*text_flags(corpus[0], tmp_path), patch=prepare_faults.free_bytes(1000), code=1)
    assert err.startswith("error:")
    assert "MB free" in err
    assert not os.path.exists(tmp_path / "text")


@pytest.fixture
def half(corpus, tmp_path):
    """Return (flags, folder) of a preparation that was killed; its text is in tmp_path/texts."""
    os.makedirs(tmp_path / "texts")
    (tmp_path / "texts" / "docs.jsonl").write_bytes((corpus[0] / "docs.jsonl").read_bytes())
    flags = text_flags(tmp_path / "texts", tmp_path)
    stopped(flags, tmp_path / "text")
    return flags, tmp_path / "text"


def test_missing_files_cost_nothing_that_is_written(half, tmp_path):
    """A preparation whose files are missing (not mounted) when it continues keeps what it has written."""
    flags, place = half
    os.rename(tmp_path / "texts" / "docs.jsonl", tmp_path / "texts" / "away")
    prepare(*flags, code=2)
    assert stream.read_json(place / "progress.json")["tokens"]


def test_a_mistake_costs_nothing_that_is_written(half):
    """An error with exit code 2 keeps what is written, and says so."""
    flags, place = half
    _, err = prepare(*flags, patch=prepare_faults.no_tokenizer(), code=2)
    assert "keeps what is written" in err
    assert stream.read_json(place / "progress.json")["tokens"]


def test_a_continued_preparation_needs_room_for_the_rest_only(half):
    flags, place = half
    prepare(*flags, patch=prepare_faults.small() + prepare_faults.free_bytes(250_000))
    documents_of(place)


def test_lost_tokens_are_reported(half):
    """Tokens that progress.json counts and that are missing are not replaced by token 0."""
    flags, place = half
    counted = stream.read_json(place / "progress.json")["tokens"]
    split, n = next((split, n) for split, n in counted.items() if n % 4096)  # SHARD_TOKENS of these tests
    for shard in place.glob(f"{split}_{n // 4096:05d}.bin*"):
        os.truncate(shard, 0)
    _, err = prepare(*flags, code=2)
    assert "has lost tokens" in err


def test_the_users_own_files_stay(corpus, tmp_path):
    """A failed preparation removes only what it has made."""
    (tmp_path / "text").mkdir()
    for name in ("tokenizer.model", "train_notes.md", "val_00000.bin"):
        (tmp_path / "text" / name).write_text("mine")
    prepare(*text_flags(corpus[0], tmp_path, column="absent"), code=2)
    assert sorted(os.listdir(tmp_path / "text")) == ["tokenizer.model", "train_notes.md", "val_00000.bin"]


def test_one_process_at_a_time(corpus, tmp_path):
    """The same command given twice is refused while the first one runs, which is not disturbed."""
    flags, place = text_flags(corpus[0], tmp_path), tmp_path / "text"
    go = tmp_path / "go"
    child = Preparation(flags, place, prepare_faults.hold_writes(str(go)), has_workers=True)
    child.until((place / "progress.json").exists)
    _, err = prepare(*flags, code=2)
    assert "by another process" in err
    assert not stream.read_json(place / "meta.json").get("complete")
    go.touch()
    code, _, err = child.wait()
    assert code == 0, err
    documents_of(place)


def test_few_documents_make_a_data_set(tmp_path):
    """Few documents make a data set without a val split, with a warning."""
    (tmp_path / "one.jsonl").write_text('{"body": "abc"}\n' * 3)
    out, _ = prepare(*text_flags(tmp_path, tmp_path, "one.jsonl"))
    assert "no document was held out" in out
    assert documents_of(tmp_path / "text") == {"train": ["abc"] * 3}


def test_no_two_sources_in_one_folder(corpus, tmp_path):
    """A folder is neither overwritten nor continued with other text."""
    flags = text_flags(corpus[0], tmp_path)
    prepare(*flags)
    _, err = prepare(*flags, "--val_fraction=0.1", code=2)
    assert "holds another data set" in err


def test_content_decides_whether_files_have_changed(tmp_path, capsys):
    """A touched file is the same, an edited one is not, and a data set that an earlier version made (with the
    hash of sizes and times) is recognized."""
    path, folder = str(written(tmp_path / "a.txt", b"text")), str(tmp_path)
    source, stamp = stream.source_now(folder, "options", [path])
    for known in (dict(source=source, stamp=stamp), dict(source=f"options {stamp}")):
        (tmp_path / "meta.json").write_text(json.dumps(known))
        assert stream.source_now(folder, "options", [path])[0] == known["source"]
    (tmp_path / "meta.json").write_text(json.dumps(dict(source=source, stamp=stamp)))
    os.utime(path, (1, 1))
    assert stream.source_now(folder, "options", [path])[0] == source
    written(tmp_path / "a.txt", b"tex.")
    for options, expected in (("options", "the files have changed"), ("others", "holds another data set")):
        with pytest.raises(SystemExit):
            stream.source_now(folder, options, [path])
        assert expected in capsys.readouterr().err


def test_newer_flags_leave_the_source_as_it_was():
    """A data set made before a flag existed is the same data set while the flag has its default."""
    flags = dict(files=("", ""), name=("", ""), max_bad_rows=(9, ""), keep_crlf=(False, ""))
    flags |= dict(plain_quotes=(False, ""))
    cfg = SimpleNamespace(files="a.txt", name="x", max_bad_rows=3, keep_crlf=False, plain_quotes=False)
    assert stream.source_of("prepare/text.py", cfg, flags) == "prepare/text.py --files=a.txt"
    cfg.keep_crlf = True
    assert stream.source_of("prepare/text.py", cfg, flags).endswith(" --keep_crlf=True")
