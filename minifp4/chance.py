"""Random bits for stochastic rounding: the same for the same element, whatever computes it.

A generator with a state would give other bits to a run that resumes, that computes in pieces of another size,
or on another device. So the bits are a hash of a counter: of (seed, name of the parameter) and of the
element's place in its matrix. From step to step they turn:

    r(step) = r(0) + step * TURN        modulo 2**32

Each draw is uniform, so rounding is right in the mean. Draws that are new in each step would be that as well,
but then their errors add up as luck does, to the square root of their number. What turns by an irrational
part of a circle in each step is spread evenly over the circle by any few steps in a row. So an update that
stays about the same for ten steps, as AdamW's do, is stored nearly as often as it should be, and rounding
brings less noise into the weights: on a noisy quadratic a third to two thirds, and a small Qwen3 with 4-bit
weights pays 5 % of its loss for it instead of 8.5 %.

A weight that swings between two codes has its draws come back when the update the other way has grown. So it
moves a little more than was asked for; `moved` shows it. And a draw is any number only for one who does not
know what the last ones did. Where a move of a block's largest number brings a new scale, `packed.py` takes
upper bits instead of the lower ones that made it move. And m, which loses a tenth in each step, loses a
little more: where gradients are noisy it is 5 % too small, as if beta1 were .895. That is the price for a
fifth less of its noise.
"""

import hashlib

import torch

from .nvfp4 import BLOCK, DRAWS


# Its part of 2**32 (a moment takes the upper bits of a draw), of 2**22 (nvfp4 the lower ones), of 2**18
# (nvfp4x2), 2**16 (bf16) and 2**13 (fp16) is far from all simple fractions p/q: q * |q * part - p| is at
# least .13 for q below 300, where the golden section, the best there is, has .38.
TURN = 0x5E137269


def rounding_key(seed, step, name):
    """(what an element's draws start from, how far they have turned), two int32: the same after a resume, on
    every device."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest()
    turned = (step * TURN + 2**31) % 2**32 - 2**31
    return int.from_bytes(digest, "little", signed=True), turned


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
    v = hashed(u)
    return ((u + key[1]).unsqueeze(1) + place * v.unsqueeze(1)).view(shape)


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
