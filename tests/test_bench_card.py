"""What bench.py measures for a CUDA card, without one: products, the memory of twins, launches of a step."""

import contextlib
import re
from types import SimpleNamespace

import torch
from conftest import settings

import model
from nanobit import kernels
from nanobit.bench import peers, timing

CUDA = torch.device("cuda", 0)


def test_the_products_of_a_forward_are_timed_and_the_choice_stays(monkeypatch, capsys):
    """bench.py prints the time of both int8 products, and leaves the one that was chosen."""
    monkeypatch.setattr(kernels, "fused_matmul", "the fused kernel")  # which only CUDA tensors reach
    timing.print_products(model.Transformer(settings(n_layer=1)), torch.device("cpu"), torch.float32, 4)
    line = r"int8 products of a forward, eager: [\d.]+ ms by Triton, [\d.]+ ms by cuBLAS"
    assert re.search(line, capsys.readouterr().out)
    assert kernels.fused_matmul == "the fused kernel"


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
