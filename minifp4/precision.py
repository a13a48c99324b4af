"""How a matrix of numbers is kept between two optimizer steps.

Training reads a number, adds something small to it and writes it back. What is small against the gap
between two numbers that the storage can hold, nearest rounding discards, every time: in bf16 the gap at 1
is 2**-7, so adding .001 a thousand times gives 1. Stochastic rounding (SR) rounds 1.001 up to 1.0078 about
one time in eight and down to 1 else, and after a thousand writes the number is near 2, as it should be:
right on average, whatever the gap.

One class for each kind of storage, all with the same three members. They work on whole rows, so that the
optimizer can walk through a matrix in pieces of any size and never needs a dense fp32 copy of it, and on
halves of rows (`nvfp4.halves`):

    tensors                      {name: tensor} of what is kept, each with the matrix's rows first
    rows(slice)                  some rows of them, `parts`, as views with one block of 16 in each row: this
                                 shape lets a compiler make one kernel of all that follows
    values(parts)                the fp32 halves that such parts stand for, [blocks, 8] each
    encoded(x, old, bits, bound) what to keep for the halves `x`, as {name: tensor}. `bits` make the rounding
                                 stochastic, None makes it nearest; `old` is what was kept so far, and
                                 `bound` a number for each row that no |x| exceeds by much (for `Blocks`)

    kind     bytes a number    gap between neighbours
    fp32     4                 2**-23 of the number, at most
    bf16     2                 2**-7
    fp16     2                 2**-10, or 2**-24 in all below 2**-14
    int8     1.0625            1/127 to 1/112 of the largest of 16 neighbours
    nvfp4    0.5625            1/12 to 1/3 of the largest of 16 neighbours

`positive` storage is for sqrt(v), AdamW's denominator. It has no sign, and **it cannot hold 0**: if a small
sqrt(v) became 0 among larger neighbours, its next update would be divided by eps, a step 10**5 too long,
and the loss NaN. So no code stands for 0, and a block's scale never underflows. Only rows that are all zero
read as zero, because their row's scale is.

Scales belong to one row or to a piece of one, so any split of a matrix into rows stores the same bits, and
the rows of rare tokens do not vanish beside those of frequent ones.
"""

import functools
import hashlib

import torch

from . import packed
from .nvfp4 import (
    BLOCK,
    E2M1_MAX,
    E4M3_MAX,
    E4M3_MIN,
    FP32_MAX,
    RANDOM,
    SIX,
    block_amax,
    block_scale,
    decode,
    e4m3_byte,
    encode,
    in_blocks,
    inverse_scale,
    paired,
    pairs,
    raw,
    scaled,
    unpaired,
)  # fmt: skip
from .packed import Packed

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = ("fp32", "bf16", "int8", "nvfp4")  # of moments; in fp16 a sqrt(v) of 1e-8 would become 0
MASTERS = (*FLOATS, "nvfp4x2", "nvfp4")  # of weights
HALF = 0x3F000000  # the bits of .5 in fp32
SHIFT = 40  # bits below the point of a fraction in int64


def master(weight):
    """The storage that a parameter (a matrix) is."""
    return PackedMaster(weight) if isinstance(weight, Packed) else Float(weight)


def zeros(kind, shape, device, positive=False):
    """Storage of one of `KINDS` for a matrix of `shape` (rows, K), all zero."""
    if kind not in KINDS:
        raise ValueError(f"moments are stored as one of {', '.join(KINDS)}, got {kind!r}")
    if kind in FLOATS:
        return Float(torch.zeros(shape, dtype=FLOATS[kind], device=device))
    return Blocks(kind, shape, device, positive)


class Float:
    """fp32, bf16 or fp16, over a tensor that may be somebody else's (a parameter)."""

    def __init__(self, data):
        if data.shape[1] % 2:
            raise ValueError(f"rows must have an even number of columns, got {tuple(data.shape)}")
        self.tensors, self.dtype = {"data": data}, data.dtype

    def rows(self, rows):
        return {"data": pairs(one_block_a_row(self.tensors["data"][rows]))}

    def values(self, parts):
        return unpaired(parts["data"], self.dtype)

    def encoded(self, x, old, bits=None, bound=None):
        if bits is not None and self.dtype != torch.float32:
            x = [stochastic_cast(half, self.dtype, drawn) for half, drawn in zip(x, bits)]
        return {"data": paired(*(half.to(self.dtype) for half in x))}


def one_block_a_row(x):
    """[rows, K] -> [blocks, 16]; as it is if K is no multiple of 16."""
    return x.view(-1, BLOCK) if x.shape[1] % BLOCK == 0 else x


class PackedMaster:
    """A `Packed` parameter: `nvfp4`, or `nvfp4x2` if it has further bits."""

    def __init__(self, weight):
        self.tensors = weight.parts()
        self.global_scale = self.tensors.pop("global_scale")
        self.finer = "more" in self.tensors

    def rows(self, rows):
        return {name: _flat(tensor[rows]) for name, tensor in self.tensors.items()}

    def values(self, parts):
        return packed.stored(parts, self.global_scale, self.finer)

    def encoded(self, x, old, bits=None, bound=None):
        block_bits = None
        if bits is not None:  # bits of its first two numbers that their codes do not use
            even, odd = (half.narrow(1, 0, 1) for half in bits)
            block_bits = even >> 10 ^ odd
        return packed.encoded(old, self.global_scale, self.finer, x, bits, block_bits)


class Blocks:
    """4 or 8 bits a number, an E4M3 scale for each block of 16, an fp32 one for each row: NVFP4, but for the
    last, and the same with integers of 8 bits.

    The row's scale is made from its `bound`, not from its largest number: that is known only when all of the
    row has been computed, the bound before, so a GPU computes and encodes in one pass. A bound twice too
    large costs nothing, since block scales are floating-point numbers.

    Positive numbers of 4 bits use eight of the 16 codes: .5 .75 1 1.5 2 3 4 6, which is E2M1 with a leading 1
    in front of every mantissa, so that it has no 0.
    """

    def __init__(self, kind, shape, device, positive):
        self.bits8, self.positive = kind == "int8", positive
        self.most = (255.0 if positive else 127.0) if self.bits8 else E2M1_MAX
        rows, k = shape
        if k % BLOCK:
            raise ValueError(
                f"{kind} storage needs rows of whole blocks of {BLOCK}, got rows of {k}: use bf16 or fp32"
            )
        self.rows_a_block = _rows_a_block(k // BLOCK, device)
        pair = torch.int16 if self.bits8 else torch.uint8  # two codes, the even element in the lower half
        self.tensors = {
            "qdata": torch.zeros(rows, k // 2, dtype=pair, device=device),
            "scale": torch.zeros(rows, k // BLOCK, device=device).to(torch.float8_e4m3fn),
            "row_scale": torch.zeros(rows, 1, device=device),
        }

    def rows(self, rows):
        parts = {name: tensor[rows] for name, tensor in self.tensors.items()}
        return parts | {name: _flat(parts[name]) for name in ("qdata", "scale")}

    def bound(self, parts):
        """For each row a number that none of the values exceeds by much, [rows, 1]."""
        return parts["row_scale"] * (self.most * E4M3_MAX / 2)

    def of_blocks(self, x, parts):
        """A number for each row, [rows, 1] -> one for each block of `parts`, [blocks, 1]."""
        blocks = torch.arange(len(parts["scale"]), device=x.device)
        return x.index_select(0, blocks * self.rows_a_block >> SHIFT)

    def values(self, parts):
        scales = parts["scale"], self.of_blocks(parts["row_scale"], parts)
        if not self.bits8 and not self.positive:
            return decode(parts["qdata"], *scales)
        codes = parts["qdata"].to(torch.int32)
        if not self.bits8:  # a code's three bits are the last of the exponent and the first of the mantissa
            bits = ((codes & 7) << 22) + HALF, ((codes & 7 << 4) << 18) + HALF
            return scaled([half.view(torch.float32) for half in bits], *scales)
        if self.positive:
            codes = codes & 0xFF, codes >> 8 & 0xFF
        else:
            codes = codes << 24 >> 24, codes >> 8  # with the sign
        return scaled([code.float() for code in codes], *scales)

    def encoded(self, x, old, bits=None, bound=None):
        row_scale = bound * (2 / (self.most * E4M3_MAX))  # half of E4M3's range is for what exceeds it
        encode_scale = self.of_blocks((1 / row_scale).clamp(max=FP32_MAX), old)
        encoder = self._encode8 if self.bits8 else self._encode_positive if self.positive else encode
        qdata, scale = encoder(x, encode_scale, bits)
        return {"qdata": qdata, "scale": scale, "row_scale": row_scale}

    def _encode_positive(self, x, encode_scale, bits):
        y, scale = self._in_units(x, encode_scale, upward=bits is not None)
        # Half a step, or a random part of one, and cut off what is below the codes' bits.
        add = (2**21, 2**21) if bits is None else [half & RANDOM - 1 for half in bits]
        y = [half.view(torch.int32).clamp(HALF, SIX) - HALF + more for half, more in zip(y, add)]
        even, odd = (half >> 22 for half in y)
        return (even | odd << 4).to(torch.uint8), e4m3_byte(scale)

    def _encode8(self, x, encode_scale, bits):
        y, scale = self._in_units(x, encode_scale, upward=True)
        if bits is None:
            y = [half.round() for half in y]
        else:
            y = [(half + uniform(drawn)).floor() for half, drawn in zip(y, bits)]
        least = 1 if self.positive else -self.most
        even, odd = (half.clamp(least, self.most).to(torch.int32) for half in y)
        return (even & 0xFF | odd << 8).to(torch.int16), e4m3_byte(scale)

    def _in_units(self, x, encode_scale, upward):
        """(the halves `x` in units of their blocks' new scales, which are above 0; these scales)"""
        x = in_blocks(x)
        scale = block_scale(block_amax(x, self.positive), encode_scale, upward, self.most)
        scale = scale.clamp(min=E4M3_MIN)
        inverse = inverse_scale(scale, encode_scale)
        return [(half * inverse).flatten(-2) for half in x], scale


@functools.cache  # m and sqrt(v) find their rows by the same number, so a compiled update finds them once
def _rows_a_block(blocks_a_row, device):
    """Times the number of a block, and shifted by SHIFT: the number of its row. To a GPU a division is twenty
    instructions and this is four; exact as long as rows * blocks_a_row**2 <= 2**40: a million rows of 16,384
    numbers, 150,000 of 42,000."""
    return torch.tensor(2**SHIFT // blocks_a_row + 1, device=device)


def _flat(x):
    """Codes [rows, K/2] -> [blocks, 8], scales [rows, K/16] -> bytes [blocks, 1]."""
    return raw(x).view(-1, 1) if x.dtype == torch.float8_e4m3fn else x.view(-1, BLOCK // 2)


def write(parts, new, ok=None):
    """Store {name: tensor} in rows of a storage's tensors, unless `ok` (bool []) is false."""
    for name, value in new.items():
        parts[name].copy_(value if ok is None else torch.where(ok, value, parts[name]))


def stochastic_cast(x, dtype, bits):
    """Round fp32 `x` to one of its two neighbours in bf16 or fp16, the closer the likelier; `bits` int32,
    shaped as x.

    Adding random bits below the last one kept carries into it with the right probability; then cut them off.
    """
    dropped = 16 if dtype == torch.bfloat16 else 13  # of fp32's 23 mantissa bits
    offset = 0.0
    if dtype == torch.float16:
        # Below 2**-14 fp16 keeps fewer bits: its numbers lie evenly, as they do just above 2**-14. Round up
        # there.
        offset = torch.where(x.abs() < 2.0**-14, 2.0**-14, 0.0).copysign(x)
    mask = (1 << dropped) - 1
    kept = (x + offset).view(torch.int32) + (bits & mask) & ~mask
    limit = torch.finfo(dtype).max
    return (kept.view(torch.float32) - offset).clamp(-limit, limit).to(dtype)


def rounding_key(seed, step, name):
    """Two int32 from which all random bits of one update derive: the same after a resume, on every device."""
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest()
    return tuple(int.from_bytes(half, "little", signed=True) for half in (digest[:4], digest[4:]))


def counter_bits(key, first, shape):
    """Random int32 for halves of the given shape [rows, K/2], that depend on the key (int32 [2]) and on each
    element's number in the whole matrix, of which the `first` here is an int32 [], and on nothing else.

    A hash of a counter instead of a generator with a state: pieces of any size, in any order, on any device,
    draw the same bits for the same element. The counter is that of a row, which here is a block of 16. Its
    numbers are u + j * v with two hashes u and v: any two of them are independent of each other, which is all
    that a sum of rounding errors needs to stay small, and each costs one instruction.
    """
    mask, shift = key.unbind()
    rows, half = shape
    even = 2 * torch.arange(half, dtype=torch.int32, device=first.device)
    starts = first + 2 * half * torch.arange(rows, dtype=torch.int32, device=first.device).unsqueeze(1)
    u = _mix(starts ^ mask)
    v = _mix(u + shift)
    return u + even * v, u + (even + 1) * v


def uniform(bits):
    """The lower 22 of random bits as fp32 in [0, 1)."""
    return (bits & RANDOM - 1) * (1 / RANDOM)


def _mix(x):  # a bijection of int32 that flips each bit half of the time (constants: C. Wellons, "lowbias32")
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * -0x7B935975  # 0x846CA68B as a signed number
    return x ^ (x >> 16 & 0xFFFF)
