"""What only a CUDA device can show; skipped without one."""

import pytest
import torch
from conftest import TINY, final, rows, settings, train

import model
import quant
from nanobit import experts, generate, kernels, machine
from nanobit.infer import packed
from nanobit.kept_codes import keep_codes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MIXTURE = dict(n_expert=4, ternary=False, optimizer="muon", total_batch_size=128)
RUNS = {
    "ternary": dict(dtype="bfloat16", dropout=0.1),
    "compiled": dict(dtype="bfloat16", compile=True, dropout=0.1),
    "float16": dict(dtype="float16", ternary=False, dropout=0.1, patience=3),
    "mixture": dict(dtype="bfloat16") | MIXTURE,
    "compiled mixture": dict(dtype="bfloat16", compile=True) | MIXTURE,
    "ternary mixture": dict(dtype="float32") | MIXTURE | dict(ternary=True),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumes_bit_for_bit(data_dir, out_dir, name):
    """A resumed run repeats the unbroken one bit for bit. Guards against what a CPU does not notice: a tensor
    left on it, an operation without a deterministic form, random numbers of the device that nobody seeds."""
    changes = RUNS[name] | dict(device="cuda", keep_last=0)
    train(data_dir, out_dir, "whole", **changes)
    train(data_dir, out_dir, "resumed", resume=f"{out_dir}/whole/checkpoints/step_000015", **changes)
    for left, right in zip(*(final(f"{out_dir}/{run_id}") for run_id in ("whole", "resumed"))):
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    after = [row for row in rows(f"{out_dir}/whole") if row["step"] > 15]
    assert after == [row for row in rows(f"{out_dir}/resumed") if row["step"] > 15]
    assert after[-1]["val_loss"] == pytest.approx(3.33, abs=0.3)  # ln 28: the ids are random


@pytest.mark.parametrize("name", ["ternary", "compiled", "float16"])
def test_graphs_change_no_bit(data_dir, out_dir, name):
    """A run whose micro-steps are replayed as CUDA graphs is the run that starts each kernel, with dropout
    and with gradients that are added over two micro-steps."""
    changes = RUNS[name] | dict(device="cuda", total_batch_size=128)
    for cuda_graph in (True, False):
        out, _ = train(data_dir, out_dir, f"graph_{cuda_graph}", cuda_graph=cuda_graph, **changes)
        assert ("micro-steps as CUDA graphs" in out) == cuda_graph
    for left, right in zip(*(final(f"{out_dir}/graph_{cuda_graph}") for cuda_graph in (True, False))):
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    assert rows(f"{out_dir}/graph_True") == rows(f"{out_dir}/graph_False")


def test_compiled_codes_and_scales_are_eager_ones():
    """Compiled code rounds weights and activations as eager code does. Guards against divisions that are
    approximate when compiled for CUDA."""
    write = torch.compile(quant.ternarize, dynamic=False)
    read = torch.compile(quant.quantize_activations, dynamic=False)
    torch.manual_seed(0)
    for _ in range(30):
        w = 0.036 * torch.randn(3072, 768, device="cuda")
        for function, compiled in ((quant.ternarize, write), (quant.quantize_activations, read)):
            for left, right in zip(function(w), compiled(w)):
                assert torch.equal(left, right)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("has_experts", [False, True])
def test_kept_codes_and_scales_are_those_of_one_matrix(compiled, has_experts):
    """The codes and scales that are made for all layers together are those of ternarize. Guards against sums
    that are not in float64, and one scale for several experts."""
    layers = [quant.BitLinear(n, n + 8) for n in (8, 768, 2048)]
    layers[0].weight.data.zero_()
    if has_experts:
        layers.append(experts.BitExperts(3, 16, 8))
        torch.nn.init.normal_(layers[-1].weight)
    network = torch.nn.Sequential(*layers).cuda()
    dtype = torch.float16 if has_experts else torch.bfloat16
    keep_codes(network, compiled, dtype)
    for layer in network:
        codes, scale = quant.ternarize(layer.weight)
        assert torch.equal(layer.kept_codes.float(), codes)
        assert torch.equal(layer.kept_scale, scale)
        assert layer.kept_floats.dtype == dtype
        assert torch.equal(layer.kept_floats.float(), codes)


def test_one_grouped_product_is_the_loop(monkeypatch):
    """One grouped product gives the outputs and gradients of the loop, also for an expert without tokens."""
    cfg = settings(**TINY, n_expert=4, ternary=False)
    torch.manual_seed(0)
    layer = experts.Experts(cfg, torch.nn.Linear).cuda()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.2)
    layer.router.weight.data[3] = 0
    layer.router.weight.data[:3, 0] += 100  # with the first activation of each token, no token for the last
    x = torch.randn(4, 16, 32, device="cuda", dtype=torch.bfloat16)
    x[..., 0] = 5
    results = []
    for pays in (True, False):
        monkeypatch.setattr(experts, "grouped_mm_pays", lambda *a, pays=pays: pays)
        layer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            y, router = layer(x)
        (y.float().square().mean() + router.sum()).backward()
        results.append([y, router, *(p.grad for p in layer.parameters())])
        assert not router[-1]
        assert not layer.up_proj.weight.grad[3].any()
    for left, right in zip(*results):
        torch.testing.assert_close(left, right, rtol=0, atol=2e-2 * right.abs().max().item())


@pytest.mark.parametrize("shape", [(80, 48), (768, 256), (3072, 768)])
def test_the_triton_kernel_is_its_twin_in_torch(shape):
    """The kernel equals BitLinear. Guards against fused multiply-adds and approximate division."""
    torch.manual_seed(0)
    bit = quant.BitLinear(*shape).cuda()
    layer = packed.packed_linear(bit.weight)
    for _ in range(200):
        x = torch.randn(1, shape[0], device="cuda") * 10 ** torch.randn(1, 1, device="cuda")
        with torch.no_grad():
            assert torch.equal(layer(x), bit(x))
            assert torch.equal(layer(x.repeat(2, 1))[:1], bit(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8192, 768, 3072), (4096, 3072, 768), (17, 768, 384), (130, 200, 136)])
def test_the_fused_product_gives_the_bits_of_two_steps(monkeypatch, shape, dtype):
    """The int8 product with its scales in the epilogue equals the product that is divided afterwards."""
    machine.pick("cuda")
    if torch.cuda.get_device_capability() < kernels.FUSED_FROM:
        pytest.skip("needs an Ampere card")
    assert kernels.fused_matmul, "machine.pick has printed why"
    N, n_in, n_out = shape
    x_int, x_scale = quant.quantize_activations(3 * torch.randn(N, n_in, device="cuda"))
    codes, scale = quant.int8_codes(torch.randn(n_out, n_in, device="cuda"))
    fused = kernels.scaled_matmul(x_int, x_scale, codes, scale, dtype)
    monkeypatch.setattr(kernels, "fused_matmul", None)
    assert torch.equal(fused, kernels.scaled_matmul(x_int, x_scale, codes, scale, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replayed_token_is_an_eager_one(dtype):
    """A replayed graph gives the logits of eager calls, token by token, and text past the context."""
    torch.manual_seed(0)
    transformer = model.Transformer(settings(**TINY)).cuda().eval()
    packed.pack_layers(transformer)
    idx = torch.randint(28, (1, 16), device="cuda")
    with torch.inference_mode(), machine.autocast(idx.device, dtype):
        caches = [generate.StaticCache(16) for _ in range(2)]
        for cache in caches:
            transformer(idx[:, :4], cache=cache)
        step = generate.replayed(transformer, caches[0], idx[:, 4:5])
        for i in range(4, 16):
            right = transformer(idx[:, i : i + 1], cache=caches[1])
            caches[1].position += 1
            assert torch.equal(step(idx[:, i : i + 1]), right), i
        text = list(generate.generate(transformer, idx, 30, True, temperature=0.0))  # past the context
        assert len(text) == 30
        assert all(0 <= token.item() < 28 for token in text)
