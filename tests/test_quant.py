"""quant.py against five-line references that are not its code."""

import pytest
import torch
from torch import nn

import quant
from nanobit import experts, kernels, metrics
from quant import BitLinear


def reference(x, w):
    """the forward of DESIGN in five lines, integer product in int64"""
    s = 1 / w.double().abs().mean().float().clamp(min=1e-5)
    t = (w * s).round().clamp(-1, 1)
    a = 127 / x.abs().max(-1, keepdim=True).values.clamp(min=1e-5)
    q = (x * a).round().clamp(-128, 127)
    return (q.long() @ t.long().T).float() / (s * a)


def layer(n_in=64, n_out=48, seed=0):
    torch.manual_seed(seed)
    return BitLinear(n_in, n_out)


@pytest.mark.parametrize("shape", [(5, 64), (1, 64), (2, 7, 64), (3, 1, 64)])
def test_forward_equals_the_reference_bit_for_bit(shape):
    """bugs guarded: scales applied before the product, sign form of b1, floor(x + 0.5), one scale for all
    tokens"""
    bit, x = layer(), torch.randn(shape) * 3
    assert torch.equal(bit(x), reference(x, bit.weight))


def test_forward_is_exact_under_autocast():
    """bug guarded: autocast turns the exact fp32 product into a bf16 one, which rounds sums above 256"""
    bit, x = layer(512, 64), torch.randn(9, 512)
    with torch.autocast("cpu", torch.bfloat16):
        y = bit(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, reference(x, bit.weight).bfloat16())


def test_extreme_inputs_are_finite():
    """bug guarded: division by a zero scale for an all-zero token or matrix"""
    bit = layer()
    x = torch.stack([torch.zeros(64), torch.full((64,), 1e30), torch.full((64,), 1e-30)])
    assert torch.equal(bit(x), reference(x, bit.weight)) and bit(x).isfinite().all()
    nn.init.zeros_(bit.weight)
    assert torch.equal(bit(x), torch.zeros(3, 48))
    # just under the clamp: max|x| = mean|W| = 5e-6 count as 1e-5
    assert quant.quantize_activations(torch.full((1, 4), 5e-6))[1].item() == pytest.approx(1.27e7)
    assert quant.weight_scale(torch.full((4, 4), 5e-6)).item() == pytest.approx(1e5)
    with pytest.raises(AssertionError, match="not exact"):
        kernels.exact_matmul(torch.ones(1, 140_000), torch.ones(1, 140_000))


def test_rounding_is_half_to_even():
    """bug guarded: kernels with floor(x + 0.5) make 0.5 a one"""
    w = torch.tensor([[0.5, 1.5, -0.5, -1.5]])  # mean|W| = 1
    assert quant.ternarize(w)[0].tolist() == [[0, 1, 0, -1]]
    q, _ = quant.quantize_activations(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5]]))
    assert q.tolist() == [[127, 0, 2, 2, 0]]


PRODUCTS = "oneDNN", "_int_mm", "fp32"  # how a CPU may compute the integer product


def set_product(monkeypatch, product):
    """make exact_matmul take this product, whatever the CPU has and whatever the sizes are"""
    if product == "oneDNN" and not kernels.HAS_INT8:
        pytest.skip("needs a CPU for which oneDNN has int8 products")
    monkeypatch.setattr(kernels, "HAS_VNNI", product == "_int_mm")
    monkeypatch.setattr(kernels, "int_matmul_pays", lambda *sizes: product != "fp32")


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("shape", [(33, 3072, 64), (7, 5, 3), (1, 768, 384), (0, 64, 48)])
def test_every_product_gives_the_same_bits(monkeypatch, shape, product):
    """bugs guarded: sums of 16 bits that saturate; an odd width; a machine that trains another model"""
    n, n_in, n_out = shape
    torch.manual_seed(0)
    q, t = torch.randint(-128, 128, (n, n_in)), torch.randint(-1, 2, (n_out, n_in))
    if n:
        q[0], q[-1], t[0], t[-1] = 127, -128, 1, -1
    set_product(monkeypatch, product)
    assert torch.equal(kernels.exact_matmul(q.float(), t.float()), (q @ t.T).float())


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_layer_uses_the_product_of_its_cpu(monkeypatch, product):
    """bug guarded: a rule that is asked, and a layer that multiplies floats all the same"""
    names = {"oneDNN": "nanobit::int8_matmul", "_int_mm": "aten::_int_mm"}
    set_product(monkeypatch, product)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer()(torch.randn(8, 64))
    calls = {event.key for event in profile.key_averages()} & set(names.values())
    assert calls == ({names[product]} if product in names else set())


def test_int8_is_used_where_it_pays(monkeypatch):
    """bug guarded: a rule that never, or for too few rows, takes the int8 product"""
    cpu, cuda, widths = torch.device("cpu"), torch.device("cuda"), (768, 3072)
    monkeypatch.setattr(kernels, "HAS_INT8", True)
    monkeypatch.setattr(kernels, "HAS_VNNI", False)  # AVX2: large products only
    assert kernels.int_matmul_pays(cpu, 1024, *widths) and kernels.int_matmul_pays(cpu, 512, 768, 384)
    assert not any(kernels.int_matmul_pays(cpu, rows, *widths) for rows in (1, 511))
    assert not kernels.int_matmul_pays(cpu, 768, 128, 512)
    monkeypatch.setattr(kernels, "HAS_INT8", False)  # ARM, or a CPU older than AVX
    assert not kernels.int_matmul_pays(cpu, 1024, *widths)
    monkeypatch.setattr(kernels, "HAS_VNNI", True)  # int8 units: also one row
    assert kernels.int_matmul_pays(cpu, 1, *widths)
    assert kernels.int_matmul_pays(cuda, 17, *widths) and not kernels.int_matmul_pays(cuda, 16, *widths)
    assert not kernels.int_matmul_pays(cuda, 17, 768, 3070)
    assert not kernels.int_matmul_pays(torch.device("mps"), 1024, *widths)


def test_scale_does_not_depend_on_threads():
    """bug guarded: a mean summed in fp32 changes with the number of threads, and with it the export"""
    w = torch.randn(512, 1024)
    scales, threads = [], torch.get_num_threads()
    for n in (1, 2, threads):
        torch.set_num_threads(n)
        scales.append(quant.weight_scale(w))
    assert torch.equal(*scales[:2])
    assert quant.weight_scale(torch.randn(3, 8, 4)).shape == (3, 1, 1), "one scale per expert matrix"


def test_gradients_are_straight_through():
    """bugs guarded: a clip mask on either side, a lost scale, gradients of the latent instead of the
    rounded values"""
    bit, x = layer(), (torch.randn(6, 64) * 5).requires_grad_()
    with torch.no_grad():
        bit.weight[0] *= 50  # far beyond the clip: still gets its gradient
    dy = torch.randn(6, 48)
    bit(x).backward(dy)
    w = bit.weight.detach()
    s, a = 1 / w.abs().mean(), 127 / x.detach().abs().amax(-1, keepdim=True)
    want_x = dy @ ((w * s).round().clamp(-1, 1) / s)
    want_w = dy.T @ ((x.detach() * a).round().clamp(-128, 127) / a)
    torch.testing.assert_close(x.grad, want_x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bit.weight.grad, want_w, rtol=1e-5, atol=1e-5)
    assert x.grad.abs().min() >= 0 and bit.weight.grad[0].abs().sum() > 0


def test_gradient_dtypes_under_autocast():
    """bug guarded: bf16 gradients on fp32 master weights, or an fp32 product in a bf16 backward"""
    bit, x = layer(), torch.randn(6, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = bit(x)
    y.float().sum().backward()
    assert bit.weight.grad.dtype == x.grad.dtype == torch.float32
    whole = torch.randn(6, 64).copy_(x.detach()).requires_grad_()
    other = layer()
    other(whole).sum().backward()
    torch.testing.assert_close(bit.weight.grad, other.weight.grad, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("product, autocast", [*((product, False) for product in PRODUCTS), ("fp32", True)])
def test_compiled_equals_eager(monkeypatch, product, autocast):
    """bugs guarded: a graph break, a compiler that contracts the rounding, a gradient that compiling cuts
    off"""
    set_product(monkeypatch, product)
    torch._dynamo.reset()
    bit, x = layer(), torch.randn(4, 64, requires_grad=True)

    def forward_and_gradients(layer):
        x.grad = bit.weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x)
        y.float().sum().backward()
        return y, x.grad, bit.weight.grad

    y, *grads = forward_and_gradients(torch.compile(bit, fullgraph=True, dynamic=False))
    z, *want = forward_and_gradients(bit)
    assert torch.equal(y, z) and want[0].abs().sum() > 0
    bound = dict(rtol=2e-2, atol=2e-2) if autocast else {}
    torch.testing.assert_close(grads, want, **bound)


def test_a_bfloat16_model_is_quantised_in_float32():
    """bug guarded: scales rounded to bf16, so that another weight is rounded up"""
    bit, x = layer().bfloat16(), torch.randn(5, 64).bfloat16()
    y = bit(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, reference(x.float(), bit.weight.float()).bfloat16())


def test_is_a_drop_in_for_linear():
    """bug guarded: another state dict than nn.Linear's, so that a float model cannot be made ternary"""
    linear, bit = nn.Linear(64, 48, bias=False), layer()
    bit.load_state_dict(linear.state_dict())
    assert torch.equal(bit.weight, linear.weight)
    with pytest.raises(ValueError, match="no bias"):
        BitLinear(4, 4, bias=True)


def test_health_counts_what_is_there():
    """bugs guarded: fractions of the latent weights, flips counted against the first codes, probes that
    stay on"""
    from conftest import settings

    from model import Transformer

    torch.manual_seed(0)
    model = Transformer(settings(n_layer=1))
    idx = torch.randint(0, 28, (1, 16))
    record, before = metrics.health(model, None, idx)
    total = record["total"]
    assert total["flip_rate"] is None and abs(total["zero"] + total["plus"] + total["minus"] - 1) < 1e-5
    assert abs(total["zero"] - 0.31) < 0.03, "Gaussian weights have 31.0 % zeros"
    w = model.blocks[0].attn.q_proj.weight
    assert record["layers"]["blocks.0.attn.q_proj"]["scale"] == pytest.approx(w.abs().mean().item(), rel=1e-5)
    assert total["act_absmax"] > 0 and not any(
        layer._forward_pre_hooks for layer in experts.bit_layers(model).values()
    )
    scales = [record["layers"][name]["act_absmax"] for name in record["layers"]]
    assert total["act_absmax"] == max(scales) > min(scales)
    with torch.no_grad():
        w.copy_(torch.tensor([[3.0, 1.02, -0.98, 0.0]]).repeat(32, 8))  # mean 1.25: codes 1, 1, -1, 0
    row = metrics.health(model, None, idx)[0]["layers"]["blocks.0.attn.q_proj"]
    assert (row["plus"], row["minus"], row["zero"], row["near_threshold"]) == (0.5, 0.25, 0.25, 0)
    with torch.no_grad():
        w.copy_(torch.tensor([[2.0, 0.54, -0.46, 1.0]]).repeat(32, 8))  # mean 1: two within 0.05 of 0.5
    row = metrics.health(model, None, idx)[0]["layers"]["blocks.0.attn.q_proj"]
    assert (row["near_threshold"], row["plus"], row["zero"]) == (0.5, 0.75, 0.25)
    before = metrics.codes(model)
    with torch.no_grad():
        w.neg_()  # every code that is not zero flips
    record, after = metrics.health(model, before, idx)
    row = record["layers"]["blocks.0.attn.q_proj"]
    assert row["flip_rate"] == pytest.approx(1 - row["zero"], abs=1e-5)
    assert record["layers"]["blocks.0.attn.k_proj"]["flip_rate"] == 0
    assert total.keys() == set(metrics.HEALTH) and model.training


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_the_reference():
    bit, x = layer(512, 256).cuda(), torch.randn(64, 512).cuda()
    assert torch.equal(bit(x).cpu(), reference(x.cpu(), bit.weight.cpu()))
    assert torch.equal(bit(x[:1]).cpu(), reference(x[:1].cpu(), bit.weight.cpu()))
