"""Text from a model: the KV cache, sampling token by token, and the samples of a run while it trains."""

import math

import torch

from nanobit.cli import fail
from nanobit.tokenizer import continuation, encode_prompt


class KVCache:
    """keys and values of the tokens seen so far, per attention layer, for at most `size` tokens"""

    def __init__(self, size):
        self.size, self.length, self.store = size, 0, {}

    def at(self, n):
        """the positions of n new tokens"""
        return slice(self.length, self.length + n)

    def append(self, layer, k, v):
        """store k, v (B, K, T, D) of the new tokens; return all of them (B, K, length + T, D) and the mask
        that T new tokens need (None for one token, or where the cache was empty: plain causal attention)"""
        B, K, T, D = k.shape
        start, end = self.length, self.length + T
        if layer not in self.store:
            self.store[layer] = k.new_empty(B, K, self.size, D), v.new_empty(B, K, self.size, D)
        both = self.store[layer]
        for kept, new in zip(both, (k, v)):
            kept.narrow(2, start, T).copy_(new)
        mask = None
        if start > 0 and T > 1:
            mask = torch.ones(T, end, dtype=torch.bool, device=k.device).tril(start)
        return *(kept.narrow(2, 0, end) for kept in both), mask


class StaticCache(KVCache):
    """a cache that gives a new token tensors of the same shapes and places at every position, so that a CUDA
    graph can be replayed: all that is stored, and a mask of what is not there yet"""

    def at(self, n):
        return self.position if self.length else super().at(n)

    def append(self, layer, k, v):
        if not self.length:
            self.position = torch.tensor([k.shape[2]], device=k.device)  # of the next token
            found = super().append(layer, k, v)
            for kept in self.store[layer]:  # what a mask hides has to be finite all the same
                kept.narrow(2, k.shape[2], self.size - k.shape[2]).zero_()
            return found
        both = self.store[layer]
        for kept, new in zip(both, (k, v)):
            kept.index_copy_(2, self.position, new)
        return *both, (torch.arange(self.size, device=k.device) <= self.position)[None]


def replayed(model, cache, fresh):
    """a function fresh (B, 1) -> logits (B, 1, V) that goes on after a StaticCache by one CUDA graph: one
    launch in place of hundreds"""
    token, length = fresh.clone(), cache.length
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles what is to be compiled, and writes what the replay writes again
        for _ in range(2):
            model(token, cache=cache)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(token, cache=cache)
    cache.length = length

    def step(fresh):
        token.copy_(fresh)
        graph.replay()
        cache.length += 1
        cache.position += 1
        return logits

    return step


def pick(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """one token id (B, 1) from logits (B, V): greedy at temperature 0, else drawn from the top_k (0 = all)
    likeliest and from the least set of them whose chances reach top_p (nucleus, arXiv 1904.09751), by a
    generator of the CPU"""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    device, logits = logits.device, logits.float().cpu() / temperature  # CUDA's cumsum is not deterministic
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1]), -1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        chance = ordered.softmax(-1)
        beyond = chance.cumsum(-1) - chance >= top_p  # the token that crosses top_p stays in
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).to(device)


@torch.no_grad()
def generate(
    model, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None, cuda_graph=False
):
    """yield the next tokens (B, 1), one at a time, after the prompts idx (B, T). Where the context is full,
    the later half of it is read again and generation goes on with that. cuda_graph: see replayed."""
    size, Cache = model.cfg.seq_len, StaticCache if cuda_graph else KVCache
    idx = idx[:, -size:]
    cache, fresh, step = Cache(size), idx, None
    for _ in range(max_new_tokens):
        if cache.length + fresh.shape[1] > size:
            cache, fresh, step = Cache(size), idx[:, -(size // 2) :], None
        if cuda_graph and cache.length:
            step = step or replayed(model, cache, fresh)
            logits = step(fresh)
        else:
            logits = model(fresh, cache=cache)
        fresh = pick(logits[:, -1], temperature, top_k, top_p, generator)
        idx = torch.cat((idx, fresh), 1)[:, -size:]
        yield fresh


# samples of a run: each prompt greedy, top-k and nucleus, by the same seed

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


def samples(cfg, model, tokenizer, prompts, device, stop):
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
