"""How a matrix of numbers is kept between two optimizer steps.

Training reads a number, adds something small to it and writes it back. What is small against the gap
between two numbers that the storage can hold, nearest rounding discards, every time: in bf16 the gap at 1
is 2**-7, so adding .001 a thousand times gives 1. Stochastic rounding (SR) rounds 1.001 up to 1.0078 about
one time in eight and down to 1 else, and after a thousand writes the number is near 2, as it should be:
right on average, whatever the gap.

One class for each kind of storage, all with the same four members, working on whole rows, so that the
optimizer can walk through a matrix in pieces of any size and never needs a dense fp32 copy of all of it:

    zeros (the constructor)   a matrix of zeros, [rows, K]
    read(rows)                rows (a slice) as fp32
    write(rows, x, key)       store fp32 rows; `key` makes the rounding stochastic, None makes it nearest
    tensors                   what is really kept: for checkpoints and for counting bytes

    kind     bytes a number    gap between neighbours
    fp32     4                 2**-23 of the number, at most
    bf16     2                 2**-7
    fp16     2                 2**-10, or 2**-24 in all below 2**-14
    int8     1.03              1/127 of the largest of 128 neighbours
    nvfp4    0.5625            1/12 to 1/3 of the largest of 16 neighbours

`positive` storage is for sqrt(v), AdamW's denominator. It has no sign, and **it cannot hold 0**: if a small
sqrt(v) became 0 among larger neighbours, its next update would be divided by eps, a step 10**5 too long,
and the loss NaN. The smallest code stands for 1 instead, and a block's scale never underflows. Only rows
that are all zero read as zero.

Scales belong to one row (or to a piece of one), so any split of a matrix into rows stores the same bits,
and the rows of rare tokens do not vanish beside those of frequent ones.
"""

import hashlib

import torch
import torch.nn.functional as F

from .nvfp4 import BLOCK, E2M1_MAX, E4M3_MAX, FP32_MAX, decode, encode
from .packed import Packed

INT8_BLOCK = 128  # numbers that share a scale in `Int8`
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = (*FLOATS, "int8", "nvfp4")  # of moments
MASTERS = (*FLOATS, "nvfp4x2", "nvfp4")  # of weights


def master(weight):
    """The storage that a parameter (a matrix) is."""
    return PackedMaster(weight) if isinstance(weight, Packed) else Float(weight)


def zeros(kind, shape, device, positive=False):
    """Storage of one of `KINDS` for a matrix of `shape` (rows, K), all zero."""
    if kind in FLOATS:
        return Float(torch.zeros(shape, dtype=FLOATS[kind], device=device))
    if kind not in KINDS:
        raise ValueError(f"a precision is one of {', '.join(KINDS)}, got {kind!r}")
    return (Int8 if kind == "int8" else Block4)(shape, device, positive)


class Float:
    """fp32, bf16 or fp16, over a tensor that may be somebody else's (a parameter)."""

    def __init__(self, data):
        self.tensors = {"data": data}

    def read(self, rows):
        return self.tensors["data"][rows].to(torch.float32, copy=True)  # not a view that `write` would change

    def write(self, rows, x, key=None):
        data = self.tensors["data"]
        if key is not None and data.dtype != torch.float32:
            x = stochastic_cast(x, data.dtype, counter_bits(key, rows, x.shape, x.device))
        data[rows] = x.to(data.dtype)


class PackedMaster:
    """A `Packed` parameter: `nvfp4`, or `nvfp4x2` if it has a residual."""

    def __init__(self, weight):
        self.weight, self.tensors = weight, weight.parts()

    def read(self, rows):
        return self.weight.exact(rows)

    def write(self, rows, x, key=None):
        if key is None:
            return self.weight.store(rows, x)
        noise = counter_uniform(key, rows, x.shape, x.device)
        blocks = torch.Size((x.shape[0], x.shape[1] // BLOCK))
        self.weight.store(rows, x, noise, counter_uniform((key[1], key[0]), rows, blocks, x.device))


class Int8:
    """8-bit integers, each block of 128 along the row times its own fp32 scale."""

    def __init__(self, shape, device, positive):
        self.least, self.most = (1, 255) if positive else (-127, 127)
        code = torch.zeros(shape, dtype=torch.uint8 if positive else torch.int8, device=device)
        scale = torch.zeros(shape[0], -(-shape[1] // INT8_BLOCK), device=device)
        self.tensors = {"code": code, "scale": scale}

    def read(self, rows):
        code = self.tensors["code"][rows]
        return (self._blocks(code.float()) * self.tensors["scale"][rows].unsqueeze(-1)).flatten(1)[
            :, : code.shape[1]
        ]

    def write(self, rows, x, key=None):
        blocks = self._blocks(x)
        scale = blocks.abs().amax(-1) / self.most
        y = blocks / scale.where(scale > 0, 1.0).unsqueeze(-1)
        if key is None:
            y = y.round()
        else:
            y = (y + self._blocks(counter_uniform(key, rows, x.shape, x.device))).floor()
        code = y.clamp(self.least, self.most).flatten(1)[:, : x.shape[1]]
        self.tensors["code"][rows] = code.to(self.tensors["code"].dtype)
        self.tensors["scale"][rows] = scale

    @staticmethod
    def _blocks(x):  # [rows, K] -> [rows, ceil(K/128), 128]; a short last block is filled with zeros
        return F.pad(x, (0, -x.shape[1] % INT8_BLOCK)).unflatten(-1, (-1, INT8_BLOCK))


class Block4:
    """NVFP4 whose global scale is one fp32 number a row."""

    def __init__(self, shape, device, positive):
        self.smallest = 1 if positive else 0
        rows, k = shape
        if k % BLOCK:
            raise ValueError(
                f"nvfp4 storage needs rows of whole blocks of {BLOCK}, got rows of {k}: use int8 or bf16"
            )
        self.tensors = {
            "qdata": torch.zeros(rows, k // 2, dtype=torch.uint8, device=device),
            "scale": torch.zeros(rows, k // BLOCK, device=device).to(torch.float8_e4m3fn),
            "row_scale": torch.zeros(rows, 1, device=device),
        }

    def read(self, rows):
        return decode(*(tensor[rows] for tensor in self.tensors.values()))

    def write(self, rows, x, key=None):
        row_scale = x.abs().amax(-1, keepdim=True) / (E2M1_MAX * E4M3_MAX)
        noise = None if key is None else counter_uniform(key, rows, x.shape, x.device)
        qdata, scale = encode(x, (1 / row_scale).clamp(max=FP32_MAX), noise, self.smallest)
        self.tensors["qdata"][rows] = qdata
        self.tensors["scale"][rows] = scale
        self.tensors["row_scale"][rows] = row_scale


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


def rounding_key(seed, step, name, what):
    """Two int32 from which all random bits of one write derive: the same after a resume, on every device."""
    digest = hashlib.blake2b(f"{seed}/{step}/{name}/{what}".encode(), digest_size=8).digest()
    return tuple(int.from_bytes(half, "little", signed=True) for half in (digest[:4], digest[4:]))


def counter_bits(key, rows, shape, device):
    """Random int32 [rows, K] that depend on the key and on each element's place in the whole matrix,
    nothing else.

    A hash of a counter (multiply, shift, xor) instead of a generator with a state: pieces of any size, in
    any order, on any device, draw the same bits for the same element.
    """
    first = rows.start * shape[-1]
    x = torch.arange(first, first + shape.numel(), dtype=torch.int32, device=device)
    x = _mix(_mix(x ^ key[0]) + key[1])
    return x.view(shape)


def counter_uniform(key, rows, shape, device):
    """The same as fp32 in [0, 1), multiples of 2**-24."""
    return (counter_bits(key, rows, shape, device) >> 8 & 0xFFFFFF).float() * 2.0**-24


def _mix(x):  # a bijection of int32 that flips each bit half of the time (constants: C. Wellons, "lowbias32")
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * -0x7B935975  # 0x846CA68B as a signed number
    return x ^ (x >> 16 & 0xFFFF)
