"""
Ternary layers that can only compute: four codes to a byte in place of the float master weights, and the same
bits out.

The layout is that of transformers, on the disk and in memory. On a CPU a C function reads it (packed.c,
compiled when a model is loaded, in half a second): it widens the codes in registers, so that a weight costs a
quarter of a byte of memory traffic. Without a C compiler they are widened to int8 at load. Many rows at a
time are a product for the library that training uses (kernels.exact_matmul), after unpacking. On CUDA one row
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

import quant
from model import Block
from nanobit.experts import Experts
from nanobit.kernels import exact_matmul
from nanobit.machine import no_compiler
from quant import BitExperts, BitLinear, output_dtype, quantize_activations, ternarize

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
    """packed.c compiled for this processor, or None, with a line on stderr: all works without it"""
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
    if out is not a multiple of 4, s (1, 1). To be made on the device where it stays."""

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
            from nanobit.infer import packed_cuda

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


PRODUCTS = dict(
    qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    o=("attn.o_proj",),
    gate_up=("ffn.gate_proj", "ffn.up_proj"),
    down=("ffn.down_proj",),
)


class PackedBlock(Block):
    """a Block of packed layers. One token of one text goes through it in a dozen calls instead of a hundred:
    each of torch's costs microseconds, of which the packed layers themselves take few.

    It repeats Block.forward (model.py) and all that this calls. Whoever changes one changes the other;
    pack_blocks checks that they still agree.
    """

    @staticmethod
    def of(block, layers):
        """Turn a Block into a PackedBlock; layers: {name in the block: PackedLinear}. ValueError if it has
        other layers or parameters than forward assumes: C would read and write beyond their ends."""
        names = [name for names in PRODUCTS.values() for name in names]
        if type(block) is not Block or layers.keys() != set(names):
            raise ValueError(f"{type(block).__name__} has the ternary layers {', '.join(layers)}")
        widths = [(layers[name].in_features, layers[name].out_features) for name in names]
        (C, n_q), (_, n_kv), *_ = widths
        n_ffn = layers["ffn.gate_proj"].out_features
        if widths != [(C, n_q), (C, n_kv), (C, n_kv), (n_q, C), (C, n_ffn), (C, n_ffn), (n_ffn, C)]:
            raise ValueError(f"its layers have the widths {widths}")
        parameters = {name: tuple(w.shape) for name, w in block.state_dict().items()}
        if parameters != {"attn_norm.weight": (C,), "ffn_norm.weight": (C,)}:
            raise ValueError(f"its other parameters are {parameters}")
        block.matrices = {
            what: (Matrix * len(names))(*(layers[name].matrix for name in names))
            for what, names in PRODUCTS.items()
        }
        block.n_out = {what: sum(m.n_out for m in matrices) for what, matrices in block.matrices.items()}
        block.__class__ = PackedBlock

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


def as_packed(layer):
    """Return the packed form of a BitLinear or BitExperts"""
    if isinstance(layer, BitLinear):
        return packed_linear(layer.weight)
    return PackedExperts(map(packed_linear, layer.weight))


def difference(ours, theirs):
    """Return the largest difference of two tensors: 0.0 if they are equal, where NaN equals NaN."""
    is_same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    return 0.0 if is_same.all() else (ours - theirs).abs().max().item()


@torch.no_grad()
def pack_layers(model):
    """Give the ternary layers of a model integer weights: the same function, which cannot be trained.

    A packed layer repeats BitLinear.forward (quant.py). One layer of each shape is compared with it, on four
    random rows; if the two differ, nothing is packed, and a line on stderr says so.
    """
    packed, compared = {}, set()
    for name, layer in quant.bit_layers(model).items():
        packed[name] = as_packed(layer)
        shape = type(layer), layer.weight.shape
        if shape in compared:
            continue
        compared.add(shape)
        n_expert = layer.weight.shape[0] if isinstance(layer, BitExperts) else 0
        x = torch.randn(n_expert or 4, shape[1][-1], generator=torch.Generator().manual_seed(0))
        x = x.to(layer.weight.device)
        sizes = ([1] * n_expert,) if n_expert else ()
        off = difference(packed[name](x, *sizes), layer(x, *sizes))
        if off:
            print(
                f"{name}: {type(layer).__name__} (quant.py) does not compute what packed.py does (largest "
                f"difference {off:.3g}): its own forward is used, with the float weights, which is slower",
                file=sys.stderr,
            )
            return
    for name, layer in packed.items():
        replace(model, name, layer)


def pack_blocks(model, single_tokens):
    """Make each Block of packed layers a PackedBlock, if these compute the same bits; if they do not, the
    Blocks stay, and the reason is printed on stderr. single_tokens(model) returns a function that computes
    the logits of tokens which the model reads one by one."""
    candidates, why = [], ""
    for block in model.modules():
        if not isinstance(block, Block) or isinstance(getattr(block, "ffn", None), Experts):
            continue
        layers = {name: layer for name, layer in block.named_modules() if isinstance(layer, PackedLinear)}
        has_c = [layer.library and layer.out_features == layer.matrix.n_out for layer in layers.values()]
        if has_c and all(has_c):
            candidates.append((block, layers))
    if not candidates:
        return
    with torch.random.fork_rng(devices=[]):  # a Block that was changed may draw random numbers
        logits = single_tokens(model)
        plain = logits()
        try:
            for block, layers in candidates:
                PackedBlock.of(block, layers)
            if off := difference(logits(), plain):
                why = f"the largest difference of logits is {off:.3g}"
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {error}"
    if why:
        for block, _ in candidates:
            if type(block) is PackedBlock:
                block.__class__ = Block
        print(
            f"PackedBlock (packed.py) does not compute what Block (model.py) does: {why}; so each token goes "
            "through Block, which is slower",
            file=sys.stderr,
        )
