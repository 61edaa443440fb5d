"""nanobit/infer/packed.py: integer weights are the same function, in every way that they compute it."""

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
from nanobit.infer.head import Int8Head, lighten_head
from nanobit.infer.restore import restore
from quant import BitLinear, ternarize


def test_pack_has_the_layout_of_transformers():
    """A byte holds codes + 1 of rows r, r + R, r + 2R, r + 3R, lowest bits first."""
    codes = torch.tensor([[-1], [0], [1], [1], [0], [-1], [1], [0]], dtype=torch.int8)  # R = 2
    assert packed.pack(codes).tolist() == [[0 | 2 << 2 | 1 << 4 | 2 << 6], [1 | 2 << 2 | 0 << 4 | 1 << 6]]


def test_unpack_is_the_inverse_of_pack():
    """Packed codes come back, from a quarter of their rows."""
    codes = ternarize(torch.randn(128, 40))[0]
    assert packed.pack(codes).shape == (32, 40)
    assert packed.pack(codes).dtype == torch.uint8
    assert torch.equal(packed.unpack(packed.pack(codes)), codes.to(torch.int8))


def test_rows_that_do_not_fill_a_byte_are_refused():
    """pack needs a multiple of 4 rows, and reports that."""
    with pytest.raises(ValueError, match="multiple of 4"):
        packed.pack(torch.zeros(6, 40))


@pytest.fixture(params=["C", "int8"])
def form(request, monkeypatch):
    """The form of computing: with the C functions, compiled once for all tests, or without a compiler."""
    if request.param == "int8":
        monkeypatch.setattr(packed, "library", lambda: None)
    elif not packed.library():
        pytest.skip("needs a C compiler")
    return request.param


def test_a_missing_compiler_is_reported(monkeypatch, capfd):
    """Without a C compiler, one line on stderr reports that everything is slower."""
    monkeypatch.setattr(packed.shutil, "which", lambda name: None)
    packed.library.cache_clear()
    assert packed.library() is None
    packed.library.cache_clear()
    err = capfd.readouterr().err
    assert "no C compiler" in err
    assert "slower" in err


def test_a_compiler_that_works_is_silent(capfd):
    """With a C compiler, packed.c is compiled without a line on stderr."""
    if not any(map(packed.shutil.which, packed.COMPILERS)):
        pytest.skip("needs a C compiler")
    packed.library.cache_clear()
    assert packed.library()
    assert not capfd.readouterr().err


@pytest.mark.parametrize("ffn_dim", [6, 7, 50])
def test_widths_that_are_not_multiples_of_4(form, ffn_dim):
    """Any width gives the logits of training. Guards against rows of padding that are cut off and leave
    strided values, of which the next function rounds others."""
    cfg = settings(n_embd=32, ffn_dim=ffn_dim)
    for seed in range(4):
        torch.manual_seed(seed)
        part = dict(config=vars(cfg), model=Transformer(cfg).state_dict())
        x = torch.randint(cfg.vocab_size, (4, cfg.seq_len))
        with torch.no_grad():
            assert torch.equal(restore(part, "cpu")(x), restore(part, "cpu", packed=True)(x))


@pytest.mark.parametrize("n_rows", [1, 3, packed.FEW, packed.FEW + 1])
@pytest.mark.parametrize("shape", [(80, 48), (17, 5), (768, 256), (300, 258)])
def test_integer_weights_give_the_same_bits(form, shape, n_rows):
    """A packed layer equals BitLinear to the last bit, for few rows and many, ties, strided inputs, autocast
    and infinity. Guards against rows, scales or roundings in another order, and sums that threads share."""
    torch.manual_seed(0)
    bit = BitLinear(*shape)
    layer = packed.packed_linear(bit.weight)
    assert layer.packed.numel() == -(-shape[1] // 4) * shape[0]
    x = torch.randn(n_rows, shape[0]) * 10 ** torch.randn(n_rows, 1)
    x[0] = 0
    with torch.no_grad():
        assert torch.equal(layer(x), bit(x))
        x[0] = torch.randint(-254, 255, (shape[0],)) / 2  # its largest is 127: halves are ties
        x[0, 0] = 127
        assert torch.equal(layer(x), bit(x))
        x = x.t().contiguous().t().view(n_rows, 1, -1)  # not contiguous
        assert torch.equal(layer(x), bit(x))
        assert layer(x).shape == (n_rows, 1, shape[1])
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), bit(x))
            assert layer(x).dtype == torch.bfloat16
        x[0, 0, 0] = float("inf")
        assert layer(x)[0].isnan().all()
        assert not layer(x)[1:].isnan().any()


SHAPE = dict(n_layer=2, n_embd=64, n_head=4, n_kv_head=2, ffn_dim=96, seq_len=32)


def random_model(**changes):
    """Return a model whose weights all matter, norms too."""
    model = Transformer(settings(**SHAPE | changes)).eval()
    for p in model.parameters():
        nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3)
    return model


def part_of(model):
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


def test_a_packed_layer_stays_on_its_device(form):
    """Moving a packed layer is an error: C would have an address that is no longer the tensor's."""
    layer = packed.packed_linear(torch.randn(48, 80))
    for move in (lambda: layer.to("meta"), layer.share_memory, layer.double):
        with pytest.raises(RuntimeError, match="stays on the device"):
            move()


def test_an_input_of_another_width_is_refused(form):
    """C would read beyond the end of the codes."""
    with pytest.raises(AssertionError):
        packed.packed_linear(torch.randn(48, 80))(torch.randn(1, 160))


@torch.no_grad()
def test_weights_that_do_not_lie_row_by_row(form):
    """Strided master weights are packed in the right order."""
    bit = BitLinear(80, 48)
    bit.weight.data = bit.weight.data.t().contiguous().t()
    x = torch.randn(3, 80)
    assert torch.equal(packed.packed_linear(bit.weight)(x), bit(x))


@torch.no_grad()
def test_no_rows_give_no_rows(form):
    """An expert without tokens returns an empty result."""
    assert packed.packed_linear(torch.randn(48, 80))(torch.randn(0, 80)).shape == (0, 48)


@pytest.mark.parametrize("makes", ["junk", "nothing", "an error", "only without -fopenmp"])
def test_compilers_that_fail(makes, tmp_path, monkeypatch, capfd):
    """A compiler that is broken, or whose library cannot be loaded, is one line, and int8 is used."""
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


def test_the_ends_of_the_range(form):
    """The largest sums, the least scale of a token, and NaN give what BitLinear gives. Guards against sums of
    16 bits that overflow if all codes and inputs have one sign."""
    bit = BitLinear(5000, 4)
    for sign in (1, -1):
        nn.init.constant_(bit.weight, sign * 0.5)
        layer = packed.packed_linear(bit.weight)
        with torch.no_grad():
            for x in (torch.ones(1, 5000), -torch.ones(1, 5000), torch.full((1, 5000), 1e-7)):
                assert torch.equal(layer(x), bit(x))
            x[0, 7] = float("nan")
            assert layer(x).isnan().all()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_lighter_head_leaves_the_embedding(form, dtype):
    """lighten_head rounds the head, and not the embedding that is tied to it."""
    model = Transformer(settings(**SHAPE)).eval()
    idx = torch.randint(28, (1, 8))
    embed = model.embed.weight.clone()
    with torch.no_grad():
        before = model(idx)
        lighten_head(model, dtype)
        after = model(idx)
    assert torch.equal(model.embed.weight, embed)
    assert after.dtype == torch.float32
    assert 0 < (after - before).abs().max() < 0.02 * before.abs().max()


@pytest.mark.parametrize("shape", [(768, 101), (31, 5), (70, 64)])
def test_the_int8_head_is_its_formula(form, shape):
    """Logits are integer sums by two scales, for one row and many, with the largest sums and autocast."""
    torch.manual_seed(0)
    weight = torch.randn(shape[::-1])
    weight[0] = weight[0].sign()
    x = torch.randn(2, 3, shape[0])
    x[0, 0] = weight[0]
    w_int, w_scale = quantize(weight)
    x_int, x_scale = quantize(x)
    expected = x_int @ w_int.t() / (w_scale.view(-1) * x_scale)  # whole numbers below 2^24: exact
    head = Int8Head(weight)
    assert torch.equal(head(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(x[:1, :1]), expected[:1, :1])
    assert (expected - x @ weight.t()).abs().max() < 0.02 * expected.std() * shape[0] ** 0.5


UNITS = {"avx2": ["-mavx2"], "avx_vnni": ["-mavxvnni"], "avx512_vnni": ["-mavx512vnni", "-mavx512vl"]}


def units_here():
    """Return the keys of UNITS that this CPU has and the compiler knows, as Linux names them."""
    try:
        words = set(open("/proc/cpuinfo").read().split())
    except OSError:
        return []
    return [name for name in UNITS if name in words]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """packed.c in portable C and for each of units_here."""
    if not packed.library():
        pytest.skip("needs a C compiler")
    compiler = next(filter(None, map(packed.shutil.which, packed.COMPILERS)))
    all_flags = [[], *(UNITS[name] for name in units_here())]
    return [packed.build(compiler, flags, tmp_path_factory.mktemp("units")) for flags in all_flags]


@pytest.mark.parametrize("n_rows", [1, 5])
@pytest.mark.parametrize("n_in", [31, 32, 1023, 1056, 3072])
def test_all_units_of_this_cpu_give_the_same_bits(libraries, n_rows, n_in, monkeypatch):
    """packed.c in portable C, with AVX2 and with VNNI computes the same, also with the largest sums."""
    torch.manual_seed(0)
    bit, weight = BitLinear(n_in, 12), torch.randn(12, n_in)
    nn.init.constant_(bit.weight[:4], 1.0)
    x = torch.cat([torch.ones(1, n_in), torch.randn(n_rows - 1, n_in)])
    weight[0] = -1
    results = []
    for library in libraries:
        monkeypatch.setattr(packed, "library", lambda library=library: library)
        with torch.no_grad():
            results.append((packed.packed_linear(bit.weight)(x), Int8Head(weight)(x)))
    for layer, head in results:
        assert torch.equal(layer, results[0][0])
        assert torch.equal(head, results[0][1])
