"""
Generate text with a trained model, streamed as it comes.

    python sample.py --ckpt=runs/demo --prompt=12+34=
    python sample.py --ckpt=runs/demo --prompt=12+34= --temperature=0
    echo 12+34= | python sample.py --ckpt=runs/demo --prompt=-

Text goes to stdout, tokens per second to stderr. Generation stops at the end-of-text token.
"""

import signal
import sys
import time

import config

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the text where it is
FLAGS = {
    "ckpt": ("", "a run folder (its newest checkpoint), a step folder or a checkpoint.pt"),
    "prompt": ("", "the text to go on from; - reads it from stdin"),
    "max_new_tokens": (256, "tokens to generate at most"),
    "temperature": (0.8, "0 = greedy, 1 = the model's own chances"),
    "top_k": (0, "draw from the k likeliest tokens; 0 = from all"),
    "top_p": (1.0, "draw from the likeliest tokens whose chances reach this (nucleus); 1 = from all"),
    "num_samples": (1, "texts to generate"),
    "seed": (1337, "another seed draws another text"),
    "dtype": ("float32", "float32 | bfloat16: what the matrix products compute in"),
}
cfg = config.load(sys.argv[1:], __doc__, FLAGS, only=("device",), check_run=False)
config.need_flags(cfg, "ckpt", "prompt")
signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as in: sample.py ... | head

import torch

import checkpoint
import data
import device as machine
from model import generate, restore

faults = [
    f"{name} = {getattr(cfg, name)} must be {range_}"
    for name, ok, range_ in (
        ("temperature", cfg.temperature == 0 or cfg.temperature >= 0.01, "0 or at least 0.01"),
        ("top_k", cfg.top_k >= 0, "at least 0"),
        ("top_p", 0 < cfg.top_p <= 1, "more than 0 and at most 1"),
        ("max_new_tokens", cfg.max_new_tokens >= 1, "at least 1"),
        ("num_samples", cfg.num_samples >= 1, "at least 1"),
    )
    if not ok
]
if faults:
    config.fail(*faults)
device = machine.pick(cfg.device)
dtype = machine.pick_dtype(cfg.dtype, device)
part = checkpoint.load(checkpoint.locate(cfg.ckpt))
model = restore(part, device)
tokenizer, eot = data.tokenizer(part["tokenizer"]), part["tokenizer"]["eot"]
text = sys.stdin.read().rstrip("\n") if cfg.prompt == "-" else cfg.prompt
try:
    prompt = data.encode_prompt(tokenizer, eot, text)
except ValueError as error:
    config.fail(f"prompt = {text!r}: {error}")

generator = torch.Generator().manual_seed(cfg.seed)
for _ in range(cfg.num_samples):
    began, made, new, shown = time.perf_counter(), 0, [], 0
    print(text, end="", flush=True)
    with machine.autocast(device, dtype):
        options = dict(temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p, generator=generator)
        for token in generate(model, torch.tensor([prompt], device=device), cfg.max_new_tokens, **options):
            made += 1
            if token.item() == eot:
                break
            new.append(token.item())
            whole = tokenizer.decode(new)
            print(whole[shown:], end="", flush=True)
            shown = len(whole)
    print(flush=True)
    seconds = time.perf_counter() - began
    print(f"{made} tokens, {made / seconds:,.0f} tokens/s", file=sys.stderr)
