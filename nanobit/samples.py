"""Texts that a model writes while it trains: each prompt greedy, top-k and nucleus, by the same seed."""

import torch

from nanobit.cli import fail
from nanobit.infer.inference import generate
from nanobit.tokenizer import continuation, encode_prompt

MODES = {
    "greedy": dict(temperature=0.0),
    "top_k": dict(temperature=0.8, top_k=50),
    "nucleus": dict(temperature=0.8, top_p=0.95),
}


def encode(cfg, tokenizer, bos):
    """[(prompt, its ids)] of cfg.sample_prompts. Exits with 2 where the tokenizer lacks a character."""
    try:
        return [(text, encode_prompt(tokenizer, bos, text)) for text in cfg.sample_prompts]
    except ValueError as error:
        fail(f"sample_prompts: {error}; set prompts for this data set, or --sample_every=0")


def write(cfg, model, tokenizer, prompts, device, stop):
    """yield a line of samples.jsonl for each mode and prompt, until stop() is true, asked after each token"""
    generator = torch.Generator().manual_seed(cfg.seed)
    for mode, options in MODES.items():
        for text, ids in prompts:
            new, prompt = [], torch.tensor([ids], device=device)
            for token in generate(model, prompt, cfg.sample_tokens, generator=generator, **options):
                new.append(token.item())
                if stop():
                    return
            text_made = continuation(tokenizer, ids, new)
            yield dict(mode=mode, prompt=text, generated_text=text_made, repetition=repetition(new))


def repetition(ids):
    """share of the 4-grams of a text that it has had before; 0 for text that never repeats itself"""
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
