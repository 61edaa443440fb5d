"""train.py as a child process: what a run does, writes and prints, and that sample.py and evaluate.py agree
with it."""

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import termios
import time

import faults
import pytest
import torch
from conftest import (
    EVENTS,
    SCALARS,
    final,
    lines,
    result_of,
    rows,
    run,
    run_flags,
    start_train,
    train,
    write_data,
)

from nanobit import checkpoint
from nanobit.run_dir import step_dir

HALF = dict(ternary=False, dtype="float16", sample_every=0, eval_every=0)


def skips_of(run_dir):
    """Return [(step, number of skipped steps)] of what the run reported."""
    rows = lines(run_dir, EVENTS)
    return [(row["step"], row["steps"]) for row in rows if row["event"] == "anomaly"]


def trained(run_dir, key):
    """Return a value of each training line."""
    return [row[key] for row in lines(run_dir, SCALARS) if key in row]


def is_finite(run_dir, step):
    """Return whether all weights of a checkpoint are finite."""
    return all(w.isfinite().all() for w in final(run_dir, step)[0].values())


# the weights that a run begins with


def test_init_from_takes_weights_only(data_dir, out_dir):
    """init_from starts at step 0 with the weights of another run, which a learning rate of 0 keeps."""
    changes = dict(max_steps=6, sample_every=0)
    train(data_dir, out_dir, "float", ternary=False, **changes)
    train(data_dir, out_dir, "from", init_from=f"{out_dir}/float", learning_rate=0.0, **changes)
    start = lines(f"{out_dir}/from", EVENTS)[0]
    assert start["event"] == "start"
    assert start["step"] == 0
    for key, value in final(f"{out_dir}/float", 6)[0].items():
        assert torch.equal(value, final(f"{out_dir}/from", 6)[0][key]) or "proj" not in key


# steps that are not finite


def test_a_step_that_is_not_finite_is_skipped_and_reported(data_dir, out_dir):
    """A NaN loss changes no weight: the step counts, is reported, and its loss is null."""
    patch = faults.nan_loss_at(4, 6)
    train(data_dir, out_dir, "r", patch=patch, max_steps=12, save_every=0, sample_every=0)
    assert is_finite(f"{out_dir}/r", 12)
    assert skips_of(f"{out_dir}/r") == [(4, 1), (6, 1)]
    losses = {row["step"]: row["loss"] for row in lines(f"{out_dir}/r", SCALARS) if "loss" in row}
    assert losses[4] is None
    assert losses[5] is not None
    assert list(losses) == list(range(1, 13))


def test_a_gradient_that_is_not_finite_is_skipped_too(data_dir, out_dir):
    """An overflow in the backward only, which the loss does not show, is skipped and reported."""
    patch = faults.infinite_gradient_at(4, "norm.weight")
    train(data_dir, out_dir, "r", patch=patch, max_steps=8, save_every=0, sample_every=0)
    assert skips_of(f"{out_dir}/r") == [(4, 1)]
    assert is_finite(f"{out_dir}/r", 8)


def test_a_run_that_overflows_ends_with_one_line(data_dir, out_dir):
    """Infinities in the record of ternary health do not end a run with a traceback."""
    _, err = train(data_dir, out_dir, "r", code=1, learning_rate=1e30, sample_every=0, eval_every=0)
    assert "5 steps in a row" in err


def test_five_in_a_row_end_the_run(data_dir, out_dir):
    """Five skipped steps in a row end the run, though the log comes every 6 steps, and the last good
    checkpoint is named; a resumed run begins a new row."""
    changes = dict(log_every=6, sample_every=0, eval_every=0)
    _, err = train(data_dir, out_dir, "r", patch=faults.nan_loss_at(*range(7, 12)), code=1, **changes)
    assert "5 steps in a row" in err
    assert "checkpoints/step_000011" in err
    train(data_dir, out_dir, "r", resume="auto", **changes)


def test_an_overflow_in_float16_lowers_the_scale(data_dir, out_dir):
    """An overflow under float16 halves the scale of the loss until it fits, and is not an anomaly."""
    changes = HALF | dict(schedule="linear", max_steps=12, save_every=0)
    train(data_dir, out_dir, "r", patch=faults.loss_scale(2.0**40), **changes)
    scales = trained(f"{out_dir}/r", "loss_scale")
    assert scales[0] == 2.0**39
    assert 1 <= scales[-1] < 2.0**39
    assert skips_of(f"{out_dir}/r") == []


def test_gradients_are_clipped_without_their_scale(data_dir, out_dir):
    """The norm of a gradient under float16 is that of float32."""
    changes = HALF | dict(schedule="linear", max_steps=1, save_every=0)
    train(data_dir, out_dir, "plain", **changes | dict(dtype="float32"))
    train(data_dir, out_dir, "scaled", **changes)
    norm, scaled = (trained(f"{out_dir}/{run_id}", "grad_norm")[0] for run_id in ("plain", "scaled"))
    assert scaled == pytest.approx(norm, rel=0.02)


def test_float16_that_always_overflows_ends(data_dir, out_dir):
    """A scale that no halving helps ends the run, although an overflow is not an anomaly."""
    patch = faults.loss_scale(2.0) + faults.nan_loss_always()
    _, err = train(data_dir, out_dir, "r", patch=patch, code=1, save_every=0, **HALF)
    assert "steps in a row were not finite" in err


def test_an_overflow_under_muon_moves_nothing(data_dir, out_dir):
    """An infinity in a matrix of Muon also stops the AdamW of the embedding, whose gradient is finite."""
    patch = faults.loss_scale(2.0**16) + faults.infinite_gradient_at(4, "blocks.0.attn.q_proj.weight")
    changes = HALF | dict(optimizer="muon", schedule="constant", max_steps=4, save_every=1, keep_last=0)
    train(data_dir, out_dir, "r", patch=patch, **changes)
    earlier, before, after = (final(f"{out_dir}/r", step)[0] for step in (2, 3, 4))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(before["embed.weight"], earlier["embed.weight"])


# how a run ends


def test_out_of_memory_is_one_line(data_dir, out_dir):
    """A GPU without enough memory costs one line with the remedy."""
    _, err = train(data_dir, out_dir, "r", patch=faults.out_of_memory(), code=1, sample_every=0)
    assert "--batch_size=2 --total_batch_size=64" in err
    assert err.count("error: ") == 1


def test_max_minutes_ends_as_if_finished(data_dir, out_dir):
    """A run that its time limit ends is saved and evaluated."""
    changes = dict(max_minutes=0.01, max_steps=10**6, save_every=0, log_every=50, sample_every=0)
    out, _ = train(data_dir, out_dir, "t", **changes)
    result = result_of(out)
    assert 0 < result["step"] < 10**6
    assert os.path.exists(f"{result['checkpoint']}/manifest.json")
    assert result["val_loss"] is not None


# no evaluation is better than the first one
STILL = dict(eval_every=2, sample_every=0, learning_rate=0.0, weight_decay=0.0, stage2_weight_decay=0.0)


@pytest.fixture(scope="module")
def impatient(tmp_path_factory):
    """Return (data_dir, out_dir, stdout) of run "p", which patience = 2 ended."""
    folder = tmp_path_factory.mktemp("impatient")
    where = write_data(folder / "data"), str(folder / "runs")
    out, _ = train(*where, "p", patience=2, **STILL)
    return *where, out


def test_patience_ends_a_run(impatient):
    """A run ends after so many evaluations without a new best."""
    assert result_of(impatient[2])["step"] == 6, "best at 2, none better at 4 and 6"


def test_patience_is_not_forgotten_by_a_resume(impatient):
    """A run that patience ended is finished."""
    data_dir, out_dir, _ = impatient
    out, _ = train(data_dir, out_dir, "p", resume="auto", patience=2, **STILL)
    assert "is finished" in out


def test_a_signal_does_not_count_an_evaluation_twice(data_dir, out_dir):
    """An evaluation that is repeated, since a signal came between it and the update, counts once."""
    changes = STILL | dict(patience=4, sample_every=4)
    patch = faults.signal_in("generate", "generate", 4, signal.SIGTERM)
    train(data_dir, out_dir, "i", patch=patch, code=128 + signal.SIGTERM, **changes)
    out, _ = train(data_dir, out_dir, "i", resume="auto", **changes)
    assert result_of(out)["step"] == 10, "best at 2, none better at 4, 6, 8 and 10"


def test_a_run_continues_without_patience(impatient, out_dir):
    """A run that patience ended continues to max_steps once patience is off."""
    data_dir, former_dir, _ = impatient
    shutil.copytree(f"{former_dir}/p", f"{out_dir}/p")
    out, _ = train(data_dir, out_dir, "p", resume="auto", patience=0, **STILL)
    assert result_of(out)["step"] == 24


BAD = [
    (dict(out_dir="{tmp}/file/x"), "cannot write"),
    (dict(dataset="nowhere"), "data set"),
    (dict(resume="{tmp}/gone"), "resume ="),
    (dict(init_from="{tmp}/file"), "init_from ="),
    (dict(sample_prompts="['ABC']"), "sample_prompts"),
    (dict(device="cuda:7"), "device = 'cuda:7'"),
    (dict(seq_len=600), "seq_len = 600"),
]


@pytest.mark.parametrize("changes, says", BAD, ids=[next(iter(changes)) for changes, _ in BAD])
def test_bad_input_ends_with_one_line_and_no_traceback(data_dir, out_dir, tmp_path, changes, says):
    """What the user can mend exits with 2 and one line."""
    (tmp_path / "file").write_text("")
    args = [flag.replace("{tmp}", str(tmp_path)) for flag in run_flags(data_dir, out_dir, "x", **changes)]
    _, err = run("train.py", *args, code=2)
    assert says in err
    assert err.count("error: ") == 1


# what an update computes


def test_accumulation_does_not_change_the_result(data_dir, out_dir):
    """Four micro-steps of one sequence are one of four: the same tokens, losses and norms. (AdamW hides the
    size of a gradient, its norm does not.)"""
    changes = dict(ternary=False, total_batch_size=64, max_steps=8, sample_every=0)
    train(data_dir, out_dir, "one", batch_size=4, **changes)
    train(data_dir, out_dir, "four", batch_size=1, **changes)
    for key in ("loss", "grad_norm"):
        one, four = (trained(f"{out_dir}/{run_id}", key) for run_id in ("one", "four"))
        assert one == pytest.approx(four, abs=1e-4)


def test_grad_clip_0_does_not_clip(data_dir, out_dir):
    """grad_clip = 0 is a bound that is never reached; a tiny one changes the run: beside such gradients
    adam_eps is no longer small."""
    changes = dict(ternary=False, total_batch_size=64, max_steps=8, sample_every=0, adam_eps=1e-4)
    for run_id, grad_clip in (("off", 0.0), ("wide", 1e9), ("tight", 1e-6)):
        train(data_dir, out_dir, run_id, grad_clip=grad_clip, **changes)
    off, wide, tight = (rows(f"{out_dir}/{run_id}")[-1]["val_loss"] for run_id in ("off", "wide", "tight"))
    assert off == wide
    assert abs(tight - off) > 1e-3


# what a run writes and prints


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return (folder, stdout, stderr) of a run of six steps of two blocks."""
    folder = tmp_path_factory.mktemp("written")
    out, err = train(write_data(folder / "data"), str(folder / "runs"), "r", max_steps=6, n_layer=2)
    return str(folder / "runs" / "r"), out, err


def test_the_last_line_of_stdout_is_the_result(written):
    """A program reads the result from the last line of stdout, one JSON object."""
    names = (
        "run_id step tokens loss val_loss val_bits_per_byte seconds tokens_per_sec peak_memory_gb checkpoint"
    )
    assert set(result_of(written[1])) == set(names.split())


def test_progress_goes_to_stderr_and_to_the_log(written):
    """Progress is on stderr, without a bar if that is not a terminal, and train.log has the same lines."""
    run_dir, _, err = written
    with open(f"{run_dir}/train.log", encoding="utf-8") as file:
        log = file.read()
    assert log == err
    assert "\r" not in err
    assert log.count("\nstep ") == 6


def test_a_training_line_describes_its_update(written):
    """The line of step 1 has the keys of the contract, and the numbers of the first update."""
    row = next(row for row in lines(written[0], SCALARS) if row["step"] == 1)
    names = (
        "step epoch tokens loss lr weight_decay stage grad_norm tokens_per_sec step_ms mfu memory_gb gpu_util"
    )
    assert set(row) == {*names.split(), "time"}
    assert row["tokens"] == 64
    assert row["epoch"] == 4 / 31
    assert row["stage"] == 1
    assert row["lr"] == pytest.approx(5e-4)


def test_the_line_of_the_last_update_of_stage_1_says_so(written):
    """The stage of a line is that of its update: of six steps, the third is the last of stage 1."""
    assert [row["stage"] for row in lines(written[0], SCALARS) if "stage" in row] == [1, 1, 1, 2, 2, 2]


def test_the_settings_are_stored_with_their_origin(written):
    """config.json holds each setting with its origin, and the process."""
    with open(f"{written[0]}/config.json", encoding="utf-8") as file:
        config = json.load(file)
    assert config["settings"]["max_steps"] == {"value": 6, "origin": "--max_steps=6"}
    assert config["pid"]


def test_ternary_health_has_a_row_for_each_layer(written):
    """A line of bitnet.jsonl holds the total and all 14 layers of two blocks."""
    health = lines(written[0], "metrics/bitnet.jsonl")[0]
    assert set(health) == {"step", "total", "layers"}
    assert len(health["layers"]) == 14


def test_a_checkpoint_has_three_files(written):
    """A checkpoint is its two parts and the manifest; checkpoint.pt holds all that use needs."""
    folder = step_dir(written[0], 6)
    assert set(os.listdir(folder)) == {"checkpoint.pt", "trainer.pt", "manifest.json"}
    assert set(checkpoint.load(folder)) == {"format", "step", "tokens", "config", "tokenizer", "model"}


def test_events_begin_with_the_start_and_end_with_the_finish(written):
    """The events of a run are its start, its saves and its finish."""
    events = [event["event"] for event in lines(written[0], EVENTS)]
    assert events[0] == "start"
    assert events[-1] == "finish"
    assert "save" in events


def test_samples_are_written_in_three_modes(written):
    """Each prompt is continued greedily, by top_k and by nucleus."""
    samples = lines(written[0], "samples/samples.jsonl")
    assert [sample["mode"] for sample in samples] == ["greedy", "top_k", "nucleus"]
    assert set(samples[0]) == {"step", "mode", "prompt", "generated_text", "repetition"}


def read_now(leader):
    """Return what has arrived at a terminal."""
    try:
        return os.read(leader, 65536)
    except BlockingIOError:
        return b""


def test_a_terminal_gets_a_bar(data_dir, out_dir):
    """A terminal of 60 columns shows a bar that fits, loss lines and a sample."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    patch = faults.in_terminal(os.ttyname(follower), (2,))
    child = start_train(data_dir, out_dir, "r", patch, max_steps=8)
    os.set_blocking(leader, False)
    shown = b""
    while not child.ended():
        shown += read_now(leader)
        time.sleep(0.01)
    shown += read_now(leader)
    os.close(follower)
    assert child.wait(0)[0] == 0
    bars = re.findall(r"\r([^\r\n]*?8/8 100%[^\r\n]*)", shown.decode())
    assert bars, "the bar reaches the end"
    assert max(map(len, bars)) <= 60
    assert "loss" in bars[-1]
    assert "tok/s" in bars[-1]
    assert b"step 3/8" in shown
    assert b"sample 8/8" in shown


# the commands that use the model


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Return (--ckpt= and --data_dir= of a run that evaluates all its windows, its result)."""
    folder = tmp_path_factory.mktemp("evaluated")
    data_dir, out_dir = write_data(folder / "data"), str(folder / "runs")
    out, _ = train(data_dir, out_dir, "r", max_steps=6, eval_tokens=10**6, sample_every=0)
    return [f"--ckpt={out_dir}/r", f"--data_dir={data_dir}"], result_of(out)


def test_evaluate_agrees_with_training(evaluated):
    """evaluate.py uses the windows and the forward of training."""
    where, trained = evaluated
    out, _ = run("evaluate.py", *where, "--batch_size=4")
    result = result_of(out)
    assert result["val_loss"] == pytest.approx(trained["val_loss"], abs=1e-6)
    assert result["bits_per_byte"] == pytest.approx(trained["val_bits_per_byte"], abs=1e-6)
    assert result["dtype"] == "float32"


def test_evaluate_refuses_an_unknown_split(evaluated):
    """A split that the data set does not have exits with 2."""
    assert "no split 'test'" in run("evaluate.py", *evaluated[0], "--split=test", code=2)[1]


def test_sample_repeats_itself_with_its_seed(evaluated):
    """sample.py writes so many samples of the prompt, the same with the same seed only."""
    ask = [evaluated[0][0], "--prompt=ab", "--max_new_tokens=20", "--num_samples=4"]
    first, again, other = (run("sample.py", *ask, seed) for seed in ("--seed=3", "--seed=3", "--seed=4"))
    assert first[0] == again[0]
    assert first[0] != other[0]
    assert first[0].count("\nab") == 3
    assert "tokens/s" in first[1]


def test_sample_refuses_a_character_that_the_tokenizer_lacks(evaluated):
    """A prompt that cannot be encoded exits with 2, and with the character."""
    err = run("sample.py", evaluated[0][0], "--prompt=Z", code=2)[1]
    assert "tokenizer has no character 'Z'" in err


def test_sample_needs_a_prompt(evaluated):
    """A missing prompt exits with 2."""
    assert "--prompt=... or" in run("sample.py", evaluated[0][0], code=2)[1]
