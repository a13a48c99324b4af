"""A weight that exists only as NVFP4, and is a parameter all the same.

`Packed` is a tensor whose shape is the logical [out, in] and whose memory is codes and scales: 0.5625 bytes a
number (`nvfp4`), or 1.0625 with four further bits each (`nvfp4x2`). No dense copy lies anywhere. To autograd,
`nn.Module` and `state_dict` it is one tensor, so hooks, names and tied weights work as ever; its gradient is
an ordinary dense tensor. Arithmetic on it is refused: who may look inside asks.

    nvfp4()    the codes that products and exports read
    decode()   their values
    stored()   what is really stored
    encode()   what to write for new values; `store()` writes it

Writing is where 4-bit training lives or dies. A step of lr 1e-5 moves a weight by 1/400 of the gap between
two codes; rounded to nearest, it never arrives. So it is rounded stochastically: one weight in 400 takes a
whole step, and the mean is right.

`nvfp4x2` has 16 places for each code: four mantissa bits more than E2M1, the place `16 * code + more`, `more`
from -8 to 7. The place is rounded stochastically, with a sixteenth of the noise, and products read the
nearest code: a weight between two codes creeps through 16 places until it is read as the next.

    1.22 with a block scale of 1: code 2 stands for 1 and 3 for 1.5, so the place is 16 * 2.44 = 39.04: 39,
    seldom 40. The code is 2, as (39 + 8) // 16; `more` is 7; what is stored is 1.21875. At 40 the code is 3.

At 40, in the middle, both codes are as near. Always taking the higher would read one weight in 32 a step too
large; so it is the higher in even columns and the lower in odd ones, where `more` goes from -7 to 8. Having
no such place (39 or 41, by chance) would be right on average too, and costs 2.7 % of loss: a weight that
hovers between two codes should go to and fro quickly, so that what is read averages out.

A new block scale shifts the grid under all 16 numbers, also under those that did not move. So in `nvfp4` a
block keeps its scale while its largest number is between 2.9 and 6 times it. When one grows a little beyond
6, the scale too is rounded stochastically: it seldom takes the next value, and then that number goes to 6
times it; else the number is cut. On average it grows as it should, and most of the time the other fifteen
stay as they are. In `nvfp4x2` a shift costs little, but a number between 5 and 6.875 times the scale is read
as 6 times it, whatever it does. So when the largest moves there, the scale becomes the nearest one.
"""

import torch

from .nvfp4 import (
    BLOCK, DRAWS, E2M1_MAX, E4M3_MAX, NVFP4, block_scale, code, decode, dequantize, e2m1_code, from_units,
    in_units, look_up, neighbour, pair, pair_table, quantize, row_chunks,
)  # fmt: skip

KEPT_FROM, KEPT_TO = 2.9, 5.0  # times its scale: where a block's largest number keeps it, also when it moves
PLACES = 16  # of `nvfp4x2` for each code
MIDDLES = 8, 7  # at which of them the code itself lies, in even and in odd columns
LAST = 8 * PLACES - 1  # the last place of code 7, counted from the first of code 0
UPPER = 32 - (DRAWS - 4)  # shifted right by so many bits, a draw rounds a place by its upper ones


class Packed(torch.Tensor):
    """`Packed(q)`: the matrix [out, in] whose `NVFP4` is `q`.

    more: of nvfp4x2, uint8 [out, in/2]: `MIDDLES` + four bits, of the even element in the low half.
    """

    @staticmethod
    def __new__(cls, q, more=None):
        rows, half = q.qdata.shape
        shape, device = (rows, 2 * half), q.qdata.device
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bfloat16, device=device)

    def __init__(self, q, more=None):
        self.qdata, self.scale, self.global_scale = q
        self.more = more

    def tensors(self):
        """{name: tensor} of the memory."""
        names = (*NVFP4._fields, "more")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def part(self, rows):
        """Some rows (a slice) as a weight of their own, in the same memory."""
        return from_tensors({name: x[rows] if x.dim() else x for name, x in self.tensors().items()})

    def nvfp4(self, rows=slice(None)):
        """The codes of some rows (a slice, or row numbers [N]) that products read."""
        return NVFP4(self.qdata[rows], self.scale[rows], self.global_scale)

    def decode(self, rows=slice(None)):
        """The values of some rows as products read them, [rows, in]."""
        return dequantize(self.nvfp4(rows))

    def stored(self, rows=slice(None)):
        """The values of some rows as they are stored, fp32 [rows, in]."""
        if self.more is None:
            return decode(*self.nvfp4(rows))
        pairs = self.qdata[rows].long() * 256 + self.more[rows]
        return from_units(look_up(pairs, PLACE_TABLE), self.scale[rows], self.global_scale)

    def encode(self, x, rows, bits=None):
        """What to write into some rows for the values `x`, fp32 [rows, in]: {name: tensor}.

        bits: random int32, shaped as x, round codes and block scales stochastically; None rounds to nearest.
        """
        old, encode_scale = self.scale[rows], 1 / self.global_scale
        x = x.unflatten(-1, (-1, BLOCK))  # [rows, in] -> [rows, in/16, 16]
        bits = None if bits is None else bits.view(x.shape)
        amax, unit = x.abs().amax(-1), old.float() * self.global_scale
        on_place = (8 * amax / unit).round() * unit == 8 * amax  # of nvfp4x2: as it was stored
        most = E2M1_MAX if self.more is None else torch.where(on_place, 7.0, KEPT_TO)
        scale_fits = (amax > KEPT_FROM * unit) & (amax <= most * unit)
        if bits is None or self.more is not None:
            new_scale = block_scale(amax, encode_scale)
        else:
            chance = bits[..., 0] >> 10 ^ bits[..., 1]  # bits of two numbers that their codes do not use
            new_scale, x = _stochastic_scale(x, amax, self.global_scale, chance, scale_fits)
        scale = torch.where(scale_fits, old, new_scale)
        y = in_units(x, scale, encode_scale)
        if self.more is None:
            return {"qdata": pair(e2m1_code(y, bits).flatten(-2)), "scale": scale}
        if bits is not None:  # the step that moved the largest number has used up its lower bits
            bits = bits >> torch.where(scale.float() == old.float(), 0, UPPER).int().unsqueeze(-1)
        middle = MIDDLES[0] - torch.arange(BLOCK, device=x.device) % 2  # 8, 7, 8, 7, ...
        place = (code(y.abs().clamp(max=7.0), bits, PLACES) + middle).clamp(max=LAST).to(torch.uint8)
        codes = place // PLACES | torch.signbit(y).to(torch.uint8) << 3
        more = place % PLACES
        return {"qdata": pair(codes.flatten(-2)), "scale": scale, "more": pair(more.flatten(-2))}

    def store(self, x, rows=slice(None)):
        """Write fp32 values [rows, in], to nearest."""
        for name, new in self.encode(x, rows).items():
            getattr(self, name)[rows] = new

    def __tensor_flatten__(self):
        return list(self.tensors()), None

    @staticmethod
    def __tensor_unflatten__(tensors, _, shape, stride):
        return from_tensors(tensors)

    def __repr__(self):
        kind = "nvfp4" if self.more is None else "nvfp4x2"
        return f"Packed({tuple(self.shape)}, {kind}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs, aten = dict(kwargs or {}), torch.ops.aten
        if function in (aten.detach.default, aten.alias.default):
            return from_tensors(args[0].tensors())
        same_type = kwargs.pop("dtype", None) in (None, torch.bfloat16)
        if function in (aten.clone.default, aten._to_copy.default) and same_type:
            kwargs.pop("memory_format", None)
            return from_tensors({name: function(part, **kwargs) for name, part in args[0].tensors().items()})
        if function is aten.copy_.default and isinstance(args[1], Packed):
            theirs = args[1].tensors()
            for name, part in args[0].tensors().items():
                part.copy_(theirs[name])
            return args[0]
        raise NotImplementedError(f"{function} on a packed weight, which has no dense values: use .decode()")


def from_tensors(tensors):
    """The `Packed` with the given `tensors()`."""
    return Packed(NVFP4(*(tensors[name] for name in NVFP4._fields)), tensors.get("more"))


def place_value(codes, more, middle):
    """The number, fp32, at the place 16 * code + more - middle, with its sign: `code`'s rulers read back."""
    place = (codes % 8 * PLACES + more - middle).float()
    size = torch.maximum(torch.maximum(place / 32, place / 16 - 2), place / 8 - 8)
    return torch.where(codes < 8, size, -size)


def place_table():
    """A `pair_table` of all two bytes: two codes, and their further bits."""
    codes, more = torch.arange(2**16) // 256, torch.arange(2**16) % 256
    even, odd = (codes % 16, more % 16), (codes // 16, more // 16)
    return pair_table(place_value(*even, MIDDLES[0]), place_value(*odd, MIDDLES[1]))


PLACE_TABLE = place_table()


def _stochastic_scale(x, amax, global_scale, chance, scale_fits):
    """New block scales, rounded stochastically, and `x` with numbers beyond 6 times the smaller one
    adjusted.

    With probability `share` the larger scale is taken. With the smaller one such numbers will be cut to its
    limit; so with the larger they must go beyond what they are, for the mean to be right.
    """
    exact = (amax * (1 / global_scale / E2M1_MAX)).clamp(max=E4M3_MAX)
    nearest = exact.to(torch.float8_e4m3fn)
    smaller = torch.where(nearest.float() > exact, neighbour(nearest, -1), nearest)
    larger = neighbour(smaller, 1)
    share = (exact - smaller.float()) / (larger.float() - smaller.float())
    up = ((chance & 2**DRAWS - 1) < share * 2**DRAWS) & ~scale_fits
    # What is beyond the limit grows by 1 / share; where `up` is not, nothing is beyond.
    limit = torch.where(up, E2M1_MAX * smaller.float() * global_scale, torch.inf).unsqueeze(-1)
    growth = torch.where(up, 1 / share - 1, 0.0).unsqueeze(-1)
    x = x + ((x.abs() - limit).clamp(min=0) * growth).copysign(x)
    return torch.where(amax < torch.inf, torch.where(up, larger, smaller), torch.nan), x


def pack(weight, global_scale, finer):
    """A weight as `Packed` (`finer`: nvfp4x2), read as `quantize` has it; one that is packed keeps its codes
    and its global scale."""
    packed = isinstance(weight, Packed)
    tensors = weight.tensors() if packed else quantize(weight, global_scale=global_scale)._asdict()
    on_code = torch.full_like(tensors["qdata"], MIDDLES[0] | MIDDLES[1] << 4)  # of numbers that are codes
    more = tensors.get("more", on_code) if finer else None
    new = Packed(NVFP4(*(tensors[name].clone() for name in NVFP4._fields)), more)
    for rows in row_chunks(weight) if finer and not packed else ():
        codes = tensors["qdata"][rows]
        new.store(weight.detach()[rows].float(), rows)
        wrong = new.qdata[rows] ^ codes  # a middle that is read as the farther code: take the place beside it
        more = torch.where(wrong & 7 > 0, new.more[rows] | 15, new.more[rows])
        new.more[rows] = torch.where(wrong & 7 << 4 > 0, more & 15, more)
        new.qdata[rows] = codes
    return new


def refit(weights):
    """Double the global scale that packed `weights` share, where a block scale nears the end of its range.

    All block scales are halved, so that no number changes (but in E4M3's subnormals, by half their step).
    """
    largest = torch.stack([weight.scale.float().amax() for weight in weights]).amax()
    factor = torch.where(largest > E4M3_MAX / 2, 2.0, 1.0)
    for weight in weights:
        weight.scale.copy_(weight.scale.float() / factor)
        weight.global_scale.mul_(factor)


def stored_values(weight):
    """The stored values of a weight, packed or not, as an ordinary tensor."""
    return weight.stored() if isinstance(weight, Packed) else weight.detach()


def tensors_of(weight):
    """The ordinary tensors that a weight, packed or not, is in memory."""
    return list(weight.tensors().values()) if isinstance(weight, Packed) else [weight.detach()]


def bytes_of(weight):
    """Memory that a weight takes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(weight))
