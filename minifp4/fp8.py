"""Matrix products in FP8: twice as fast on GPUs that have them, and rounded.

E4M3 (Micikevicius et al. 2022) is a float of 8 bits: three of mantissa, magnitudes from 2**-9 to 448. Tensor
cores multiply two such numbers exactly; what is lost is lost before, when an operand of bf16 is rounded from
8 to 4 significant bits:

    codes = E4M3(x * scale)        x is about codes / scale        a @ b.T = (codes_a @ codes_b.T) / scales

A gradient is far below 2**-9. So each operand is multiplied by a power of two, exactly, that brings its
largest number to between 128 and 256. A float loses nothing by the half of its range that stays unused, and
nothing is ever cut off. The scale is measured of every operand: nothing of it is remembered from one step to
the next, so that a run that goes on computes what it would have.

An infinity or a NaN makes NaN of the whole product, so that its step is skipped.

Hopper's tensor cores read both operands along the dimension that is added up. bf16 they transpose on the way,
FP8 they do not; so an operand that is needed along both dimensions is stored twice (`FP8.both`).

Only training multiplies like this, and not the head, whose logits decide. Text is generated, and a held-out
loss measured, as servers will compute: with activations in bf16.
"""

from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

from .linear import Products

E4M3 = torch.float8_e4m3fn
LEAST = 16  # what is added up, and what a weight makes of it, are multiples of so many numbers


def measure(x):
    """(scale, 1 / scale), fp32 [], of x [N / 16, 16, K]; the latter NaN if not all of it is finite."""
    # In two steps: the compiler's one that leaves a single number reads memory at a third of its speed.
    largest = x.flatten(1).abs().amax(1).amax().float()
    exponent = (largest.view(torch.int32) >> 23).clamp(8, 254)  # + 127: the largest is 1 to 2 times 2**it
    scale, inverse = ((bits << 23).view(torch.float32) for bits in (261 - exponent, exponent - 7))
    return scale, inverse + largest * 0


def rows(x, scale):
    """The codes of x [..., K]."""
    return (x.float() * scale).to(E4M3)


def columns(x, scale):
    """The same of x [N / 16, 16, K], transposed: [K, N / 16, 16]."""
    return both(x, scale)[1]


def both(x, scale):
    """`rows` and `columns`, for which x is read once."""
    codes = rows(x, scale)
    return codes, codes.permute(2, 0, 1).contiguous()


class Kernels(NamedTuple):
    """What is done with numbers, beside products; `fused/` has kernels of these four."""

    measure: Callable = measure
    rows: Callable = rows
    columns: Callable = columns
    both: Callable = both


class FP8(Products):
    """An operand is (codes, 1 / its scale), and True if it is to be added up in fp32.

    Tensor cores keep about 14 bits of a sum and cut off the rest: of 16,384 numbers that lean to one side
    nearly 4 % get lost. Two of the three products add up some thousand features, which are few enough; a
    weight's gradient all tokens of a batch. So its sums go on in fp32, which takes an eighth longer.
    """

    def __init__(self, kernels=Kernels()):  # noqa: B008
        self.kernels = kernels

    def rows(self, x):
        scale, inverse = self.kernels.measure(by_16(x))
        return self.kernels.rows(x, scale), inverse

    def columns(self, x):
        x = by_16(x)
        scale, inverse = self.kernels.measure(x)
        return self.kernels.columns(x, scale).flatten(1), inverse

    def both(self, x, columns=True):
        if not columns:
            return self.rows(x), absent(x)
        sixteens = by_16(x)
        scale, inverse = self.kernels.measure(sixteens)
        codes, transposed = self.kernels.both(sixteens, scale)
        return (codes.flatten(0, 1)[: len(x)], inverse), (transposed.flatten(1), inverse)

    def gradient(self, dy):
        rows, columns = self.both(dy)
        return rows, (*columns, True)

    def multiply(self, a, b, dtype):
        (a, of_a, *exactly), (b, of_b) = a, b
        if a.is_cuda:
            how = {"out_dtype": dtype, "use_fast_accum": not exactly}
            return torch._scaled_mm(a, b.T, scale_a=of_a, scale_b=of_b, **how)
        return ((a.float() * of_a) @ (b.float() * of_b).T).to(dtype)


def absent(x):
    """What has the shape of x's columns, but takes no memory."""
    nothing = x.new_zeros((), dtype=torch.float32)
    return nothing.to(E4M3).expand(x.shape[1], len(x) + missing(x)), nothing


def missing(x):
    """How many rows more would be a multiple of 16."""
    return -len(x) % LEAST


def by_16(x):
    """[N, K] -> [N / 16, 16, K], with rows of 0 where some are missing."""
    padded = F.pad(x, (0, 0, 0, missing(x))) if missing(x) else x  # `pad` copies also where it adds nothing
    return padded.unflatten(0, (-1, LEAST))


def use(model, kind=FP8):
    """Let all layers but the head multiply in FP8; ValueError names a layer that cannot."""
    names = {module: name for name, module in model.named_modules()}
    for layer in model.linears()[:-1]:
        if any(size % LEAST for size in layer.weight.shape):
            shape = " x ".join(map(str, layer.weight.shape))
            raise ValueError(f"--product fp8: {names[layer]} is {shape}, no multiples of {LEAST}")
        layer.products = kind()


def why_not(device):
    """The reason why `device` has no FP8 products, or None. A CPU computes the same, slowly."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        major, minor = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {major}.{minor}, FP8 products need 8.9"
    return None
