"""nanobit/infer/packed.py: integer weights are the same function, in every way that they compute it."""

import pytest
import torch
from conftest import settings
from torch import nn

from model import Transformer
from nanobit.infer import packed
from nanobit.infer.restore import restore
from quant import BitLinear, ternarize


def test_pack_has_the_layout_of_transformers():
    """A byte holds codes + 1 of rows r, r + R, r + 2R, r + 3R, lowest bits first."""
    codes = torch.tensor([[-1], [0], [1], [1], [0], [-1], [1], [0]], dtype=torch.int8)  # R = 2
    assert packed.pack(codes).tolist() == [[0 | 2 << 2 | 1 << 4 | 2 << 6], [1 | 2 << 2 | 0 << 4 | 1 << 6]]


def test_unpack_is_the_inverse_of_pack():
    """Packed codes come back, from a quarter of their rows."""
    codes = ternarize(torch.randn(128, 40))[0]
    assert packed.pack(codes).shape == (32, 40)
    assert packed.pack(codes).dtype == torch.uint8
    assert torch.equal(packed.unpack(packed.pack(codes)), codes.to(torch.int8))


def test_rows_that_do_not_fill_a_byte_are_refused():
    """pack needs a multiple of 4 rows, and reports that."""
    with pytest.raises(ValueError, match="multiple of 4"):
        packed.pack(torch.zeros(6, 40))


@pytest.mark.parametrize("n_rows", [1, 3, packed.FEW, packed.FEW + 1])
@pytest.mark.parametrize("shape", [(80, 48), (17, 5), (768, 256), (300, 258)])
def test_integer_weights_give_the_same_bits(form, shape, n_rows):
    """A packed layer equals BitLinear to the last bit, for few rows and many, ties, strided inputs, autocast
    and infinity. Guards against rows, scales or roundings in another order, and sums that threads share."""
    torch.manual_seed(0)
    bit = BitLinear(*shape)
    layer = packed.packed_linear(bit.weight)
    assert layer.packed.numel() == -(-shape[1] // 4) * shape[0]
    x = torch.randn(n_rows, shape[0]) * 10 ** torch.randn(n_rows, 1)
    x[0] = 0
    with torch.no_grad():
        assert torch.equal(layer(x), bit(x))
        x[0] = torch.randint(-254, 255, (shape[0],)) / 2  # its largest is 127: halves are ties
        x[0, 0] = 127
        assert torch.equal(layer(x), bit(x))
        x = x.t().contiguous().t().view(n_rows, 1, -1)  # not contiguous
        assert torch.equal(layer(x), bit(x))
        assert layer(x).shape == (n_rows, 1, shape[1])
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), bit(x))
            assert layer(x).dtype == torch.bfloat16
        x[0, 0, 0] = float("inf")
        assert layer(x)[0].isnan().all()
        assert not layer(x)[1:].isnan().any()


def test_the_ends_of_the_range(form):
    """The largest sums, the least scale of a token, and NaN give what BitLinear gives. Guards against sums of
    16 bits that overflow if all codes and inputs have one sign."""
    bit = BitLinear(5000, 4)
    for sign in (1, -1):
        nn.init.constant_(bit.weight, sign * 0.5)
        layer = packed.packed_linear(bit.weight)
        with torch.no_grad():
            for x in (torch.ones(1, 5000), -torch.ones(1, 5000), torch.full((1, 5000), 1e-7)):
                assert torch.equal(layer(x), bit(x))
            x[0, 7] = float("nan")
            assert layer(x).isnan().all()


@torch.no_grad()
def test_weights_that_do_not_lie_row_by_row(form):
    """Strided master weights are packed in the right order."""
    bit = BitLinear(80, 48)
    bit.weight.data = bit.weight.data.t().contiguous().t()
    x = torch.randn(3, 80)
    assert torch.equal(packed.packed_linear(bit.weight)(x), bit(x))


@torch.no_grad()
def test_no_rows_give_no_rows(form):
    """An expert without tokens returns an empty result."""
    assert packed.packed_linear(torch.randn(48, 80))(torch.randn(0, 80)).shape == (0, 48)


@pytest.mark.parametrize("ffn_dim", [6, 7, 50])
def test_widths_that_are_not_multiples_of_4(form, ffn_dim):
    """Any width gives the logits of training. Guards against rows of padding that are cut off and leave
    strided values, of which the next function rounds others."""
    cfg = settings(n_embd=32, ffn_dim=ffn_dim)
    for seed in range(4):
        torch.manual_seed(seed)
        part = dict(config=vars(cfg), model=Transformer(cfg).state_dict())
        x = torch.randint(cfg.vocab_size, (4, cfg.seq_len))
        with torch.no_grad():
            assert torch.equal(restore(part, "cpu")(x), restore(part, "cpu", packed=True)(x))


def test_a_packed_layer_stays_on_its_device(form):
    """Moving a packed layer is an error: C would still have the former address of the tensor."""
    layer = packed.packed_linear(torch.randn(48, 80))
    for move in (lambda: layer.to("meta"), layer.share_memory, layer.double):
        with pytest.raises(RuntimeError, match="stays on the device"):
            move()


def test_an_input_of_another_width_is_refused(form):
    """C would read beyond the end of the codes."""
    with pytest.raises(AssertionError):
        packed.packed_linear(torch.randn(48, 80))(torch.randn(1, 160))
