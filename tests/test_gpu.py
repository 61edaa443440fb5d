"""What only a CUDA device can show; all of it is skipped without one."""

import pytest
import torch
from conftest import TINY, final, rows, settings, train

import model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MIXTURE = dict(n_expert=4, ternary=False, optimizer="muon", total_batch_size=128)
KINDS = {
    "ternary": dict(dtype="bfloat16", dropout=0.1),
    "compiled": dict(dtype="bfloat16", compile=True),
    "float16": dict(dtype="float16", ternary=False, dropout=0.1, patience=3),
    "mixture": dict(dtype="bfloat16") | MIXTURE,
    "compiled mixture": dict(dtype="bfloat16", compile=True) | MIXTURE,
    "ternary mixture": dict(dtype="float32") | MIXTURE | dict(ternary=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_bit_for_bit(data_dir, out_dir, kind):
    """bugs guarded: what a CPU does not notice: a tensor left on it, an operation without a deterministic
    form, a state of the device's random numbers that nobody seeds"""
    how = KINDS[kind] | dict(device="cuda", keep_last=0)
    train(data_dir, out_dir, "whole", **how)
    train(data_dir, out_dir, "resumed", resume=f"{out_dir}/whole/checkpoints/step_000015", **how)
    for left, right in zip(*(final(f"{out_dir}/{name}") for name in ("whole", "resumed"))):
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    after = [row for row in rows(f"{out_dir}/whole") if row["step"] > 15]
    assert after == [row for row in rows(f"{out_dir}/resumed") if row["step"] > 15]
    assert after[-1]["val_loss"] == pytest.approx(3.33, abs=0.3)  # ln 28: the ids are random


def test_one_grouped_product_is_the_loop(monkeypatch):
    """bug guarded: rows given to the wrong expert by their ends"""
    cfg = settings(**TINY, n_expert=4, ternary=False)
    torch.manual_seed(0)
    experts = model.Experts(cfg, torch.nn.Linear).cuda()
    for p in experts.parameters():
        torch.nn.init.normal_(p, std=0.2)
    experts.router.weight.data[3] = 0
    experts.router.weight.data[:3, 0] += 100  # with the first activation of each token, no token for the last
    x = torch.randn(4, 16, 32, device="cuda", dtype=torch.bfloat16)
    x[..., 0] = 5
    found = []
    for pays in (True, False):
        monkeypatch.setattr(model, "grouped_mm_pays", lambda *a, pays=pays: pays)
        experts.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            y, router = experts(x)
        (y.float().square().mean() + router.sum()).backward()
        found.append([y, router, *(p.grad for p in experts.parameters())])
        assert not router[-1] and not experts.up_proj.weight.grad[3].any()
    for left, right in zip(*found):
        torch.testing.assert_close(left, right, rtol=0, atol=2e-2 * right.abs().max().item())
