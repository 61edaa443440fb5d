"""PackedBlock of nanobit/infer/packed.py: single tokens of a packed model are those of the model, also after
model.py or quant.py has changed."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from conftest import CHARS, run, settings, token_files
from scripted_models import save
from torch import nn

import model as plain
import quant
from model import Transformer
from nanobit.generate import KVCache, StaticCache, generate
from nanobit.infer import packed
from nanobit.infer.restore import restore

SHAPE = dict(n_layer=2, n_embd=64, n_head=4, n_kv_head=2, ffn_dim=96, seq_len=32)


def random_model(**changes):
    """Return a model whose weights all matter, norms too."""
    model = Transformer(settings(**SHAPE | changes)).eval()
    for p in model.parameters():
        nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3)
    return model


def part_of(model):
    """Return what a checkpoint holds of a model."""
    return dict(config=vars(model.cfg), model=model.state_dict())


@pytest.fixture(
    params=[
        {},
        dict(n_kv_head=4, rope_theta=500.0, norm_eps=1e-2, tie_embeddings=False),
        dict(n_embd=36, n_head=6, n_kv_head=3, ffn_dim=50),  # 50 rows are not a multiple of 4
        dict(n_expert=4),
    ]
)
def pair(request, form):
    """A model of master weights, and the same one packed."""
    torch.manual_seed(1)
    model = random_model(**request.param)
    integers = restore(part_of(model), "cpu", packed=True)
    is_quick = isinstance(integers.blocks[0], packed.PackedBlock)
    assert is_quick == (form == "C" and not request.param.keys() & {"ffn_dim", "n_expert"})
    assert not any(name.endswith("_proj.weight") for name in integers.state_dict())
    return model, integers


@torch.no_grad()
def test_token_by_token(pair):
    """Single tokens after a prompt have the same logits, keys and values. Guards against a norm without its
    weight, positions that turn the wrong way, and keys that the cache does not get."""
    idx = torch.randint(28, (1, 20))
    caches = KVCache(32), KVCache(32)
    for part in idx.split([7, *[1] * 12, 1], 1):
        logits, packed_logits = (model(part, cache=cache) for model, cache in zip(pair, caches))
        assert torch.equal(logits, packed_logits)
        assert logits.std() > 0.1
    for name in ("k_cache", "v_cache"):
        for left, right in zip(*(getattr(cache, name).values() for cache in caches)):
            assert torch.equal(left[:, :, :20], right[:, :, :20])


@torch.no_grad()
def test_a_token_without_a_cache(pair):
    """A single token without a cache has the same logits."""
    idx = torch.randint(28, (1, 1))
    assert torch.equal(*(model(idx) for model in pair))


@torch.no_grad()
def test_a_token_with_a_static_cache(pair):
    """Single tokens with a cache of constant shapes have the same logits."""
    caches = StaticCache(32), StaticCache(32)
    for part in torch.randint(28, (1, 9)).split([6, 1, 1, 1], 1):
        assert torch.equal(*(model(part, cache=cache) for model, cache in zip(pair, caches)))
        for cache in caches:
            cache.position += cache.length > 6


@torch.no_grad()
def test_several_texts_and_bfloat16_take_the_usual_way(pair):
    """What the fast path does not cover has the same logits."""
    two_texts = torch.randint(28, (2, 1))
    assert torch.equal(*(model(two_texts, cache=KVCache(32)) for model in pair))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(*(model(two_texts[:1], cache=KVCache(32)) for model in pair))


@pytest.mark.parametrize("seq_len", [1, 2, 5, 19])
def test_the_fast_path_is_compared_in_any_context(seq_len, capfd):
    """The comparison fits the context, leaves torch's random numbers as they are, and takes NaN on both sides
    for the same."""
    torch.manual_seed(5)
    model = Transformer(settings(**SHAPE | dict(seq_len=seq_len, vocab_size=3))).eval()
    nn.init.constant_(model.norm.weight, float("nan"))
    before = torch.get_rng_state()
    restored = restore(part_of(model), "cpu", packed=True)
    assert type(restored.blocks[0]) is (packed.PackedBlock if packed.library() else plain.Block)
    assert torch.equal(torch.get_rng_state(), before)
    assert not capfd.readouterr().err


# changes of model.py and quant.py that a student tries first: {name: (owner, attribute, its new value)}

rotate, rope_tables, quantize = plain.rotate, plain.rope_tables, quant.quantize_activations
block_forward, block_init = plain.Block.forward, plain.Block.__init__


def relu2(self, x):
    return self.down_proj(F.relu(self.gate_proj(x)).square() * self.up_proj(x)), None


def qk_norm(x, cos, sin):
    return rotate(F.rms_norm(x, x.shape[-1:]), cos, sin)


def other_base(x, cos, sin):
    return rotate(x, cos**2 - sin**2, 2 * sin * cos)  # twice the angle


def other_tables(seq_len, head_dim, theta):
    return rope_tables(seq_len, head_dim, 7 * theta)


def inner_norm(self, x):
    y = F.silu(self.gate_proj(x)) * self.up_proj(x)
    return self.down_proj(F.rms_norm(y, y.shape[-1:])), None


def with_third_norm(self, cfg, Linear):
    block_init(self, cfg, Linear)
    self.out_norm = plain.RMSNorm(cfg.n_embd, cfg.norm_eps)


def without_an_attribute(self, cfg, Linear):
    block_init(self, cfg, Linear)
    self.attn.heads = self.attn.__dict__.pop("n_head")


def own_heads(self, x, cos, sin, cache=None):
    self.attn.n_head = self.attn.heads
    y = block_forward(self, x, cos, sin, cache)
    del self.attn.n_head
    return y


def four_bits(x):
    q, a = quantize(x)
    return (q / 16).round(), a / 16


HACKS = dict(
    relu2=[(plain.FeedForward, "forward", relu2)],
    qk_norm=[(plain, "rotate", qk_norm)],
    other_base=[(plain, "rotate", other_base)],
    inner_norm=[(plain.FeedForward, "forward", inner_norm)],
    third_norm=[(plain.Block, "__init__", with_third_norm)],
    renamed=[(plain.Block, "__init__", without_an_attribute), (plain.Block, "forward", own_heads)],
    four_bits=[(quant, "quantize_activations", four_bits)],
)


def written(model):
    """Return 24 tokens after a prompt of three."""
    generator = torch.Generator().manual_seed(3)
    return [token.item() for token in generate(model, torch.tensor([[1, 2, 3]]), 24, generator=generator)]


@pytest.mark.parametrize("name", HACKS)
def test_a_change_of_the_model_is_honoured(name, monkeypatch, capfd):
    """Whoever changes model.py or quant.py gets what they wrote, and one line says why it is slower."""
    for owner, attribute, value in HACKS[name]:
        monkeypatch.setattr(owner, attribute, value)
    torch.manual_seed(5)
    hacked = random_model()
    part = part_of(hacked)
    assert written(restore(part, "cpu", packed=True)) == written(restore(part, "cpu")) == written(hacked)
    err = capfd.readouterr().err
    if packed.library() or name == "four_bits":  # without a C compiler no Block has a fast path
        assert err.count("does not compute what") == 1
        assert "slower" in err


def test_other_positions_reach_a_restored_model(monkeypatch):
    """A restored model has the rotary angles of model.py, which no checkpoint holds."""
    monkeypatch.setattr(plain, "rope_tables", other_tables)
    torch.manual_seed(5)
    model = Transformer(settings(**SHAPE)).eval()
    assert torch.equal(restore(part_of(model), "cpu").cos, model.cos)
    assert torch.equal(restore(part_of(model), "cpu").sin, model.sin)


def test_sample_writes_with_a_changed_model(tmp_path):
    """What sample.py writes does not depend on --packed, whatever a student did to model.py."""
    ckpt = save(tmp_path / "run", token_files.char_tokenizer(CHARS))
    flags = [ckpt, "--prompt=abc", "--max_new_tokens=30", "--device=cpu"]
    patch = (
        inspect.getsource(relu2) + "import model, torch.nn.functional as F\nmodel.FeedForward.forward = relu2"
    )
    text, err = run("sample.py", *flags, patch=patch)
    assert run("sample.py", *flags, "--packed=False", patch=patch)[0] == text
    assert ("PackedBlock (packed.py) does not compute what Block" in err) == bool(packed.library())
