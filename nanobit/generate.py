"""Text from a model: the KV cache, sampling token by token, and the samples of a run while it trains."""

import math

import torch

from nanobit.cli import fail
from nanobit.cuda_graph import captured
from nanobit.tokenizer import TextStream, continuation, encode_prompt


class KVCache:
    """Keys and values (B, K, size, D) of the tokens read so far, in a dict by attention layer."""

    def __init__(self, size):
        self.size = size
        self.length = 0
        self.k_cache, self.v_cache = {}, {}

    def positions(self, n):
        """Return the positions of the next n tokens, as an index of the tables of rotary angles."""
        return slice(self.length, self.length + n)

    def update(self, layer, k, v):
        """Store k, v (B, K, T, D) of the next T tokens. Return those of all tokens (B, K, length + T, D), and
        their mask (T, length + T), None if causal attention needs none: for one token or the first ones."""
        B, K, T, D = k.shape
        end = self.length + T
        for store, new in ((self.k_cache, k), (self.v_cache, v)):
            if layer not in store:
                store[layer] = new.new_zeros(B, K, self.size, D)  # finite, though StaticCache masks it
            store[layer].narrow(2, self.length, T).copy_(new)
        mask = None
        if self.length > 0 and T > 1:
            mask = torch.ones(T, end, dtype=torch.bool, device=k.device).tril(self.length)
        return self.k_cache[layer].narrow(2, 0, end), self.v_cache[layer].narrow(2, 0, end), mask


class StaticCache(KVCache):
    """A cache of constant shapes and addresses after the prompt, so that a CUDA graph can be replayed: the
    whole store, and a mask of what is filled. The caller adds 1 to `position`, a tensor, after each token."""

    def positions(self, n):
        return self.position if self.length else super().positions(n)

    def update(self, layer, k, v):
        if not self.length:
            self.position = torch.tensor([k.shape[2]], device=k.device)  # of the next token
            return super().update(layer, k, v)
        self.k_cache[layer].index_copy_(2, self.position, k)
        self.v_cache[layer].index_copy_(2, self.position, v)
        mask = (torch.arange(self.size, device=k.device) <= self.position)[None]
        return self.k_cache[layer], self.v_cache[layer], mask


def replayed(model, cache, new):
    """Return a function new (B, 1) -> logits (B, 1, V) that continues a StaticCache by one CUDA graph."""
    length = cache.length
    replay = captured(lambda token: model(token, cache=cache), new)  # writes what the replay writes again
    cache.length = length

    def step(new):
        logits = replay(new)
        cache.length += 1
        cache.position += 1
        return logits

    return step


def sample_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Return a token id (B, 1) for logits (B, V): the most probable at temperature 0, else one drawn by a
    generator of the CPU, from the top_k most probable (0 = all), and of these from the smallest set whose
    total probability reaches top_p (nucleus, arXiv 1904.09751)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    device = logits.device
    logits = logits.float().cpu() / temperature  # CUDA's cumsum is not deterministic
    if top_k:
        smallest = logits.topk(min(top_k, logits.shape[-1]), -1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        probs = ordered.softmax(-1)
        excluded = probs.cumsum(-1) - probs >= top_p  # the token that crosses top_p stays in
        excluded[:, 0] = False  # also if top_p is 0 in fp32
        logits = logits.masked_fill(excluded.scatter(-1, order, excluded), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).to(device)


@torch.no_grad()
def generate(model, idx, max_new_tokens, cuda_graph=False, **sampling):
    """Yield the tokens (B, 1) that follow the prompts idx (B, T), one at a time. When the context is full,
    its later half is read again. cuda_graph: see replayed; sampling: the options of sample_token."""
    size = model.cfg.seq_len
    Cache = StaticCache if cuda_graph else KVCache
    cache, step = Cache(size), None
    idx = new = idx[:, -size:]
    for _ in range(max_new_tokens):
        if cache.length + new.shape[1] > size:
            cache, step = Cache(size), None
            new = idx[:, -(size // 2) :]
        if cuda_graph and cache.length:
            step = step or replayed(model, cache, new)
            logits = step(new)
        else:
            logits = model(new, cache=cache)
        new = sample_token(logits[:, -1], **sampling)
        idx = torch.cat((idx, new), 1)[:, -size:]
        yield new


def write_on(model, tokenizer, eot, ids, max_new_tokens, **options):
    """Yield the text that a model writes after ids, a list that grows, up to the end-of-text token: whole
    characters, or '', for each token, and the rest at the end. options: those of generate."""
    stream = TextStream(tokenizer, ids)
    idx = torch.tensor([ids], device=model.embed.weight.device)
    for token in generate(model, idx, max_new_tokens, **options):
        ids.append(token.item())
        if ids[-1] == eot:
            break
        yield stream.add(ids[-1])
    yield stream.end()


MODES = {  # of the samples of a run
    "greedy": dict(temperature=0.0),
    "top_k": dict(temperature=0.8, top_k=50),
    "nucleus": dict(temperature=0.8, top_p=0.95),
}


def encode_prompts(cfg, tokenizer, bos):
    """Return [(prompt, ids)] of cfg.sample_prompts. Exits with 2 if the tokenizer lacks a character."""
    try:
        return [(text, encode_prompt(tokenizer, bos, text)) for text in cfg.sample_prompts]
    except ValueError as error:
        fail(f"sample_prompts: {error}; set prompts for this data set, or --sample_every=0")


def samples(cfg, model, tokenizer, prompts, device, stop):
    """Yield a row of samples.jsonl for each mode and prompt, until stop() is true, asked after each token."""
    generator = torch.Generator().manual_seed(cfg.seed)
    for mode, options in MODES.items():
        for prompt, ids in prompts:
            idx = torch.tensor([ids], device=device)
            new = []
            for token in generate(model, idx, cfg.sample_tokens, generator=generator, **options):
                new.append(token.item())
                if stop():
                    return
            text = continuation(tokenizer, ids, new)
            yield dict(mode=mode, prompt=prompt, generated_text=text, repetition=repetition(new))


def repetition(ids):
    """Return the fraction of 4-grams that occurred before in the same text: 0 if it never repeats itself."""
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
