"""
Ternary layers for inference: four codes in a byte instead of float master weights, and the same output bits.

The layout is that of transformers. On a CPU a C function (packed.c, compiled when a model is loaded) unpacks
codes in registers; without a compiler, they are unpacked to int8. Many rows at a time are unpacked and
multiplied as in training (kernels.py). On CUDA, a Triton kernel computes single rows (packed_cuda.py)."""

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile

import torch
import torch.nn.functional as F
from torch import nn

from model import Block
from nanobit import machine
from nanobit.experts import BitExperts, bit_layers
from nanobit.generate import KVCache
from nanobit.kernels import exact_matmul
from quant import output_dtype, quantize_activations, ternarize

COMPILERS = "cc", "gcc", "clang"
FEW = 1024  # rows up to which the C function is faster than unpacking


def pack(codes):
    """Return codes {-1, 0, 1} (out, in) as uint8 (R, in), R = out / 4: a byte of row r holds codes + 1 of the
    rows r, r + R, r + 2R and r + 3R, lowest bits first. ValueError unless out is a multiple of 4."""
    if len(codes) % 4:
        raise ValueError(f"pack: {len(codes)} output rows are not a multiple of 4")
    quarters = (codes + 1).to(torch.uint8).chunk(4)
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


def unpack(packed):
    """Return the int8 codes {-1, 0, 1} (out, in) of uint8 (out / 4, in): the inverse of pack."""
    return torch.cat([(packed >> shift & 3).to(torch.int8) - 1 for shift in (0, 2, 4, 6)])


class Matrix(ctypes.Structure):
    """The `matrix` of packed.c. Whoever makes one keeps the tensor whose address `codes` is."""

    _fields_ = [("codes", ctypes.c_void_p), ("n_out", ctypes.c_int64), ("scale", ctypes.c_float)]


def build(compiler, flags, folder):
    """Return packed.c as a library, compiled in a folder. OSError or AttributeError if that fails."""
    source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "packed.c")
    path = os.path.join(folder, "packed.so")
    exact = "-O3 -fno-math-errno -fno-trapping-math -ffp-contract=off -shared -fPIC".split()
    command = [compiler, *exact, *flags, source, "-o", path, "-lm"]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode:
        raise OSError(" ".join(result.stderr.splitlines()[-1:]) or f"exit code {result.returncode}")
    lib = ctypes.CDLL(path)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    lib.packed_linear.argtypes = [pointer, *3 * [number], *3 * [pointer], ctypes.c_float, *3 * [pointer]]
    lib.int8_linear.argtypes = [pointer, pointer, *3 * [number], pointer, pointer]
    lib.float_linear.argtypes = [pointer, number, number, pointer, pointer]
    lib.rotate.argtypes = [pointer, number, number, pointer, pointer]
    for function in (lib.packed_linear, lib.int8_linear, lib.float_linear, lib.rotate):
        function.restype = None
    return lib


@functools.cache
def library():
    """Return packed.c compiled for this processor, or None after printing why: everything works without."""
    problem = f"no C compiler ({', '.join(COMPILERS)})"
    for compiler in filter(None, map(shutil.which, COMPILERS)):
        for flags in (["-march=native", "-fopenmp"], ["-march=native"], []):
            try:
                with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                    return build(compiler, flags, folder)  # Windows cannot delete a loaded library
            except (OSError, AttributeError) as error:  # it fails, or its library cannot be loaded here
                problem = f"{compiler}: {error}"
    print(f"writing text is slower without packed.c: {problem}", file=sys.stderr)


def address(tensor):
    return None if tensor is None else tensor.data_ptr()


def int8_linear(rows, scales, x):
    """Return y (..., out) of x (..., in), fp32 and contiguous: see head.Int8Head."""
    y = x.new_empty(*x.shape[:-1], len(rows))
    sizes = (len(rows), x.shape[:-1].numel(), x.shape[-1])
    library().int8_linear(address(rows), address(scales), *sizes, address(x), address(y))
    return y


def float_linear(w, x):
    """Return y (..., out) of one row x (..., in) and w (out, in), fp32 and contiguous."""
    y = x.new_empty(*x.shape[:-1], len(w))
    library().float_linear(address(w), *w.shape, address(x), address(y))
    return y


class Matrices:
    """The matrices of PackedLinears, side by side, as the C function takes them."""

    def __init__(self, *layers):
        self.array = (Matrix * len(layers))(*(layer.matrix for layer in layers))
        self.n_out = sum(matrix.n_out for matrix in self.array)

    def __call__(self, x, norm=None, factor=None, residual=None):
        """Return y (..., n_out) for x (..., in), fp32 and contiguous: W (norm(x) * factor) + residual."""
        y = x.new_empty(*x.shape[:-1], self.n_out)
        rms = (None, None, 0.0)
        if norm is not None:
            mean = x.pow(2).mean(-1, keepdim=True)  # torch sums in an order that C does not repeat
            rms = (address(mean), address(norm.weight), norm.eps)
        inputs = (address(x), *rms, address(factor), address(residual))
        sizes = (len(self.array), x.shape[:-1].numel(), x.shape[-1])
        library().packed_linear(ctypes.addressof(self.array), *sizes, *inputs, address(y))
        return y


class PackedLinear(nn.Module):
    """A BitLinear that has only its codes: packed (out / 4, in), see pack, with rows of zeros at the end if
    out_features is not a multiple of 4, and scale (1, 1). It stays on the device where it was made."""

    def __init__(self, packed, scale, out_features):
        super().__init__()
        assert packed.shape[1] * 127 < 2**24, "sums of this width are not exact in fp32"
        self.in_features = packed.shape[1]
        self.out_features = out_features
        self.padded_out = 4 * len(packed)
        self.packed = packed.contiguous()
        self.scale = scale.float().view(1, 1)
        self.matrix = Matrix(self.packed.data_ptr(), self.padded_out, scale.item())
        self.in_c = Matrices(self)
        on_cpu = packed.device.type == "cpu"
        self.uses_c = on_cpu and library() is not None
        self.uses_triton = packed.is_cuda and not machine.no_compiler(packed.device)
        self.codes = unpack(packed) if on_cpu and not self.uses_c else None  # once, not for each token

    def _apply(self, *args, **kwargs):
        raise RuntimeError("a packed layer stays on the device where it was made: C has its address")

    def forward(self, x):
        """Return y (..., out) for x (..., in), as BitLinear does."""
        assert x.shape[-1] == self.in_features
        y = self.product(x).view(*x.shape[:-1], self.padded_out)
        # after strided values, torch's vector functions would give other last bits than after BitLinear
        return y[..., : self.out_features].contiguous().to(output_dtype(x))

    def product(self, x):
        """Return y (..., padded_out), fp32, in the fastest way for the device and the number of rows."""
        n_rows = x.shape[:-1].numel()
        if self.uses_c and n_rows <= FEW:
            return self.in_c(x.float().contiguous())
        if self.uses_triton and n_rows == 1:
            from nanobit.infer import packed_cuda

            return packed_cuda.packed_linear(self.packed, x, self.matrix.scale)
        with torch.autocast(x.device.type, enabled=False):
            x_int, x_scale = quantize_activations(x.reshape(-1, self.in_features))
            codes = unpack(self.packed) if self.codes is None else self.codes
            return exact_matmul(x_int, codes) / (self.scale * x_scale)


class PackedExperts(nn.ModuleList):
    """BitExperts as one PackedLinear each."""

    def forward(self, x, sizes):
        return torch.cat([layer(rows) for layer, rows in zip(self, x.split(sizes))])


NAMES = ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "ffn.gate_proj", "ffn.up_proj"]
NAMES += ["ffn.down_proj", "attn_norm.weight", "ffn_norm.weight"]


class PackedBlock(nn.Module):
    """A Block of packed layers that computes one token of one text in a dozen calls instead of a hundred. It
    repeats Block.forward (model.py) and all that this calls. ValueError or KeyError for a block that has
    other layers, widths or parameters: C would read and write beyond their ends."""

    def __init__(self, block):
        super().__init__()
        layers = packed_layers(block)
        shapes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
        shapes |= {name: tuple(p.shape) for name, p in block.state_dict().items()}
        C, n_q = shapes["attn.q_proj"]
        n_kv, n_ffn = shapes["attn.k_proj"][1], shapes["ffn.gate_proj"][1]
        known = [(C, n_q), (C, n_kv), (C, n_kv), (n_q, C), (C, n_ffn), (C, n_ffn), (n_ffn, C), (C,), (C,)]
        if type(block) is not Block or shapes != dict(zip(NAMES, known)):
            raise ValueError(f"{type(block).__name__} has the layers and parameters {shapes}")
        self.block = block
        self.qkv = Matrices(layers["attn.q_proj"], layers["attn.k_proj"], layers["attn.v_proj"])
        self.o = Matrices(layers["attn.o_proj"])
        self.gate_up = Matrices(layers["ffn.gate_proj"], layers["ffn.up_proj"])
        self.down = Matrices(layers["ffn.down_proj"])

    def forward(self, x, cos, sin, cache=None):
        if x.shape[:2].numel() > 1 or cache is None or output_dtype(x) != torch.float32:
            return self.block(x, cos, sin, cache)
        attn = self.block.attn
        H, K, D = attn.n_head, attn.n_kv_head, attn.head_dim
        qkv = self.qkv(x, self.block.attn_norm).view(1, H + 2 * K, 1, D)
        library().rotate(qkv.data_ptr(), H + K, D, cos.data_ptr(), sin.data_ptr())
        q, k, v = qkv.split((H, K, K), 1)
        k, v, mask = cache.update(attn, k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=H != K)
        x = self.o(y.reshape(1, 1, -1), residual=x)
        gate, up = self.gate_up(x, self.block.ffn_norm).chunk(2, -1)
        return self.down(F.silu(gate), factor=up, residual=x), None


def packed_layers(module):
    """Return {name: PackedLinear} of the packed layers in a module."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, PackedLinear)}


def packed_linear(w):
    """Return the PackedLinear of master weights (out, in), or PackedExperts of those of BitExperts."""
    if w.dim() == 3:
        return PackedExperts(map(packed_linear, w))
    codes, scale = ternarize(w)
    return PackedLinear(pack(F.pad(codes, (0, 0, 0, -len(codes) % 4))), scale, len(codes))


def difference(ours, theirs):
    """Return the largest difference of two tensors: 0.0 if they are equal, NaN counted as equal to NaN."""
    is_same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    return 0.0 if is_same.all() else (ours - theirs).abs().max().item()


@torch.no_grad()
def pack_layers(model):
    """Give the ternary layers of a model in eval mode integer weights, and its blocks the fast path of
    pack_blocks: the same function, which cannot be trained. One layer of each shape is compared with the
    BitLinear (quant.py) on a few rows; if they differ, a line reports that, and nothing is packed."""
    layers = bit_layers(model)
    packed = {name: packed_linear(layer.weight) for name, layer in layers.items()}
    one_of_each_shape = {layer.weight.shape: name for name, layer in layers.items()}
    for name in one_of_each_shape.values():
        layer = layers[name]
        n_rows = model.cfg.n_expert or 4
        sizes = [[1] * n_rows] if isinstance(layer, BitExperts) else []
        x = torch.randn(n_rows, layer.weight.shape[-1], generator=torch.Generator().manual_seed(0))
        x = x.to(layer.weight.device)
        if off := difference(packed[name](x, *sizes), layer(x, *sizes)):
            fault = f"does not compute what packed.py does (largest difference {off:.3g})"
            print(f"{name} (quant.py) {fault}: its float weights are used, which is slower", file=sys.stderr)
            return
    for name, layer in packed.items():
        model.set_submodule(name, layer)
    pack_blocks(model)


def pack_blocks(model):
    """Replace the Blocks by PackedBlocks, if the logits of single tokens keep every bit; else report it."""
    blocks = {name: block for name, block in model.named_modules() if isinstance(block, Block)}
    layers = packed_layers(model).values()
    fit = [layer.uses_c and layer.out_features == layer.padded_out for layer in layers]
    if model.cfg.n_expert or not layers or not all(fit):
        return
    with torch.random.fork_rng(devices=[]):  # a Block that was changed may draw random numbers
        plain = single_token_logits(model)
        try:
            for name, block in blocks.items():
                model.set_submodule(name, PackedBlock(block))
            off = difference(single_token_logits(model), plain)
            problem = f"the largest difference of logits is {off:.3g}" if off else ""
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
    if problem:
        for name, block in blocks.items():
            model.set_submodule(name, block)
        fault = f"PackedBlock (packed.py) does not compute what Block (model.py) does: {problem}"
        print(f"{fault}; so each token goes through Block, which is slower", file=sys.stderr)


def single_token_logits(model):
    """Return the logits (1, 4, V) of four tokens, read one by one after 16; fewer in a short context."""
    n = min(20, model.cfg.seq_len)
    ids = (7 * torch.arange(n)[None] + 1) % model.cfg.vocab_size
    cache = KVCache(n)
    if n > 4:
        model(ids[:, :-4], cache=cache)
    return torch.cat([model(token, cache=cache) for token in ids[:, -4:].split(1, 1)], 1)
