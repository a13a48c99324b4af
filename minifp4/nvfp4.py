"""NVFP4: sixteen numbers in nine bytes.

A number in NVFP4 is a product of three factors, each stored at another rate:

    value = e2m1(code) * scale * global_scale
            4 bits       8 bits  32 bits
            each number  each 16 each tensor

`e2m1(code)` has a sign, two exponent bits and one mantissa bit, so only eight magnitudes exist:

    code  0    1    2    3    4    5    6    7        (bit 3 is the sign: code 9 is -0.5)
    e2m1  0   0.5   1   1.5   2    3    4    6

`scale` is an E4M3 number (8 bits, at most 448, smallest step 2**-9). It stretches the eight magnitudes over
a block of 16 neighbours of the last dimension, so that the block's largest number lands on 6.
`global_scale` is one fp32 number that brings the tensor's largest block scale into E4M3's range. Two codes
share a byte, the even element in the low half: 8 bytes of codes and 1 of scale make 0.5625 bytes a number.

Worked example (it is also the first test). Sixteen numbers whose largest magnitude is 3:

    x      0   .1  -.2   .3  .45  -.6  .75   .9   1.  -1.1  1.3  1.5  -1.9  2.2  2.6   3.

    global_scale = 2**-9                 the power of two at or above 3 / (6 * 448)
    scale        = 3 / (6 * 2**-9) = 256 which E4M3 holds exactly
    x / .5       0   .2  -.4   .6   .9 -1.2  1.5  1.8   2.  -2.2  2.6   3.  -3.8  4.4  5.2   6.
    e2m1         0    0  -.5   .5   1   -1   1.5   2    2   -2    3    3    -4    4    6    6
    code         0    0    9    1   2   10    3    4    4   12    5    5    14    6    7    7
    qdata      00        19       a2        43        c4        55        6e        77   (hexadecimal)

Decoding multiplies back: 6 * 256 * 2**-9 = 3, and .45 has become 1 * .5 = .5.

Rounding. "nearest" takes the closer code, ties to the even one. "stochastic" (SR) takes one of the two
neighbours by chance, the closer the likelier, so that the stored number is right on average: numbers that
move by less than half a step survive. `precision.py` and `optim.py` show why training at 4 bits depends on
it.

The order of the multiplications is that of TransformerEngine, in fp32, so its bytes and ours are the same.
What this module does not do: Hadamard transforms, 16x16 blocks, swizzled scales, matrix products in 4 bits.
"""

from typing import NamedTuple

import torch

BLOCK = 16  # numbers that share a scale
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_MIN = 2.0**-9  # the smallest positive E4M3, a subnormal
E4M3_NAN = 480.0  # stands for NaN where scales are numbers: it would have the byte that NaN has
FP32_MAX = torch.finfo(torch.float32).max
SIGN = -(2**31)  # the bit of the sign in fp32
ONE, SIX = 0x3F800000, 0x40C00000  # the bits of 1.0 and 6.0 in fp32
LEAST, LARGEST = 0x3C800000, 0x43E00000  # those of 2**-6, E4M3's smallest normal number, and of 448
EXPONENT = 0x7F800000  # where fp32 has its exponent
E2M1_UNIT, E4M3_UNIT = 2.0**14, 2.0**8  # how much more an exponent means there than in fp16
BOTH = 0x00010001  # times a number: the same number in both halves of an int32
RANDOM = 2**22  # stochastic rounding draws one of so many numbers: fp32's mantissa less E2M1's one bit


class NVFP4(NamedTuple):
    """A quantized tensor. Scales multiply: `value = e2m1(code) * scale * global_scale`."""

    qdata: torch.Tensor  # uint8 [..., K/2], the even element in the low half of the byte
    scale: torch.Tensor  # float8_e4m3fn [..., K/16]
    global_scale: torch.Tensor  # fp32, []


def quantize(x, rounding="nearest", *, global_scale=None, generator=None):
    """Quantize `x` [..., K] (fp32, bf16 or fp16; K a multiple of 16) to `NVFP4`.

    rounding: "nearest", or "stochastic" with random numbers from `generator` (torch's default one if None).
    global_scale: kept as it is when given; otherwise amax / (6 * 448). For weights, give
    `weight_global_scale`. NaN and infinities stay visible: the blocks that hold one (all blocks if the
    global scale depends on it) decode to NaN. Raises ValueError for a wrong shape, dtype or rounding.
    """
    check_quantizable(x)
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f'rounding must be "nearest" or "stochastic", got {rounding!r}')
    if global_scale is None:
        largest = amax(x)
        # Not `2688 / largest`: torch computes that as 2688 * (1 / largest), and rounds twice.
        encode_scale = torch.full_like(largest, E2M1_MAX * E4M3_MAX) / largest
        encode_scale = torch.where(
            largest == 0, 1.0, encode_scale.clamp(max=FP32_MAX)
        )  # finite below 1e-35 too
        global_scale = 1 / encode_scale
    else:
        global_scale = torch.as_tensor(global_scale, dtype=torch.float32, device=x.device)
        encode_scale = 1 / global_scale
    bits = None
    if rounding == "stochastic":
        drawn = torch.randint(RANDOM, x.shape, generator=generator, device=x.device, dtype=torch.int32)
        bits = as_matrix(drawn)
    qdata = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=torch.uint8, device=x.device)
    scale = torch.empty(*x.shape[:-1], x.shape[-1] // BLOCK, dtype=torch.uint8, device=x.device)
    matrix, codes, scales = as_matrix(x.detach()), as_matrix(qdata), as_matrix(scale)
    for rows in row_chunks(matrix):
        drawn = None if bits is None else halves(bits[rows])
        codes[rows], scales[rows] = encode(halves(matrix[rows].float()), encode_scale, drawn)
    return NVFP4(qdata, scale.view(torch.float8_e4m3fn), global_scale)


def dequantize(q, dtype=torch.float32):
    """The numbers that `q` stands for, [..., K], computed in fp32 and rounded once to `dtype`."""
    values = torch.empty(*q.qdata.shape[:-1], 2 * q.qdata.shape[-1], dtype=dtype, device=q.qdata.device)
    matrix, codes, scales = as_matrix(values), as_matrix(q.qdata), as_matrix(q.scale)
    for rows in row_chunks(matrix):
        matrix[rows] = decode_rows(codes[rows], scales[rows].float(), q.global_scale)
    return values


def weight_global_scale(*weights):
    """One power-of-two global scale, fp32 [], for weights that a server fuses into one matrix (q/k/v,
    gate/up).

    `2**ceil(log2(amax / 2688))`, doubled: the spare power of two lets the weights grow while they train. A
    power of two costs nothing here, because E4M3 is a floating-point format too, and it buys much: its
    reciprocal and its bf16 are exact, so the checkpoint survives every reader's order of operations.
    """
    largest = torch.stack([amax(w) for w in weights]).amax()
    exact = largest / (E2M1_MAX * E4M3_MAX)
    # Round up to a power of two: a carry out of the mantissa bits increments the exponent.
    power = ((exact.view(torch.int32) + 0x7FFFFF) & ~0x7FFFFF).view(torch.float32)
    power = torch.where(exact == 0, 1.0, 2 * power)
    return torch.where(torch.isfinite(largest), power, largest)


def fake_quantize(x, global_scale, dtype=torch.float32):
    """`dequantize(quantize(x))` without keeping the codes: what a 4-bit product makes of a weight `x`."""
    check_quantizable(x)
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    matrix, into = as_matrix(x.detach()), as_matrix(values)
    for rows in row_chunks(matrix):
        codes, scales = encode(halves(matrix[rows].float()), 1 / global_scale)
        into[rows] = decode_rows(codes, e4m3(scales), global_scale)
    return values


def as_matrix(x):
    """[..., K] -> [rows, K], a view where the layout allows it."""
    return x.reshape(x.numel() // x.shape[-1], x.shape[-1])


def row_chunks(x, rows=0):
    """Slices that cover the rows of `x`, `rows` at a time; 0: as many as are fast on the device of `x`.

    On a CPU a piece and its temporaries should stay in the cache (5 times faster than whole matrices); a
    GPU wants few large launches. Every result of this package is the same for every choice.
    """
    numbers = x.numel() // max(1, len(x))  # in a row
    rows = rows or max(1, (2**24 if x.device.type == "cuda" else 2**18) // max(1, numbers))
    return row_slices(len(x), rows)


def row_slices(count, rows):
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


def check_quantizable(x):
    """Raise ValueError unless `x` is floating point with a last dimension made of whole blocks."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"NVFP4 quantizes fp32, bf16 or fp16, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0 or x.shape[-1] % BLOCK:
        raise ValueError(f"the last dimension must be a multiple of {BLOCK}, got the shape {tuple(x.shape)}")


def amax(x):
    """The largest magnitude of a tensor, fp32 []; NaN if there is one."""
    low, high = torch.aminmax(x.detach()) if x.numel() else (x.new_zeros(()), x.new_zeros(()))
    return torch.maximum(-low, high).float()


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


def decode_rows(qdata, scale, global_scale):
    """The same, interleaved, fp32 [..., K], with scales as numbers."""
    code = joined(qdata & 0xF, qdata >> 4).to(torch.int16)
    values = fp16_bits(code & 7, code & 8).view(torch.float16)
    blocks = (values.float() * E2M1_UNIT).unflatten(-1, (-1, BLOCK))
    return (blocks * (scale * global_scale).unsqueeze(-1)).flatten(-2)


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


def rounded(y, bits, most, further=0):
    """Round |y| (fp32, limited to a number whose bits are `most`) to a code: int32 >= 0, of which bits 28 to
    30 are the code and those below mean nothing.

    further: mantissa bits beyond E2M1's one, for a finer grid (`packed.py`); they are the bits below.

    Below 2 codes are 1/2 apart, from 2 to 4 they are 1 apart, and 4 and 6 are 2 apart.

    Nearest: fp32 numbers are that far apart from 2**22, 2**23 and 2**24 on. So adding that power of two
    makes the processor round to a code, ties to even, and the sum's last bits count the steps.

    Stochastic: the larger of |y| + 1 and 2 |y| is 1 for code 0, 1.5 for 1, 2, 3, 4, 6, 8 and 12 for the
    others: one step in fp32's exponent and highest mantissa bit, place 22, from each to the next. Adding
    random bits below rounds up with the probability of the fraction, and what has only zeros there, a number
    on the grid, never moves.
    """
    place = 22 - further
    if bits is None:
        magnitude = limited(y, most)
        exponent = (magnitude & EXPONENT).clamp(min=ONE)
        power = exponent + (place << 23)
        steps = (magnitude.view(torch.float32) + power.view(torch.float32)).view(torch.int32) - power
        return steps + (exponent - ONE >> place) << place + 6
    magnitude = y.abs()
    steps = torch.maximum((magnitude + 1).view(torch.int32), (magnitude + magnitude).view(torch.int32))
    steps = steps.clamp(max=most + (1 << 23)) - ONE  # twice `most`
    return steps + (bits & (1 << place) - 1) << 6


def fp16_bits(numbers, signs, further=0):
    """The bits of an fp16 number that is E2M1's times 2**-14; `signs`: bit 3 of the codes alone.

    An E2M1 number is an fp16 number whose other bits are 0: put its sign, exponent and mantissa bits there.
    What is left to correct is the exponent's bias, 15 instead of 1. Codes 0 and 1 come out right as fp16
    subnormals.
    """
    return numbers << 9 - further | signs << 12
