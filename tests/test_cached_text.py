"""
How far the logits of text with a KV cache are from those without, in float and ternary models.

    python tests/test_cached_text.py runs/demo        the same measurement on a checkpoint, in float32
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import settings

from model import Transformer
from nanobit import checkpoint, data
from nanobit.generate import KVCache
from nanobit.infer.restore import restore


@torch.no_grad()
def cache_divergence(model, prompts, new_tokens, batch_size=20):
    """Compare greedy continuations of prompts (N, T) with a KV cache and without, where each token costs a
    forward of the whole text, for batch_size texts together. As long as the two texts of a prompt are the
    same their logits are compared; when they part, the gap between the two tokens in the uncached logits is
    kept. Returns a dict: texts, positions compared, spread (std of the logits), median_diff and max_diff
    (largest difference of any logit of a position), differ (texts that part), gaps (one for each of
    those)."""
    diffs, gaps = [], []
    for plain in prompts.split(batch_size):
        cache, fresh = KVCache(prompts.shape[1] + new_tokens), plain
        same = torch.ones(len(plain), dtype=torch.bool)
        for _ in range(new_tokens):
            cached, uncached = model(fresh, cache=cache)[:, -1], model(plain)[:, -1]  # (N, V)
            diffs.append((cached - uncached).abs().amax(-1)[same])
            fresh, token = cached.argmax(-1, keepdim=True), uncached.argmax(-1, keepdim=True)
            parts = same & (fresh != token)[:, 0]
            gaps += (uncached.gather(-1, token) - uncached.gather(-1, fresh))[parts, 0].tolist()
            same &= ~parts
            plain = torch.cat((plain, token), 1)
    diffs = torch.cat(diffs)
    found = dict(texts=len(prompts), positions=len(diffs), spread=uncached.std().item())
    found |= dict(median_diff=diffs.median().item(), max_diff=diffs.max().item())
    return found | dict(differ=len(gaps), gaps=gaps)


def chain(n, length):
    """Return n texts (n, length) of a Markov chain over the 28 ids, always the same."""
    generator = torch.Generator().manual_seed(1)
    chances = torch.randn(28, 28, generator=generator).mul(2).softmax(-1)
    ids = torch.randint(28, (n, 1), generator=generator)
    for _ in range(length - 1):
        ids = torch.cat((ids, torch.multinomial(chances[ids[:, -1]], 1, generator=generator)), 1)
    return ids


def trained(ternary):
    """Return a small model trained for 60 steps on that chain, so that its logits have a spread."""
    torch.manual_seed(0)
    model, ids = Transformer(settings(ternary=ternary, seq_len=32)), chain(256, 25)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for step in range(60):
        some = ids[step % 8 * 32 :][:32]
        model(some[:, :-1], some[:, 1:])[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("ternary, bound", [(False, 1e-5), (True, 0.1)])
def test_cached_text_is_the_uncached_one(ternary, bound):
    """Text with a cache is the text without: a cache read at a wrong position would move logits by about
    their spread.

    The two ways multiply matrices of other shapes, whose fp32 sums differ in the last bits: about 1e-6 in
    a float model. In a ternary one such a bit may move an activation over the edge of an int8 rounding,
    and the step is then 1/127 of the token's largest: rare, but thousands of times larger (DESIGN,
    section 5).
    """
    found = cache_divergence(trained(ternary), chain(456, 8)[256:], 24, batch_size=200)
    assert found["texts"] == 200
    assert found["spread"] > 1
    assert found["max_diff"] <= bound
    assert all(gap <= bound for gap in found["gaps"])
    assert found["positions"] >= (200 - found["differ"]) * 24


def main(ckpt, new_tokens="32"):
    """Print cache_divergence for a checkpoint and 200 prompts of 32 tokens from its validation split."""
    part = checkpoint.load(checkpoint.locate(ckpt))
    model, cfg = restore(part, "cpu"), SimpleNamespace(**part["config"])
    new_tokens = min(int(new_tokens), cfg.seq_len // 2)
    cfg.seq_len = min(32, cfg.seq_len // 2)
    windows = data.Windows(cfg, data.meta(cfg), "val").fixed(200 * cfg.seq_len, 200, torch.device("cpu"))
    found = cache_divergence(model, next(windows)[0], new_tokens)
    gaps = found.pop("gaps")
    found["explained"] = sum(gap <= found["max_diff"] for gap in gaps)
    found["largest_gap"] = max(gaps, default=0.0)
    for name, value in found.items():
        print(f"{name:12} {value:.3g}" if type(value) is float else f"{name:12} {value:,}")


if __name__ == "__main__":
    main(*sys.argv[1:])
