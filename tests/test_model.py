"""model.py against a plain float transformer written here."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import settings

from model import Transformer
from nanobit.generate import generate
from nanobit.infer.restore import restore


def make(seed=0, **changes):
    torch.manual_seed(seed)
    return Transformer(settings(**changes)).eval()


def plain_llama(p, idx, cfg):
    """Return the logits of a float Llama from its state dict, with explicit loops over heads and a
    written-out softmax."""

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
    """The float twin computes what a Llama computes. Guards against interleaved rotation, heads shared in the
    wrong order, a norm after instead of before, and eps outside."""
    model = make(ternary=False, **changes)
    idx = torch.randint(0, 28, (16,))
    with torch.no_grad():
        want = plain_llama(model.state_dict(), idx, model.cfg)
        torch.testing.assert_close(model(idx[None])[0], want, rtol=1e-4, atol=1e-5)


def test_baseline_has_exactly_its_parameters():
    """The baseline has the parameters that its name promises: a norm more would be 95,410,944."""
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
    """The first loss is near ln(V): with an N(0, 1) tied embedding it would be in the hundreds."""
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
    """A changed token changes no logits before it, and those from it on."""
    model = make()
    a = torch.randint(0, 28, (1, 16))
    b = a.clone()
    b[0, 9:] = (b[0, 9:] + 1) % 28
    with torch.no_grad():
        assert torch.equal(model(a)[:, :9], model(b)[:, :9])
        assert not torch.equal(model(a)[:, 9], model(b)[:, 9])


def test_dropout_is_everywhere_and_only_in_training():
    """The dropout setting reaches embedding, attention, and both outputs of every block, and only when
    training."""
    model = make(dropout=0.5).train()
    dropouts = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert len(dropouts) == 1 + model.cfg.n_layer
    assert all(m.p == 0.5 for m in dropouts)
    assert all(block.attn.dropout == 0.5 for block in model.blocks)
    idx = torch.randint(0, 28, (1, 16))
    uses = []
    for module in dropouts:
        module.register_forward_hook(lambda module, *_: uses.append(module))
    with torch.no_grad():
        model(idx)
        assert uses == [model.dropout, *(b.dropout for b in model.blocks for _ in range(2))]
        for module in dropouts:  # what is left is the attention's own
            module.p = 0.0
        assert not torch.equal(model(idx), model(idx))
        assert torch.equal(model.eval()(idx), model(idx))


def test_the_residual_stream_starts_small():
    """Initial weights keep the size of outputs at every width, and that of the residual stream at every
    depth."""
    model = make(n_layer=8, n_embd=64, ffn_dim=128)
    std = {
        name: p.std().item() for name, p in model.named_parameters() if "blocks.3" in name and "proj" in name
    }
    assert std["blocks.3.ffn.up_proj.weight"] == pytest.approx(64**-0.5, rel=0.1)
    assert std["blocks.3.ffn.down_proj.weight"] == pytest.approx((128 * 16) ** -0.5, rel=0.1)
    assert std["blocks.3.attn.o_proj.weight"] == pytest.approx((64 * 16) ** -0.5, rel=0.1)


def test_positions_count_from_0():
    """The first token is not rotated, as in transformers."""
    assert torch.equal(make(n_embd=64).cos[0], torch.ones(32))


def test_forward_under_autocast_has_fp32_norms_and_logits():
    """Under autocast norms, logits and loss are computed in fp32."""
    model = make(n_embd=64)
    x = torch.randn(2, 5, 64).bfloat16()
    norm = model.norm
    with torch.no_grad():
        want = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + norm.eps)
        assert torch.equal(norm(x), norm.weight * want.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            idx = torch.randint(0, 28, (2, 16))
            assert model(idx).dtype == model(idx, idx)[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_rounds_before_it_multiplies(dtype):
    """The normalized x is rounded to the dtype of x before it meets the weights, as in transformers."""
    norm = make(n_embd=64).norm.to(dtype)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = torch.randn(2, 5, 64).bfloat16()
    want = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + norm.eps)
    y = norm(x)
    assert y.dtype == dtype
    assert torch.equal(y, norm.weight * want.bfloat16())


@pytest.mark.parametrize("changes", [{}, dict(ternary=False), dict(n_expert=4)])
def test_restore_gives_the_same_model(changes):
    """A restored model, packed or not, computes the logits and the text of the original. Guards against
    weights that a loose load leaves at their initial values."""
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


def test_padding_of_the_vocabulary_changes_nothing():
    """Rows of padding take no part in logits, loss or gradients."""
    torch.manual_seed(0)
    plain = Transformer(settings())
    padded = Transformer(settings(vocab_multiple=64))
    assert padded.embed.weight.shape[0] == 64
    assert padded.counts()["total"] - plain.counts()["total"] == 36 * 32
    state = plain.state_dict()
    for name in ("embed.weight", "head.weight"):
        state[name] = torch.cat((state[name], torch.full((36, 32), 7.0)))
    padded.load_state_dict(state)
    idx = torch.randint(0, 28, (2, 16))
    torch.testing.assert_close(padded(idx), plain(idx), rtol=0, atol=0)
    loss, _ = padded(idx, idx)
    loss.backward()
    torch.testing.assert_close(loss, plain(idx, idx)[0], rtol=0, atol=0)
    assert not padded.embed.weight.grad[28:].any()


def test_attention_on_a_cpu_is_in_float32(monkeypatch):
    """In bfloat16 training on a CPU attention computes in float32, which is several times faster."""
    attend = F.scaled_dot_product_attention
    dtypes = []

    def noted(*args, **options):
        y = attend(*args, **options)
        dtypes.extend(tensor.dtype for tensor in (*args, y))
        return y

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    with torch.autocast("cpu", torch.bfloat16):
        Transformer(settings(n_layer=1))(torch.zeros(1, 8, dtype=torch.long))
    assert dtypes == [torch.float32] * 4
