"""nanobit/machine.py on a CUDA card that is declared, with its name, its capability and its faults."""

import contextlib
import os
import re
import sys
import sysconfig
from types import SimpleNamespace

import pytest
import torch
from conftest import settings
from torch._subclasses.fake_tensor import FakeTensorMode

import model
from nanobit import cards, experts, kernels, machine
from nanobit.bench import peers, timing

CUDA = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch):
    """Return a function that declares a CUDA card, as torch describes it."""

    monkeypatch.setattr(kernels, "HAS_CUDA_INT8", True)  # pick() sets both
    monkeypatch.setattr(kernels, "fused_matmul", None)

    monkeypatch.delenv("TORCHINDUCTOR_EMULATE_DIVISION_ROUNDING", raising=False)  # which pick may set

    def declare(name="NVIDIA GeForce RTX 3060", capability=(8, 6), has_int8=True):
        monkeypatch.setattr(kernels, "multiplies_int8", lambda device: has_int8)
        monkeypatch.setattr(kernels, "working_fused", lambda device: ("the fused kernel", ""))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_120", "compute_120"])
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: capability >= (8, 0))

    return declare


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA GeForce RTX 3060", 25.5),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 88.2),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 NVL", None),
    ],
)
def test_the_peak_is_that_of_the_whole_name(card, name, tflops):
    """The peak of a card is known by its whole name, in 16-bit floats only."""
    card(name)
    assert cards.peak_flops(CUDA, torch.bfloat16) == cards.peak_flops(CUDA, torch.float16)
    assert cards.peak_flops(CUDA, torch.bfloat16) == (tflops and tflops * 1e12)
    assert cards.peak_flops(CUDA, torch.float32) is None
    assert cards.peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_a_card_without_int8_products_uses_floats(card, capsys):
    """A card whose cuBLAS refuses int8 is reported once, and its ternary layers multiply floats."""
    for has_int8 in (True, False):
        card("NVIDIA GeForce GTX 1650", (7, 5), has_int8)
        assert machine.pick("auto") == CUDA
        assert kernels.int_matmul_pays(CUDA, 1024, 768, 768) == has_int8
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "GTX 1650 has no int8 products" in err


def refused(a, b):
    raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul")


@pytest.mark.parametrize(
    "capability, has_int8, has_compiler, is_fused",
    [((8, 0), True, True, True), ((7, 5), True, True, False), ((9, 0), False, True, False)]
    + [((8, 6), True, False, False)],
)
def test_the_fused_product_is_for_ampere_and_newer(
    card, monkeypatch, capability, has_int8, has_compiler, is_fused
):
    """Triton's int8 product is used on Ampere and newer, if Triton can compile and the card has int8."""
    card(capability=capability, has_int8=has_int8)
    monkeypatch.setattr(machine, "no_compiler", lambda device: {False: "no gcc", True: ""}[has_compiler])
    machine.pick("cuda")
    assert bool(kernels.fused_matmul) == is_fused


def test_a_fused_product_that_fails_is_reported_and_not_used(card, monkeypatch, capsys):
    """A card on which Triton fails, or computes other bits, uses cuBLAS, with a line that says why."""
    working = kernels.working_fused
    card()
    monkeypatch.setattr(machine, "no_compiler", lambda device: "")
    wrong = SimpleNamespace(scaled_int8_matmul=lambda q, codes, *_: torch.zeros(len(q), len(codes)))
    for module, says in ((None, "ModuleNotFoundError"), (wrong, "its product of 40 x 200 x 48 is wrong")):
        monkeypatch.setitem(sys.modules, "nanobit.kernels_cuda", module)
        monkeypatch.setattr(kernels, "working_fused", lambda device: working(torch.device("cpu")))
        machine.pick("cuda")
        assert kernels.fused_matmul is None
        assert says in capsys.readouterr().err


def test_compiled_code_divides_exactly_if_it_divides_by_the_scales(card, monkeypatch):
    """Without the fused product, which divides exactly, compiled code has to; with it, it need not."""
    card()
    monkeypatch.setattr(machine, "no_compiler", lambda device: "")
    for fused, value in (("the fused kernel", None), (None, "1")):
        monkeypatch.delenv("TORCHINDUCTOR_EMULATE_DIVISION_ROUNDING", raising=False)
        monkeypatch.setattr(kernels, "working_fused", lambda device, fused=fused: (fused, ""))
        machine.pick("cuda")
        assert os.environ.get("TORCHINDUCTOR_EMULATE_DIVISION_ROUNDING") == value


def test_the_products_of_a_forward_are_timed_and_the_choice_stays(monkeypatch, capsys):
    """bench.py prints the time of both int8 products, and leaves the one that was chosen."""
    monkeypatch.setattr(kernels, "fused_matmul", "the fused kernel")  # which only CUDA tensors reach
    timing.print_products(model.Transformer(settings(n_layer=1)), torch.device("cpu"), torch.float32, 4)
    line = r"int8 products of a forward, eager: [\d.]+ ms by Triton, [\d.]+ ms by cuBLAS"
    assert re.search(line, capsys.readouterr().out)
    assert kernels.fused_matmul == "the fused kernel"


@pytest.mark.parametrize(
    "product, works",
    [(torch._int_mm, True), (refused, False), (lambda a, b: torch._int_mm(a, b) + 1, False)],
    ids=["right", "refused", "wrong"],
)
def test_int8_products_are_tried(monkeypatch, product, works):
    """An int8 product that raises, or gives wrong sums, is not used."""
    monkeypatch.setattr(torch, "_int_mm", product)
    assert kernels.multiplies_int8(torch.device("cpu")) == works


@pytest.fixture
def nvidia_smi(monkeypatch, tmp_path):
    """Return a function that makes nvidia-smi print a text and end with an exit code."""

    def declare(text, code=0):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{text}'\nexit {code}\n")
        os.chmod(tmp_path / "nvidia-smi", 0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return declare


@pytest.mark.parametrize(
    "text, code, cuda, says",
    [
        (
            "GPU 0: NVIDIA RTX A6000 (UUID: x)",
            0,
            "13.0",
            "A6000, but torch 2.99 needs a driver for CUDA 13.0",
        ),
        ("GPU 0: NVIDIA RTX A6000 (UUID: x)", 0, None, "A6000, but torch 2.99 is built without CUDA"),
        ("NVIDIA-SMI has failed", 9, "13.0", "nvidia-smi fails: NVIDIA-SMI has failed"),
    ],
)
def test_a_card_that_torch_does_not_see_is_reported(monkeypatch, nvidia_smi, capsys, text, code, cuda, says):
    """A card that nvidia-smi knows and torch does not is one line with auto, and an error with cuda."""
    nvidia_smi(text, code)
    monkeypatch.setattr(torch, "__version__", "2.99")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # by the driver's own library
    assert machine.pick("auto").type == "cpu"
    assert machine.pick("cpu").type == "cpu"
    err = capsys.readouterr().err
    assert err.startswith("warning: computing on cpu: ")
    assert says in err
    assert err.count("\n") == 1
    with pytest.raises(SystemExit):
        machine.pick("cuda")
    assert says in (err := capsys.readouterr().err)
    assert err.startswith("error: device = 'cuda' cannot be used: ")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.pick("auto").type == "cpu"
    assert not capsys.readouterr().err, "the card is hidden on purpose"


def test_nvidia_smi_that_hangs_is_reported(monkeypatch, nvidia_smi, capsys):
    """A driver that does not answer costs seconds and a line, not the command."""
    nvidia_smi("")
    run = cards.subprocess.run
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def hang(*args, timeout, **options):
        return run(["sleep", "30"], timeout=timeout / 100)

    monkeypatch.setattr(cards.subprocess, "run", hang)
    assert machine.pick("auto").type == "cpu"
    assert "nvidia-smi does not answer" in capsys.readouterr().err


def test_a_card_without_code_in_torch_is_reported(card, capsys):
    """A card older than all code in torch is not used; newer and AMD's cards are."""
    card("NVIDIA GeForce GTX 1080", (6, 1))
    assert machine.pick("auto").type == "cpu"
    assert "no code for NVIDIA GeForce GTX 1080, compute capability 6.1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        machine.pick("cuda:0")
    assert "error: device = 'cuda:0' cannot be used: torch" in capsys.readouterr().err
    card("NVIDIA GeForce RTX 5090", (12, 0))
    assert machine.pick("auto") == CUDA
    card("AMD Radeon RX 7900", (11, 0))
    torch.cuda.get_arch_list = lambda: ["gfx1100"]  # monkeypatch restores it
    assert machine.pick("auto") == CUDA


@pytest.mark.parametrize(
    "programs, cc, has_header, says",
    [
        (["gcc"], None, True, ""),
        (["clang"], None, True, ""),
        (["cc"], None, True, "needs a C compiler (gcc or clang)"),
        (["gcc"], "icx", True, "needs a C compiler (icx)"),
        (["icx"], "icx", True, ""),
        (["gcc"], None, False, "/python9/Python.h on CUDA, for Triton; install python3-dev"),
    ],
)
def test_triton_needs_a_compiler_and_the_header_of_python(
    monkeypatch, tmp_path, programs, cc, has_header, says
):
    """What Triton needs on CUDA is looked for: a traceback at the first step would be the alternative."""
    monkeypatch.setattr(machine, "has_triton", lambda: True)
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: f"{tmp_path}/python9")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if cc:
        monkeypatch.setenv("CC", cc)
    for program in programs:
        (tmp_path / program).write_text("#!/bin/sh\n")
        os.chmod(tmp_path / program, 0o755)
    if has_header:
        (tmp_path / "python9").mkdir()
        (tmp_path / "python9" / "Python.h").touch()
    reason = machine.no_compiler(CUDA)
    assert says in reason
    assert bool(says) == bool(reason)


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
@pytest.mark.parametrize("changes", [dict(n_expert=4), dict(fsdp=True), dict(dtype="float32"), {}])
def test_a_run_uses_the_float16_units_of_a_card(card, capsys, capability, changes):
    """auto is float16 in training on Volta and Turing, except if its gradient scaler would not work."""
    card("Tesla T4", capability)
    cfg = SimpleNamespace(**dict(dtype="auto", n_expert=0, fsdp=False) | changes)
    assert machine.training_dtype(cfg, CUDA) == (torch.float32 if changes else torch.float16)
    assert ("--dtype=float16 should be faster" in capsys.readouterr().err) == (
        "dtype" not in changes and bool(changes)
    )
    card()
    assert (
        machine.training_dtype(SimpleNamespace(dtype="auto", n_expert=0, fsdp=False), CUDA) == torch.bfloat16
    )


@pytest.mark.parametrize(
    "error, explained",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (MemoryError("Unable to allocate 195. GiB for an array"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (KeyError("out of memory"), False),
    ],
)
def test_every_lack_of_memory_is_explained(card, monkeypatch, capsys, error, explained):
    """A lack of memory is one line with the remedy, whichever library raises it."""
    card()
    monkeypatch.setattr(sys, "excepthook", None)  # restored afterwards
    cfg = SimpleNamespace(batch_size=8, total_batch_size=1024, dropout=0.0, n_expert=0, cuda_graph=True)
    machine.explain_out_of_memory(cfg, CUDA)
    sys.excepthook(type(error), error, None)
    err = capsys.readouterr().err
    assert (
        "\nerror: out of memory on NVIDIA GeForce RTX 3060 with batch_size = 8; halve it" in err
    ) == explained
    assert (type(error).__name__ in err) != explained
    assert ("--cuda_graph=False takes less" in err) == explained


def test_the_product_of_all_experts_is_for_hopper(card, monkeypatch):
    """Cards of AMD report Hopper's capability, and do not have its product for all experts."""
    with FakeTensorMode():
        x = torch.empty(8, 64, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(4, 64, 64, device="cuda")
    for capability, hip, pays in [((9, 0), None, True), ((9, 4), "7.0", False), ((12, 0), None, False)]:
        card("", capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        assert experts.grouped_mm_pays(x, weight) == pays


def test_the_twins_are_measured_with_the_memory_of_the_others(monkeypatch):
    """bench.py --compare gives the memory of its models back before a child measures each twin alone."""
    calls = []

    class Pool:
        def __init__(self, *args, **options):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def submit(self, *args):
            calls.append("a child")
            return SimpleNamespace(result=lambda: 1.0)

    monkeypatch.setattr(peers.timing, "training", lambda *args, **how: ({}, {"nanoGPT": 1.0}, {}))
    monkeypatch.setattr(peers.concurrent.futures, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
    peers.training(SimpleNamespace(ternary=True), CUDA, torch.bfloat16)
    assert calls == ["empty_cache", "a child", "a child"]


@pytest.mark.parametrize(
    "capability, dtype, has_flash",
    [
        ((8, 6), torch.bfloat16, True),
        ((8, 6), torch.float32, False),
        ((7, 5), torch.float16, False),
        ((12, 0), torch.float16, True),
    ],
)
def test_flash_attention_needs_16_bits_and_ampere(card, capability, dtype, has_flash):
    """Groups of heads are left to torch only if its attention of them does not store T x T weights."""
    card("", capability)
    with FakeTensorMode():
        q = torch.empty(3, 4, 16, 8, device="cuda")
    with machine.autocast(CUDA, dtype):
        assert model.has_flash_attention(q) == has_flash
    assert model.has_flash_attention(q.to(dtype)) == has_flash


def test_repeated_heads_are_groups_of_heads(monkeypatch):
    """Attention with repeated keys and values has the logits and gradients of groups of heads."""
    attention = torch.nn.functional.scaled_dot_product_attention
    grouped = []

    def spy(*args, enable_gqa, **options):
        grouped.append(enable_gqa)
        return attention(*args, enable_gqa=enable_gqa, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    results = []
    for has_flash in (True, False):
        monkeypatch.setattr(model, "has_flash_attention", lambda q, has_flash=has_flash: has_flash)
        torch.manual_seed(0)
        net = model.Transformer(settings(n_head=4, n_kv_head=2))
        idx = torch.randint(28, (3, 16))
        loss, _ = net(idx, idx)
        loss.backward()
        results.append([loss, *(p.grad for p in net.parameters())])
    for left, right in zip(*results):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
    assert grouped == [True, True, False, False]


def test_launches_and_busy_time_are_reported(monkeypatch, capsys):
    """bench.py counts what a step starts on a CUDA device, and how long it was busy, without annotations."""

    def event(kind, us, is_user_annotation=False):
        device_type = getattr(torch.autograd.DeviceType, kind)
        time_range = SimpleNamespace(elapsed_us=lambda: us)
        return SimpleNamespace(**locals())

    step = [event("CPU", 900), event("CUDA", 6000), event("CUDA", 2000), event("CUDA", 8000, True)]
    for events, says, facts in [
        (step, "2 kernels and copies a step, device busy 80%", dict(launches=2, device_busy=0.8)),
        ([], "launches: unknown", dict(launches=None, device_busy=None)),
    ]:
        result = contextlib.nullcontext(SimpleNamespace(events=lambda events=events: events))
        monkeypatch.setattr(torch.profiler, "profile", lambda activities, result=result: result)
        contestant = SimpleNamespace(device=CUDA, step=lambda: None)
        assert timing.device_use(contestant, 10.0) == facts
        assert says in capsys.readouterr().out
    assert timing.device_use(SimpleNamespace(device=torch.device("cpu")), 10.0) == {}
