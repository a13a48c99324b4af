"""A weight that exists only as NVFP4, and is a parameter all the same.

`Packed` is a tensor whose shape is the logical [out, in] and whose memory is codes and scales: 0.5625 bytes a
number (`nvfp4`), or 1.125 with a second NVFP4 of what the first rounded away (`nvfp4x2`). No dense copy lies
anywhere. To autograd, `nn.Module` and `state_dict` it is one tensor, so hooks, names and tied weights work as
ever; its gradient is an ordinary dense tensor. Arithmetic on it is refused: who may look inside asks.

    nvfp4()    the codes that products and exports read: Q1
    decode()   their values
    exact()    what is really stored: Q1, and the residual Q2 if there is one
    store()    write new values

Writing is where 4-bit training lives or dies. A step of lr 1e-5 moves a weight by 1/400 of the gap between
two codes; to nearest, it never arrives. With one NVFP4 the code is rounded stochastically: one weight in
400 takes a whole step, and the mean is right. With two, Q1 is rounded to nearest and Q2, with gaps some 12
times finer, stochastically.

A new block scale shifts the grid under all 16 numbers, also under those that did not move. So a block keeps
its scale while its largest number is between 2.9 and 6 times it. When one grows a little beyond 6, the
scale too is rounded stochastically: it seldom takes the next value, and then that number goes to 6 times
it; else the number is cut. On average it grows as it should, and most of the time the other fifteen stay as
they are.
"""

import torch

from .nvfp4 import (
    BLOCK,
    E2M1_MAX,
    E4M3_MIN,
    NVFP4,
    block_scale,
    decode,
    dequantize,
    encode,
    next_e4m3,
    quantize,
    row_chunks,
    weight_global_scale,
)

KEEP = 2.9  # a block's scale stays while its amax is in (KEEP, E2M1_MAX] times it
FINER = 8  # the residual's global scale is so much smaller, to keep its block scales out of the subnormals


class Packed(torch.Tensor):
    """`Packed(q)`: the matrix [out, in] whose `NVFP4` is `q`, without or with the `residual` (codes,
    scales)."""

    @staticmethod
    def __new__(cls, q, residual=None):
        rows, half = q.qdata.shape
        shape, device = (rows, 2 * half), q.qdata.device
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bfloat16, device=device)

    def __init__(self, q, residual=None):
        self.qdata, self.scale, self.global_scale = q
        if residual is not None:
            self.residual_qdata, self.residual_scale = residual

    @property
    def has_residual(self):
        return hasattr(self, "residual_qdata")

    def parts(self):
        """{name: tensor} of the memory."""
        names = ["qdata", "scale", "global_scale"]
        names += ["residual_qdata", "residual_scale"] if self.has_residual else []
        return {name: getattr(self, name) for name in names}

    def nvfp4(self):
        return NVFP4(self.qdata, self.scale, self.global_scale)

    def decode(self, rows=slice(None)):
        """The values of some rows (a slice, or row numbers [N]) as products read them, fp32 [rows, in]."""
        return dequantize(NVFP4(self.qdata[rows], self.scale[rows], self.global_scale))

    def exact(self, rows=slice(None)):
        """The values of some rows as they are stored, fp32 [rows, in]."""
        if not self.has_residual:
            return self.decode(rows)
        finer = self.global_scale / FINER
        return self.decode(rows) + decode(self.residual_qdata[rows], self.residual_scale[rows], finer)

    def store(self, rows, x, noise=None, block_noise=None):
        """Write fp32 values [rows, in], to nearest, or stochastically.

        noise, block_noise: uniform in [0, 1), [rows, in] and [rows, in/16], for the codes and the block
        scales.
        """
        encode_scale, old = 1 / self.global_scale, self.scale[rows]
        amax = x.unflatten(-1, (-1, BLOCK)).abs().amax(-1)
        unit = old.float() * self.global_scale
        fits = (amax > KEEP * unit) & (amax <= E2M1_MAX * unit)
        if noise is None or self.has_residual:
            fresh = block_scale(amax, encode_scale)
        else:
            fresh, x = self._stochastic_scale(x, amax, encode_scale, block_noise, fits)
        scale = torch.where(fits, old.float(), fresh.float()).to(torch.float8_e4m3fn)
        first = None if self.has_residual else noise
        self.qdata[rows], self.scale[rows] = encode(x, encode_scale, first, scale=scale)
        if self.has_residual:
            rest = x - self.decode(rows)
            self.residual_qdata[rows], self.residual_scale[rows] = encode(rest, FINER * encode_scale, noise)

    def _stochastic_scale(self, x, amax, encode_scale, block_noise, fits):
        """New block scales, rounded stochastically, and `x` with numbers beyond 6 times the smaller one
        adjusted.

        With probability `share` the larger scale is taken. With the smaller one such numbers will be cut to
        its limit; so with the larger they must go beyond what they are, for the mean to be right.
        """
        exact = amax * (encode_scale / E2M1_MAX)
        nearest = block_scale(amax, encode_scale)
        below = next_e4m3(nearest, nearest.float() > exact, -1)
        above = next_e4m3(below, torch.ones_like(fits))
        share = (exact - below.float()) / (above.float() - below.float()).clamp(min=E4M3_MIN)
        up = (block_noise < share) & ~fits
        limit = (E2M1_MAX * below.float() * self.global_scale).unsqueeze(-1)
        blocks = x.unflatten(-1, (-1, BLOCK))
        beyond = (limit + (blocks.abs() - limit) / share.unsqueeze(-1)).copysign(blocks)
        adjusted = torch.where(up.unsqueeze(-1) & (blocks.abs() > limit), beyond, blocks)
        return torch.where(up, above.float(), below.float()), adjusted.flatten(-2)

    def __tensor_flatten__(self):
        return list(self.parts()), None

    @staticmethod
    def __tensor_unflatten__(tensors, _, shape, stride):
        return from_parts(tensors)

    def __repr__(self):
        kind = "nvfp4x2" if self.has_residual else "nvfp4"
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
    q = NVFP4(*(parts[name] for name in NVFP4._fields))
    return Packed(
        q, (parts["residual_qdata"], parts["residual_scale"]) if "residual_qdata" in parts else None
    )


def pack(weight, global_scale, residual):
    """A weight as `Packed`, rounded to nearest; one that is packed keeps its codes and its global scale."""
    values = weight.exact() if isinstance(weight, Packed) else weight.detach().float()
    q = weight.nvfp4() if isinstance(weight, Packed) else quantize(values, global_scale=global_scale)
    q = NVFP4(*(part.clone() for part in q))
    if not residual:
        return Packed(q)
    return Packed(q, quantize(values - dequantize(q), global_scale=q.global_scale / FINER)[:2])


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
    qdata, scale = (torch.cat([part.view(torch.uint8) for part in some]) for some in zip(*parts))
    return Packed(NVFP4(qdata, scale.view(torch.float8_e4m3fn), global_scale))


def _codes_of_values(x, global_scale):
    """(codes, scales, whether they are `x` exactly)"""
    blocks, encode_scale = x.unflatten(-1, (-1, BLOCK)), 1 / global_scale
    amax, scale, right = blocks.abs().amax(-1), None, None
    for top in (E2M1_MAX, 4.0, 3.0):
        tried = block_scale(amax * (E2M1_MAX / top), encode_scale)
        scale = tried if scale is None else torch.where(right, scale.float(), tried.float()).to(tried.dtype)
        codes, _ = encode(x, encode_scale, scale=scale)
        right = (decode(codes, scale, global_scale).unflatten(-1, (-1, BLOCK)) == blocks).all(-1)
    return codes, scale, bool(right.all())


def refit(weights):
    """Double the global scale of packed `weights` that share one, where a block scale nears the end of its
    range.

    All block scales are halved, so that no number changes (but in E4M3's subnormals, by half their step).
    """
    top = torch.stack([weight.scale.float().amax() for weight in weights]).amax()
    factor = torch.where(top > 224.0, 2.0, 1.0)
    for weight in weights:
        weight.global_scale.mul_(factor)
        for scale in [weight.scale, *([weight.residual_scale] if weight.has_residual else [])]:
            scale.copy_(scale.float() / factor)


def dense(weight):
    """The stored values of a weight, packed or not, as an ordinary tensor."""
    return weight.exact() if isinstance(weight, Packed) else weight.detach()


def bytes_of(weight):
    """Memory that a weight takes."""
    parts = weight.parts().values() if isinstance(weight, Packed) else (weight,)
    return sum(part.numel() * part.element_size() for part in parts)
