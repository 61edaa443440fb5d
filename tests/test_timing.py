"""nanobit/bench/timing.py, generation.py and peers.py: what is timed, and what it is compared with."""

import math
import os
import textwrap
from types import SimpleNamespace

import pytest
import torch
from conftest import settings
from plans import TINY, bench

from nanobit import optim
from nanobit.bench import generation, timing


def test_bench_times_the_twins_part_by_part():
    """The JSON of a comparison has every key that programs read, and the time of each part of a step."""
    found, out, _ = bench(**TINY, max_steps=10, pairs=2, warmup=1, compile=False, optimizer="muon")
    contract = "params params_active params_ternary step_ms float_step_ms tokens_per_sec mfu peak_memory_gb"
    assert set(contract.split() + ["device", "dtype", "compile"]) <= found.keys()
    assert list(found["parts_ms"]) == ["data", "forward", "backward", "optimizer", "codes"]
    assert sum(found["parts_ms"].values()) > 0
    assert found["mfu"] is None
    assert found["compile"] is False
    assert "ternary / float:" in out
    assert 0 < found["mfu_measured"] < 1


def test_a_timed_update_is_that_of_training(monkeypatch, tmp_path):
    """Each timed step makes the update of train.py, which checks that the loss is finite."""
    losses = []
    update = optim.update

    def noted(*args):
        losses.append(args[-1].item())
        return update(*args)

    monkeypatch.setattr(optim, "update", noted)
    cfg = SimpleNamespace(**vars(settings()), warmup=2)
    timing.ours(cfg, True, timing.random_tokens(cfg, str(tmp_path)), torch.device("cpu"), torch.float32)
    assert losses == pytest.approx([math.log(28)] * 2, abs=0.3)  # of a vocabulary of 28


def test_bench_times_the_float_experiment_itself():
    """A float experiment is given its own speed, not that of its ternary twin."""
    found, out, _ = bench(**TINY, max_steps=10, pairs=2, warmup=1, compile=False, ternary=False)
    assert found["params_ternary"] == 0
    assert found["float_step_ms"] == found["step_ms"]
    assert "float / ternary:" in out


def test_two_speeds_are_compared_pair_by_pair():
    """The ratio and its quartiles are those of pairs, so that a slow minute of the machine is not a
    difference."""
    assert timing.compared([1, 10, 1, 10], [4, 2, 4, 2]) == (5.5 / 3, (0.25, 5))


def test_steps_that_are_timed_together_are_averaged(monkeypatch):
    """The time of short steps, which a CUDA device is given together, is their mean."""
    steps = []
    monkeypatch.setattr(timing, "now", lambda device: float(len(steps)))
    contestant = SimpleNamespace(device=None, steps_together=10, ms=[], step=lambda: steps.append(None))
    timing.Contestant.time_steps(contestant)
    assert len(steps) == 10
    assert contestant.ms == [1000.0]  # of a step


def test_bench_times_the_weights_that_it_names(monkeypatch):
    """What is timed as integers has packed layers, and a head has the dtype of its name."""
    monkeypatch.setattr(generation, "generate", lambda model, *args, **how: model)
    for packed, head in ((True, "float32"), (False, "bfloat16"), (True, "int8")):
        cfg = SimpleNamespace(**vars(settings()), packed=packed, head=head)
        prompt = torch.zeros(1, 4, dtype=torch.long)
        _, write = generation.writer(cfg, True, head, torch.device("cpu"), prompt, 4)
        model = write()
        assert any(type(layer).__name__ == "PackedLinear" for layer in model.modules()) == packed
        weight = model.head.rows if head == "int8" else model.head.weight
        assert weight.dtype == getattr(torch, head)


def test_bench_times_text_and_plans_from_what_it_timed():
    """--sample times text, --compare each of its peers, and --plan without a speed uses the step that it
    timed."""
    found, *_ = bench(**TINY, max_steps=10, sample=True)
    assert found["dtype"] == "float32"  # as in sample.py, also where training takes bfloat16
    assert found["prefill_tokens_per_sec"] > found["decode_tokens_per_sec"] > 0
    pytest.importorskip("cyllama", reason="needs cyllama: requirements-dev.txt")
    found, out, _ = bench(**TINY, max_steps=10, sample=True, compare=True, pairs=1, packed=False)
    assert list(found["decode"])[:2] == ["ternary, master weights", "ternary, master weights, bfloat16 head"]
    found, out, _ = bench(**TINY, max_steps=10, sample=True, compare=True, pairs=1)
    names = ["ternary", "ternary, bfloat16 head", "ternary, int8 head", "float", "llama.cpp f16"]
    assert list(found["decode"]) == names
    assert found["decode"]["ternary"] == found["decode_tokens_per_sec"]
    assert all(speed > 0 for speed in found["decode"].values())
    assert out.count(" of ternary (") == 4
    found, out, _ = bench(**TINY, max_steps=1000, plan=True, pairs=1, warmup=1, compile=False)
    assert "the experiment's own length" in found["recommendation"]
    assert {1000, 2000} <= {row["steps"] for row in found["rows"]}
    assert found["step_ms"] > 0
    assert "(assumed)" not in out
    assert found["rows"][0]["expected_loss"] is None
    assert any("does not hold for so small a model" in text for text in found["warnings"])


def test_bench_compares_with_a_peer(tmp_path):
    """A peer trains on the same tokens, and is timed in the same pairs."""
    code = """
        import torch
        from dataclasses import dataclass

        @dataclass
        class GPTConfig:
            block_size: int; n_layer: int; n_head: int; n_embd: int; dropout: float

        class GPT(torch.nn.Module):
            def __init__(self, config):
                super().__init__()
                self.embed = torch.nn.Embedding(50304, config.n_embd)
            def forward(self, idx, targets):
                assert idx.shape == targets.shape and idx.max() < 64
                logits = self.embed(idx) @ self.embed.weight.T
                return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.view(-1))
    """
    os.mkdir(tmp_path / "nanoGPT")
    (tmp_path / "nanoGPT" / "model.py").write_text(textwrap.dedent(code))
    flags = dict(pairs=1, warmup=1, compile=False, max_steps=10)
    found, out, _ = bench(**TINY, **flags, compare=True, peers=tmp_path)
    assert found["ratios"].keys() == {"float", "nanoGPT"}
    assert found["nanogpt_step_ms"] > 0
    assert found["peak_memory_gb"] > 0.1 < found["float_peak_memory_gb"]
    assert "nanoGPT: 1,609,728 parameters" in out
