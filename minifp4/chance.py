"""Random bits for stochastic rounding: the same for the same element, whatever computes it.

A generator with a state would give other bits to a run that resumes, that computes in pieces of another size,
or on another device. So the bits are a hash of a counter: of (seed, step, name of the parameter) and of the
element's place in its matrix, and of nothing else.
"""

import hashlib

import torch

from .nvfp4 import BLOCK, DRAWS


def rounding_key(seed, step, name):
    """Two int32 from which all random bits of one update derive: the same after a resume, on every device."""
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest()
    return tuple(int.from_bytes(half, "little", signed=True) for half in (digest[:4], digest[4:]))


def random_bits(key, first, shape):
    """Random int32 [rows, K] for the elements from number `first` (int32 []) of a matrix on; key: int32 [2].

    The counter is that of a block of 16. Its numbers are u + j * v with two hashes u and v: any two of them
    are independent of each other, which is all that a sum of rounding errors needs to stay small, and each
    costs one addition.
    """
    rows, k = shape
    block = BLOCK if k % BLOCK == 0 else k
    place = torch.arange(block, dtype=torch.int32, device=first.device)
    starts = first + block * torch.arange(rows * k // block, dtype=torch.int32, device=first.device)
    u = hashed(starts ^ key[0])
    v = hashed(u + key[1])
    return (u.unsqueeze(1) + place * v.unsqueeze(1)).view(shape)


def uniform(bits):
    """The lower 22 of random bits as fp32 in [0, 1)."""
    return (bits & 2**DRAWS - 1) * 2.0**-DRAWS


def hashed(x):
    """A bijection of int32 that flips each bit half of the time (constants: C. Wellons, "lowbias32")."""
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * -0x7B935975  # 0x846CA68B as a signed number
    return x ^ (x >> 16 & 0xFFFF)


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
