"""The processes of one run: one, or as many as torchrun started, each with its own device.

Every rank does the same things in the same order, on its own part of each batch; rank 0 alone writes. What
one rank knows and all must act on (a signal, a time limit, whether a save succeeded) is shared before any of
them acts, since a rank that leaves alone leaves the others waiting."""

import contextlib
import datetime
import os
import signal
import sys
import time
import warnings

import torch
import torch.distributed as dist

from nanobit.cli import LOCAL_RANK, RANK, WORLD

is_main = RANK == 0
control = None  # the group for flags and values, on which rank 0 may keep the others waiting


def start(device):
    """Meet the other ranks, if there are any."""
    global control
    if WORLD > 1:
        # numbers of the CPU go over gloo on every machine: sharing a flag does not wait for a GPU
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
        # to scan 200 GB of tokens, or to wait for the first of them, takes longer than any sum may
        control = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))


def stop():
    """Leave the other ranks."""
    global control
    if dist.is_initialized():
        dist.destroy_process_group()
        # This ends its threads: one that frees a tensor while Python ends would abort the process. DDP keeps
        # those of the other group, which have nothing to do by then
        control = None


def share(value):
    """Return rank 0's value (anything that can be pickled) on every rank."""
    box = [value]
    if WORLD > 1:
        dist.broadcast_object_list(box, group=control, device=torch.device("cpu"))
    return box[0]


def from_main(make, on_each_machine=False):
    """Return on every rank what make() returns on rank 0, after the first rank of each machine has called it
    too, if wanted. If it exits on one of them, all exit with its code."""
    value = None
    code = -1  # it did not exit
    if is_main or (on_each_machine and LOCAL_RANK == 0):
        try:
            value = make()
        except SystemExit as end:
            code = end.code or 0
    value = share(value)
    code = int(largest(code))
    if code >= 0:
        stop()
        raise SystemExit(code)
    return value


def largest(number):
    """Return the largest of the ranks' numbers, on every rank."""
    if WORLD == 1:
        return number
    box = torch.tensor(float(number), dtype=torch.float64)
    dist.all_reduce(box, dist.ReduceOp.MAX, group=control)
    return box.item()


def total(tensor):
    """Sum a tensor over the ranks in place, and return it."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


# signals: the flag is polled, so that nothing is left half done

received = 0  # the signal that this process got
received_at = 0.0  # when, by time.monotonic
interrupted = 0  # the signal that any rank got, when asked_to_stop was last called


def handle_signals(handler):
    """Set the handler of SIGINT, SIGTERM and, if the platform has it, SIGHUP (a closed terminal)."""
    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # set by nohup
        signal.signal(signal.SIGHUP, handler)


def leave_on_signal():
    """From now on, a signal ends the program with 128 + its number and removes what has only been begun. Of
    several ranks, which may wait for each other in C, it just ends each."""
    if WORLD == 1:
        handle_signals(lambda signum, frame: sys.exit(128 + signum))


def listen():
    """From now on, the first SIGINT, SIGTERM or SIGHUP sets the flag, and the second exits immediately. One
    of several ranks may get the same signal twice, from SLURM and from torchrun: only after five seconds does
    it count as the second."""
    handle_signals(on_signal)


def on_signal(signum, frame):
    """Handle a signal: see listen."""
    global received, received_at
    if received and WORLD > 1 and time.monotonic() < received_at + 5:
        return
    if received:  # a rename is one call, which this cannot cut in two
        write_stderr(b"\nstopped, nothing saved; --resume=auto continues from the last checkpoint\n")
        os._exit(128 + signum)
    received, received_at = signum, time.monotonic()
    write_stderr(b"\nsaving before exit; press Ctrl-C again to quit immediately\n")


def write_stderr(text):
    """Write bytes to stderr, from inside a signal handler, if it can be written: not to a closed terminal."""
    with contextlib.suppress(OSError):
        os.write(2, text)


def stops_alone():
    """Return whether a signal came and this process need not ask others: it may stop within a step."""
    return bool(received) and WORLD == 1


def asked_to_stop():
    """Return the signal that asked any rank to stop, or 0; every rank must ask."""
    global interrupted
    interrupted = int(largest(received or interrupted))
    return interrupted


# one model on many devices


def shard(model, device):
    """Give each rank its part of every parameter, and so of the optimizer's state; those of a block are put
    together while it computes (FSDP2)."""
    if WORLD == 1:
        print("fsdp is off: it needs several processes (torchrun)", file=sys.stderr)
        return
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(device.type, (WORLD,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def replicate(model, device, cfg, is_masked):
    """Return the model with its gradients averaged over the ranks, each of which has it whole (DDP), unless
    it is sharded. is_masked: whether its batches have loss masks."""
    if WORLD == 1 or any(hasattr(p, "placements") for p in model.parameters()):
        return model
    ids = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():
        # torch 2.13 warns of broadcast_buffers, and 2.11 does not know the name of its successor
        warnings.simplefilter("ignore", FutureWarning)
        model = torch.nn.parallel.DistributedDataParallel(
            model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    # after its first backward DDP packs the gradients in the order in which they came, which changes the last
    # bits of sums over three or more ranks. that backward is thrown away here: the first step after a resume
    # is then like any other
    rows = torch.zeros(cfg.batch_size, cfg.seq_len + 1, dtype=torch.long, device=device)
    batch = [rows[:, :-1], rows[:, 1:]]  # strided as Windows.tensor does, or it compiles twice
    if is_masked:
        batch = [rows[:, :-1], rows[:, 1:].clone(), torch.ones((), device=device)]
    model(*batch)[0].backward()
    model.zero_grad()
    return model


def sync_gradients(model, wanted):
    """Set whether the next backward averages the gradients over the ranks: only the last micro-step's must.
    Sharded ones always do, since otherwise they would have to be kept whole."""
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        model.require_backward_grad_sync = wanted


def local(tensor):
    """Return this rank's part of a tensor that may be sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(w):
    """Return a tensor, put together if FSDP has sharded it; every rank must ask."""
    return w.full_tensor() if hasattr(w, "full_tensor") else w


def as_sharded(tensor, like):
    """Return a whole tensor, the same on every rank, sharded as `like` is."""
    if not hasattr(like, "placements"):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    tensor = DTensor.from_local(tensor.to(like.device), like.device_mesh, [Replicate()], run_check=False)
    return tensor.redistribute(placements=like.placements)


def gather(state):
    """Return a state dict with its sharded tensors put together, on rank 0; every rank must ask."""
    if isinstance(state, dict):
        return {key: gather(value) for key, value in state.items()}
    if isinstance(state, list):
        return [gather(value) for value in state]
    if not hasattr(state, "full_tensor"):
        return state
    full = whole(state)  # on every rank, one at a time
    return full.cpu() if is_main else None


def load(model, optimizers, state, optimizer_states):
    """Give back what gather made of a model and of the state of its optimizers, if any, on any number of
    ranks. Rates, betas and the like stay those of the settings of now."""
    own = model.state_dict()
    model.load_state_dict({key: as_sharded(value, own.get(key)) for key, value in state.items()})
    for optimizer, saved in zip(optimizers, optimizer_states, strict=True):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for i, entry in saved["state"].items():
            for key, value in entry.items():
                if value.shape == params[i].shape:
                    entry[key] = as_sharded(value, params[i])
        optimizer.load_state_dict(optimizer.state_dict() | dict(state=saved["state"]))
