"""Matrix products with NVFP4 weights (W4A16), and the embedding look-up.

The forward pass multiplies with what the 4-bit weight really is, in the activations' precision:

    w4 = dequantize(quantize(weight))      y = x @ w4.T

Rounding has no useful derivative (it is 0 almost everywhere), so the backward pass takes it for the
identity, the straight-through estimator (STE, Bengio et al. 2013):

    dx = dy @ w4           d weight = dy.T @ x

w4 is not kept between the two passes: it is as large as a bf16 weight, and computing it again costs a few
microseconds a megabyte. Only the weight itself is saved, and that exists anyway. (A checkpointed block is
computed again just before its backward pass; then w4 is kept that long.)

Biases do not occur in Qwen3's projections and are left out.
"""

from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .kernels import any_length, compiled
from .nvfp4 import (
    BLOCK,
    decode,
    dequantize,
    encode,
    fake_quantize,
    paired,
    pairs,
    quantize,
    raw,
    row_slices,
    unpaired,
    weight_global_scale,
)
from .packed import Packed, dense, refit, refit_parts

WORDS = 16384  # of the vocabulary in a slice of head or embedding


class Kernels(NamedTuple):
    """What this module does in many small operations; `compiled_kernels` makes one or two of each."""

    dequantize: Callable  # (NVFP4, dtype)
    fake_quantize: Callable  # (weight, global_scale, dtype)
    refit: Callable  # (packed weights of a group)
    gated: Callable  # `_gated`
    gated_backward: Callable  # `_gated_backward`


class Linear(nn.Module):
    """`x @ weight.T`, through NVFP4 if `quantized`; with a gate (SwiGLU) `(silu(gate) * x) @ weight.T`.

    group: the layers that a server fuses with this one (q/k/v, gate/up); they share one global scale.
    kept_scale: the group's scale of dense weights since the last `refit_global_scales`, else None.
    decoded: what the product reads, kept while weights do not change (`Qwen3.decoded`), else None.
    recomputed: the forward pass is one of a checkpointed block, which keeps what it saves only when it runs
    again (`model.Checkpointed`).
    unread: nobody reads the product now, only its derivatives are wanted.
    on_gradient: a function (slice of rows, their gradient), or None. `loss.cross_entropy` gives it the
    gradient of the head some rows at a time, and autograd none: the whole is as large as the dense matrix.
    """

    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_buffer("kept_scale", None, persistent=False)
        self.quantized, self.group, self.decoded, self.kernels = False, [self], None, EAGER
        self.recomputed, self.unread, self.on_gradient = False, False, None

    def global_scale(self):
        """The fp32 [] scale of the group's weights; None if the product reads the weight as it is stored."""
        if not self.quantized or isinstance(self.weight, Packed):
            return None
        return group_scale(self) if self.kept_scale is None else self.kept_scale

    def codes(self):
        """The weight as `NVFP4`: what the product reads if `quantized`."""
        if isinstance(self.weight, Packed):
            return self.weight.nvfp4()
        return quantize(dense(self.weight), global_scale=group_scale(self))

    def value(self, dtype):
        """The weight as the product reads it, dense, in `dtype`."""
        return weight_value(self.weight, self.global_scale(), dtype, quantized=self.quantized)

    def forward(self, x, gate=None):
        if self.decoded is not None:
            return F.linear(x if gate is None else _gated(gate, x), self.decoded)
        return _MatrixProduct.apply(x, gate, self.weight, self)


class Embedding(nn.Module):
    """Rows of `weight` by number, in `dtype`. Dense ones are quantized only where the matrix is the NVFP4
    head's too (tied).

    on_gradient: gets the gradient some rows at a time, as with `Linear`.
    """

    def __init__(self, rows, features):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, features))
        self.register_buffer("kept_scale", None, persistent=False)
        self.quantized, self.group, self.kernels, self.on_gradient = False, [self], EAGER, None
        self.reads_codes = True  # of a packed weight

    global_scale = Linear.global_scale

    def value(self, dtype):
        """All rows as the look-up reads them, in `dtype`."""
        return weight_value(self.weight, self.global_scale(), dtype, quantized=self.reads_codes)

    def forward(self, ids, dtype):
        return _LookUp.apply(ids, self.weight, self, dtype)


def group_scale(layer):
    """The power-of-two global scale, fp32 [], for all weights of the layer's group."""
    return weight_global_scale(*(dense(other.weight) for other in layer.group))


def refit_global_scales(layers):
    """After a step: the global scales that the weights have now, each group one.

    Packed weights that have grown get a larger one; the one of dense weights is measured, once a step and
    not at every use.
    """
    for group in {id(layer.group[0]): layer.group for layer in layers}.values():
        if all(isinstance(layer.weight, Packed) for layer in group):
            group[0].kernels.refit([layer.weight for layer in group])
            continue
        if not group[0].quantized:
            continue
        scale = group_scale(group[0])
        for layer in group:
            if layer.kept_scale is None:
                layer.kept_scale = scale.clone()
            layer.kept_scale.copy_(scale)


def share_global_scale(*layers):
    """Make `layers` one group."""
    for layer in layers:
        layer.group = list(layers)


def weight_value(weight, global_scale, dtype, rows=slice(None), kernels=None, quantized=True):
    """A weight, or some rows of it (a slice or row numbers), as the forward pass reads it: dense, in
    `dtype`. If not `quantized`, a packed one too is read as it is stored."""
    kernels = kernels or EAGER
    if isinstance(weight, Packed):
        return kernels.dequantize(weight.nvfp4(rows), dtype) if quantized else weight.exact(rows).to(dtype)
    if global_scale is None:
        return weight.detach()[rows].to(dtype)
    return kernels.fake_quantize(weight.detach()[rows], global_scale, dtype)


def word_slices(count):
    """Slices of a vocabulary of so many words, for what would be large as a whole."""
    return row_slices(count, WORDS)


class _MatrixProduct(torch.autograd.Function):
    """With a gate, silu(gate) * x is not kept for the backward pass, which makes it again."""

    @staticmethod
    def forward(ctx, x, gate, weight, layer):
        ctx.global_scale, ctx.kernels, ctx.quantized = layer.global_scale(), layer.kernels, layer.quantized
        w4 = weight_value(weight, ctx.global_scale, x.dtype, kernels=ctx.kernels, quantized=ctx.quantized)
        ctx.save_for_backward(x, gate, weight, w4 if layer.recomputed else None)
        if layer.unread:
            return x.new_zeros(()).expand(*x.shape[:-1], len(weight))
        return F.linear(x if gate is None else ctx.kernels.gated(gate, x), w4)

    @staticmethod
    def backward(ctx, dy):
        x, gate, weight, w4 = ctx.saved_tensors
        wants_x, wants_gate, wants_weight = ctx.needs_input_grad[:3]
        dx = dgate = dweight = None
        if wants_x or wants_gate:
            if w4 is None:
                how = {"kernels": ctx.kernels, "quantized": ctx.quantized}
                w4 = weight_value(weight, ctx.global_scale, dy.dtype, **how)
            dx = dy @ w4
        if gate is not None:
            if dx is None:
                x = ctx.kernels.gated(gate, x)
            else:
                ctx.kernels.gated_backward(dx, x, gate)
                x, dx, dgate = dx, x, gate  # what they have become
        if wants_weight:
            dweight = dy.flatten(0, -2).T @ x.flatten(0, -2)
        return dx, dgate, dweight, None


def _gated(gate, x):
    """SwiGLU (Shazeer 2020)."""
    return F.silu(gate) * x


def _gated_backward(dx, x, gate):
    """From dx, the gradient of silu(gate) * x, in place, for nothing that a layer keeps is larger: `dx`
    becomes that product, `x` and `gate` their gradients."""
    silu = F.silu(gate)
    gate.copy_(torch.ops.aten.silu_backward(dx * x, gate))
    product = silu * x
    x.copy_(dx * silu)
    dx.copy_(product)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, layer, dtype):
        ctx.save_for_backward(ids, weight)
        ctx.on_gradient = layer.on_gradient
        rows, how = ids.flatten(), {"quantized": layer.reads_codes}
        return weight_value(weight, layer.global_scale(), dtype, rows, **how).unflatten(0, ids.shape)

    @staticmethod
    def backward(ctx, dy):
        ids, weight = ctx.saved_tensors
        # `embedding_dense_backward` sums a word's rows in a fixed order, which index_add on a GPU does not.
        if ctx.on_gradient is None:
            dweight = torch.ops.aten.embedding_dense_backward(dy, ids, len(weight), -1, False)
            return None, dweight, None, None
        words, sums = _sums_by_word(ids.flatten(), dy.flatten(0, -2))
        for rows in word_slices(len(weight)):
            count = rows.stop - rows.start  # row `count` is for all other words, and dropped
            ours = torch.where((words >= rows.start) & (words < rows.stop), words - rows.start, count)
            dweight = sums.new_zeros(count + 1, sums.shape[1]).index_copy_(0, ours, sums)
            ctx.on_gradient(rows, dweight[:count])
        return None, None, None, None


def _sums_by_word(ids, dy):
    """(words [N], the sum of each one's rows of `dy` [N, D]) of a look-up of `ids` [N], each word once and
    -1 for what is left; the number of words is not read from the device."""
    ordered, order = ids.sort(stable=True)
    number = torch.cat([ordered.new_zeros(1), (ordered[1:] != ordered[:-1]).long()]).cumsum(0)  # of the word
    words = torch.full_like(ids, -1).index_copy_(0, number, ordered)
    numbers = torch.empty_like(ids).index_copy_(0, order, number)  # in the order of `ids`
    return words, torch.ops.aten.embedding_dense_backward(dy, numbers, len(ids), -1, False)


def compiled_kernels():
    """`Kernels` that are compiled. Decoding is fastest with one kernel for each shape, and a group's largest
    scale is found well only by a kernel made for its size; the others serve all shapes.

    Weights are read by them even where a caller asked for eager code (`torch.compiler.set_stance`), because
    in eager each temporary would be as large as the dense matrix.
    """
    decode_blocks, fake_blocks, fit = (
        compiled(function) for function in (_decode_blocks, _fake_blocks, refit_parts)
    )

    def dequantize(q, dtype):
        blocks = q.qdata.view(-1, BLOCK // 2), raw(q.scale).view(-1, 1)
        with torch.compiler.set_stance("default"):
            return decode_blocks(*blocks, q.global_scale, dtype).view(dtype).view(len(q.qdata), -1)

    def fake_quantize(weight, global_scale, dtype):
        blocks = any_length(pairs(weight.view(-1, BLOCK)))
        with torch.compiler.set_stance("default"):
            return fake_blocks(*blocks, global_scale, weight.dtype, dtype).view(dtype).view_as(weight)

    return Kernels(
        dequantize, fake_quantize, lambda weights: refit(weights, fit),
        torch.compile(_gated), torch.compile(_gated_backward),
    )  # fmt: skip


def _decode_blocks(qdata, scale, global_scale, dtype):
    """The numbers as `nvfp4.pairs`: with half as many instructions as one by one."""
    return paired(*(half.to(dtype) for half in decode(qdata, scale, global_scale)))


def _fake_blocks(weight, global_scale, stored, dtype):
    """The same of `pairs` in `stored`, after encoding them."""
    return _decode_blocks(*encode(unpaired(weight, stored), 1 / global_scale), global_scale, dtype)


EAGER = Kernels(dequantize, fake_quantize, refit, _gated, _gated_backward)
