"""nanobit/bench/planner.py: the numbers of a plan are those that were worked out elsewhere."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import settings
from plans import BASELINE, COST, bench, rows_of

from model import Transformer
from nanobit.bench import planner, report


@pytest.mark.parametrize(
    "params, per_param, loss", [(95e6, 5, 4.02), (95e6, 20, 3.47), (95e6, 100, 3.09), (300e6, 20, 2.91)]
)
def test_the_law_gives_known_losses(params, per_param, loss):
    """The scaling law, with its constants, gives known losses."""
    assert planner.expected_loss(params, per_param * params) == pytest.approx(loss, abs=0.006)
    gap = planner.expected_loss(params, 1e9, ternary=True) - planner.expected_loss(params, 1e9)
    assert gap == pytest.approx({95e6: 0.31, 300e6: 0.25}[params], abs=0.006)


@pytest.mark.parametrize("epochs, share", [(1, 1.0), (2, 0.984), (4, 0.931), (16, 0.661), (40, 0.379)])
def test_repeated_data_is_worth_less(epochs, share):
    """Each epoch after the first adds less than the one before; the first counts in full."""
    assert planner.worth(epochs * 7e9, 7e9) / (epochs * 7e9) == pytest.approx(share, abs=0.001)
    assert planner.worth(epochs * 7e9, 0) == epochs * 7e9


def test_a_finished_run_calibrates_the_law(tmp_path):
    """A finished run shifts the law by what its loss is above the law of its own model, data and epochs."""
    os.mkdir(tmp_path / "metrics")
    params, tokens = 50_000_000, 1_000_000_000
    run_config = dict(settings=dict(ternary=dict(value=True)), params=dict(active=params))
    (tmp_path / "config.json").write_text(json.dumps(run_config))
    law = planner.expected_loss(params, tokens, ternary=True)
    line = dict(step=5, event="finish", why="max_steps", result=dict(val_loss=law + 0.5, tokens=tokens))
    (tmp_path / "metrics" / "events.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "metrics" / "scalars.jsonl").write_text('{"step": 5, "loss": 3.0, "epoch": 8.0}\n')
    repeated = planner.expected_loss(params, tokens, tokens / 8, ternary=True)
    assert planner.calibration(str(tmp_path)) == pytest.approx(law + 0.5 - repeated)
    (tmp_path / "metrics" / "scalars.jsonl").write_text('{"step": 5, "loss": 3.0, "epoch": 0.1}\n')
    assert planner.calibration(str(tmp_path)) == pytest.approx(0.5)
    found, out, _ = bench(BASELINE, plan=True, step_ms=100, steps="400000", calibrate=tmp_path)
    plain, *_ = bench(BASELINE, plan=True, step_ms=100, steps="400000")
    shift = found["rows"][0]["expected_loss"] - plain["rows"][0]["expected_loss"]
    assert shift == pytest.approx(0.5)
    assert "shifted by +0.50" in out
    assert found["is_calibrated"]
    run_config["params"]["active"] = 20_000
    (tmp_path / "config.json").write_text(json.dumps(run_config))
    _, _, err = bench(BASELINE, plan=True, step_ms=100, calibrate=tmp_path, code=2)
    assert "does not hold for so small a model" in err


@pytest.mark.parametrize(
    "save_every, eval_every, schedule, count",
    [
        (10, 0, "cosine", 4),  # 10, 20, 30, the end
        (0, 0, "cosine", 1),
        (10, 0, "two_stage", 6),  # and 16, 17
        (10, 0, "bitnet", 6),
        (17, 0, "two_stage", 3),  # 16, 17 and 34, the end
        (10, 4, "cosine", 11),  # 4, 8, 10, 12, 16, 20, 24, 28, 30, 32, the end
        (5, 7, "cosine", 11),  # the end, 35, is a multiple of both
    ],
)
def test_checkpoints_are_counted(save_every, eval_every, schedule, count):
    """The checkpoint of the end counts, as do those that a new best may cause, each once."""
    cfg = SimpleNamespace(save_every=save_every, eval_every=eval_every, schedule=schedule, stage_boundary=0.5)
    assert planner.saves(cfg, 35 if eval_every == 7 else 34) == count


@pytest.mark.parametrize(
    "eval_tokens, val_tokens, tokens",
    [(4096, 1000, 1000), (4096, 9000, 4096), (4096, 0, 4096), (0, 9000, 9000), (0, 0, 0)],
)
def test_an_evaluation_reads_no_more_than_there_is(eval_tokens, val_tokens, tokens):
    """The time of an evaluation is that of eval_tokens (0 = all), or of a smaller validation set."""
    cfg = SimpleNamespace(eval_tokens=eval_tokens, val_tokens=val_tokens)
    assert planner.evaluated_tokens(cfg) == tokens


def test_a_row_by_hand():
    """The hours of a row include the evaluations at step 0 and at the end, the samples, and the saves at the
    boundary."""
    cfg, (row,) = rows_of([36_000])
    assert row["hours"] == pytest.approx(1.0)
    # evaluations at 0, 5,000, ..., 35,000 and the end; samples at 7,000, ... and the end; saves at 5,000 (a
    # best), 10,000 (both), ..., 35,000 and the end, and two at the boundary, 17,999 and 18,000
    assert row["hours_total"] == pytest.approx(1 + (9 * 3.6 + 6 * 7.2 + 10 * 36) / 3600)
    assert row["price"] == pytest.approx(2 * row["hours_total"])
    assert row["finish"] == "2026-02-28 01:07"
    assert row["spare_hours"] == pytest.approx(100 - row["hours_total"])
    assert row["epochs"] == pytest.approx(0.294912)
    law = planner.expected_loss(95e6, 36_000 * 8192, 1e9, cfg.ternary)
    assert row["expected_loss"] == pytest.approx(law + 0.25)
    weights = 4 * 95e6 * (3 + 4) / 1e9
    assert row["checkpoint_gb"] == pytest.approx(weights + 8 * 95e6 * (min(3, cfg.keep_last or 3) + 4) / 1e9)


def test_a_mixture_counts_its_active_parameters():
    """The law takes the active parameters; the loss by all parameters is the other end of the bracket."""
    counts, cost = dict(total=500_000_000, active=160_000_000), COST | dict(dataset_tokens=1e9)
    cfg, _ = rows_of([1])
    row = planner.row(cfg, counts, 1_000_000, cost)
    assert row["tokens_per_param"] == pytest.approx(16.384)
    assert row["tokens_per_active_param"] == 51.2
    want = [planner.expected_loss(n, 8.192e9, 1e9, cfg.ternary) + 0.25 for n in (160e6, 500e6)]
    assert row["expected_loss"] == pytest.approx(want[0])
    cautions = list(report.cautions(cfg, counts, [row], cost))
    assert any(f"the law gives {want[1]:.2f}" in text for text in cautions)
    assert not any("fewer than 20" in text for text in cautions)


def test_lengths_to_compare():
    """The lengths to compare fill the budget of hours, and the experiment's own length is among them."""
    cfg, _ = rows_of([1])
    cfg.max_steps = 400
    assert planner.candidates(cfg, 100.0, 0) == [100, 200, 400, 800]
    assert planner.candidates(cfg, 100.0, 10) == [400, 45_000, 90_000, 180_000, 324_000]
    assert max(planner.candidates(cfg, 1e-9, 1e6)) <= planner.MOST_STEPS


@pytest.mark.parametrize(
    "changes, per_token",
    [  # C = 64, F = 96, V = 1000; 8 C + b (...) for each of 3 blocks, then 4 C + b C + 2 b V
        (dict(ternary=True), 3 * (512 + 4 * 7 * 64 + 12 * 96) + 512 + 8000),
        (dict(ternary=False), 3 * (512 + 4 * 6 * 64 + 12 * 96) + 512 + 8000),
        (dict(ternary=False, n_expert=4, n_expert_active=2), 3 * (512 + 24 * 64 + 2 * 16 * 160) + 8512),
    ],
)
def test_memory_by_hand(changes, per_token):
    """Memory counts repeated keys and values, each active expert, the state of the optimizer, and the copies
    that autocast makes."""
    cfg = settings(n_layer=3, n_embd=64, n_head=4, n_kv_head=2, ffn_dim=96, vocab_size=1000, **changes)
    counts = Transformer(cfg).counts()
    state = planner.memory_gb(cfg, counts, 0, 4)
    assert state * 1e9 == pytest.approx(16 * counts["total"] + counts["ternary"])
    assert (planner.memory_gb(cfg, counts, 3, 4) - state) * 1e9 == pytest.approx(per_token * 3 * cfg.seq_len)
    cfg.optimizer = "muon"
    with_muon = planner.memory_gb(cfg, counts, 0, 4) * 1e9
    assert with_muon == pytest.approx(12 * counts["total"] + 4 * 64 * 1000 + counts["ternary"])
    copies = planner.memory_gb(cfg, counts, 0, 2) * 1e9 - with_muon
    assert copies == pytest.approx(2 * counts["total"])


@torch.library.custom_op("nanobit_tests::product", mutates_args=())
def product(
    q: torch.Tensor, codes: torch.Tensor, dtype: torch.dtype, rounded_x: torch.Tensor
) -> torch.Tensor:
    """Stand for the product of a GPU, into which the compiler cannot look."""
    return (q.float() @ codes.float().t()).to(dtype)


@product.register_fake
def _(q, codes, dtype, rounded_x):
    return q.new_empty(len(q), len(codes), dtype=dtype)


@pytest.mark.parametrize("ternary, dtype", [(True, torch.float32), (False, torch.bfloat16)])
def test_planned_memory_is_what_autograd_keeps(ternary, dtype, monkeypatch):
    """The planned activations are, within 2 %, what autograd keeps of a compiled model, as on a GPU: there a
    ternary layer keeps its rounded input, which its product asks for (kernels.scaled_matmul)."""

    def scaled_matmul(x_int, x_scale, codes, scale, dtype, rounded_x):
        return product(x_int.to(torch.int8), codes, dtype, rounded_x)

    monkeypatch.setattr("quant.scaled_matmul", scaled_matmul)
    monkeypatch.setattr("model.attends_in_float32", lambda q: False)
    monkeypatch.setattr("model.repeats_heads", lambda q: True)
    torch._dynamo.reset()
    cfg = settings(n_layer=1, n_embd=128, n_head=4, n_kv_head=2, ffn_dim=384, vocab_size=256, seq_len=32)
    cfg.ternary, cfg.dropout = ternary, 0.0
    model = Transformer(cfg)
    ours, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    # the compiler keeps what its partition says; the code that it then makes does not matter here
    compiled, counted = torch.compile(model, backend="aot_eager_decomp_partition", dynamic=False), []
    for batch_size in (4, 8):
        kept.clear()
        x = torch.randint(256, (batch_size, 32))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss, _ = compiled(x, x)
        counted.append(sum(kept.values()) + x.numel() * 256 * dtype.itemsize)  # the gradient of the logits
        loss.backward()
    planned = [planner.memory_gb(cfg, model.counts(), n, dtype.itemsize) for n in (4, 8)]
    assert 1e9 * (planned[1] - planned[0]) == pytest.approx(counted[1] - counted[0], rel=0.02)
    state = planner.memory_gb(cfg, model.counts(), 0, 4) * 1e9  # weights, gradients, AdamW's two numbers
    assert state == 16 * model.counts()["total"] + model.counts()["ternary"]
    cfg.total_batch_size = 64 * 32
    fits = planner.largest_batch_size(cfg, model.counts(), 0.9, 4)
    assert 64 % fits == 0
    assert planner.memory_gb(cfg, model.counts(), fits, 4) <= 0.9 * 0.9 - 0.8
    assert planner.largest_batch_size(cfg, model.counts(), 0.5, 4) == 0


def test_planned_memory_follows_the_dtype():
    """float32 is planned with more memory than bfloat16."""
    how = dict(plan=True, step_ms=695, steps="1", gpu_memory_gb=7)
    half, whole = (bench(BASELINE, **how, dtype=dtype)[0] for dtype in ("bfloat16", "float32"))
    assert half["memory_gb"] < whole["memory_gb"]
    assert half["largest_batch_size"] > whole["largest_batch_size"]
