"""nanobit/prepare/token_files.py: what counts after a kill, what is left in its place, and characters."""

import os

import numpy as np
import prepare_faults
import pytest
from documents import prepare, text_flags

from nanobit.prepare import stream, token_files
from nanobit.tokenizer import make_tokenizer


def test_a_kill_after_a_shard_is_renamed(tmp_path, monkeypatch):
    """A shard that was renamed before progress.json counted it is continued from what is counted; longer
    files of an earlier try are removed."""
    monkeypatch.setattr(token_files, "SHARD_TOKENS", 8)
    split = token_files.Split(str(tmp_path), "train", np.dtype("<u2"), 0, {})
    split.write(np.arange(21, dtype="<u2"))
    split.sync()
    # as known before the first shard was full
    split = token_files.Split(str(tmp_path), "train", np.dtype("<u2"), 5, {})
    assert sorted(os.listdir(tmp_path)) == ["train_00000.bin.partial"]
    split.write(np.arange(5, 19, dtype="<u2"))
    split.finish()
    found = [np.fromfile(tmp_path / name, "<u2") for name in sorted(split.shards)]
    assert np.concatenate(found).tolist() == list(range(19))
    assert [part.size for part in found] == [8, 8, 3]


def test_tokens_reach_the_disk_before_the_progress_that_counts_them(corpus, tmp_path):
    """Tokens are flushed before progress.json counts them, and meta.json, which a training may read, lists
    only what is counted there: a continued preparation never takes it back."""
    _, err = prepare(
        *text_flags(corpus[0], tmp_path), patch=prepare_faults.small() + prepare_faults.check_order_on_disk()
    )
    assert err.count("checked") > 10


@pytest.mark.parametrize("content", ["[]", "{}", '{"source": 3}', '{"complete": true}'])
def test_a_meta_json_without_a_source_is_reported(tmp_path, capsys, content):
    """A meta.json of something else is left in its place, and is one error line."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "meta.json").write_text(content)
    for start_over in (True, False):
        with pytest.raises(SystemExit):
            stream.source_now(str(tmp_path / "text"), "options", ())
            token_files.open_data_set(str(tmp_path), "text", "options", start_over)
        err = capsys.readouterr().err
        assert "holds another data set (its meta.json names no source)" in err
        assert err.count("\n") == 1
    assert (tmp_path / "text" / "meta.json").read_text() == content


def test_a_nul_in_a_prompt_is_not_the_end_of_a_text():
    """A NUL is not a character, although its place in the characters is that of the end-of-text token."""
    tokenizer = make_tokenizer(token_files.char_tokenizer("\0ab"))
    assert tokenizer.encode("ba") == [2, 1]
    with pytest.raises(ValueError, match="it has 'ab'"):
        tokenizer.encode("a\0b")
