"""
Ternary layers that can only compute: four codes to a byte in place of the float master weights, and the same
bits out.

The layout is that of transformers, on the disk and in memory. On a CPU a C function reads it (packed.c,
compiled when a model is loaded, in half a second): it widens the codes in registers, so that a weight costs a
quarter of a byte of memory traffic. Without a C compiler they are widened to int8 at load. Many rows at a
time are a product for the library that training uses (quant.exact_matmul), after unpacking. On CUDA one row
is a Triton kernel's (packed_cuda.py).
"""

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

from device import no_compiler
from model import Block, FeedForward
from quant import BitExperts, BitLinear, exact_matmul, output_dtype, quantize_activations, ternarize

COMPILERS = "cc", "gcc", "clang"
FEW = 384  # rows up to which the C function is faster than unpacking


def pack(t):
    """codes {-1, 0, 1} (out, in) -> uint8 (out / 4, in), four to a byte in the layout that transformers
    reads: byte row r holds rows r, r + R, r + 2R, r + 3R of t + 1, lowest bits first, R = out / 4. ValueError
    unless 4 | out."""
    if t.shape[0] % 4:
        raise ValueError(f"pack: {t.shape[0]} output rows are not a multiple of 4")
    u = (t + 1).to(torch.uint8).view(4, t.shape[0] // 4, t.shape[1])
    return u[0] | u[1] << 2 | u[2] << 4 | u[3] << 6


def unpack(packed):
    """uint8 (out / 4, in) -> int8 codes {-1, 0, 1} (out, in); the inverse of pack"""
    rows = [(packed >> shift & 3).to(torch.int8) - 1 for shift in (0, 2, 4, 6)]
    return torch.cat(rows)


# the C functions


class Matrix(ctypes.Structure):
    """the matrix of packed.c; whoever makes one keeps the tensor whose address `codes` is"""

    _fields_ = [("codes", ctypes.c_void_p), ("n_out", ctypes.c_int64), ("s", ctypes.c_float)]


def built(compiler, more, folder):
    """packed.c as a library, or an OSError or AttributeError that says why not"""
    source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "packed.c")
    path = os.path.join(folder, "packed.so")
    how = "-O3 -fno-math-errno -fno-trapping-math -ffp-contract=off -shared -fPIC".split()
    command = [compiler, *how, *more, source, "-o", path, "-lm"]
    made = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if made.returncode:
        raise OSError(" ".join(made.stderr.strip().splitlines()[-1:]) or f"exit code {made.returncode}")
    lib, pointer, number = ctypes.CDLL(path), ctypes.c_void_p, ctypes.c_int64
    lib.packed_linear.argtypes = [pointer, number, number, number, pointer, pointer, pointer]
    lib.packed_linear.argtypes += [ctypes.c_float, pointer, pointer, pointer]
    lib.rotate.argtypes = [pointer, number, number, pointer, pointer]
    lib.packed_linear.restype = lib.rotate.restype = None
    return lib


@functools.cache
def library():
    """packed.c compiled for this processor, or None, which is said on stderr: everything works without it"""
    problem = f"no C compiler ({', '.join(COMPILERS)})"
    for compiler in filter(None, map(shutil.which, COMPILERS)):
        for more in (["-march=native", "-fopenmp"], ["-march=native"], []):
            try:
                with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                    return built(compiler, more, folder)  # Windows cannot delete what is loaded
            except (OSError, AttributeError) as error:  # it fails, or makes what this machine cannot load
                problem = f"{compiler}: {error}"
    print(f"ternary layers compute from int8, which is slower: {problem}", file=sys.stderr)
    return None


class PackedLinear(nn.Module):
    """a BitLinear of which only the codes are left; `packed` (out / 4, in) as of pack, with rows of zeros
    where out is no multiple of 4, s (1, 1). To be made on the device where it stays."""

    def __init__(self, packed, s, out_features):
        super().__init__()
        assert packed.shape[1] * 127 < 2**24, "sums of this width are not exact in fp32"
        packed = packed.contiguous()
        self.out_features, self.in_features = out_features, packed.shape[1]
        self.register_buffer("s", s.float().view(1, 1), persistent=False)
        self.register_buffer("packed", packed, persistent=False)
        self.matrix = Matrix(packed.data_ptr(), 4 * len(packed), s.item())
        self.library = library() if packed.device.type == "cpu" else None
        self.has_triton = packed.is_cuda and not no_compiler(packed.device)
        # to unpack for each token would take longer than the product
        is_wide = packed.device.type == "cpu" and not self.library
        self.register_buffer("wide", unpack(packed) if is_wide else None, persistent=False)

    def _apply(self, *args, **kwargs):
        raise RuntimeError("a packed layer stays on the device where it was made: C has its address")

    def forward(self, x):
        """y (..., out) for x (..., in), as BitLinear"""
        assert x.shape[-1] == self.in_features
        dtype, n_rows = output_dtype(x), x.shape[:-1].numel()
        if self.library and n_rows <= FEW:
            x = x.float().contiguous()
            y = x.new_empty(*x.shape[:-1], self.matrix.n_out)
            rest = x.data_ptr(), None, None, 0.0, None, None, y.data_ptr()
            self.library.packed_linear(ctypes.addressof(self.matrix), 1, n_rows, self.in_features, *rest)
        elif self.has_triton and n_rows == 1:
            import packed_cuda

            y = packed_cuda.packed_linear(self.packed, x, self.matrix.s)
            y = y.view(*x.shape[:-1], self.matrix.n_out)
        else:
            with torch.autocast(x.device.type, enabled=False):
                q, a = quantize_activations(x.reshape(-1, self.in_features))
                codes = unpack(self.packed) if self.wide is None else self.wide
                y = (exact_matmul(q, codes) / (self.s * a)).view(*x.shape[:-1], self.matrix.n_out)
        if y.shape[-1] > self.out_features:
            # a function of strided values would take other vectors than after BitLinear, with other last bits
            y = y[..., : self.out_features].contiguous()
        return y.to(dtype)


class PackedExperts(nn.ModuleList):
    """BitExperts as a PackedLinear each"""

    def forward(self, x, sizes):
        """y (N, out) for x (N, in), of which the first sizes[0] rows go to expert 0, and so on"""
        return torch.cat([layer(rows) for layer, rows in zip(self, x.split(sizes))])


class PackedBlock(Block):
    """a Block of packed layers. One token of one text goes through it in a dozen calls instead of a hundred:
    each of torch's costs microseconds, of which the packed layers themselves take few."""

    @staticmethod
    def of(block):
        """turn a Block, whose layers are packed already, into one"""
        block.__class__ = PackedBlock
        block.matrices = {
            what: (Matrix * len(layers))(*(layer.matrix for layer in layers))
            for what, layers in dict(
                qkv=[block.attn.q_proj, block.attn.k_proj, block.attn.v_proj],
                o=[block.attn.o_proj],
                gate_up=[block.ffn.gate_proj, block.ffn.up_proj],
                down=[block.ffn.down_proj],
            ).items()
        }
        block.n_out = {what: sum(m.n_out for m in matrices) for what, matrices in block.matrices.items()}

    def product(self, what, x, norm=None, times=None, plus=None):
        """y (1, 1, outs) of x (1, 1, in) through these matrices side by side. Where they are given, x is
        first normalised and multiplied by times, and plus is added to y."""
        matrices, y = self.matrices[what], x.new_empty(1, 1, self.n_out[what])
        mean = norm and x.pow(2).mean(-1, keepdim=True)  # torch's order of summing
        tensors = mean, norm and norm.weight, times, plus, y
        mean, weight, times, plus, out = (t if t is None else t.data_ptr() for t in tensors)
        how = x.data_ptr(), mean, weight, norm.eps if norm else 0.0, times, plus, out
        library().packed_linear(ctypes.addressof(matrices), len(matrices), 1, x.shape[-1], *how)
        return y

    def forward(self, x, cos, sin, cache=None):
        if x.shape[:2].numel() > 1 or cache is None or output_dtype(x) != torch.float32:
            return super().forward(x, cos, sin, cache)
        attn = self.attn
        H, K, D = attn.n_head, attn.n_kv_head, attn.head_dim
        qkv = self.product("qkv", x, self.attn_norm).view(1, H + 2 * K, 1, D)
        library().rotate(qkv.data_ptr(), H + K, D, cos.data_ptr(), sin.data_ptr())
        q, k, v = qkv.split((H, K, K), 1)
        k, v, mask = cache.append(attn, k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=H != K)
        x = self.product("o", y.reshape(1, 1, -1), plus=x)
        gate, up = self.product("gate_up", x, self.ffn_norm).chunk(2, -1)
        return self.product("down", F.silu(gate), times=up, plus=x), None


def packed_linear(w):
    """the PackedLinear of master weights (out, in)"""
    t, s = ternarize(w)
    return PackedLinear(pack(F.pad(t, (0, 0, 0, -len(t) % 4))), s, len(t))


def replace(model, name, layer):
    """put a layer in the place of the one at this name"""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)


def pack_layers(model):
    """give the ternary layers of a model integer weights: the same function, which cannot be trained"""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BitLinear):
            packed = packed_linear(layer.weight)
        elif isinstance(layer, BitExperts):
            packed = PackedExperts(map(packed_linear, layer.weight))
        else:
            continue
        replace(model, name, packed)
    for block in model.blocks:
        layers = [layer for layer in block.modules() if isinstance(layer, PackedLinear)]
        whole = all(layer.library and layer.out_features == layer.matrix.n_out for layer in layers)
        if layers and whole and isinstance(block.ffn, FeedForward):
            PackedBlock.of(block)
