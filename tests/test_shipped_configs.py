"""config/train_*.py: the models, rates and plans of the shipped configs."""

import glob
import math
import os

import pytest
import torch
from conftest import ROOT

import config
from model import Transformer
from nanobit import schedule

CONFIGS = sorted(glob.glob(os.path.join(ROOT, "config", "train_*.py")))
STATED = {
    "train_simple": 526_848,
    "train_arithmetic": 1_331_328,
    "train_tictactoe": 1_330_944,
    "train_tinystories": 12_194_688,
    "train_laptop": 787_584 + 128 * 4096,
    "train_text": 10_621_824 + 384 * 4096,  # with the vocabulary that prepare/text.py makes by default
    "train_baseline_95m": 95_367_936,
    "train_best_95m": 95_367_936,
    "train_dense_300m": 300_270_592,
    "train_moe_500m": 505_965_312,
}


@pytest.mark.parametrize("path", CONFIGS)
def test_every_shipped_config_builds(path):
    """Every shipped config loads, and its model has the size that its text states."""
    cfg = config.load([path])
    cfg.vocab_size = cfg.vocab_size or 4096
    with torch.device("meta"):
        assert Transformer(cfg).counts()["total"] == STATED[cfg.run_id]


FORMER = {  # learning_rate, stage2_lr and min_lr, when all three were rates
    "train_simple": (2e-3, 1.3e-3, 1.5e-5),
    "train_arithmetic": (4e-3, None, None),  # the present rates of three configs have always been ratios
    "train_tictactoe": (1.5e-3, 1e-3, 1.5e-5),
    "train_tinystories": (1.5e-3, 1e-3, 1.5e-5),
    "train_text": (4e-3, None, None),
    "train_laptop": (8e-3, None, None),
    "train_baseline_95m": (1.5e-3, 1e-3, 1.5e-5),
    "train_best_95m": (1.5e-3, 1e-3, 1.5e-5),
    "train_dense_300m": (6e-4, None, 6e-5),  # its schedule and that of the mixture have no stage 2
    "train_moe_500m": (1e-3, None, 1e-4),
}
ONE_ULP = {("train_simple", 1.3e-3), ("train_dense_300m", 6e-5)}


@pytest.mark.parametrize("path", CONFIGS)
def test_the_ratios_are_the_former_rates(path):
    """The shipped configs train at the rates that they were measured with."""
    cfg = config.load([path])
    peak, *former = FORMER[cfg.run_id]
    assert cfg.learning_rate == peak
    for rate, now in zip(former, schedule.final_rates(cfg)):
        if rate is not None:
            assert abs(now - rate) == math.ulp(rate) * ((cfg.run_id, rate) in ONE_ULP)


@pytest.mark.parametrize("path", CONFIGS)
def test_half_the_batch_size_is_the_same_experiment(path):
    """Half the batch_size changes nothing but the accumulation."""
    cfg = config.load([path])
    half = config.load([path, f"--batch_size={cfg.batch_size // 2}"])
    differs = {name for name in vars(cfg) if getattr(cfg, name) != getattr(half, name)} - {"origin"}
    assert differs == {"batch_size", "accumulation"}
    assert half.accumulation == 2 * cfg.accumulation


def test_the_dense_model_is_the_plan():
    """The dense 300M model has the numbers of its plan."""
    cfg = config.load(["config/train_dense_300m.py"])
    plan = dict(max_steps=100_000, total_batch_size=512 * 2048, warmup_steps=2000, dropout=0.1, n_kv_head=16)
    plan |= dict(eval_every=1000, save_every=10_000, weight_decay=0.1, grad_clip=1.0, adam_eps=1e-8)
    assert {key: getattr(cfg, key) for key in plan} == plan
    assert cfg.patience > 0
    assert not cfg.ternary
    assert schedule.lr(cfg, 1999) == 6e-4
    assert abs(schedule.lr(cfg, 99_999) - 6e-5) < 1e-9
    with torch.device("meta"):
        assert Transformer(cfg).embed.weight.shape == (50_304, 1024)


def test_the_mixture_is_the_plan():
    """The mixture has the numbers of its plan, and the parameters of idle experts are not active."""
    cfg = config.load(["config/train_moe_500m.py"])
    with torch.device("meta"):
        counts = Transformer(cfg).counts()
    idle = 12 * 6 * 3 * 768 * 2048
    assert counts["active"] == counts["total"] - idle == 166_226_688
    assert counts["ternary"] == 0
    assert cfg.max_steps == -(-10_000_000_000 // cfg.total_batch_size)
    assert cfg.keep_last == 3
    assert schedule.lr(cfg, 999) == 1e-3
    assert schedule.final_rates(cfg)[1] == 1e-4


def test_baseline_is_the_plan():
    """The baseline has the numbers of its plan, and train_best_95m differs in its optimizer."""
    cfg = config.load(["config/train_baseline_95m.py"])
    plan = dict(max_steps=400_000, accumulation=2, total_batch_size=8192, warmup_steps=375, log_every=100)
    plan |= dict(eval_every=5000, sample_every=5000, save_every=10_000, seq_len=256, batch_size=16)
    assert {key: getattr(cfg, key) for key in plan} == plan
    assert schedule.boundary_steps(cfg) == {199_999, 200_000}
    assert schedule.lr(cfg, 374) == 1.5e-3
    assert schedule.lr(cfg, 200_000) == 1e-3
    assert abs(schedule.lr(cfg, 399_999) - 1.5e-5) < 1e-8
    assert schedule.weight_decay(cfg, 199_999) == 0.1
    assert schedule.weight_decay(cfg, 200_000) == 0
    best = config.load(["config/train_best_95m.py"])
    differs = {name for name in vars(cfg) if getattr(cfg, name) != getattr(best, name)} - {"origin"}
    assert differs == {"run_id", "optimizer", "muon_momentum"}
    assert (best.optimizer, best.muon_momentum) == ("muon", 0.9)
