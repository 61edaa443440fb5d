"""nanobit/cuda_graph.py without a card: which gradients are replaced or added, and when graphs are used."""

from types import SimpleNamespace

import pytest
import torch
from conftest import settings

from nanobit import cuda_graph, kernels, machine

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def as_recorded(function, *inputs, pool=None):
    """Do what captured does, on the CPU: repeated, it writes the gradients where they were when it was
    recorded, and does not touch p.grad."""
    function(*inputs)
    parameters = getattr(function, "__self__", SimpleNamespace(parameters=[])).parameters
    grads = [p.grad for p in parameters]

    def replay(*inputs):
        before = [p.grad for p in parameters]
        outputs = function(*inputs)
        for p, grad, former in zip(parameters, grads, before):
            grad.copy_(p.grad)
            p.grad = former
        return outputs

    return replay


@pytest.mark.parametrize("n_micro_steps", [1, 3])
def test_replayed_gradients_are_those_of_the_update(monkeypatch, n_micro_steps):
    """The gradients of an update are the sum over its micro-steps, also in the second update: recording
    computes gradients too, and the optimizer drops them after each update."""
    monkeypatch.setattr(cuda_graph, "captured", as_recorded)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    w = torch.nn.Parameter(torch.ones(3))

    def micro_step(x):
        loss = (w * x).sum()
        loss.backward()
        return (loss.detach(),)

    steps = cuda_graph.MicroSteps(micro_step, [w], n_micro_steps, is_replayed=True)
    for update in range(2):
        for micro in range(n_micro_steps):
            (loss,) = steps(micro, torch.full((3,), 10.0**micro))
            assert loss == 3 * 10.0**micro
        assert w.grad.tolist() == [sum(10.0**micro for micro in range(n_micro_steps))] * 3, update
        w.grad = None


def test_a_recording_that_fails_names_the_remedy(monkeypatch):
    """An error while a graph is recorded ends the run, and names the flag that does without."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)

    def fails(*args, **how):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graph, "captured", fails)
    steps = cuda_graph.MicroSteps(print, [], 1, is_replayed=True)
    with pytest.raises(RuntimeError, match="not permitted") as caught:
        steps(0)
    assert "--cuda_graph=False" in caught.value.__notes__[0]


def test_without_graphs_a_micro_step_is_called():
    """MicroSteps that are not replayed call the function once for each micro-step."""
    calls = []
    steps = cuda_graph.MicroSteps(lambda x: calls.append(x), [], 2, is_replayed=False)
    steps(0, "a")
    steps(1, "b")
    assert calls == ["a", "b"]


def test_graphs_are_used_if_the_host_would_be_late(monkeypatch):
    """Graphs are for short micro-steps on one card, at most 10 ms at its peak: not on a CPU, on several
    ranks, nor for experts. A card whose peak is unknown counts as one of 100 TFLOP/s."""
    peak = 64e12
    monkeypatch.setattr(machine.cards, "peak_flops", lambda device, dtype: peak)

    def replays(device, flops_per_token, **changes):
        cfg = settings(**dict(batch_size=4, seq_len=16) | changes)
        return machine.replays_micro_steps(cfg, device, torch.bfloat16, flops_per_token)

    assert replays(CUDA, 0.99e10)
    assert not replays(CUDA, 1.01e10)
    assert not replays(CPU, 1)
    assert not replays(CUDA, 1, cuda_graph=False)
    assert not replays(CUDA, 1, n_expert=4, ternary=False)
    peak = None
    assert replays(CUDA, 1.5e10)
    assert not replays(CUDA, 1.6e10)
    monkeypatch.setattr(machine, "WORLD", 2)
    assert not replays(CUDA, 1)


def test_the_reciprocal_by_float64_is_the_one_of_float32():
    """1 / x in float64, rounded to float32, is 1 / x rounded once: how a card computes scales is exact."""
    torch.manual_seed(0)
    x = torch.rand(100_000) * 2.0 ** torch.randint(-16, 40, (100_000,))
    assert torch.equal((1.0 / x.double()).float(), kernels.reciprocal(x))
