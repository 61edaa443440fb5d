"""train.py as a child process: what a run does, writes and says, and that sample.py and evaluate.py agree
with it."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios

import pytest
import torch
from conftest import EVENTS, NAN, ROOT, RUN, SCALARS, final, flags, lines, rows, run, train

from nanobit import checkpoint


def test_init_from_takes_weights_only(data_dir, out_dir):
    """bug guarded: init_from that continues the step, or resumes the optimizer; and float weights made
    ternary"""
    train(data_dir, out_dir, "float", max_steps=6, ternary=False, sample_every=0)
    train(
        data_dir,
        out_dir,
        "from",
        max_steps=6,
        init_from=f"{out_dir}/float",
        sample_every=0,
        learning_rate=0.0,
    )
    events = lines(f"{out_dir}/from", EVENTS)
    assert events[0]["event"] == "start" and events[0]["step"] == 0
    for key, value in final(f"{out_dir}/float", 6)[0].items():
        assert torch.equal(value, final(f"{out_dir}/from", 6)[0][key]) or "proj" not in key


def test_a_step_that_is_not_finite_is_skipped_and_told(data_dir, out_dir):
    """bug guarded: one NaN ends in NaN weights three days later"""
    patch = NAN.format(bad="count[0] in (4, 6)")
    train(data_dir, out_dir, "r", patch=patch, max_steps=12, save_every=0, sample_every=0)
    weights, _ = final(f"{out_dir}/r", 12)
    assert all(w.isfinite().all() for w in weights.values())
    told = [row for row in lines(f"{out_dir}/r", EVENTS) if row["event"] == "anomaly"]
    assert [(row["step"], row["steps"]) for row in told] == [(4, 1), (6, 1)]
    losses = {row["step"]: row["loss"] for row in lines(f"{out_dir}/r", SCALARS) if "loss" in row}
    assert losses[4] is None and losses[5] is not None and list(losses) == list(range(1, 13))


def test_a_gradient_that_is_not_finite_is_skipped_too(data_dir, out_dir):
    """bug guarded: an overflow in the backward only, which the loss does not show"""
    patch = "import torch; from nanobit import optim\nreal = optim.make_optimizers\ncount = [0]\n"
    patch += "def hook(grad):\n    count[0] += 1\n    return grad * float('inf') if count[0] == 4 else grad\n"
    patch += "def make(cfg, model, dtype):\n    model.norm.weight.register_hook(hook)\n"
    patch += "    return real(cfg, model, dtype)\n"
    patch += "optim.make_optimizers = make"
    train(data_dir, out_dir, "r", patch=patch, max_steps=8, save_every=0, sample_every=0)
    told = [row for row in lines(f"{out_dir}/r", EVENTS) if row["event"] == "anomaly"]
    assert [(row["step"], row["steps"]) for row in told] == [(4, 1)]
    assert all(w.isfinite().all() for w in final(f"{out_dir}/r", 8)[0].values())


def test_a_run_that_overflows_ends_with_one_line(data_dir, out_dir):
    """bug guarded: infinities in the record of ternary health end the run with a traceback"""
    _, err = train(data_dir, out_dir, "r", code=1, learning_rate=1e30, sample_every=0, eval_every=0)
    assert "5 steps in a row" in err


def test_an_overflow_in_float16_lowers_the_scale_and_is_no_anomaly(data_dir, out_dir):
    """bugs guarded: the scaler's search for its scale told as a fault of the run; an overflow that is not
    skipped; a clip of gradients that are still scaled"""
    how = dict(ternary=False, dtype="float16", max_steps=12, save_every=0, sample_every=0, eval_every=0)
    patch = "import torch\nreal = torch.amp.GradScaler.__init__\n"
    patch += "def init(self, *a, **k): real(self, *a, init_scale=2.0**40, **k)\n"
    patch += "torch.amp.GradScaler.__init__ = init"
    train(data_dir, out_dir, "r", patch=patch, schedule="linear", **how)
    scales = [row["loss_scale"] for row in lines(f"{out_dir}/r", SCALARS)]
    assert scales[0] == 2.0**39 and 1 <= scales[-1] < 2.0**39
    assert not [row for row in lines(f"{out_dir}/r", EVENTS) if row["event"] == "anomaly"]
    train(data_dir, out_dir, "plain", schedule="linear", **how | dict(dtype="float32"))
    norm = lines(f"{out_dir}/plain", SCALARS)[0]["grad_norm"]
    train(data_dir, out_dir, "scaled", schedule="linear", **how)
    assert lines(f"{out_dir}/scaled", SCALARS)[0]["grad_norm"] == pytest.approx(norm, rel=0.02)


def test_float16_that_overflows_for_ever_ends(data_dir, out_dir):
    """bug guarded: a scale halved for days, because overflows are no anomaly"""
    patch = "import torch\nreal = torch.amp.GradScaler.__init__\n"
    patch += "def init(self, *a, **k): real(self, *a, init_scale=2.0, **k)\n"
    patch += "torch.amp.GradScaler.__init__ = init\n" + NAN.format(bad="True").replace("real", "net")
    how = dict(ternary=False, dtype="float16", sample_every=0, eval_every=0, save_every=0)
    _, err = train(data_dir, out_dir, "r", patch=patch, code=1, **how)
    assert "steps in a row were not finite" in err


def test_an_overflow_under_muon_moves_nothing(data_dir, out_dir):
    """bug guarded: the scaler looks at each optimizer's gradients alone, so that an infinity in a matrix
    leaves the embedding to AdamW's momentum"""
    patch = "import torch\nreal = torch.amp.GradScaler.__init__\n"
    patch += "def init(self, *a, **k): real(self, *a, init_scale=2.0**16, **k)\n"
    patch += "torch.amp.GradScaler.__init__ = init\nfrom nanobit import optim\n"
    patch += "make, count = optim.make_optimizers, [0]\n"
    patch += "def hook(grad):\n    count[0] += 1\n    return grad * float('inf') if count[0] == 4 else grad\n"
    patch += "def hooked(cfg, model, dtype):\n    model.blocks[0].attn.q_proj.weight.register_hook(hook)\n"
    patch += "    return make(cfg, model, dtype)\noptim.make_optimizers = hooked"
    how = dict(
        ternary=False, dtype="float16", optimizer="muon", sample_every=0, eval_every=0, schedule="constant"
    )
    train(data_dir, out_dir, "r", patch=patch, max_steps=4, save_every=1, keep_last=0, **how)
    before, after = (final(f"{out_dir}/r", step)[0] for step in (3, 4))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(before["embed.weight"], final(f"{out_dir}/r", 2)[0]["embed.weight"])


def test_five_in_a_row_end_the_run(data_dir, out_dir):
    """bug guarded: a run that skips for days; the fifth in a row is found although the log comes every 6
    steps"""
    patch = NAN.format(bad="7 <= count[0] <= 11")
    _, err = train(data_dir, out_dir, "r", patch=patch, code=1, log_every=6, sample_every=0, eval_every=0)
    assert "5 steps in a row" in err and "checkpoints/step_000011" in err
    # what was saved among them has good weights, and a resumed run begins a new row
    train(data_dir, out_dir, "r", resume="auto", log_every=6, sample_every=0, eval_every=0)


def test_out_of_memory_is_one_line(data_dir, out_dir):
    """bug guarded: a screen of traceback instead of the remedy"""
    patch = NAN.replace(
        "if {bad}: out = out[0] * float('nan'), out[1]", "raise torch.OutOfMemoryError('CUDA out of memory')"
    )
    _, err = train(data_dir, out_dir, "r", patch=patch, code=1, sample_every=0)
    assert "--batch_size=2 --total_batch_size=64" in err and err.count("error: ") == 1


def test_max_minutes_and_patience_end_as_if_finished(data_dir, out_dir):
    """bugs guarded: a run ended by its time budget that is not saved; patience forgotten by a resume"""
    out, _ = train(
        data_dir, out_dir, "t", max_minutes=0.01, max_steps=10**6, save_every=0, log_every=50, sample_every=0
    )
    result = json.loads(out.strip().split("\n")[-1])
    assert 0 < result["step"] < 10**6 and os.path.exists(f"{result['checkpoint']}/manifest.json")
    assert result["val_loss"] is not None
    how = dict(
        patience=2,
        learning_rate=0.0,
        eval_every=2,
        sample_every=0,
        stage2_weight_decay=0.0,
        weight_decay=0.0,
    )
    out, _ = train(data_dir, out_dir, "p", **how)
    assert json.loads(out.strip().split("\n")[-1])["step"] == 6, "best at 2, none better at 4 and 6"
    out, _ = train(data_dir, out_dir, "p", resume="auto", **how)
    assert "is finished" in out
    out, _ = train(data_dir, out_dir, "p", resume="auto", **how | dict(patience=0))
    assert json.loads(out.strip().split("\n")[-1])["step"] == 24, "without patience it goes on"
    # a signal between an evaluation and the update does not count that evaluation twice
    how |= dict(patience=4, sample_every=4)
    patch = "import os, signal; from nanobit import generate\nreal, count = generate.generate, [0]\n"
    patch += "def signalled(*a, **k):\n    count[0] += 1\n"
    patch += "    if count[0] == 4: os.kill(os.getpid(), signal.SIGTERM)\n    return real(*a, **k)\n"
    patch += "generate.generate = signalled"
    train(data_dir, out_dir, "i", patch=patch, code=128 + signal.SIGTERM, **how)
    out, _ = train(data_dir, out_dir, "i", resume="auto", **how)
    assert json.loads(out.strip().split("\n")[-1])["step"] == 10, "best at 2, none better at 4, 6, 8 and 10"


def test_accumulation_does_not_change_the_result(data_dir, out_dir):
    """bug guarded: a gradient summed instead of averaged over micro-steps; other tokens with another
    batch_size"""
    how = dict(ternary=False, total_batch_size=64, max_steps=8, sample_every=0)
    train(data_dir, out_dir, "one", batch_size=4, **how)
    train(data_dir, out_dir, "four", batch_size=1, **how)
    for key in ("loss", "grad_norm"):  # AdamW hides the size of a gradient, its norm does not
        a, b = ([row[key] for row in lines(f"{out_dir}/{r}", SCALARS) if key in row] for r in ("one", "four"))
        assert a == pytest.approx(b, abs=1e-4)
    # 0 switches clipping off, a tiny bound changes the run: beside it adam_eps is no longer small
    for run_id, grad_clip in (("off", 0.0), ("wide", 1e9), ("tight", 1e-6)):
        train(data_dir, out_dir, run_id, batch_size=4, grad_clip=grad_clip, adam_eps=1e-4, **how)
    off, wide, tight = (rows(f"{out_dir}/{r}")[-1]["val_loss"] for r in ("off", "wide", "tight"))
    assert off == wide and abs(tight - off) > 1e-3


def test_bad_input_ends_with_one_line_and_no_traceback(data_dir, out_dir, tmp_path):
    """bug guarded: a traceback for what the user can mend"""
    (tmp_path / "file").write_text("")
    for changes, says in (
        (dict(out_dir=f"{tmp_path}/file/x"), "cannot write"),
        (dict(dataset="nowhere"), "data set"),
        (dict(resume=f"{tmp_path}/gone"), "resume ="),
        (dict(init_from=f"{tmp_path}/file"), "init_from ="),
        (dict(sample_prompts="['ABC']"), "sample_prompts"),
        (dict(device="cuda:7"), "device = 'cuda:7'"),
        (dict(seq_len=600), "seq_len = 600"),
    ):
        values = dict(data_dir=data_dir, out_dir=out_dir, run_id="x") | changes
        _, err = train(values.pop("data_dir"), values.pop("out_dir"), values.pop("run_id"), code=2, **values)
        assert says in err and err.count("error: ") == 1, err


def test_output_goes_where_programs_look(data_dir, out_dir):
    """bug guarded: progress on stdout, a bar in a log file, a last line that is not JSON"""
    out, err = train(data_dir, out_dir, "r", max_steps=6)
    result = json.loads(out.strip().split("\n")[-1])
    assert set(result) == set(
        "run_id step tokens loss val_loss val_bits_per_byte seconds tokens_per_sec "
        "peak_memory_gb checkpoint".split()
    )
    log = open(f"{out_dir}/r/train.log", encoding="utf-8").read()
    assert log == err and "\r" not in err and log.count("\nstep ") == 6
    row = next(row for row in lines(f"{out_dir}/r", SCALARS) if row["step"] == 1)
    assert (
        row["tokens"] == 64
        and row["epoch"] == 4 / 31
        and row["stage"] == 1
        and row["lr"] == pytest.approx(5e-4)
    )
    config = json.load(open(f"{out_dir}/r/config.json"))
    assert config["settings"]["max_steps"] == {"value": 6, "origin": "--max_steps=6"} and config["pid"]
    keys = "step epoch tokens loss lr weight_decay stage grad_norm tokens_per_sec step_ms mfu "
    keys += "memory_gb gpu_util time"
    assert set(row) == set(keys.split())
    health = lines(f"{out_dir}/r", "metrics/bitnet.jsonl")[0]
    assert set(health) == {"step", "total", "layers"} and len(health["layers"]) == 14
    folder = checkpoint.step_dir(f"{out_dir}/r", 6)
    assert set(checkpoint.load(folder)) == {"format", "step", "tokens", "config", "tokenizer", "model"}
    assert set(os.listdir(folder)) == {"checkpoint.pt", "trainer.pt", "manifest.json"}
    events = [event["event"] for event in lines(f"{out_dir}/r", EVENTS)]
    assert events[0] == "start" and events[-1] == "finish" and "save" in events
    samples = lines(f"{out_dir}/r", "samples/samples.jsonl")
    assert [s["mode"] for s in samples] == ["greedy", "top_k", "nucleus"]
    assert set(samples[0]) == {"step", "mode", "prompt", "generated_text", "repetition"}


def test_evaluate_and_sample_agree_with_training(data_dir, out_dir):
    """bug guarded: evaluation of other windows, or of another forward, than while training"""
    out, _ = train(data_dir, out_dir, "r", max_steps=6, eval_tokens=10**6, sample_every=0)
    trained = json.loads(out.strip().split("\n")[-1])
    where = [f"--ckpt={out_dir}/r", f"--data_dir={data_dir}"]
    out, _ = run("evaluate.py", *where, "--batch_size=4")
    result = json.loads(out.strip().split("\n")[-1])
    assert result["val_loss"] == pytest.approx(trained["val_loss"], abs=1e-6) and result["dtype"] == "float32"
    assert result["bits_per_byte"] == pytest.approx(trained["val_bits_per_byte"], abs=1e-6)
    ask = [where[0], "--prompt=ab", "--max_new_tokens=20", "--num_samples=4"]
    texts = [run("sample.py", *ask, more) for more in ("--seed=3", "--seed=3", "--seed=4")]
    assert texts[0][0] == texts[1][0] != texts[2][0]
    assert texts[0][0].count("\nab") == 3 and "tokens/s" in texts[0][1]
    assert "tokenizer has no character 'Z'" in run("sample.py", where[0], "--prompt=Z", code=2)[1]
    assert "--prompt=... or" in run("sample.py", where[0], code=2)[1]
    assert "no split 'test'" in run("evaluate.py", *where, "--split=test", code=2)[1]


def test_a_terminal_gets_a_bar(data_dir, out_dir):
    """A terminal of 60 columns shows a bar that fits, loss lines and a sample."""
    values = dict(data_dir=data_dir, out_dir=out_dir, dataset="tiny", run_id="r") | RUN | dict(max_steps=8)
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    child = subprocess.Popen(
        [sys.executable, "train.py", *flags(**values)], cwd=ROOT, stdout=subprocess.PIPE, stderr=follower
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        shown += chunk
        if not chunk:
            break
    child.communicate()
    assert child.returncode == 0
    bars = re.findall(r"\r([^\r\n]*?8/8 100%[^\r\n]*)", shown.decode())
    assert bars, "the bar reaches the end"
    assert max(map(len, bars)) <= 60
    assert "loss" in bars[-1] and "tok/s" in bars[-1]
    assert b"step 3/8" in shown
    assert b"sample 8/8" in shown
