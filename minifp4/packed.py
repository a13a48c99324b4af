"""A weight that exists only as NVFP4, and is a parameter all the same.

`Packed` is a tensor whose shape is the logical [out, in] and whose memory is its codes and scales, 0.5625
bytes a
number: no dense copy lies anywhere. To autograd, `nn.Module` and `state_dict` it is one tensor, so hooks,
names and tied weights work as ever; its gradient is an ordinary dense tensor. Arithmetic on it is refused:
the few functions that may look inside (`linear.py`, `formats.py`, ...) ask for `decode` or `nvfp4`.
"""

import torch

from .nvfp4 import NVFP4, dequantize


class Packed(torch.Tensor):
    """`Packed(q)`: the matrix [out, in] whose `NVFP4` is `q`."""

    @staticmethod
    def __new__(cls, q):
        rows, half = q.qdata.shape
        shape, device = (rows, 2 * half), q.qdata.device
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bfloat16, device=device)

    def __init__(self, q):
        self.qdata, self.scale, self.global_scale = q

    def nvfp4(self):
        return NVFP4(self.qdata, self.scale, self.global_scale)

    def decode(self, rows=slice(None)):
        """The values of some rows (a slice, or row numbers [N]), fp32 [rows, in]."""
        return dequantize(NVFP4(self.qdata[rows], self.scale[rows], self.global_scale))

    def __tensor_flatten__(self):
        return ["qdata", "scale", "global_scale"], None

    @staticmethod
    def __tensor_unflatten__(tensors, _, shape, stride):
        return Packed(NVFP4(**tensors))

    def __repr__(self):
        return f"Packed({tuple(self.shape)}, NVFP4, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        aten = torch.ops.aten
        if function in (aten.detach.default, aten.alias.default):
            return cls(args[0].nvfp4())
        if function in (aten.clone.default, aten._to_copy.default) and kwargs.pop("dtype", None) in (
            None,
            torch.bfloat16,
        ):
            kwargs.pop("memory_format", None)
            return cls(NVFP4(*(function(part, **kwargs) for part in args[0].nvfp4())))
        if function is aten.copy_.default and isinstance(args[1], Packed):
            for mine, other in zip(args[0].nvfp4(), args[1].nvfp4()):
                mine.copy_(other)
            return args[0]
        raise NotImplementedError(
            f"{function} on a packed NVFP4 weight, which has no dense values: use .decode()"
        )


def dense(weight):
    """The stored values of a weight, packed or not, as an ordinary tensor."""
    return weight.decode() if isinstance(weight, Packed) else weight.detach()


def bytes_of(weight):
    """Memory that a weight takes."""
    parts = weight.nvfp4() if isinstance(weight, Packed) else (weight,)
    return sum(part.numel() * part.element_size() for part in parts)
