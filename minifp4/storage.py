"""How a matrix of numbers is kept between two optimizer steps.

Training reads a number, adds something small to it and writes it back. What is small against the gap
between two numbers that the storage can hold, nearest rounding discards, every time: in bf16 the gap at 1
is 2**-7, so adding .001 a thousand times gives 1. Stochastic rounding (SR) rounds 1.001 up to 1.0078 about
one time in eight and down to 1 else, and after a thousand writes the number is near 2, as it should be:
right on average, whatever the gap.

    kind     bytes a number    gap between neighbours
    fp32     4                 2**-23 of the number, at most
    bf16     2                 2**-7
    fp16     2                 2**-10, or 2**-24 in all below 2**-14
    int8     1.0625            1/127 to 1/112 of the largest of 16 neighbours
    nvfp4    0.5625            1/12 to 1/3 of the largest of 16 neighbours

One class for each way of storing. They work on whole rows, so that the optimizer can walk through a matrix
in pieces of any size and never needs a dense fp32 copy of it:

    tensors                      {name: tensor} of what is kept, each with the matrix's rows first
    read(rows)                   the numbers in some rows (a slice), fp32 [rows, K], in memory of their own
    encode(x, rows, bits, bound) what to write into these rows for the numbers `x`, {name: tensor}; `bits`,
                                 random and shaped as x, make the rounding stochastic, None makes it nearest
    bound(rows)                  a number for each row that none of its numbers exceeds by much, [rows, 1],
                                 or None; `encode` is given the new one (`bound`)

A new kind of moments is a class with these four members, made by `kind(shape, device, positive)`, and a line
in `KINDS`: it trains at once.

`positive` storage is for sqrt(v), AdamW's denominator. It has no sign, and **it cannot hold 0**: if a small
sqrt(v) became 0 among larger neighbours, its next update would be divided by eps, a step 10**5 too long,
and the loss NaN. So no code stands for 0, and a block's scale never underflows. Only rows that are all zero
read as zero, because their row's scale is. (For the same reason moments are not kept in fp16, which has
nothing between 0 and 6e-8.)

In 4 bits sqrt(v) has 16 numbers, 1 and 1.5 times the powers of two from 2**-5 to 2**2: the sign bit, idle in
E2M1, serves as a third bit of the exponent. Both the range and the rounding count. With E2M1's own eight a
number below a twelfth of its block's largest was pulled up to that, so that a weight whose gradient is a
hundredth of its neighbour's moved at an eighth of AdamW's speed; and rounded to nearest, it stays where a
step changes it by less than half a gap, high long after the gradients have become small. (From scratch,
with bf16 weights: +1.3 % of loss with eight, +1.6 % with 16 to nearest, +.4 % so.)

Scales belong to one row or to a piece of one, so any split of a matrix into rows stores the same bits, and
the rows of rare tokens do not vanish beside those of frequent ones.
"""

import torch

from .chance import stochastic_cast, uniform
from .nvfp4 import (
    BLOCK, DRAWS, E2M1_MAX, E2M1_TABLE, E4M3_MAX, FP32_MAX, block_scale, code_table, e2m1_code, from_units,
    in_units, look_up, pair, row_chunks,
)  # fmt: skip
from .packed import Packed

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MASTERS = (*FLOATS, "nvfp4x2", "nvfp4")  # what weights may be stored as
ROOT = [m * 2.0**e for e in range(-5, 3) for m in (1.0, 1.5)]  # the 16 codes of sqrt(v): 1/32 to 6
ROOT_TABLE = code_table(ROOT)
E4M3_MIN = 2.0**-9  # the smallest positive E4M3


class Float:
    """fp32, bf16 or fp16, over a tensor that may be somebody else's (a parameter)."""

    def __init__(self, data):
        if data.shape[1] % 2:
            raise ValueError(f"rows must have an even number of columns, got {tuple(data.shape)}")
        self.tensors = {"data": data}

    def bound(self, rows):
        return None

    def read(self, rows):
        return self.tensors["data"][rows].to(torch.float32, copy=True)

    def encode(self, x, rows, bits=None, bound=None):
        dtype = self.tensors["data"].dtype
        stochastic = bits is not None and dtype != torch.float32
        return {"data": stochastic_cast(x, dtype, bits) if stochastic else x.to(dtype)}


class Weight:
    """A `Packed` parameter."""

    def __init__(self, weight):
        self.weight, self.tensors = weight, weight.tensors()
        del self.tensors["global_scale"]  # it has no rows

    def bound(self, rows):
        return None

    def read(self, rows):
        return self.weight.stored(rows)

    def encode(self, x, rows, bits=None, bound=None):
        return self.weight.encode(x, rows, bits)


class NVFP4Moment:
    """m or sqrt(v) as NVFP4 with a global scale for each row, which is made from the row's `bound`.

    The bound is known before the row is computed, its largest number only after. A bound twice too large
    costs nothing, because block scales are floating-point numbers.
    """

    roots, least = ROOT_TABLE, 0  # the numbers of sqrt(v)'s codes, and its smallest code

    def __init__(self, shape, device, positive):
        self.positive, (rows, k) = positive, shape
        qdata = torch.zeros(rows, k // 2, dtype=torch.uint8, device=device)
        self.tensors = {"qdata": qdata, **zero_scales("nvfp4", shape, device)}

    def bound(self, rows):
        return self.tensors["row_scale"][rows] * (E2M1_MAX * E4M3_MAX / 2)

    def read(self, rows):
        qdata, scale, row_scale = (tensor[rows] for tensor in self.tensors.values())
        codes = look_up(qdata, self.roots if self.positive else E2M1_TABLE)
        return from_units(codes, scale, row_scale)

    def floored(self):
        """(numbers with the smallest code, all of them), int64 []; rows that are 0 do not count."""
        at_floor, counted = 0, 0
        for rows in row_chunks(self.tensors["qdata"], 256):  # few: to count truths torch makes them int64
            codes, used = self.tensors["qdata"][rows], self.tensors["row_scale"][rows] > 0
            at_floor += ((codes & 15 <= self.least) & used).sum() + ((codes >> 4 <= self.least) & used).sum()
            counted += used.sum() * codes.shape[1] * 2
        return at_floor, counted

    def encode(self, x, rows, bits=None, bound=None):
        upward = bits is not None and not self.positive
        scales = new_scales(x, bound, E2M1_MAX, upward, never_zero=self.positive)
        y = in_units(x.unflatten(-1, (-1, BLOCK)), *scales[:2]).flatten(-2)
        codes = root_code(y, shared(bits)) if self.positive else e2m1_code(y, bits)
        return {"qdata": pair(codes), "scale": scales[0], "row_scale": scales[2]}


class Int8Moment:
    """m or sqrt(v) as whole numbers of 8 bits, m from -127 to 127 and sqrt(v) from 1 to 255, with the scales
    of `NVFP4Moment`."""

    def __init__(self, shape, device, positive):
        self.positive, self.most, (rows, k) = positive, 255.0 if positive else 127.0, shape
        qdata = torch.zeros(rows, k // 2, dtype=torch.int16, device=device)  # two numbers in each
        self.tensors = {"qdata": qdata, **zero_scales("int8", shape, device)}

    def bound(self, rows):
        return self.tensors["row_scale"][rows] * (self.most * E4M3_MAX / 2)

    def read(self, rows):
        qdata, scale, row_scale = (tensor[rows] for tensor in self.tensors.values())
        numbers = qdata.view(torch.uint8 if self.positive else torch.int8)
        return from_units(numbers.float(), scale, row_scale)

    def encode(self, x, rows, bits=None, bound=None):
        scales = new_scales(x, bound, self.most, upward=True, never_zero=True)
        y = in_units(x.unflatten(-1, (-1, BLOCK)), *scales[:2]).flatten(-2)
        if self.positive or bits is None:
            y = y.round().clamp(1 if self.positive else -self.most, self.most)
        else:
            y = (y + uniform(bits)).floor().clamp(-self.most, self.most)
        numbers = y.to(torch.uint8 if self.positive else torch.int8)
        return {"qdata": numbers.view(torch.int16), "scale": scales[0], "row_scale": scales[2]}


KINDS = {  # of moments
    "fp32": lambda shape, device, positive: Float(torch.zeros(shape, device=device)),
    "bf16": lambda shape, device, positive: Float(torch.zeros(shape, device=device, dtype=torch.bfloat16)),
    "int8": Int8Moment,
    "nvfp4": NVFP4Moment,
}


def master(weight):
    """The storage that a parameter (a matrix) is."""
    return Weight(weight) if isinstance(weight, Packed) else Float(weight)


def zeros(kind, shape, device, positive=False):
    """Storage of one of `KINDS` for a matrix of `shape` (rows, K), all zero."""
    if kind not in KINDS:
        raise ValueError(f"moments are stored as one of {', '.join(KINDS)}, got {kind!r}")
    return KINDS[kind](shape, device, positive)


def write(store, rows, new, ok):
    """Store {name: tensor} in some rows of a storage, unless `ok` (bool []) is false."""
    for name, value in new.items():
        kept = store.tensors[name][rows]
        kept.copy_(torch.where(ok, value, kept))


def zero_scales(kind, shape, device):
    """The scales of a storage of blocks, all zero: E4M3 for each block, fp32 for each row."""
    rows, k = shape
    if k % BLOCK:
        raise ValueError(
            f"{kind} storage needs rows of whole blocks of {BLOCK}, got rows of {k}: use bf16 or fp32"
        )
    scale = torch.zeros(rows, k // BLOCK, device=device).to(torch.float8_e4m3fn)
    return {"scale": scale, "row_scale": torch.zeros(rows, 1, device=device)}


def new_scales(x, bound, most, upward, never_zero):
    """(block scales, the reciprocals of the row scales, row scales) for numbers `x` [rows, K] of which the
    largest is about `bound` [rows, 1]; codes go up to `most`."""
    row_scale = bound * (2 / (most * E4M3_MAX))  # half of E4M3's range is for what exceeds the bound
    encode_scale = (1 / row_scale).clamp(max=FP32_MAX)
    scale = block_scale(x.unflatten(-1, (-1, BLOCK)).abs().amax(-1), encode_scale, upward, most)
    if never_zero:
        scale = scale.float().clamp(min=E4M3_MIN).to(torch.float8_e4m3fn)
    return scale, encode_scale, row_scale


def shared(bits):
    """One draw for each block of sqrt(v), shaped as `bits` [rows, K]: that of its first number in even
    columns, its opposite in odd ones. Each number is right on average as with a draw of its own, and a kernel
    keeps one until the block's largest number is known, not 16."""
    if bits is None:
        return None
    first = bits[..., ::BLOCK].unsqueeze(-1)
    return torch.cat([first, ~first], -1).repeat(1, 1, BLOCK // 2).flatten(-2)


def root_code(y, bits=None):
    """The number, uint8, of one of the two of `ROOT` around y >= 0: the nearest (half way between them: the
    larger), or with random `bits` one by chance, as in `nvfp4.code`.

    One ruler is enough, because there are two codes for each power of two: with y = mantissa * 2**exponent,
    the mantissa from 1/2 to 1, 4 * mantissa + 2 * exponent + 6 is 0 for 1/32, 1 for 3/64, ..., 15 for 6, and
    between two codes a straight line. It is counted in units of 2**-22.
    """
    mantissa, exponent = torch.frexp(y.clamp(ROOT[0], ROOT[-1]))
    fine = (mantissa * 2.0 ** (DRAWS + 2)).to(torch.int32) + (2 * exponent + 6 << DRAWS)
    half = 2 ** (DRAWS - 1)
    share = half if bits is None else bits + half & 2**DRAWS - 1  # half and a number with a sign: `fused/`
    return (fine + share >> DRAWS).to(torch.uint8)
