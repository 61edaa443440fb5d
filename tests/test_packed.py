"""packed.py: integer weights are the same function, in every way that they compute it."""

import inspect
import os

import pytest
import torch
import torch.nn.functional as F
from conftest import CHARS, run, settings, token_files
from test_sample import save
from torch import nn

import model as plain
import quant
from model import Transformer
from nanobit.generate import KVCache, StaticCache, generate
from nanobit.infer import packed
from nanobit.infer.restore import lighten_head, restore
from quant import BitLinear, ternarize


def test_pack_has_the_layout_of_transformers():
    """bug guarded: packing along the inputs or neighbouring rows, which loads as garbage"""
    t = torch.tensor(
        [[-1], [0], [1], [1], [0], [-1], [1], [0]], dtype=torch.int8
    )  # R = 2: rows 0 2 4 6 share a byte
    assert packed.pack(t).tolist() == [[0 | 2 << 2 | 1 << 4 | 2 << 6], [1 | 2 << 2 | 0 << 4 | 1 << 6]]
    t = ternarize(torch.randn(128, 40))[0]
    assert packed.pack(t).shape == (32, 40) and packed.pack(t).dtype == torch.uint8
    assert torch.equal(packed.unpack(packed.pack(t)), t.to(torch.int8))
    with pytest.raises(ValueError, match="multiple of 4"):
        packed.pack(t[:6])


@pytest.fixture(params=["C", "int8"])
def how(request, monkeypatch, capfd):
    """with the C functions, and on a machine without a compiler"""
    packed.library.cache_clear()
    if request.param == "int8":
        monkeypatch.setattr(packed.shutil, "which", lambda name: None)
    elif not any(map(packed.shutil.which, packed.COMPILERS)):
        pytest.skip("needs a C compiler")
    assert bool(packed.library()) == (request.param == "C")
    assert ("no C compiler" in capfd.readouterr().err) == (request.param == "int8")
    yield request.param
    packed.library.cache_clear()


def test_widths_that_are_no_multiple_of_4(how):
    """bug guarded: rows of padding that are cut off and leave strided values, of which the next function
    rounds others"""
    for ffn_dim in (6, 7, 50):
        cfg = settings(n_embd=32, ffn_dim=ffn_dim)
        for seed in range(4):
            torch.manual_seed(seed)
            weights = Transformer(cfg).state_dict()
            part, x = dict(config=vars(cfg), model=weights), torch.randint(cfg.vocab_size, (4, cfg.seq_len))
            with torch.no_grad():
                assert torch.equal(restore(part, "cpu")(x), restore(part, "cpu", packed=True)(x))


@pytest.mark.parametrize("shape", [(80, 48), (17, 5), (768, 256), (300, 258)])
def test_integer_weights_give_the_same_bits(how, shape):
    """bugs guarded: rows of another order, a scale or a rounding of another order of operations, ties not to
    even, threads that share a sum; many rows, which are computed otherwise"""
    torch.manual_seed(0)
    bit = BitLinear(*shape)
    layer = packed.packed_linear(bit.weight)
    assert layer.packed.numel() == -(-shape[1] // 4) * shape[0]
    with torch.no_grad():
        for n_rows in (1, 3, packed.FEW, packed.FEW + 1):
            x = torch.randn(n_rows, shape[0]) * 10 ** torch.randn(n_rows, 1)
            x[0] = 0
            assert torch.equal(layer(x), bit(x))
            x[0] = torch.randint(-254, 255, (shape[0],)) / 2  # its largest is 127: halves are ties
            x[0, 0] = 127
            assert torch.equal(layer(x), bit(x))
            x = x.t().contiguous().t().view(n_rows, 1, -1)  # not contiguous
            assert torch.equal(layer(x), bit(x)) and layer(x).shape == (n_rows, 1, shape[1])
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(layer(x), bit(x)) and layer(x).dtype == torch.bfloat16
            x[0, 0, 0] = float("inf")
            assert layer(x)[0].isnan().all() and not layer(x)[1:].isnan().any()


SHAPE = dict(n_layer=2, n_embd=64, n_head=4, n_kv_head=2, ffn_dim=96, seq_len=32)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(n_kv_head=4, rope_theta=500.0, norm_eps=1e-2, tie_embeddings=False),
        dict(n_embd=36, n_head=6, n_kv_head=3, ffn_dim=50),  # 50 rows are no multiple of 4
        dict(n_expert=4),
    ],
)
def test_token_by_token(how, changes):
    """bugs guarded: a token that takes another way through a packed block and comes out otherwise: a norm
    without its weight, positions that turn the wrong way, keys that the cache does not get"""
    torch.manual_seed(1)
    model = Transformer(settings(**SHAPE | changes)).eval()
    for p in model.parameters():
        nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3)
    integers = restore(dict(config=vars(model.cfg), model=model.state_dict()), "cpu", packed=True)
    is_quick = isinstance(integers.blocks[0], packed.PackedBlock)
    assert is_quick == (how == "C" and not changes.keys() & {"ffn_dim", "n_expert"})
    assert not any(name.endswith("_proj.weight") for name in integers.state_dict())
    idx, caches = torch.randint(28, (1, 20)), (KVCache(32), KVCache(32))
    with torch.no_grad():
        for part in idx.split([7, *[1] * 12, 1], 1):
            logits = [m(part, cache=cache) for m, cache in zip((model, integers), caches)]
            assert torch.equal(*logits) and logits[0].std() > 0.1
        for left, right in zip(caches[0].k_cache.values(), caches[1].k_cache.values()):
            assert torch.equal(left[:, :, :20], right[:, :, :20])
        # one token without a cache, or with one of constant shapes
        assert torch.equal(*(m(idx[:, :1]) for m in (model, integers)))
        caches = StaticCache(32), StaticCache(32)
        for part in idx[:, :9].split([6, 1, 1, 1], 1):
            assert torch.equal(*(m(part, cache=cache) for m, cache in zip((model, integers), caches)))
            for cache in caches:
                cache.position += cache.length > 6
        # several texts, and bfloat16, take the usual way
        both = torch.randint(28, (2, 1))
        assert torch.equal(*(m(both, cache=KVCache(32)) for m in (model, integers)))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(*(m(idx[:, :1], cache=KVCache(32)) for m in (model, integers)))


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
    """24 tokens after a prompt of three"""
    generator = torch.Generator().manual_seed(3)
    return [token.item() for token in generate(model, torch.tensor([[1, 2, 3]]), 24, generator=generator)]


@pytest.mark.parametrize("name", HACKS)
def test_a_change_of_the_model_is_honoured(name, monkeypatch, capfd):
    """rule: whoever changes model.py or quant.py gets what they wrote, and is shown why it is slower"""
    for owner, attribute, value in HACKS[name]:
        monkeypatch.setattr(owner, attribute, value)
    torch.manual_seed(5)
    hacked = Transformer(settings(**SHAPE)).eval()
    for p in hacked.parameters():
        nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3)
    part = dict(config=vars(hacked.cfg), model=hacked.state_dict())
    assert written(restore(part, "cpu", packed=True)) == written(restore(part, "cpu")) == written(hacked)
    err = capfd.readouterr().err
    if packed.library() or name == "four_bits":  # without a C compiler no Block has a fast path
        assert err.count("does not compute what") == 1 and "slower" in err


def test_other_positions_reach_a_restored_model(monkeypatch):
    """rule: a restored model has the rotary angles of model.py, which no checkpoint holds"""
    monkeypatch.setattr(plain, "rope_tables", other_tables)
    torch.manual_seed(5)
    model = Transformer(settings(**SHAPE)).eval()
    part = dict(config=vars(model.cfg), model=model.state_dict())
    assert torch.equal(restore(part, "cpu").cos, model.cos)
    assert torch.equal(restore(part, "cpu").sin, model.sin)


@pytest.mark.parametrize("seq_len", [1, 2, 5, 19])
def test_the_fast_path_is_compared_in_any_context(seq_len, capfd):
    """rule: the comparison fits the context, leaves torch's random numbers as they are, and takes NaN on
    both sides for the same"""
    torch.manual_seed(5)
    model = Transformer(settings(**SHAPE | dict(seq_len=seq_len, vocab_size=3))).eval()
    nn.init.constant_(model.norm.weight, float("nan"))
    before = torch.get_rng_state()
    found = restore(dict(config=vars(model.cfg), model=model.state_dict()), "cpu", packed=True)
    assert type(found.blocks[0]) is (packed.PackedBlock if packed.library() else plain.Block)
    assert torch.equal(torch.get_rng_state(), before) and not capfd.readouterr().err


def test_sample_writes_with_a_changed_model(tmp_path):
    """rule: what sample.py writes does not depend on --packed, whatever a student did to model.py"""
    ckpt = save(tmp_path / "run", token_files.char_tokenizer(CHARS))
    flags = [ckpt, "--prompt=abc", "--max_new_tokens=30", "--device=cpu"]
    patch = (
        inspect.getsource(relu2) + "import model, torch.nn.functional as F\nmodel.FeedForward.forward = relu2"
    )
    text, err = run("sample.py", *flags, patch=patch)
    assert run("sample.py", *flags, "--packed=False", patch=patch)[0] == text
    assert ("PackedBlock (packed.py) does not compute what Block" in err) == bool(packed.library())


def test_a_packed_layer_stays(how):
    """bugs guarded: an address in C that is no longer the tensor's; an input of another width, which C would
    read beyond its end; weights that do not lie row by row; experts without a token"""
    bit = BitLinear(80, 48)
    bit.weight.data = bit.weight.data.t().contiguous().t()
    layer, x = packed.packed_linear(bit.weight), torch.randn(3, 80)
    with torch.no_grad():
        assert torch.equal(layer(x), bit(x)) and layer(x[:0]).shape == (0, 48)
    for move in (lambda: layer.to("meta"), layer.share_memory, layer.double):
        with pytest.raises(RuntimeError, match="stays on the device"):
            move()
    with pytest.raises(AssertionError):
        layer(torch.randn(1, 160))


@pytest.mark.parametrize("makes", ["junk", "nothing", "an error", "only without -fopenmp"])
def test_compilers_that_fail(makes, tmp_path, monkeypatch, capfd):
    """bug guarded: a traceback where the compiler is broken, or makes what this machine cannot load"""
    body = {
        "junk": "while [ $# -gt 0 ]; do [ $1 = -o ] && echo junk >$2; shift; done",
        "nothing": "exit 0",
        "an error": "printf '\\377 no\\n' >&2; exit 1",
        "only without -fopenmp": 'case "$*" in *fopenmp*) exit 1;; esac; exec gcc "$@"',
    }[makes]
    if "gcc" in body and not packed.shutil.which("gcc"):
        pytest.skip("needs gcc")
    (tmp_path / "cc").write_text(f"#!/bin/sh\n{body}\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(packed, "COMPILERS", ["cc"])
    packed.library.cache_clear()
    assert bool(packed.library()) == makes.startswith("only")
    assert ("slower" in capfd.readouterr().err) != makes.startswith("only")
    packed.library.cache_clear()


def test_the_ends_of_the_range(how):
    """bugs guarded: sums of 16 bits that overflow where all codes and inputs have one sign; the least scale
    of a token; a number that is none"""
    bit = BitLinear(5000, 4)
    for sign in (1, -1):
        nn.init.constant_(bit.weight, sign * 0.5)
        layer = packed.packed_linear(bit.weight)
        with torch.no_grad():
            for x in (torch.ones(1, 5000), -torch.ones(1, 5000), torch.full((1, 5000), 1e-7)):
                assert torch.equal(layer(x), bit(x))
            x[0, 7] = float("nan")
            assert layer(x).isnan().all()


def test_a_lighter_head_leaves_the_embedding():
    """bug guarded: a tied embedding that is rounded with the head"""
    model = Transformer(settings(**SHAPE)).eval()
    idx, embed = torch.randint(28, (1, 8)), model.embed.weight.clone()
    with torch.no_grad():
        before = model(idx)
        lighten_head(model)
        after = model(idx)
    assert torch.equal(model.embed.weight, embed) and after.dtype == torch.float32
    assert 0 < (after - before).abs().max() < 0.02 * before.abs().max()


def test_the_triton_kernel(monkeypatch):
    """bugs guarded: what its compiler does to a rounding cannot be seen here, but rows and codes that it
    mistakes can, where Triton is installed: it runs on the CPU then"""
    if torch.cuda.is_available():
        pytest.skip("test_gpu.py runs it on the device")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton", reason="needs triton")
    from nanobit.infer import packed_cuda

    for shape in ((80, 48), (100, 64), (768, 16)):
        bit = BitLinear(*shape)
        layer = packed.packed_linear(bit.weight)
        for x in (torch.randn(shape[0]), torch.zeros(shape[0]), torch.randint(-254, 255, shape[:1]) / 2):
            x[:1] = 127.0 * x.any()
            with torch.no_grad():
                assert torch.equal(packed_cuda.packed_linear(layer.packed, x, layer.matrix.scale), bit(x))
