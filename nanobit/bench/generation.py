"""Time the generation of text, for bench.py."""

import time
from statistics import median

import torch

from nanobit import machine
from nanobit.bench import timing
from nanobit.generate import generate
from nanobit.infer.head import set_head
from nanobit.infer.packed import pack_layers
from nanobit.kept_codes import keep_codes


def writer(cfg, ternary, head, device, prompt, n_new):
    """Return (name, function that yields n_new greedy tokens after prompt (1, T)) of the experiment's model
    or its twin, with this head."""
    replays = machine.can_replay(cfg, device, cfg.n_expert)
    model = timing.build(cfg, ternary, device).eval()
    name = "ternary, master weights" if ternary else "float"
    if ternary and cfg.packed:
        name = "ternary"
        pack_layers(model)
    keep_codes(model)
    set_head(model, head)
    if head != "float32":
        name += f", {head} head"
    return name, lambda: generate(model, prompt, n_new, temperature=0.0, cuda_graph=replays)


@torch.inference_mode()
def sampling(cfg, device, dtype, peers=None):
    """Time and print reading half a context and writing at most 128 tokens; return what the JSON line needs.
    peers(cfg, device, prompt, n_new) returns {name: function that yields the tokens} to compare with."""
    prompt = torch.randint(cfg.vocab_size, (1, max(1, cfg.seq_len // 2)), device=device)
    n_new = max(2, min(128, cfg.seq_len - prompt.shape[1]))
    first, write = writer(cfg, cfg.ternary, cfg.head, device, prompt, n_new)
    everyone = {first: write}
    if peers:
        everyone |= peers(cfg, device, prompt, n_new)
    memory = machine.peak_memory_gb(device)
    prefill = {name: [] for name in everyone}
    decode = {name: [] for name in everyone}
    for i, (name, write) in timing.in_turn(list(everyone.items()), 1 + max(3, cfg.pairs // 2), "texts"):
        with machine.autocast(device, dtype):
            clock = [time.perf_counter(), *(timing.now(device) for _ in write())]
        if i:  # the first round warms up
            prefill[name].append(prompt.shape[1] / (clock[1] - clock[0]))
            second = min(2, n_new - 1)  # for which a CUDA graph is recorded
            decode[name].append((n_new - second) / (clock[-1] - clock[second]))
    width = max(map(len, everyone))
    tokens_per_sec = {name: median(speeds) for name, speeds in decode.items()}
    for name, speeds in decode.items():
        line = f"{name:{width}}  prefill of {prompt.shape[1]} tokens {median(prefill[name]):9,.1f}, "
        line += f"decode {tokens_per_sec[name]:7,.1f} ({min(speeds):,.1f} to {max(speeds):,.1f}) tokens/s"
        if name != first:
            ratio, (low, high) = timing.compared(speeds, decode[first])
            line += f", {ratio:.2f} of {first} ({low:.2f} to {high:.2f})"
        print(line)
    facts = dict(prefill_tokens_per_sec=median(prefill[first]), decode_tokens_per_sec=tokens_per_sec[first])
    facts["peak_memory_gb"] = memory
    if peers:
        facts["decode"] = tokens_per_sec
    return facts
