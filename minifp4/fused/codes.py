"""The arithmetic of `nvfp4.py` and `packed.py` for a GPU: the same bits, in as few instructions as there are.

Plain code rounds with three rulers and decodes with a table. A GPU has no cheap table, and everything here
runs once for every weight in every step, where each instruction is a fifth of a millisecond for Qwen3-4B.
Three facts save most of them:

- E2M1, E4M3 and fp16 are floating-point formats of one family. Put a code's bits where fp16 or fp32 has its
  exponent and mantissa, and it is that number, but for a power of two.
- Two codes share a byte. So the arithmetic goes through the even and the odd columns side by side (`halves`)
  and never interleaves them; a compiler then makes one kernel of decoding, updating and encoding. Where
  numbers of 16 bits are read or written, two at a time are one int32 (`pairs`).
- Integer, logic, compare and select instructions run at half the rate of fp32 products and sums. Magnitudes
  are compared as the integers that their bits are; those are ordered alike, NaN last.

Scales are handled as bytes (uint8) in memory and as fp32 numbers in registers: compilers know E4M3 as a type
only for GPUs of compute capability 8.9 and later. Packed weights are {name: tensor} of such bytes here.
"""

import torch

from ..nvfp4 import BLOCK, DRAWS, E2M1_MAX, E4M3_MAX, FP32_MAX
from ..packed import KEPT_FROM, KEPT_TO, LAST, MIDDLES, PLACES, UPPER

SIGN = -(2**31)  # the bit of the sign in fp32
ONE, SIX, SEVEN = 0x3F800000, 0x40C00000, 0x40E00000  # the bits of 1.0, 6.0 and 7.0 in fp32
LEAST, LARGEST = 0x3C800000, 0x43E00000  # those of 2**-6, E4M3's smallest normal number, and of 448
EXPONENT = 0x7F800000  # where fp32 has its exponent
E2M1_UNIT, E4M3_UNIT = 2.0**14, 2.0**8  # how much more an exponent means there than in fp16
E4M3_NAN = 480.0  # stands for NaN where scales are numbers: it would have the byte that NaN has
BOTH = 0x00010001  # times a number: the same number in both halves of an int32
RANDOM = 2**DRAWS  # stochastic rounding draws one of so many numbers: fp32's mantissa less E2M1's one bit
MORE = 4  # bits of `nvfp4x2` beyond a code's


def halves(x):
    """[..., K] -> the even and the odd columns, each [..., K/2].

    Two codes share a byte, so the arithmetic goes through both halves side by side and never interleaves
    them: a compiler then makes one kernel of decoding, updating and encoding.
    """
    return x[..., 0::2], x[..., 1::2]


def joined(even, odd):
    """The inverse of `halves`."""
    return torch.stack([even, odd], -1).flatten(-2)


def pairs(x):
    """16-bit numbers [..., K] two at a time, as int32 [..., K/2] (the same memory): one access to memory
    instead of two with gaps between them. Wider ones as they are."""
    return x.view(torch.int32) if x.element_size() == 2 else x


def unpaired(x, dtype):
    """The halves, fp32, of `pairs` of `dtype`."""
    if x.dtype != torch.int32:
        return tuple(half.float() for half in halves(x))
    if dtype == torch.bfloat16:  # the upper half of an fp32 number
        return (x << 16).view(torch.float32), (x & -0x10000).view(torch.float32)
    return tuple(half.to(torch.int16).view(dtype).float() for half in (x, x >> 16))


def paired(even, odd):
    """The inverse of `unpaired`."""
    if even.element_size() != 2:
        return joined(even, odd)
    even, odd = (half.view(torch.int16).to(torch.int32) for half in (even, odd))
    return even & 0xFFFF | odd << 16


def encode(x, encode_scale, bits=None, scale=None):
    """(qdata, scale), uint8 [..., K/2] and [..., K/16], of `x`, fp32 halves of [..., K]: the arithmetic of
    `quantize`. What is stored of a scale is its byte; before that it is an fp32 number that E4M3 has.

    encode_scale: fp32, the reciprocal of the global scale; [], or [..., 1] with one for each row.
    bits: random int32, halves shaped as x, make the rounding stochastic; the lower 22 of each count.
    scale: block scales to use instead of new ones, as numbers.
    """
    x = in_blocks(x)
    if scale is None:
        scale = block_scale(block_amax(x), encode_scale, upward=bits is not None)
    inverse = inverse_scale(scale, encode_scale)
    bits = (None, None) if bits is None else in_blocks(bits)
    even, odd = (e2m1_code(half * inverse, drawn) for half, drawn in zip(x, bits))
    return (even | odd << 4).to(torch.uint8).flatten(-2), e4m3_byte(scale)


def in_blocks(x):
    """Halves [..., K/2] -> [..., K/16, 8]."""
    return tuple(half.unflatten(-1, (-1, BLOCK // 2)) for half in x)


def block_amax(x, positive=False):
    """The largest magnitude of each block, [..., K/16], of fp32 halves [..., K/16, 8]; NaN if one is.

    positive: none is below 0, so magnitudes need not be taken.
    """
    even, odd = ((half.view(torch.int32) if positive else magnitude_bits(half)).amax(-1) for half in x)
    return torch.maximum(even, odd).view(torch.float32)


def magnitude_bits(x):
    """The bits of |x| (fp32) as int32: ordered as the numbers are, NaN last, and quicker to compare on a
    GPU."""
    return x.abs().view(torch.int32)


def inverse_scale(scale, encode_scale):
    """What numbers [..., K/16, 8] are multiplied with to be in units of the block's scale, [..., K/16, 1]."""
    exact = 1 / (scale * (1 / encode_scale))
    return exact.clamp(max=FP32_MAX).unsqueeze(-1)  # finite where the scale is 0


def block_scale(amax, encode_scale, upward=False, most=E2M1_MAX):
    """The scale that brings a block's largest magnitude `amax` to `most`, the largest code's value.

    To nearest, where 6 may become 6.37 and be cut to 6; or `upward`, so that nothing is cut, which stochastic
    rounding needs to be right on average.
    """
    exact, scale, gap = nearest_e4m3(amax * (encode_scale * (1 / most)))
    if upward:
        scale = torch.where(scale < exact, scale + gap, scale)
    return torch.where(amax < torch.inf, scale, E4M3_NAN)


def nearest_e4m3(x):
    """(`x`, fp32 >= 0, but at most 448; the E4M3 number nearest to that, ties to even; the gap between the
    two numbers around it), all fp32. Rounded as in `rounded`."""
    x = limited(x, LARGEST)
    exponent = (x & EXPONENT).clamp(min=LEAST)
    power, gap = (number.view(torch.float32) for number in (exponent + (20 << 23), exponent - (3 << 23)))
    x = x.view(torch.float32)
    return x, x + power - power, gap


def raw(scale):
    """E4M3 numbers as uint8, the same memory; bytes as they are."""
    return scale.view(torch.uint8)


def e4m3(byte):
    """The numbers, fp32, that E4M3 bytes (uint8) stand for.

    torch can convert its type float8_e4m3fn, but in compiled code only where the GPU can, from compute
    capability 8.9 on. And it is little work: like E2M1, E4M3 is fp16 with a narrower exponent.
    """
    x = byte.view(torch.int8).to(torch.int32) << 7
    # fp16's exponent has one bit more, 14, and the shift leaves a copy of the sign there. It must become 0,
    # but 1 for NaN: 0x7F and 0xFF are the only bytes to which adding 1 changes it.
    bits = x ^ (x + (1 << 7) & 1 << 14)
    return bits.to(torch.int16).view(torch.float16).float() * E4M3_UNIT


def e4m3_byte(scale):
    """The inverse of `e4m3`, for positive numbers: they are fp16 numbers too."""
    return ((scale * (1 / E4M3_UNIT)).half().view(torch.int16) >> 7).to(torch.uint8)


def decode(qdata, scale, global_scale):
    """The inverse of `encode`: halves, fp32 [..., K/2] each; `global_scale` is [] or [..., 1]."""
    # A product with two bits set puts a byte into both halves of an int32, the even code where the lower one
    # wants it and the odd one where the upper does: `fp16_bits` of two codes at once.
    x = qdata.to(torch.int32)
    magnitudes, signs = x * (1 << 9 | 1 << 21), x * (1 << 12 | 1 << 24)
    bits = magnitudes & (7 << 9) * BOTH | signs & (SIGN | 8 << 12)
    return scaled(both_fp16(bits), scale, global_scale * E2M1_UNIT)


def both_fp16(bits):
    """The fp16 numbers whose bits are the lower and the upper half of int32."""
    return tuple(half.to(torch.int16).view(torch.float16) for half in (bits, bits >> 16))


def scaled(x, scale, global_scale):
    """Halves in units of their block's scale -> values."""
    step = (e4m3(scale) * global_scale).unsqueeze(-1)
    return tuple((half.float() * step).flatten(-2) for half in in_blocks(x))


def e2m1_code(y, bits=None):
    """The codes (int32, 0..15) of numbers `y` in units of the block's scale; magnitudes above 6 become 6."""
    return (rounded(y, bits, SIX) | y.view(torch.int32) & SIGN) >> 28 & 15


def limited(y, most):
    """The bits of |y|, but at most `most` (bits). NaN becomes that too; a block's scale keeps it visible."""
    return magnitude_bits(y).clamp(max=most)


def rounded(y, bits, most, more=0):
    """Round |y| (fp32, limited to a number whose bits are `most`) to a code: int32 >= 0, of which bits 28 to
    30 are the code and those below mean nothing.

    more: mantissa bits beyond E2M1's one, for a finer grid (`Packed.more`); they are the bits below.

    Below 2 codes are 1/2 apart, from 2 to 4 they are 1 apart, and 4 and 6 are 2 apart.

    Nearest: fp32 numbers are that far apart from 2**22, 2**23 and 2**24 on. So adding that power of two
    makes the processor round to a code, ties to even, and the sum's last bits count the steps.

    Stochastic: the larger of |y| + 1 and 2 |y| is 1 for code 0, 1.5 for 1, 2, 3, 4, 6, 8 and 12 for the
    others: one step in fp32's exponent and highest mantissa bit, place 22, from each to the next. Adding
    random bits below rounds up with the probability of the fraction, and what has only zeros there, a number
    on the grid, never moves.
    """
    place = 22 - more
    if bits is None:
        magnitude = limited(y, most)
        exponent = (magnitude & EXPONENT).clamp(min=ONE)
        power = exponent + (place << 23)
        steps = (magnitude.view(torch.float32) + power.view(torch.float32)).view(torch.int32) - power
        return steps + (exponent - ONE >> place) << place + 6
    magnitude = y.abs()
    steps = torch.maximum((magnitude + 1).view(torch.int32), (magnitude + magnitude).view(torch.int32))
    steps = (steps - ONE).clamp(max=most + (1 << 23) - ONE)  # twice `most`
    return steps + (bits & (1 << place) - 1) << 6


def fp16_bits(numbers, signs, more=0):
    """The bits of an fp16 number that is E2M1's times 2**-14; `signs`: bit 3 of the codes alone.

    An E2M1 number is an fp16 number whose other bits are 0: put its sign, exponent and mantissa bits there.
    What is left to correct is the exponent's bias, 15 instead of 1. Codes 0 and 1 come out right as fp16
    subnormals.
    """
    return numbers << 9 - more | signs << 12


def stored(parts, global_scale, finer):
    """The values of a weight, or of rows of one, with these `parts` (bytes): halves, fp32.

    finer: whether it is nvfp4x2.
    """
    codes, scale = parts["qdata"], parts["scale"]
    if not finer:
        return decode(codes, scale, global_scale)
    codes, more = spread(codes), spread(parts["more"])
    places = ((codes & 7 * BOTH) << MORE) + more - (MIDDLES[0] | MIDDLES[1] << 16)  # none is below 0
    bits = fp16_bits(places, codes & 8 * BOTH, MORE)
    return scaled(both_fp16(bits), scale, global_scale * E2M1_UNIT)


def spread(x):
    """Bytes of two codes -> int32 with the even code in the lower half of its bits, the odd one in the upper:
    a GPU then computes with both in one instruction."""
    x = x.to(torch.int32)
    return (x | x << 12) & 15 * BOTH


def encoded(parts, global_scale, finer, x, bits=None, block_bits=None):
    """What to write into such `parts` for the halves `x`: {name: tensor}.

    bits, block_bits: random int32, halves as x and [rows, in/16], round codes and block scales
    stochastically; None rounds to nearest.
    """
    old, encode_scale = e4m3(parts["scale"]), 1 / global_scale
    amax = block_amax(in_blocks(x))
    unit = old * global_scale
    on_place = (8 * amax / unit).round() * unit == 8 * amax
    most = torch.where(on_place, 7.0, KEPT_TO) if finer else E2M1_MAX
    scale_fits = (amax > KEPT_FROM * unit) & (amax <= most * unit)
    if bits is None or finer:
        new_scale = block_scale(amax, encode_scale)
    else:
        new_scale, x = _stochastic_scale(x, amax, global_scale, block_bits, scale_fits)
    scale = torch.where(scale_fits, old, new_scale)
    if finer:
        used_up = torch.where(scale == old, 0, UPPER).to(torch.int32).unsqueeze(-1)  # lower bits of each draw
        bits = bits and [half >> used_up for half in in_blocks(bits)]
        return {"scale": e4m3_byte(scale)} | _places(x, scale, encode_scale, bits)
    return dict(zip(("qdata", "scale"), encode(x, encode_scale, bits, scale)))


def _places(x, scale, encode_scale, bits):
    """The codes and the four more bits of `nvfp4x2`; bits: halves [..., K/16, 8]."""
    inverse, nibbles = inverse_scale(scale, encode_scale), []
    for half, drawn, middle in zip(in_blocks(x), bits or (None, None), MIDDLES):
        y = half * inverse
        place = ((rounded(y, drawn, SEVEN, MORE) >> 28 - MORE) + middle).clamp(max=LAST)
        sign = y.view(torch.int32) >> 28 & 8  # from place 31 to place 3
        nibbles.append((place >> MORE | sign, place & PLACES - 1))
    qdata, more = ((even | odd << 4).to(torch.uint8).flatten(-2) for even, odd in zip(*nibbles))
    return {"qdata": qdata, "more": more}


def _stochastic_scale(x, amax, global_scale, block_bits, scale_fits):
    """New block scales, rounded stochastically, and `x` with numbers beyond 6 times the smaller one
    adjusted.

    With probability `share` the larger scale is taken. With the smaller one such numbers will be cut to its
    limit; so with the larger they must go beyond what they are, for the mean to be right.
    """
    exact, nearest, gap = nearest_e4m3(amax * (1 / global_scale / E2M1_MAX))
    below = torch.where(nearest > exact, nearest - gap, nearest)
    share = (exact - below) / gap
    up = ((block_bits & RANDOM - 1) < share * RANDOM) & scale_fits.logical_not()
    # What is beyond the limit grows by 1 / share; where `up` is not, nothing is beyond.
    limit = torch.where(up, E2M1_MAX * below * global_scale, torch.inf).unsqueeze(-1)
    growth = torch.where(up, 1 / share - 1, 0.0).unsqueeze(-1)

    def adjusted(blocks):
        beyond = (blocks.abs() - limit).view(torch.int32).clamp(min=0).view(torch.float32)
        return (blocks + (beyond * growth).copysign(blocks)).flatten(-2)

    scale = torch.where(amax < torch.inf, torch.where(up, below + gap, below), E4M3_NAN)
    return scale, [adjusted(blocks) for blocks in in_blocks(x)]


def refit(scales, global_scales):
    numbers = [e4m3(scale) for scale in scales]
    top = torch.stack([number.amax() for number in numbers]).amax()
    factor = torch.where(top > E4M3_MAX / 2, 2.0, 1.0)
    for scale, number, global_scale in zip(scales, numbers, global_scales):
        _, halved, _ = nearest_e4m3(number / factor)
        scale.copy_(e4m3_byte(torch.where(number.isnan(), E4M3_NAN, halved)))
        global_scale.mul_(factor)
