"""NVFP4: sixteen numbers in nine bytes.

A number in NVFP4 is a product of three factors, each stored at another rate:

    value = e2m1(code) * scale * global_scale
            4 bits       8 bits  32 bits
            each number  each 16 each tensor

`e2m1(code)` has a sign, two exponent bits and one mantissa bit, so only eight magnitudes exist:

    code  0    1    2    3    4    5    6    7        (codes 8 to 15 are the same with a minus: 9 is -0.5)
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

Rounding. "nearest" takes the closer code, ties to the even one. "stochastic" takes one of the two neighbours
by chance, the closer the likelier, so that the stored number is right on average: numbers that move by less
than half a step survive. `storage.py` and `optim.py` show why training at 4 bits depends on it.

The order of the multiplications is that of TransformerEngine, in fp32, so its bytes and ours are the same.
What this module does not do: Hadamard transforms, 16x16 blocks, swizzled scales, matrix products in 4 bits.
"""

import functools
from typing import NamedTuple

import torch

BLOCK = 16  # numbers that share a scale
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the magnitudes of codes 0 to 7
E2M1_MAX = 6.0
E4M3_MAX = 448.0
FP32_MIN, FP32_MAX = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
DRAWS = 22  # stochastic rounding draws one of 2**22 numbers for each element


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
        encode_scale = torch.where(largest == 0, 1.0, encode_scale.clamp(max=FP32_MAX))  # finite below 1e-35
        global_scale = 1 / encode_scale
    else:
        global_scale = torch.as_tensor(global_scale, dtype=torch.float32, device=x.device)
        encode_scale = 1 / global_scale
    bits = None
    if rounding == "stochastic":
        drawn = torch.randint(2**DRAWS, x.shape, generator=generator, device=x.device, dtype=torch.int32)
        bits = as_matrix(drawn)
    qdata = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=torch.uint8, device=x.device)
    scale = torch.empty(*x.shape[:-1], x.shape[-1] // BLOCK, dtype=torch.float8_e4m3fn, device=x.device)
    matrix, codes, scales = as_matrix(x.detach()), as_matrix(qdata), as_matrix(scale)
    for rows in row_chunks(matrix):
        drawn = None if bits is None else bits[rows]
        codes[rows], scales[rows] = encode(matrix[rows].float(), encode_scale, drawn)
    return NVFP4(qdata, scale, global_scale)


def dequantize(q, dtype=torch.float32):
    """The numbers that `q` stands for, [..., K], computed in fp32 and rounded once to `dtype`."""
    values = torch.empty(*q.qdata.shape[:-1], 2 * q.qdata.shape[-1], dtype=dtype, device=q.qdata.device)
    matrix, codes, scales = as_matrix(values), as_matrix(q.qdata), as_matrix(q.scale)
    for rows in row_chunks(matrix):
        matrix[rows] = decode(codes[rows], scales[rows], q.global_scale)
    return values


def fake_quantize(x, global_scale, dtype=torch.float32):
    """`dequantize(quantize(x))` without keeping the codes: what a 4-bit product makes of a weight `x`."""
    check_quantizable(x)
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    matrix, into = as_matrix(x.detach()), as_matrix(values)
    for rows in row_chunks(matrix):
        into[rows] = decode(*encode(matrix[rows].float(), 1 / global_scale), global_scale)
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
    # exact = mantissa * 2**exponent, the mantissa in [.5, 1)
    mantissa, exponent = torch.frexp(exact.clamp(min=FP32_MIN))
    power = torch.ldexp(torch.ones_like(exact), exponent + (mantissa > 0.5))
    return torch.where(exact == 0, 1.0, torch.where(largest.isfinite(), power, largest))


def encode(x, encode_scale, bits=None, scale=None):
    """(qdata uint8 [..., K/2], scale E4M3 [..., K/16]) of `x`, fp32 [..., K].

    encode_scale: fp32, the reciprocal of the global scale; [], or [..., 1] with one for each row.
    bits: random int32, shaped as x, of which the lower 22 count, make the rounding stochastic.
    scale: block scales to use instead of new ones.
    """
    x = x.unflatten(-1, (-1, BLOCK))  # [..., K] -> [..., K/16, 16]
    if scale is None:
        scale = block_scale(x.abs().amax(-1), encode_scale, upward=bits is not None)
    bits = None if bits is None else bits.view(x.shape)
    return pair(e2m1_code(in_units(x, scale, encode_scale), bits).flatten(-2)), scale


def decode(qdata, scale, global_scale):
    """The inverse of `encode`, fp32 [..., K]; `global_scale` is [] or [..., 1]."""
    return from_units(look_up(qdata, E2M1_TABLE), scale, global_scale)


def block_scale(amax, encode_scale, upward=False, most=E2M1_MAX):
    """The E4M3 scales that bring the blocks' largest magnitudes `amax` to `most`, the largest code's value.

    To nearest, where 6 may become 6.37 and be cut to 6; or `upward`, so that nothing is cut, which stochastic
    rounding needs to be right on average.
    """
    exact = (amax * (encode_scale * (1 / most))).clamp(max=E4M3_MAX)  # some versions of torch make 500 NaN
    scale = exact.to(torch.float8_e4m3fn)
    if upward:
        scale = torch.where(scale.float() < exact, neighbour(scale, 1), scale)
    return torch.where(amax < torch.inf, scale, torch.nan)


def neighbour(scale, step):
    """The next E4M3 number above (1) or below (-1) a positive one: its byte is one more, or one less."""
    return (scale.view(torch.uint8) + step).view(torch.float8_e4m3fn)


def in_units(x, scale, encode_scale):
    """`x` [..., K/16, 16] in units of its blocks' scales [..., K/16]."""
    exact = 1 / (scale.float() * (1 / encode_scale))
    return x * exact.clamp(max=FP32_MAX).unsqueeze(-1)  # finite where the scale is 0


def from_units(x, scale, global_scale):
    """Numbers [..., K] in units of their block's scale [..., K/16] -> values."""
    unit = scale.float() * global_scale
    return (x.unflatten(-1, (-1, BLOCK)) * unit.unsqueeze(-1)).flatten(-2)


def e2m1_code(y, bits=None):
    """The codes 0 to 15, uint8, of numbers `y` in units of their block's scale; beyond 6 they become 6."""
    return code(y.abs().clamp(max=E2M1_MAX), bits) | torch.signbit(y).to(torch.uint8) << 3


def code(size, bits=None, places=1):
    """The code 0 to 7, uint8, of magnitudes `size`; with more `places` a finer one, so many for each code.

    Codes are 1/2 apart below 2, 1 apart from 2 to 4, and 2 beyond. So there are three rulers, each right in
    its own range and reading too much in the others; the least of the three readings is the code:

        size            0.9   2.2   4.6
        2 size          1.8   4.4   9.2
        size + 2        2.9   4.2   6.6
        size / 2 + 4    4.45  5.1   6.3      -> codes 2, 4, 6 (each reading rounded, ties to even)

    Stochastic rounding counts in units of 2**-22 of a place, adds a random number of them, less than a
    place, and drops what does not fill one: so .8 of a place becomes 1 in .8 of the draws.
    """
    if bits is None:
        least = torch.minimum((2 * places * size).round(), (places * size).round() + 2 * places)
        return torch.minimum(least, (places / 2 * size).round() + 4 * places).to(torch.uint8)
    digits = DRAWS - (places - 1).bit_length()  # binary ones, of a fraction of a place
    fine = (size * 2.0 ** (DRAWS + 1)).round().to(torch.int32)
    least = torch.minimum(fine, (fine >> 1) + (2 << DRAWS))
    least = torch.minimum(least, (fine >> 2) + (4 << DRAWS))
    return (least + (bits & 2**digits - 1) >> digits).to(torch.uint8)


def pair(codes):
    """Codes [..., K] two to a byte, uint8 [..., K/2], the even element in the low half."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def look_up(index, table):
    """The two numbers of each entry: `index` [..., K/2] into a `pair_table` -> fp32 [..., K]."""
    table = table if index.device == table.device else copied(table, index.device)
    return torch.take(table, index.long()).view(torch.float32)


def pair_table(even, odd):
    """A table of pairs of fp32 numbers for `look_up`, each pair as one word of 64 bits: half the look-ups."""
    return torch.stack([even, odd], -1).view(torch.int64).squeeze(-1)


def code_table(values):
    """The `pair_table` of all bytes of two codes that stand for `values` [16]."""
    values, byte = torch.tensor(values), torch.arange(256)
    return pair_table(values[byte % 16], values[byte // 16])


@functools.cache
def copied(table, device):
    """A table on another device, brought there once."""
    return table.to(device)


E2M1_TABLE = code_table([*E2M1, *(-value for value in E2M1)])


def as_matrix(x):
    """[..., K] -> [rows, K], a view where the layout allows it."""
    return x.reshape(x.numel() // x.shape[-1], x.shape[-1])


def row_chunks(x, rows=0):
    """Slices that cover the rows of `x`, `rows` at a time; 0: as many as are fast on the device of `x`.

    On a CPU a piece and its temporaries should stay in the cache (5 times faster than whole matrices); a
    GPU wants few large pieces. Every result of this package is the same for every choice.
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
