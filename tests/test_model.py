"""model.py against a plain float transformer written here, and against itself with and without a cache."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import settings

from model import Transformer
from nanobit.generate import KVCache, generate, sample_token
from nanobit.infer.restore import restore
from nanobit.metrics import mean_loss


def make(seed=0, **changes):
    torch.manual_seed(seed)
    return Transformer(settings(**changes)).eval()


def plain_llama(p, idx, cfg):
    """logits of a float Llama from its state dict, with explicit loops over heads and a written-out
    softmax"""

    def norm(x, w):
        return x / (x.square().mean(-1, keepdim=True) + cfg.norm_eps).sqrt() * w

    def turn(x):  # (T, D)
        T, D = x.shape
        angle = torch.arange(T)[:, None] * cfg.rope_theta ** (-torch.arange(0, D, 2) / D)
        a, b = x[:, : D // 2], x[:, D // 2 :]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], 1)

    D, T = cfg.n_embd // cfg.n_head, len(idx)
    x = p["embed.weight"][idx]
    for n in range(cfg.n_layer):
        w = {
            key.removeprefix(f"blocks.{n}."): value
            for key, value in p.items()
            if key.startswith(f"blocks.{n}.")
        }
        h, heads = norm(x, w["attn_norm.weight"]), []
        for head in range(cfg.n_head):
            kv = head // (cfg.n_head // cfg.n_kv_head)
            q = turn(h @ w["attn.q_proj.weight"][head * D : head * D + D].T)
            k = turn(h @ w["attn.k_proj.weight"][kv * D : kv * D + D].T)
            v = h @ w["attn.v_proj.weight"][kv * D : kv * D + D].T
            score = (q @ k.T / math.sqrt(D)).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            heads.append(score.softmax(-1) @ v)
        x = x + torch.cat(heads, 1) @ w["attn.o_proj.weight"].T
        h = norm(x, w["ffn_norm.weight"])
        x = (
            x
            + (F.silu(h @ w["ffn.gate_proj.weight"].T) * (h @ w["ffn.up_proj.weight"].T))
            @ w["ffn.down_proj.weight"].T
        )
    return norm(x, p["norm.weight"]) @ p["head.weight"].T


@pytest.mark.parametrize(
    "changes", [{}, dict(n_head=4, n_kv_head=2), dict(tie_embeddings=False, rope_theta=500.0)]
)
def test_float_twin_is_a_plain_llama(changes):
    """bugs guarded: interleaved rotation, heads shared in the wrong order, norm after instead of before,
    eps outside"""
    model = make(ternary=False, **changes)
    idx = torch.randint(0, 28, (16,))
    with torch.no_grad():
        want = plain_llama(model.state_dict(), idx, model.cfg)
        torch.testing.assert_close(model(idx[None])[0], want, rtol=1e-4, atol=1e-5)


def test_baseline_has_exactly_its_parameters():
    """bug guarded: a norm too many (the peer that states 95,367,936 builds 95,410,944)"""
    import config

    with torch.device("meta"):
        model = Transformer(config.load(["config/train_baseline_95m.py"]))
    counts = model.counts()
    assert counts == dict(total=95_367_936, active=95_367_936, ternary=70_778_880, full_precision=24_589_056)
    assert sum(p.numel() for p in model.parameters()) == counts["total"]
    assert model.flops_per_token() == 6 * 95_367_936 + 12 * 8 * 768 * 256


@pytest.mark.parametrize("ternary", [True, False])
@pytest.mark.parametrize("config_file", ["train_simple", "train_arithmetic", "train_baseline_95m"])
def test_initial_loss_is_near_ln_vocab(config_file, ternary):
    """bug guarded: an N(0, 1) tied embedding starts in the hundreds"""
    import config

    layers = ["--n_layer=2"] if config_file.endswith("95m") else []
    cfg = config.load([f"config/{config_file}.py", f"--ternary={ternary}", *layers])
    torch.manual_seed(0)
    model = Transformer(cfg).eval()
    idx = torch.randint(0, cfg.vocab_size, (2, 65))
    with torch.no_grad():
        loss = model(idx[:, :-1], idx[:, 1:])[0].item()
    assert abs(loss - math.log(cfg.vocab_size)) < 0.3


def test_no_token_sees_the_future():
    """bug guarded: a mask that is off by one"""
    model = make()
    a = torch.randint(0, 28, (1, 16))
    b = a.clone()
    b[0, 9:] = (b[0, 9:] + 1) % 28
    with torch.no_grad():
        assert torch.equal(model(a)[:, :9], model(b)[:, :9])
        assert not torch.equal(model(a)[:, 9], model(b)[:, 9])


@pytest.mark.parametrize("ternary", [True, False])
def test_cache_gives_the_logits_of_the_full_forward(ternary):
    """bugs guarded: positions that restart at 0 after the prompt, a chunk whose mask forgets the past"""
    model = make(ternary=ternary)
    idx = torch.randint(0, 28, (3, 16))
    cache, steps = KVCache(16), []
    with torch.no_grad():
        full = model(idx)
        for start, end in ((0, 5), (5, 6), (6, 11), (11, 12), (12, 16)):
            steps.append((end, model(idx[:, start:end], cache=cache)[:, 0]))
    # a ternary model may differ by a flipped int8 rounding; a wrong position or mask moves logits by far more
    bound = 1e-5 if not ternary else 0.3 * full.std().item()
    assert max((full[:, end - 1] - logits).abs().max().item() for end, logits in steps) <= bound


def test_greedy_text_is_the_same_with_and_without_a_cache():
    """bug guarded: a cache that is read one token late"""
    model = make(ternary=False)
    idx = torch.randint(0, 28, (2, 3))
    cached = torch.cat(list(generate(model, idx, 10, temperature=0.0)), 1)
    for _ in range(10):
        with torch.no_grad():
            idx = torch.cat((idx, model(idx)[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(cached, idx[:, 3:])


def test_generation_goes_on_past_the_context():
    """bug guarded: an index error at token seq_len + 1, or for a prompt longer than the context"""
    model = make()
    for length in (1, 16, 40):
        new = torch.cat(
            list(generate(model, torch.zeros(1, length, dtype=torch.long), 40, temperature=0.0)), 1
        )
        assert new.shape == (1, 40) and 0 <= new.min() and new.max() < 28
    # where the context of 16 is full, its later half is read again
    model = make(ternary=False)
    prompt = torch.arange(16)[None]
    new = torch.cat(list(generate(model, prompt, 2, temperature=0.0)), 1)
    with torch.no_grad():
        text = torch.cat((prompt, model(prompt)[:, -1].argmax(-1, keepdim=True)), 1)
        assert new[0, 1] == model(text[:, -8:])[0, -1].argmax()


def test_sample_token_draws_from_the_right_set():
    """bugs guarded: top_p that drops the token which crosses it, top_k off by one, temperature 0 dividing
    by zero"""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(2000, 1)

    def draw(seed=0, **options):
        return sample_token(logits, generator=torch.Generator().manual_seed(seed), **options)

    def drawn(**options):
        return set(draw(**options).flatten().tolist())

    assert drawn(temperature=0) == {0}
    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_p=0.5) == {0} and drawn(top_p=0.6) == {0, 1} and drawn(top_p=0.9) == {0, 1, 2}
    assert drawn(top_k=100, top_p=1.0, temperature=2.0) == {0, 1, 2, 3}
    assert drawn(temperature=0.05) == {0}, "a low temperature is nearly greedy"
    logits = logits[:, [3, 0, 2, 1]]  # the most probable are not the first
    assert drawn(top_p=0.6) == {1, 3} and drawn(top_k=1) == {1}
    assert torch.equal(draw(seed=1), draw(seed=1))
    assert not torch.equal(draw(seed=1), draw(seed=2))


def test_dropout_is_everywhere_and_only_in_training():
    """bug guarded: a dropout setting that reaches only some of the layers"""
    model = make(dropout=0.5).train()
    found = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert len(found) == 1 + model.cfg.n_layer and all(m.p == 0.5 for m in found)
    assert all(block.attn.dropout == 0.5 for block in model.blocks)
    idx = torch.randint(0, 28, (1, 16))
    uses = []
    for module in found:
        module.register_forward_hook(lambda module, *_: uses.append(module))
    with torch.no_grad():
        model(idx)
        assert uses == [model.dropout, *(b.dropout for b in model.blocks for _ in range(2))]
        for module in found:  # what is left is the attention's own
            module.p = 0.0
        assert not torch.equal(model(idx), model(idx))
        assert torch.equal(model.eval()(idx), model(idx))


def test_the_residual_stream_starts_small():
    """bug guarded: initial weights that grow the residual stream with depth"""
    model = make(n_layer=8, n_embd=64, ffn_dim=128)
    std = {
        name: p.std().item() for name, p in model.named_parameters() if "blocks.3" in name and "proj" in name
    }
    assert std["blocks.3.ffn.up_proj.weight"] == pytest.approx(64**-0.5, rel=0.1)
    assert std["blocks.3.ffn.down_proj.weight"] == pytest.approx((128 * 16) ** -0.5, rel=0.1)
    assert std["blocks.3.attn.o_proj.weight"] == pytest.approx((64 * 16) ** -0.5, rel=0.1)
    assert torch.equal(model.cos[0], torch.ones(32)), "positions count from 0, as in transformers"


def test_forward_under_autocast_has_fp32_norms_and_logits():
    """bug guarded: logits, loss or norms computed in bf16"""
    model = make(n_embd=64)
    x = torch.randn(2, 5, 64).bfloat16()
    norm = model.norm
    with torch.no_grad():
        want = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + norm.eps)
        assert torch.equal(norm(x), norm.weight * want.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            idx = torch.randint(0, 28, (2, 16))
            assert model(idx).dtype == model(idx, idx)[0].dtype == torch.float32


def test_mean_loss_weighs_tokens_and_can_be_stopped():
    """bugs guarded: a mean over batches when the last is smaller, dropout while evaluating, a deaf
    evaluation"""
    model = make(dropout=0.5).train()
    batches = [(torch.randint(0, 28, (n, 16)), torch.randint(0, 28, (n, 16))) for n in (4, 1)]
    loss = mean_loss(model, batches)
    assert model.training
    model.eval()
    with torch.no_grad():
        want = (4 * model(*batches[0])[0].item() + model(*batches[1])[0].item()) / 5
    assert loss == pytest.approx(want, rel=1e-6)
    assert mean_loss(model, batches, stop=lambda: True) is None


@pytest.mark.parametrize("changes", [{}, dict(ternary=False), dict(n_expert=4)])
def test_restore_gives_the_same_model(changes):
    """bugs guarded: weights left at their initial values by a loose load; integer weights that are another
    function"""
    model = make(seed=3, **changes).eval()
    part = {"config": vars(model.cfg), "model": model.state_dict()}
    idx = torch.randint(0, 28, (1, 16))
    with torch.no_grad():
        assert torch.equal(restore(part, "cpu")(idx), model(idx))
        packed = restore(part, "cpu", packed=True)
        assert torch.equal(packed(idx), model(idx))
        texts = [
            [token.item() for token in generate(m, idx[:, :4], 8, temperature=0)] for m in (model, packed)
        ]
    assert texts[0] == texts[1]
    kept = "blocks.0.attn.q_proj.weight" in packed.state_dict()
    assert kept != model.cfg.ternary, "integers in place of the floats"
