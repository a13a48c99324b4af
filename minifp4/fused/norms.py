"""RMSNorm (Zhang & Sennrich 2019), and what a Qwen3 does just before one or after it.

    r = 1 / sqrt(mean(x**2) + eps)        n = x * r        y = n * weight

Little is computed here, so time is the number of times that memory is read or written. Autograd makes a
kernel of its own for each sum: of a block's input and the branch that comes back to it; and on the way back,
of the gradients of all who read the same tensor (q, k and v read one norm, and its input goes on beside
them). Each costs as much as the norm. So each of the two functions below has one kernel forward, one
backward, and these sums are inside:

    dn = dy * weight        dx = dn * r - x * r**3 * mean(dn * x)        dweight = sum(dy * n)

with the input (after the sum) and r kept. In fp32 the bits are autograd's; in bf16 these functions round
their results alone, not each sum.
"""

from typing import Callable, NamedTuple

import torch

from .compiled import any_length, compiled

# For the compiler, which would keep what reads more than four tensors in memory.
ONE_KERNEL = {"realize_reads_threshold": 64, "realize_opcount_threshold": 500}
MANY = 1024  # tokens, for which the two gradients of a norm are one kernel


class Kernels(NamedTuple):
    """What this module does; `compiled_kernels` makes one kernel of each."""

    norm: Callable  # `_norm`
    norm_backward: Callable  # `_norm_backward`
    rotated: Callable  # `_rotated`
    rotated_backward: Callable  # `_rotated_backward`


def add_norm(module, kernels, x, branch=None, readers=1):
    """(x + branch, its norm by the `RMSNorm` module, its norm again, ... for each of its readers): each with
    a gradient of its own, which are added in the norm's backward pass."""
    return _AddNorm.apply(x, branch, module.weight, module.eps, readers, kernels)


def rotated_norm(module, kernels, x, cos, sin):
    """The norm of every head of [B, T, H, head_dim], then `model.rotated` by cos and sin [B, T, head_dim]."""
    return _RotatedNorm.apply(x, cos, sin, module.weight, module.eps, kernels)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, weight, eps, readers, kernels):
        parts = (part if part is None else part.flatten(0, -2) for part in (x, branch))
        total, y, r = kernels.norm(*parts, weight, eps)
        ctx.save_for_backward(total, r, weight)
        ctx.shape, ctx.adds, ctx.kernels = x.shape, branch is not None, kernels
        if ctx.adds:
            x = total.view(x.shape)
        return x, *(y.view(x.shape) for _ in range(readers))  # each with a gradient of its own

    @staticmethod
    def backward(ctx, dtotal, *dy):
        dtotal, *dy = (gradient.flatten(0, -2) for gradient in (dtotal, *reversed(dy)))
        dx, dweight = ctx.kernels.norm_backward(*ctx.saved_tensors, dtotal, tuple(dy))
        dx = dx.view(ctx.shape)
        return dx, dx if ctx.adds else None, dweight, None, None, None


class _RotatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, weight, eps, kernels):
        ctx.shape, ctx.kernels = x.shape, kernels
        # To the compiler, finding a head's token in [B, T] is a division.
        x, cos, sin = (tensor.flatten(0, 1) for tensor in (x, cos, sin))
        y, r = kernels.rotated(x, cos, sin, weight, eps)
        ctx.save_for_backward(x, r, weight, cos, sin)
        return y.view(ctx.shape)

    @staticmethod
    def backward(ctx, dy):
        dx, dweight = ctx.kernels.rotated_backward(*ctx.saved_tensors, dy.flatten(0, 1))
        return dx.view(ctx.shape), None, None, dweight, None, None


def _norm(x, branch, weight, eps):
    """(x + branch, y, r)"""
    if branch is not None:
        x = x + branch
    return x, *_rms_norm(x, weight, eps)


def _norm_backward(x, r, weight, dx, dy):
    """(the gradient of x, of weight), from those of x itself and of all copies of y."""
    first, *others = (gradient.float() for gradient in dy)
    return _rms_norm_backward(x, r, weight, sum(others, first), dx)


def _rotated(x, cos, sin, weight, eps):
    """(y, with each pair rotated; r)"""
    y, r = _rms_norm(x, weight, eps)
    return y * cos.unsqueeze(1) + _swapped(y) * sin.unsqueeze(1), r  # cos, sin: [tokens, 1, head_dim]


def _rotated_backward(x, r, weight, cos, sin, dy):
    """(the gradient of x, of weight); the way back is by the negative angle."""
    dy, cos, sin = dy.float(), cos.unsqueeze(1), sin.unsqueeze(1)
    return _rms_norm_backward(x, r, weight, dy * cos - _swapped(dy) * sin)


def _swapped(x):
    """The halves of the last dimension exchanged."""
    return x.roll(x.shape[-1] // 2, -1)


def _rms_norm(x, weight, eps):
    """(y, r)"""
    wide = x.float()
    r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * (wide * r).to(x.dtype), r


def _rms_norm_backward(x, r, weight, dy, dx=0):
    """`dy` in fp32. `dx`: what else to add to the gradient of x."""
    wide = x.float()
    dn = dy * weight.to(x.dtype)
    dx = dx + dn * r - wide * ((dn * wide).sum(-1, keepdim=True) * r.pow(3) / x.shape[-1])
    return dx.to(x.dtype), (dy * (wide * r)).sum(tuple(range(x.dim() - 1))).to(x.dtype)


def compiled_kernels():
    """`Kernels` that are compiled, for any batch."""
    return Kernels(
        norm=_for_any_batch(compiled(_norm, config={"XBLOCK": 1, "num_warps": 4})),
        norm_backward=_both_gradients(_norm_backward, 16),
        rotated=_for_any_batch(compiled(_rotated, ONE_KERNEL, {"XBLOCK": 8, "num_warps": 2})),
        rotated_backward=_both_gradients(_rotated_backward, 64),
    )


def _both_gradients(function, rows):
    """A backward pass as one kernel, whose thread blocks go through so many rows each and add up their part
    of the weight's gradient on the way. Few tokens are too few for that, and cheap to read twice."""
    one = "triton.mix_order_reduction"
    how = {f"{one}_split_size": rows, f"{one}_allow_multi_stages": True, f"{one}_non_strict_mode": True}
    many = _for_any_batch(compiled(function, ONE_KERNEL | how))
    few = _for_any_batch(compiled(function, {one: False}))
    return lambda x, *others: (many if len(x) >= MANY else few)(x, *others)


def _for_any_batch(function):
    """`function`, compiled, without regard to how many tokens there are."""

    def call(*values):
        for value in values:
            for tensor in value if isinstance(value, tuple) else (value,):
                if isinstance(tensor, torch.Tensor) and tensor.dim() > 1:  # [tokens, ...], not a weight
                    any_length(tensor)
        return function(*values)

    return call


EAGER = Kernels(_norm, _norm_backward, _rotated, _rotated_backward)
