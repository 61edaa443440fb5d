"""CUDA graphs: the kernels of a function are recorded once, and then started together.

A step of a small model is hundreds of short kernels. To start one takes the host longer than the device needs
to run it, so that without a graph the device waits most of the time (docs/results.md)."""

import functools

import torch


@functools.cache
def side_stream():
    """Return the stream on which all graphs are recorded: cuBLAS keeps memory for each that it meets."""
    return torch.cuda.Stream()


def captured(function, *inputs, pool=None):
    """Return a function that computes function(*inputs) for other tensors of these shapes, by replaying one
    graph. Its outputs are the same tensors each time. What the function reads besides must stay where it is.

    function is called three times here: twice to compile and to allocate what stays, then to be recorded. The
    random numbers of the device are afterwards what they were. pool: memory that several graphs share, if one
    is replayed after another (torch.cuda.graph_pool_handle). Do not drop one graph while another lives: torch
    may free the memory of cuBLAS that they share (PyTorch's issue 193402)."""
    static = [tensor.clone() for tensor in inputs]
    random_state = torch.cuda.get_rng_state()
    side = side_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=side):
        outputs = function(*static)
    torch.cuda.set_rng_state(random_state)

    def replay(*inputs):
        for tensor, new in zip(static, inputs):
            tensor.copy_(new)
        graph.replay()
        return outputs

    return replay


class MicroSteps:
    """The micro-steps of an update. micro_step(*batch) adds gradients and returns tensors. If is_replayed, it
    becomes two graphs: the gradients of the first micro-step replace the former ones, those of the others are
    added."""

    def __init__(self, micro_step, parameters, n_micro_steps, is_replayed):
        self.micro_step = micro_step
        self.parameters = list(parameters)
        self.n_micro_steps = n_micro_steps
        self.is_replayed = is_replayed
        self.graphs = []

    def __call__(self, micro, *batch):
        """Do micro-step number `micro` of an update; the first call compiles, and records graphs."""
        if not self.is_replayed:
            return self.micro_step(*batch)
        if not self.graphs:
            try:
                self.capture(batch)
            except RuntimeError as error:
                error.add_note("if it is the recording that fails: --cuda_graph=False")
                raise
        if micro == 0:
            for p, grad in zip(self.parameters, self.grads):
                p.grad = grad  # the optimizer has dropped them
        return self.graphs[min(micro, 1)](*batch)

    def capture(self, batch):
        """Record the graphs."""
        pool = torch.cuda.graph_pool_handle()
        self.graphs.append(captured(self.first_micro_step, *batch, pool=pool))
        self.grads = [p.grad for p in self.parameters]
        if self.n_micro_steps > 1:
            self.graphs.append(captured(self.micro_step, *batch, pool=pool))

    def first_micro_step(self, *batch):
        """Compute the gradients anew."""
        for p in self.parameters:
            p.grad = None
        return self.micro_step(*batch)
