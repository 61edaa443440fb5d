"""Training beside a preparation that still runs (tokenize_on_fly)."""

import signal
import time

import prepare_faults
import torch
from conftest import RUN, final, rows, settings, start_ranks, train
from documents import started, stopped, text_flags

from nanobit import data
from nanobit.run_dir import steps


def test_batches_read_while_the_preparation_writes(corpus, tmp_path, monkeypatch):
    """The batches beside a preparation that writes, is killed and continues are those of the complete set; a
    shard is never listed before it is whole, nor taken back."""
    real = time.sleep
    monkeypatch.setattr(data.time, "sleep", lambda seconds: real(seconds / 50))
    flags, place = text_flags(corpus[0], tmp_path), tmp_path / "text"
    cfg = settings(
        data_dir=tmp_path, dataset="text", vocab_size=0, tokenize_on_fly=True, seq_len=64, eval_tokens=640
    )
    child = started(flags, place)
    meta, cpu, messages, batches, seen = data.meta(cfg), torch.device("cpu"), [], [], []
    w = data.Windows(cfg, meta, "train")
    val = [x for x, _ in data.Windows(cfg, meta, "val").fixed(640, 4, cpu)]
    kill = True
    while w.total is None or len(batches) * 40 < w.total + 40:
        if fault := w.wait_for(len(batches) * 40 + 39, say=messages.append):
            assert not kill
            assert "prepare/text.py --files" in fault
            child = started(flags, place)
            continue
        batches.append(w.batch(len(batches) * 40, 40, cpu))
        seen.append(w.ready)
        if kill and w.ready > 4 * 63:
            assert child.kill()[0] == -signal.SIGKILL
            kill = False
    assert child.wait()[0] == 0
    assert not kill
    assert "waiting" in messages[0]
    assert len({*seen}) > 4
    cfg.tokenize_on_fly = False
    after = data.Windows(cfg, data.meta(cfg), "train")
    for i, batch in enumerate(batches):
        assert torch.equal(torch.stack(batch), torch.stack(after.batch(i * 40, 40, cpu))), i
    cfg.tokenize_on_fly = True
    later = data.Windows(cfg, data.meta(cfg), "val").fixed(640, 4, cpu)
    assert torch.equal(torch.cat(val), torch.cat([x for x, _ in later]))
    assert data.same_tokens(data.digest(meta), data.digest(data.meta(cfg)))


def test_train_beside_a_preparation_that_dies_and_goes_on(corpus, tmp_path):
    """A run on the fly whose preparation dies saves its steps, and ends, continued, with the weights of a run
    on the complete set; its ranks wait together, and Ctrl-C does not wait for tokens."""
    flags, place = text_flags(corpus[0], tmp_path), tmp_path / "text"
    of = dict(dataset="text", vocab_size=0, batch_size=30, max_steps=12, eval_every=4, tokenize_on_fly=True)
    of |= dict(save_every=0, sample_every=0, total_batch_size=960)
    stopped(flags, place, 10_000)  # two shards
    _, err = train(tmp_path, tmp_path / "runs", "fly", code=1, **of)
    assert "error:" in err
    assert "prepare/text.py --files" in err
    assert "train.py --resume=" in err
    assert steps(tmp_path / "runs" / "fly")[0] > 0, "what was trained is saved"
    child = started(flags, place, prepare_faults.hold_writes(str(tmp_path / "go")))
    more = dict(data_dir=tmp_path, out_dir=tmp_path / "runs", run_id="fly", resume="auto")
    for is_last in (False, True):
        first, second = start_ranks(2, **RUN | of | more)
        while "waiting for more train tokens" not in "".join(first.output()):
            assert not first.ended(), first.wait(0)
            time.sleep(0.01)
        if not is_last:
            second.kill(signal.SIGINT)
            code, _, err = first.wait(60)
            assert code == second.wait(60)[0] == 130, err
            assert "stopped by signal 2, saved step" in err, err
    (tmp_path / "go").touch()
    code, _, err = first.wait(60)
    assert code == 0, err
    assert "continuing" in err, err
    assert second.wait(60) == (0, "", ""), err
    assert child.wait()[0] == 0, err
    train(tmp_path, tmp_path / "runs", "after", **of)
    fly, after = (final(tmp_path / "runs" / name, 12) for name in ("fly", "after"))
    assert all(torch.equal(fly[0][key], after[0][key]) for key in after[0])
    fly, after = (
        [(row["step"], row.get("loss"), row.get("val_loss")) for row in rows(tmp_path / "runs" / name)]
        for name in ("fly", "after")
    )
    assert fly == after
