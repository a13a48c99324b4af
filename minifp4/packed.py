"""A weight that exists only as NVFP4, and is a parameter all the same.

`Packed` is a tensor whose shape is the logical [out, in] and whose memory is codes and scales: 0.5625 bytes a
number (`nvfp4`), or 1.0625 with four further bits each (`nvfp4x2`). No dense copy lies anywhere. To autograd,
`nn.Module` and `state_dict` it is one tensor, so hooks, names and tied weights work as ever; its gradient is
an ordinary dense tensor. Arithmetic on it is refused: who may look inside asks.

    nvfp4()    the codes that products and exports read
    decode()   their values
    exact()    what is really stored
    store()    write new values

Writing is where 4-bit training lives or dies. A step of lr 1e-5 moves a weight by 1/400 of the gap between
two codes; to nearest, it never arrives. So it is rounded stochastically: one weight in 400 takes a whole
step, and the mean is right.

`nvfp4x2` has 16 places for each code: four mantissa bits more than E2M1, the place `16 * code + more`, `more`
from -8 to 7. The place is rounded stochastically, with a sixteenth of the noise, and products read the
nearest code: a weight between two codes creeps through 16 places until it is read as the next.

    1.22 with a block scale of 1: code 2 stands for 1 and 3 for 1.5, so the place is 16 * 2.44 = 39.04: 39,
    seldom 40. The code is 2, as (39 + 8) // 16; `more` is 7; what is stored is 1.21875. At 40 the code is 3.

A new block scale shifts the grid under all 16 numbers, also under those that did not move. So a block keeps
its scale while its largest number is between 2.9 and 6 times it. When in `nvfp4` one grows a little beyond
6, the scale too is rounded stochastically: it seldom takes the next value, and then that number goes to 6
times it; else the number is cut. On average it grows as it should, and most of the time the other fifteen
stay as they are. In `nvfp4x2` there are places up to 6.875, beyond what any nearest scale leaves.
"""

import torch

from .nvfp4 import (
    BLOCK,
    BOTH,
    E2M1_MAX,
    E2M1_UNIT,
    E4M3_MAX,
    E4M3_NAN,
    NVFP4,
    RANDOM,
    block_amax,
    block_scale,
    both_fp16,
    decode,
    decode_rows,
    dequantize,
    e4m3,
    e4m3_byte,
    encode,
    fp16_bits,
    halves,
    in_blocks,
    inverse_scale,
    joined,
    nearest_e4m3,
    quantize,
    raw,
    rounded,
    row_chunks,
    scaled,
    weight_global_scale,
)

KEEP = 2.9  # a block's scale stays while its amax is in (KEEP, E2M1_MAX] times it
FURTHER, PLACES = 4, 16  # bits of `nvfp4x2` beyond a code's, and the places that they make of each
SEVEN = 0x40E00000  # the bits of 7.0 in fp32, beyond which there is no place
LAST = 7 * PLACES + 7  # the last place that is read as code 7


class Packed(torch.Tensor):
    """`Packed(q)`: the matrix [out, in] whose `NVFP4` is `q`.

    more: of nvfp4x2, uint8 [out, in/2], the even element in the low half of the byte: 8 + its four bits.
    """

    @staticmethod
    def __new__(cls, q, more=None):
        rows, half = q.qdata.shape
        shape, device = (rows, 2 * half), q.qdata.device
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bfloat16, device=device)

    def __init__(self, q, more=None):
        self.qdata, self.scale, self.global_scale = q
        if more is not None:
            self.more = more

    def parts(self):
        """{name: tensor} of the memory."""
        names = (*NVFP4._fields, "more")
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def nvfp4(self, rows=slice(None)):
        """The codes of some rows (a slice, or row numbers [N]) that products read."""
        return NVFP4(self.qdata[rows], self.scale[rows], self.global_scale)

    def decode(self, rows=slice(None)):
        """The values of such rows as products read them, fp32 [rows, in]."""
        return dequantize(self.nvfp4(rows))

    def exact(self, rows=slice(None)):
        """The values of some rows as they are stored, fp32 [rows, in]."""
        return joined(*stored(*self._rows(rows)))

    def store(self, rows, x):
        """Write fp32 values [rows, in], to nearest."""
        for name, new in encoded(*self._rows(rows), halves(x)).items():
            raw(getattr(self, name))[rows] = new

    def _rows(self, rows):
        parts = {name: raw(part)[rows] for name, part in self.parts().items() if part.dim()}
        return parts, self.global_scale, "more" in parts

    def __tensor_flatten__(self):
        return list(self.parts()), None

    @staticmethod
    def __tensor_unflatten__(tensors, _, shape, stride):
        return from_parts(tensors)

    def __repr__(self):
        kind = "nvfp4x2" if hasattr(self, "more") else "nvfp4"
        return f"Packed({tuple(self.shape)}, {kind}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs, aten = dict(kwargs or {}), torch.ops.aten
        if function in (aten.detach.default, aten.alias.default):
            return from_parts(args[0].parts())
        same_type = kwargs.pop("dtype", None) in (None, torch.bfloat16)
        if function in (aten.clone.default, aten._to_copy.default) and same_type:
            kwargs.pop("memory_format", None)
            return from_parts({name: function(part, **kwargs) for name, part in args[0].parts().items()})
        if function is aten.copy_.default and isinstance(args[1], Packed):
            theirs = args[1].parts()
            for name, part in args[0].parts().items():
                part.copy_(theirs[name])
            return args[0]
        raise NotImplementedError(f"{function} on a packed weight, which has no dense values: use .decode()")


def from_parts(parts):
    """The `Packed` with the given `parts()`."""
    return Packed(NVFP4(*(parts[name] for name in NVFP4._fields)), parts.get("more"))


def stored(parts, global_scale, finer):
    """The values of a weight, or of rows of one, with these `parts` (bytes): halves (`nvfp4.halves`), fp32.

    finer: whether it is nvfp4x2.
    """
    codes, scale = parts["qdata"], parts["scale"]
    if not finer:
        return decode(codes, scale, global_scale)
    codes, more = spread(codes), spread(parts["more"])
    places = ((codes & 7 * BOTH) << FURTHER) + more - PLACES // 2 * BOTH  # none is below 0
    bits = fp16_bits(places, codes & 8 * BOTH, FURTHER)
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
    fits = (amax > KEEP * unit) & (amax <= E2M1_MAX * unit)
    if bits is None or finer:
        fresh = block_scale(amax, encode_scale)
    else:
        fresh, x = _stochastic_scale(x, amax, global_scale, block_bits, fits)
    scale = torch.where(fits, old, fresh)
    if finer:
        return {"scale": e4m3_byte(scale)} | _places(x, scale, encode_scale, bits)
    return dict(zip(("qdata", "scale"), encode(x, encode_scale, bits, scale)))


def _places(x, scale, encode_scale, bits):
    """The codes and the further bits of `nvfp4x2`."""
    inverse, nibbles = inverse_scale(scale, encode_scale), []
    for half, drawn in zip(in_blocks(x), (None, None) if bits is None else in_blocks(bits)):
        y = half * inverse
        place = (rounded(y, drawn, SEVEN, FURTHER) >> 28 - FURTHER).clamp(max=LAST) + PLACES // 2
        sign = y.view(torch.int32) >> 28 & 8  # from place 31 to place 3
        nibbles.append((place >> FURTHER | sign, place & PLACES - 1))
    qdata, more = ((even | odd << 4).to(torch.uint8).flatten(-2) for even, odd in zip(*nibbles))
    return {"qdata": qdata, "more": more}


def _stochastic_scale(x, amax, global_scale, block_bits, fits):
    """New block scales, rounded stochastically, and `x` with numbers beyond 6 times the smaller one
    adjusted.

    With probability `share` the larger scale is taken. With the smaller one such numbers will be cut to its
    limit; so with the larger they must go beyond what they are, for the mean to be right.
    """
    exact, nearest, gap = nearest_e4m3(amax * (1 / global_scale / E2M1_MAX))
    below = torch.where(nearest > exact, nearest - gap, nearest)
    share = (exact - below) / gap
    up = ((block_bits & RANDOM - 1) < share * RANDOM) & fits.logical_not()
    # What is beyond the limit grows by 1 / share; where `up` is not, nothing is beyond.
    limit = torch.where(up, E2M1_MAX * below * global_scale, torch.inf).unsqueeze(-1)
    further = torch.where(up, 1 / share - 1, 0.0).unsqueeze(-1)

    def adjusted(blocks):
        beyond = (blocks.abs() - limit).view(torch.int32).clamp(min=0).view(torch.float32)
        return (blocks + (beyond * further).copysign(blocks)).flatten(-2)

    scale = torch.where(amax < torch.inf, torch.where(up, below + gap, below), E4M3_NAN)
    return scale, [adjusted(blocks) for blocks in in_blocks(x)]


def pack(weight, global_scale, finer):
    """A weight as `Packed`, rounded to nearest; one that is packed keeps its codes and its global scale."""
    packed = isinstance(weight, Packed)
    parts = weight.parts() if packed else quantize(weight, global_scale=global_scale)._asdict()
    on_code = torch.full_like(parts["qdata"], PLACES // 2 * 0x11)  # the places of numbers that are codes
    more = parts.get("more", on_code) if finer else None
    new = Packed(NVFP4(*(parts[name].clone() for name in NVFP4._fields)), more)
    if finer and not packed:
        for rows in row_chunks(weight):
            new.store(rows, weight.detach()[rows].float())
    return new


def pack_exactly(weight):
    """A dense matrix whose numbers all lie on an NVFP4 grid as `Packed`, without any change; any other as
    it is.

    An export keeps the head, or everything, in bf16: values of codes. Quantizing such a block anew finds
    its scale if its largest number is 6 times it; the scale may also be one that was kept, and the largest
    number 4 or 3.
    """
    global_scale, parts = weight_global_scale(weight), []
    for rows in row_chunks(weight):  # the first rows tell most other matrices apart
        codes, scale, right = _codes_of_values(weight[rows].float(), global_scale)
        if not right:
            return weight
        parts.append((codes, scale))
    qdata, scale = (torch.cat(some) for some in zip(*parts))
    return Packed(NVFP4(qdata, scale.view(torch.float8_e4m3fn), global_scale))


def _codes_of_values(x, global_scale):
    """(codes, scales, whether they are `x` exactly)"""
    blocks, encode_scale = x.unflatten(-1, (-1, BLOCK)), 1 / global_scale
    amax, scale, right = blocks.abs().amax(-1), None, None
    for top in (E2M1_MAX, 4.0, 3.0):
        tried = block_scale(amax * (E2M1_MAX / top), encode_scale)
        scale = tried if scale is None else torch.where(right, scale, tried)
        codes, byte = encode(halves(x), encode_scale, scale=scale)
        values = decode_rows(codes, scale, global_scale)
        right = (values.unflatten(-1, (-1, BLOCK)) == blocks).all(-1)
    return codes, byte, bool(right.all())


def refit_parts(scales, global_scales):
    numbers = [e4m3(scale) for scale in scales]
    top = torch.stack([number.amax() for number in numbers]).amax()
    factor = torch.where(top > E4M3_MAX / 2, 2.0, 1.0)
    for scale, number, global_scale in zip(scales, numbers, global_scales):
        _, halved, _ = nearest_e4m3(number / factor)
        scale.copy_(e4m3_byte(torch.where(number.isnan(), E4M3_NAN, halved)))
        global_scale.mul_(factor)


def refit(weights, fit=refit_parts):
    """Double the global scale of packed `weights` that share one, where a block scale nears the end of its
    range.

    All block scales are halved, so that no number changes (but in E4M3's subnormals, by half their step).
    fit: `refit_parts`, or that compiled.
    """
    fit([raw(weight.scale) for weight in weights], [weight.global_scale for weight in weights])


def dense(weight):
    """The stored values of a weight, packed or not, as an ordinary tensor."""
    return weight.exact() if isinstance(weight, Packed) else weight.detach()


def bytes_of(weight):
    """Memory that a weight takes."""
    parts = weight.parts().values() if isinstance(weight, Packed) else (weight,)
    return sum(part.numel() * part.element_size() for part in parts)
