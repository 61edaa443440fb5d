"""nanobit/generate.py: the KV cache, and the sampling of tokens."""

import pytest
import torch
from conftest import settings

from model import Transformer
from nanobit.generate import KVCache, StaticCache, generate, repetition, sample_token


def make(**changes):
    torch.manual_seed(0)
    return Transformer(settings(**changes)).eval()


def greedy(model, idx, n):
    return torch.cat(list(generate(model, idx, n, temperature=0.0)), 1)


@pytest.mark.parametrize("ternary", [True, False])
def test_cache_gives_the_logits_of_the_full_forward(ternary):
    """Text read in chunks has the logits of one forward. Guards against positions that restart after the
    prompt, and chunks whose mask forgets the past."""
    model = make(ternary=ternary)
    idx = torch.randint(0, 28, (3, 16))
    cache = KVCache(16)
    # a ternary model may differ by a flipped int8 rounding; a wrong position or mask moves logits by far more
    with torch.no_grad():
        full = model(idx)
        bound = 0.3 * full.std().item() if ternary else 1e-5
        for start, end in ((0, 5), (5, 6), (6, 11), (11, 12), (12, 16)):
            logits = model(idx[:, start:end], cache=cache)[:, 0]
            assert (full[:, end - 1] - logits).abs().max().item() <= bound


@pytest.mark.parametrize("changes", [dict(ternary=False), {}])
def test_a_static_cache_gives_the_logits_of_a_growing_one(changes, monkeypatch):
    """A cache of constant shapes gives the same logits. Guards against a mask that shows what is not stored
    yet or hides the new token, positions that stay, and memory that nobody has written."""
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *sizes: x.new_full(sizes, float("nan")))
    shape = dict(n_layer=2, n_embd=64, n_head=4, n_kv_head=2, ffn_dim=96, seq_len=32)
    model = make(**shape | changes)
    idx = torch.randint(28, (2, 32))
    growing, static = KVCache(32), StaticCache(32)
    with torch.no_grad():
        for part in idx.split([5, *[1] * 27], 1):
            expected = model(part, cache=growing)
            logits = model(part, cache=static)
            if static.length > 5:
                static.position += 1  # as after each replay of a graph
            # ternary: an ulp flips a rounding to int8
            torch.testing.assert_close(logits, expected, rtol=0, atol=0.2 if model.cfg.ternary else 1e-5)


def test_greedy_text_is_the_same_with_and_without_a_cache():
    """Greedy text is that of a full forward per token."""
    model = make(ternary=False)
    idx = torch.randint(0, 28, (2, 3))
    cached = greedy(model, idx, 10)
    for _ in range(10):
        with torch.no_grad():
            idx = torch.cat((idx, model(idx)[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(cached, idx[:, 3:])


@pytest.mark.parametrize("length", [1, 16, 40])
def test_generation_continues_past_the_context(length):
    """Prompt and text may be longer than the context of 16 tokens."""
    new = greedy(make(), torch.zeros(1, length, dtype=torch.long), 40)
    assert new.shape == (1, 40)
    assert 0 <= new.min()
    assert new.max() < 28


def test_a_full_context_continues_from_its_later_half():
    """When the context of 16 is full, its later half is read again."""
    model = make(ternary=False)
    prompt = torch.arange(16)[None]
    new = greedy(model, prompt, 2)
    with torch.no_grad():
        text = torch.cat((prompt, model(prompt)[:, -1].argmax(-1, keepdim=True)), 1)
        assert new[0, 1] == model(text[:, -8:])[0, -1].argmax()


PROBS = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(2000, 1)


def draw(logits=PROBS, seed=0, **options):
    return sample_token(logits, generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize(
    "options, tokens",
    [
        (dict(temperature=0), {0}),
        (dict(), {0, 1, 2, 3}),
        (dict(top_k=2), {0, 1}),
        (dict(top_p=0.5), {0}),
        (dict(top_p=1e-300), {0}),
        (dict(top_p=0.6), {0, 1}),  # the token that crosses top_p stays in
        (dict(top_p=0.9), {0, 1, 2}),
        (dict(top_k=100, top_p=1.0, temperature=2.0), {0, 1, 2, 3}),
        (dict(temperature=0.02), {0}),  # a low temperature is nearly greedy
    ],
)
def test_tokens_are_drawn_from_the_right_set(options, tokens):
    """temperature, top_k and top_p select the tokens that may be drawn, in any order of the vocabulary."""
    assert set(draw(**options).flatten().tolist()) == tokens
    order = [3, 0, 2, 1]
    reordered = draw(PROBS[:, order], **options).flatten().tolist()
    assert {order[token] for token in reordered} == tokens


def test_the_seed_decides_what_is_drawn():
    """The same seed draws the same tokens, another seed others."""
    assert torch.equal(draw(seed=1), draw(seed=1))
    assert not torch.equal(draw(seed=1), draw(seed=2))


def test_repetition():
    """The repetition of a text is the share of its 4-grams that it has had before."""
    assert repetition([1, 2, 3]) == 0 == repetition([1, 2, 3, 4, 5])
    assert repetition([7] * 13) == 0.9
