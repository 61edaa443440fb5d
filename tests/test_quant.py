"""quant.py against five-line references that are not its code."""

import doctest

import pytest
import torch
from test_kernels import PRODUCTS, set_product
from torch import nn

import quant
from quant import BitLinear


def reference(x, w):
    """Return the forward of DESIGN in five lines, with the integer product in int64."""
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
    """The forward is the reference to the last bit. Guards against scales applied before the product, the
    sign form of b1, floor(x + 0.5), and one scale for all tokens."""
    bit, x = layer(), torch.randn(shape) * 3
    assert torch.equal(bit(x), reference(x, bit.weight))


def test_forward_is_exact_under_autocast():
    """Autocast changes the dtype of the result only: a bf16 product would round sums above 256."""
    bit, x = layer(512, 64), torch.randn(9, 512)
    with torch.autocast("cpu", torch.bfloat16):
        y = bit(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, reference(x, bit.weight).bfloat16())


def test_extreme_inputs_are_finite():
    """Zero, tiny and huge tokens, and an all-zero matrix, give finite results."""
    bit = layer()
    x = torch.stack([torch.zeros(64), torch.full((64,), 1e30), torch.full((64,), 1e-30)])
    assert torch.equal(bit(x), reference(x, bit.weight))
    assert bit(x).isfinite().all()
    nn.init.zeros_(bit.weight)
    assert torch.equal(bit(x), torch.zeros(3, 48))


def test_scales_are_clamped():
    """max|x| and mean|W| below 1e-5 count as 1e-5."""
    assert quant.quantize_activations(torch.full((1, 4), 5e-6))[1].item() == pytest.approx(1.27e7)
    assert quant.weight_scale(torch.full((4, 4), 5e-6)).item() == pytest.approx(1e5)


def test_rounding_is_half_to_even():
    """Halves are rounded to even: floor(x + 0.5) would make 0.5 a one."""
    w = torch.tensor([[0.5, 1.5, -0.5, -1.5]])  # mean|W| = 1
    assert quant.ternarize(w)[0].tolist() == [[0, 1, 0, -1]]
    q, _ = quant.quantize_activations(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5]]))
    assert q.tolist() == [[127, 0, 2, 2, 0]]


def test_scale_does_not_depend_on_threads():
    """The scale has the same bits for every number of threads, and with it the export."""
    w = torch.randn(512, 1024)
    scales = []
    threads = torch.get_num_threads()
    for n in (1, 2, threads):
        torch.set_num_threads(n)
        scales.append(quant.weight_scale(w))
    assert torch.equal(*scales[:2])


def test_each_expert_has_its_own_scale():
    """A stack of matrices (E, out, in) has one scale per matrix."""
    assert quant.weight_scale(torch.randn(3, 8, 4)).shape == (3, 1, 1)


def test_gradients_are_straight_through():
    """The gradients are those of the product of the rounded values, without a clip mask. Guards against a
    lost scale, and gradients at the master weights instead of the rounded ones."""
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
    assert bit.weight.grad[0].abs().sum() > 0


def test_the_gradients_are_those_of_the_usual_formulation():
    """The doctest of quant.py holds: backward equals that of x + (rounded(x) - x).detach()."""
    torch.manual_seed(0)
    failed, attempted = doctest.testmod(quant)
    assert failed == 0
    assert attempted > 5


def test_gradient_dtypes_under_autocast():
    """Under autocast, fp32 weights and inputs get fp32 gradients, close to those without it."""
    bit, x = layer(), torch.randn(6, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = bit(x)
    y.float().sum().backward()
    assert bit.weight.grad.dtype == x.grad.dtype == torch.float32
    whole = torch.randn(6, 64).copy_(x.detach()).requires_grad_()
    other = layer()
    other(whole).sum().backward()
    torch.testing.assert_close(bit.weight.grad, other.weight.grad, rtol=2e-2, atol=2e-2)


def test_the_gradient_of_the_input_is_a_product_with_the_codes():
    """Under bfloat16 autocast dx is the bf16 product of dy and the codes, divided by the scale in fp32: the
    codes are exact in bf16, codes / scale is not."""
    bit, x = layer(), torch.randn(6, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = bit(x)
    dy = torch.randn(6, 48).bfloat16()
    y.backward(dy)
    codes, scale = quant.ternarize(bit.weight)
    assert torch.equal(x.grad, (dy @ codes.bfloat16()).float() / scale)


@pytest.mark.parametrize("product, autocast", [*((product, False) for product in PRODUCTS), ("fp32", True)])
def test_compiled_equals_eager(monkeypatch, product, autocast):
    """BitLinear compiles without a graph break, and to the same bits. Guards against a compiler that
    contracts the rounding, and one that cuts the gradient off."""
    set_product(monkeypatch, product)
    torch._dynamo.reset()
    bit = layer()
    x = torch.randn(4, 64, requires_grad=True)

    def forward_and_gradients(layer):
        x.grad = bit.weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x)
        y.float().sum().backward()
        return y, x.grad, bit.weight.grad

    y, *grads = forward_and_gradients(torch.compile(bit, fullgraph=True, dynamic=False))
    z, *want = forward_and_gradients(bit)
    assert torch.equal(y, z)
    assert want[0].abs().sum() > 0
    bound = dict(rtol=2e-2, atol=2e-2) if autocast else {}
    torch.testing.assert_close(grads, want, **bound)


def test_a_bfloat16_model_is_quantized_in_float32():
    """A layer of bf16 weights computes its scales and codes in fp32."""
    bit, x = layer().bfloat16(), torch.randn(5, 64).bfloat16()
    y = bit(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, reference(x.float(), bit.weight.float()).bfloat16())


def test_eager_code_keeps_int8_for_the_backward():
    """An eager layer keeps codes and rounded inputs as int8: of floats, only the scales."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        layer()(torch.randn(9, 64))
    assert {tensor.dtype for tensor in kept if tensor.numel() > 9} == {torch.int8}


def test_is_a_drop_in_for_linear():
    """The state dict is that of nn.Linear, so a float model can be made ternary."""
    linear, bit = nn.Linear(64, 48, bias=False), layer()
    bit.load_state_dict(linear.state_dict())
    assert torch.equal(bit.weight, linear.weight)


def test_a_bias_is_refused():
    """BitLinear has no bias, and reports that if one is asked for."""
    with pytest.raises(ValueError, match="no bias"):
        BitLinear(4, 4, bias=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_the_reference():
    """On CUDA, many rows and a single one equal the reference to the last bit."""
    bit, x = layer(512, 256).cuda(), torch.randn(64, 512).cuda()
    assert torch.equal(bit(x).cpu(), reference(x.cpu(), bit.weight.cpu()))
    assert torch.equal(bit(x[:1]).cpu(), reference(x[:1].cpu(), bit.weight.cpu()))
