"""model.js, in Node: the forward pass of model.py and quant.py, and the sampling of generate.py."""

import numpy as np
import pytest
import torch
from parts import part_of
from web_pages import BOUND, in_float64, js, logits_of, model_of, needs_node

import quant
from nanobit.export.web import html_file
from nanobit.generate import generate, sample_token

pytestmark = needs_node
SHAPES = {
    "groups of heads, a tied head": {},
    "an untied head": dict(tie_embeddings=False, n_kv_head=4),
    "widths that do not fill a byte": dict(n_embd=36, n_head=2, n_kv_head=1, ffn_dim=50),
    "rows of int8 that do not fill 4 bytes": dict(n_embd=18, n_head=1, n_kv_head=1, vocab_size=29),
    "rows of padding": dict(vocab_multiple=32, rope_theta=500.0, norm_eps=1e-3),
    "a float model": dict(ternary=False),
    "a float model with an untied head": dict(ternary=False, tie_embeddings=False, n_layer=3),
}


def page_of(tmp_path, embed="int8", **changes):
    """Return (path, part) of the page of a random model."""
    part = part_of(**changes)
    html_file.write(part, str(tmp_path / "x.html"), embed)
    return tmp_path / "x.html", part


def some_ids(*shape):
    return torch.randint(28, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("embed", ["int8", "f16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_logits_are_those_of_the_plain_model(shape, embed, tmp_path):
    """The script computes the logits of model.py and quant.py in float64, for texts that fill the context."""
    path, _ = page_of(tmp_path, embed, **shape)
    ids = some_ids(3, 64)
    with in_float64:
        logits = model_of(path)(ids)
    assert logits.dtype == torch.float64
    assert (logits_of(path, ids.tolist()) - logits).abs().max() <= BOUND


@pytest.mark.parametrize("size", [16, 15])
@torch.no_grad()
def test_text_beyond_the_context_is_that_of_generate(size, tmp_path):
    """Greedy text continues as generate() does when the context is full, also after a longer prompt."""
    path, _ = page_of(tmp_path, seq_len=size)
    model = model_of(path)
    for ids in (some_ids(1, 5), some_ids(1, 40)):
        with in_float64:
            ours = [token.item() for token in generate(model, ids, 40, temperature=0.0)]
        assert js("greedy(path, ids, 40)", path=str(path), ids=ids[0].tolist()) == ours


def test_rounding_is_half_to_even():
    """Halves go to the even neighbour, below zero too."""
    x = [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.49999999999999994, -0.2, 3.7, 127.5]
    assert js("x.map(roundHalfToEven)", ["model.js"], x=x) == np.round(x).tolist()


@pytest.mark.parametrize(
    "x", [[0.0] * 6, [1e-9, -1e-9], [3.0, -7.0, 2.0], [127.0, 0.5, 1.5, 2.5, -2.5, -127.0]]
)
def test_activations_are_rounded_as_in_quant(x):
    """The integers and the scale of an input are those of quant.py, also of zeros."""
    made = js("(({q, scale}) => [Array.from(q), scale])(quantizeActivations(x))", ["model.js"], x=x)
    with in_float64:
        q, scale = quant.quantize_activations(torch.tensor(x, dtype=torch.float64))
    assert made == [q.tolist() + [0] * (-len(x) % 4), scale.item()]


def test_floats_of_16_bits():
    """Each float of 16 bits that is finite has its value."""
    expected = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float64)
    finite = np.isfinite(expected)
    made = np.array(js("Array.from(HALVES)", ["model.js"]), dtype=np.float64)
    assert (made[finite] == expected[finite]).all()


OPTIONS = [dict(), dict(top_k=3), dict(top_p=0.8), dict(top_p=0.01), dict(top_k=4, top_p=0.6), dict(top_k=99)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("temperature", [0.001, 0.5, 1.0])
def test_tokens_are_drawn_as_by_sample_token(options, temperature):
    """The tokens that can be drawn, and how often each is, are those of sample_token."""
    options = dict(temperature=temperature, top_k=0, top_p=1.0) | options
    logits = [0.5, 2.0, 1.0, -1.0, 2.0, 0.0, 1.5]  # two are equal
    n = 20_000
    expression = (
        "((random) => Array.from({length: n}, () => sampleToken(logits, options, random)))(makeRandom(1))"
    )
    theirs = js(expression, ["model.js"], n=n, logits=logits, options=options)
    generator = torch.Generator().manual_seed(0)
    ours = sample_token(torch.tensor(logits).expand(n, -1), generator=generator, **options)
    counts = [np.bincount(ids, minlength=len(logits)) for ids in (theirs, ours.view(-1))]
    assert ((counts[0] > 0) == (counts[1] > 0)).all()
    assert np.abs(counts[0] - counts[1]).max() < 0.015 * n


def test_equal_logits_at_temperature_0():
    """The first of equal logits is taken, as by argmax."""
    options = dict(temperature=0, top_k=0, top_p=1)
    assert js("sampleToken(logits, options)", ["model.js"], logits=[1, 3, 3], options=options) == 1


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**53 - 1])
def test_random_numbers(seed):
    """A seed gives the same numbers each time, evenly spread over [0, 1), and no two seeds the same."""
    expression = "(({length}) => Array.from({length}, makeRandom(seed)))({length: 10000})"
    numbers = js(expression, ["model.js"], seed=seed)
    assert numbers == js(expression, ["model.js"], seed=seed)
    assert numbers != js(expression, ["model.js"], seed=seed - 1 if seed else 7)
    assert np.histogram(numbers, 10, (0, 1))[0] == pytest.approx(1000, abs=150)
    assert all(0 <= x < 1 for x in numbers)


def test_the_first_numbers_of_seeds():
    """The first numbers of small seeds are evenly spread, so that texts of neighbouring seeds differ."""
    firsts = js("Array.from({length: n}, (_, seed) => makeRandom(seed)())", ["model.js"], n=1000)
    assert np.histogram(firsts, 10, (0, 1))[0] == pytest.approx(100, abs=50)
