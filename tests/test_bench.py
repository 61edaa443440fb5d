"""bench.py and planner.py: numbers worked out elsewhere, and what the commands print."""

import datetime
import json
import os
import re
import shlex
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run, settings

import config
from model import Transformer
from nanobit.bench import planner, report, timing

TINY = dict(vocab_size=64, n_layer=2, n_embd=32, n_head=4, n_kv_head=2, ffn_dim=64, seq_len=16, batch_size=2)
BASELINE = "config/train_baseline_95m.py"


def bench(*args, code=0, **values):
    """Return (the JSON line or None, stdout, stderr)."""
    out, err = run("bench.py", *args, *(f"--{key}={value}" for key, value in values.items()), code=code)
    return json.loads(out.strip().split("\n")[-1]) if code == 0 else None, out, err


def test_the_baseline_takes_what_its_plan_says():
    """Hours, tokens and epochs of a plan follow from steps x batch; a speed that is given is not timed."""
    found, out, _ = bench(BASELINE, plan=True, step_ms=695, steps="400000", dataset_tokens=10e9)
    row = found["rows"][0]
    assert row["hours"] == pytest.approx(77.2, abs=0.05)
    assert row["tokens"] == 3_276_800_000
    assert row["tokens_per_param"] == pytest.approx(34.4, abs=0.05)
    assert row["epochs"] == pytest.approx(0.33, abs=0.005)
    assert row["hours"] < row["hours_total"] < 1.05 * row["hours"]
    assert found["params"] == 95_367_936
    assert "first step" not in out
    assert "device" not in found
    assert [each["steps"] for each in found["milestones"]] == list(range(50_000, 400_001, 50_000))
    assert [each["what"] for each in found["milestones"]][3] == "stage boundary"
    assert not found["warnings"]
    # the same by throughput
    again, *_ = bench(BASELINE, plan=True, tokens_per_sec=8192 / 0.695, steps="400000", dataset_tokens=10e9)
    assert again["rows"][0]["hours"] == pytest.approx(row["hours"])


def test_a_plan_that_contradicts_itself_is_reported():
    """Speeds, tokens or a budget that do not agree are reported with both values."""
    plan = dict(plan=True, total_batch_size=32768, tokens_per_sec=20000, step_ms=250, steps="400000")
    found, out, _ = bench(BASELINE, **plan, total_tokens=10e9, budget_hours=144)
    speeds, tokens = found["warnings"]
    for text in ("20,000 tokens/s are 1.64 s a step and 182.0 hours", "over the budget of 144"):
        assert text in speeds
    assert "250 ms are 131,072 tokens/s and 27.8 hours" in speeds
    assert "the rows use step_ms" in speeds
    assert found["rows"][0]["hours"] == pytest.approx(27.8, abs=0.05)
    assert found["step_ms"] == 250
    assert "13,107,200,000" in tokens
    assert "305,176 steps" in tokens
    assert f"warning: {speeds}" in out
    again, *_ = bench("config/train_moe_500m.py", plan=True, step_ms=9, steps="400000", total_tokens=10e9)
    assert "total_tokens = 10,000,000,000 does not follow" in again["warnings"][0]
    # without the step time, the budget does not hold the run
    del plan["step_ms"]
    found, *_ = bench(BASELINE, **plan, budget_hours=144)
    assert found["rows"][0]["hours"] == pytest.approx(182.0, abs=0.05)
    assert "budget_hours = 144 does not hold 400,000 steps" in found["warnings"][0]
    assert found["recommendation"].startswith("none")
    assert found["rows"][0]["spare_hours"] < 0


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


COST = dict(step_ms=100, eval_seconds=3.6, sample_seconds=7.2, save_seconds=36, dataset_tokens=1e9)
COST |= dict(per_hour=2.0, budget_hours=100, offset=0.25, now=datetime.datetime(2026, 2, 28))
COUNTS = dict(total=95_000_000, active=95_000_000)


def rows_of(steps, **cost):
    cfg = settings(total_batch_size=8192, batch_size=8, seq_len=256, schedule="two_stage", save_every=10_000)
    cfg = SimpleNamespace(**vars(cfg) | dict(eval_every=5000, sample_every=7000, vocab_size=32000))
    return cfg, [planner.row(cfg, COUNTS, n, COST | cost) for n in steps]


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


@pytest.mark.parametrize(
    "steps, cost, chosen, why",
    [
        ([400_000, 5_000_000], {}, 400_000, "5,000,000 steps do not fit the budget"),
        ([400_000, 3_000_000], {}, 400_000, "would repeat the data 24.6 times"),
        ([3_000_000, 3_100_000], dict(dataset_tokens=0), 3_000_000, "buy only 0.00"),
        ([100_000, 400_000], {}, 400_000, "the longest of these lengths"),
        ([5_000_000], {}, None, "over the budget"),
        # without a budget, what a doubling of the hours buys decides
        ([20_000, 400_000, 16_000_000], dict(budget_hours=0, dataset_tokens=0), 400_000, "buy only"),
    ],
)
def test_the_recommendation_and_its_reason(steps, cost, chosen, why):
    """A length over the budget, or one that repeats the data too often, is not recommended, and the reason
    is the one that decided."""
    row, sentence = report.recommendation(rows_of(steps, **cost)[1], own=400_000)
    assert (row and row["steps"]) == chosen
    assert why in sentence


def test_unwise_lengths_are_reported():
    """Few tokens per parameter, many epochs and a long warm-up are reported."""
    cfg, rows = rows_of([2_000, 1_000_000, 4_000_000])
    few, *rest = sorted(report.cautions(cfg, COUNTS, rows, COST), key=lambda text: "parameter" not in text)
    assert "2,000 steps" in few
    assert "1,000,000" not in few
    assert sum("see the data" in text for text in rest) == 2
    assert "8.2 times: repetition begins" in "".join(rest)
    assert "32.8 times: most" in "".join(rest)
    assert any("warmup_steps = " in text for text in report.cautions(cfg, COUNTS, rows_of([5])[1], COST))
    assert "8 of" not in "".join(report.cautions(cfg, COUNTS, rows_of([400_000])[1], COST))


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
    [  # C = 64, keys 32, F = 96, V = 1000; 8 C + b (...) for each of 3 blocks, then 4 C + 2 b V
        (dict(ternary=True), 3 * (512 + 4 * (128 + 64) + 8 * 96) + 256 + 8000),
        (dict(ternary=False), 3 * (512 + 4 * (128 + 64) + 8 * 64 + 12 * 96) + 256 + 8000),
        (dict(ternary=False, n_expert=4, n_expert_active=2), 3 * (512 + 768 + 512 + 2 * 16 * 160) + 8256),
    ],
)
def test_memory_by_hand(changes, per_token):
    """Memory counts keys as wide as they are, each active expert, the state of the optimizer, and the copies
    that autocast makes."""
    cfg = settings(n_layer=3, n_embd=64, n_head=4, n_kv_head=2, ffn_dim=96, vocab_size=1000, **changes)
    counts = Transformer(cfg).counts()
    state = planner.memory_gb(cfg, counts, 0, 4)
    assert state * 1e9 == pytest.approx(16 * counts["total"])
    assert (planner.memory_gb(cfg, counts, 3, 4) - state) * 1e9 == pytest.approx(per_token * 3 * cfg.seq_len)
    cfg.optimizer = "muon"
    with_muon = planner.memory_gb(cfg, counts, 0, 4) * 1e9
    assert with_muon == pytest.approx(12 * counts["total"] + 4 * 64 * 1000)
    copies = planner.memory_gb(cfg, counts, 0, 2) * 1e9 - with_muon
    assert copies == pytest.approx(0 if cfg.ternary else 2 * counts["total"])


@pytest.mark.parametrize("ternary, dtype", [(True, torch.float32), (False, torch.bfloat16)])
def test_planned_memory_is_what_autograd_keeps(ternary, dtype):
    """The planned activations are, within 10 %, what autograd keeps of a compiled model."""
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
    assert 1e9 * (planned[1] - planned[0]) == pytest.approx(counted[1] - counted[0], rel=0.1)
    state = planner.memory_gb(cfg, model.counts(), 0, 4) * 1e9  # weights, gradients, AdamW's two numbers
    assert state == 16 * model.counts()["total"]
    cfg.total_batch_size = 64 * 32
    fits = planner.largest_batch_size(cfg, model.counts(), 0.9, 4)
    assert 64 % fits == 0
    assert planner.memory_gb(cfg, model.counts(), fits, 4) <= 0.9 * 0.9 - 0.8
    assert planner.largest_batch_size(cfg, model.counts(), 0.5, 4) == 0


def test_the_page_on_cost_is_what_the_planner_says():
    """The numbers of docs/cost.md are those that its commands print."""
    page = open(os.path.join(ROOT, "docs", "cost.md"), encoding="utf-8").read()
    first, second = (shlex.split(block) for block in re.findall(r"```bash\npython (.*)\n```", page))
    rows = run(*first)[0]
    for each in json.loads(rows.strip().split("\n")[-1])["rows"]:
        shown = [f"{each['steps']:,}", f"{each['tokens'] / 1e9:.2f}B", f"{each['tokens_per_param']:.1f}"]
        shown += [f"{each['epochs']:.2f}", f"{each['hours']:.1f}", f"{each['hours_total']:.1f}"]
        shown += [f"{each['checkpoint_gb'] + each['log_gb']:.1f} GB", f"{each['expected_loss']:.2f}"]
        assert f"| {' | '.join(shown)} | {each['price']:.2f} |" in page
    assert "182.0 hours" in run(*second)[0]


def test_bench_wants_an_experiment_as_training_does():
    """Without a config file bench.py exits with 2, as train.py does."""
    _, _, err = bench(code=2, vocab_size=64)
    assert "has no length; name a config file" in err


def test_a_small_plan_has_numbers():
    """Small numbers are printed in the unit in which they are not 0."""
    found, out, _ = bench(
        "config/train_simple.py", plan=True, step_ms=50, steps="100,4000", gpu_memory_gb=0.5
    )
    assert "76,800" in out
    assert "3.07M" in out
    assert " 55 MB" in out
    assert not re.search(r"\b0\.0+(B| GB)", out)
    assert [report.count(n) for n in (768, 3e8)] == ["768", "0.30B"]
    assert report.size(1.04) == "1.0 GB"


def test_a_terminal_gets_no_json(monkeypatch, capsys):
    """On a terminal the line of JSON is printed only with --json."""
    how = [BASELINE, "--plan", "--step_ms=695", "--steps=400000"]
    for flags, has_json in (([], False), (["--json"], True)):
        monkeypatch.setattr(sys, "argv", ["bench.py", *how, *flags])
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        import bench as script

        script.main(config.load(sys.argv[1:], flags=script.FLAGS, derive=script.derive))
        assert ('{"params"' in capsys.readouterr().out) is has_json


def test_bench_times_the_twins_part_by_part():
    """The JSON of a comparison has every key that programs read, and the time of each part of a step."""
    found, out, _ = bench(**TINY, max_steps=10, pairs=2, warmup=1, compile=False, optimizer="muon")
    contract = "params params_active params_ternary step_ms float_step_ms tokens_per_sec mfu peak_memory_gb"
    assert set(contract.split() + ["device", "dtype", "compile"]) <= found.keys()
    assert list(found["parts_ms"]) == ["codes", "data", "forward", "backward", "optimizer"]
    assert sum(found["parts_ms"].values()) > 0
    assert found["mfu"] is None
    assert found["compile"] is False
    assert "ternary / float:" in out
    assert 0 < found["mfu_measured"] < 1


def test_planned_memory_follows_the_dtype():
    """float32 is planned with more memory than bfloat16."""
    how = dict(plan=True, step_ms=695, steps="1", gpu_memory_gb=6)
    half, whole = (bench(BASELINE, **how, dtype=dtype)[0] for dtype in ("bfloat16", "float32"))
    assert half["memory_gb"] < whole["memory_gb"]
    assert half["largest_batch_size"] > whole["largest_batch_size"]


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


def test_bench_times_the_weights_that_it_names(monkeypatch):
    """What is timed as integers has packed layers, and a head has the dtype of its name."""
    monkeypatch.setattr(timing, "generate", lambda model, *args, **how: model)
    for packed, head in ((True, "float32"), (False, "bfloat16"), (True, "int8")):
        cfg = SimpleNamespace(**vars(settings()), packed=packed, head=head)
        prompt = torch.zeros(1, 4, dtype=torch.long)
        _, write = timing.writer(cfg, True, head, torch.device("cpu"), prompt, 4)
        model = write()
        assert any(type(layer).__name__ == "PackedLinear" for layer in model.modules()) == packed
        weight = model.head.rows if head == "int8" else model.head.weight
        assert weight.dtype == getattr(torch, head)


def test_bench_times_text_and_plans_from_what_it_timed():
    """--sample times text, --compare each of its peers, and --plan without a speed uses the step that it
    timed."""
    found, *_ = bench(**TINY, max_steps=10, sample=True)
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


@pytest.mark.parametrize(
    "values, says",
    [
        (dict(plan=True, steps="many"), "steps = 'many' is not numbers"),
        (dict(plan=True, steps="0,5"), "must each be from 1"),
        (dict(plan=True, steps=1e12), "must each be from 1 to 1,000,000,000"),
        (dict(budget_hours=3), "--budget_hours only applies together with --plan"),
        (dict(peers="x"), "--peers only applies together with --compare"),
        (dict(compare=True, vocab_size=60000), "has 50304 tokens"),
        (dict(plan=True, watts=-1), "watts = -1.0 must be at least 0"),
        (dict(plan=True, watts=100), "--watts only applies together with --price_per_kwh"),
        (dict(plan=True, step_ms=5, calibrate="nowhere"), "calibrate = 'nowhere' is not a finished run"),
        (dict(compare=True, peers="nowhere"), "nowhere/nanoGPT/model.py does not exist"),
        (dict(sample=True, head="float16"), "choose one of float32, bfloat16"),
        (dict(sample=True, plan=True), "--plan and --sample exclude each other"),
        (dict(vocab_size=0, data_dir="nowhere"), "set --vocab_size="),
    ],
)
def test_wrong_flags_are_refused(values, says):
    """A flag with a wrong value, or without the flag it belongs to, exits with 2 and names the remedy."""
    _, _, err = bench(**TINY | dict(max_steps=10) | values, code=2)
    assert says in err


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


def test_steps_that_are_timed_together_are_averaged(monkeypatch):
    """The time of short steps, which a CUDA device is given together, is their mean."""
    steps = []
    monkeypatch.setattr(timing, "now", lambda device: float(len(steps)))
    contestant = SimpleNamespace(device=None, steps_together=10, ms=[], step=lambda: steps.append(None))
    timing.Contestant.time_steps(contestant)
    assert len(steps) == 10
    assert contestant.ms == [1000.0]  # of a step
