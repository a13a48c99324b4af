"""Matrix products with NVFP4 weights (W4A16), and the embedding look-up.

The forward pass multiplies with what the 4-bit weight really is, in the activations' precision:

    w4 = dequantize(quantize(weight))      y = x @ w4.T

Rounding has no useful derivative (it is 0 almost everywhere), so the backward pass takes it for the
identity, the straight-through estimator (STE, Bengio et al. 2013):

    dx = dy @ w4           d weight = dy.T @ x

How numbers are multiplied is one class, `Products`: to try a format, write another.

w4 is not kept between the two passes: it is as large as a bf16 weight, and computing it again costs a few
microseconds a megabyte. Only the weight itself is saved, and that exists anyway.

Servers fuse some matrices into one (q/k/v, gate/up) and keep one global scale for it. So such layers form a
`Group`, and train with one.

Biases do not occur in Qwen3's projections and are left out.
"""

import torch
from torch import nn

from .nvfp4 import dequantize, fake_quantize, quantize, row_slices, weight_global_scale
from .packed import Packed, refit, stored_values

WORDS = 16384  # of the vocabulary in a slice of head or embedding


class Group:
    """Layers whose weights share one global scale."""

    def __init__(self):
        self.layers, self.kept_scale = [], None

    def measure(self):
        """The power-of-two scale, fp32 [], that the weights ask for now."""
        return weight_global_scale(*(stored_values(layer.weight) for layer in self.layers))

    def global_scale(self):
        """The scale of dense weights: measured after each step, not at every use."""
        return self.measure() if self.kept_scale is None else self.kept_scale.to(self.layers[0].weight.device)

    def packed(self):
        return all(isinstance(layer.weight, Packed) for layer in self.layers)

    def agrees(self):
        """Whether all packed weights have the same global scale."""
        weights = [layer.weight for layer in self.layers if isinstance(layer.weight, Packed)]
        return len({weight.global_scale.item() for weight in weights}) < 2

    def trains(self):
        return any(layer.weight.requires_grad for layer in self.layers)

    def refit(self):
        """After a step: packed weights that have grown get a larger scale; that of dense ones is measured."""
        if self.packed():
            if self.trains():
                refit([layer.weight for layer in self.layers])
        elif any(layer.quantized for layer in self.layers):
            scale = self.measure()
            self.kept_scale = scale if self.kept_scale is None else self.kept_scale.copy_(scale)


class Linear(nn.Module):
    """`x @ weight.T`, through NVFP4 if `quantized`.

    group: the `Group` it belongs to; None: one of its own.
    decoded: what the product reads, kept while weights do not change (`generate.decoded`), else None.
    on_gradient: a function (slice of rows, their gradient or what makes it), or None. Head and embedding give
    it their gradients, as large as they are dense, some rows at a time, and autograd none.
    """

    def __init__(self, in_features, out_features, quantized=True, group=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.quantized, self.group, self.decoded, self.on_gradient = quantized, group or Group(), None, None
        self.products = Products()
        self.group.layers.append(self)

    def value(self, dtype, rows=slice(None)):
        """The weight, or some rows of it, as the product reads it: dense, in `dtype`."""
        return value_of(self, dtype, rows) if self.decoded is None else self.decoded[rows]

    def codes(self):
        """The weight as `NVFP4`: what the product reads if `quantized`."""
        if isinstance(self.weight, Packed):
            return self.weight.nvfp4()
        return quantize(self.weight.detach(), global_scale=self.group.measure())

    def forward(self, x):
        return _Product.apply(x, self.weight, self, self.now())

    def now(self):
        """The `Products` to use: only training may have others."""
        return self.products if torch.is_grad_enabled() else Products()


class Embedding(nn.Module):
    """Rows of `weight` by number, in `dtype`.

    tied: the matrix is the head's too. Only then is a dense one read through NVFP4: both read one value.
    """

    def __init__(self, rows, features, quantized=True, tied=False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, features))
        self.quantized, self.tied, self.group, self.on_gradient = quantized, tied, Group(), None
        self.group.layers.append(self)

    def value(self, dtype, rows=slice(None)):
        """Some rows (a slice, or row numbers) as the look-up reads them, in `dtype`."""
        if self.tied or isinstance(self.weight, Packed):
            return value_of(self, dtype, rows)
        return self.weight.detach()[rows].to(dtype)

    def forward(self, ids, dtype):
        return _LookUp.apply(ids, self.weight, self, dtype)


def value_of(layer, dtype, rows):
    """Some rows (a slice, or row numbers) of a layer's weight, dense, in `dtype`: a packed weight is read by
    its codes, a dense one through those that it would have. If the layer is not quantized, both are read as
    they are stored."""
    weight = layer.weight
    if not layer.quantized:
        return (weight.stored(rows) if isinstance(weight, Packed) else weight.detach()[rows]).to(dtype)
    if isinstance(weight, Packed):
        return dequantize(weight.nvfp4(rows), dtype)
    return fake_quantize(weight.detach()[rows], layer.group.global_scale(), dtype)


class Products:
    """How training multiplies: here in the activations' precision (`fp8.py` has another way).

    The rows of one matrix meet the rows of another, multiply(rows(a), rows(b)) = a @ b.T; where columns meet,
    `columns` makes rows of them. What these make of a matrix [N, K] is a tuple of tensors, an operand.
    """

    def rows(self, x):
        return (x,)

    def columns(self, x):
        return (x.T,)

    def both(self, x, columns=True):
        """(rows, columns); without `columns` the latter need only have their shape."""
        return self.rows(x), self.columns(x)

    def gradient(self, dy):
        """(rows, columns) of what comes back."""
        return self.both(dy)

    def multiply(self, a, b, dtype):
        """[N, K] and [M, K] -> [N, M] in `dtype`."""
        return a[0] @ b[0].T


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, layer, how):
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.how = layer, how
        y = how.multiply(how.rows(x.flatten(0, -2)), how.rows(layer.value(x.dtype)), x.dtype)  # x @ w4.T
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, dy):
        (x, _), how, dx, dweight = ctx.saved_tensors, ctx.how, None, None
        rows, columns = how.gradient(dy.flatten(0, -2))
        if ctx.needs_input_grad[0]:  # dy @ w4
            dx = how.multiply(rows, how.columns(ctx.layer.value(dy.dtype)), dy.dtype).view_as(x)
        if ctx.needs_input_grad[1]:  # dy.T @ x
            dweight = how.multiply(columns, how.columns(x.flatten(0, -2)), dy.dtype)
        return dx, dweight, None, None


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, layer, dtype):
        ctx.save_for_backward(ids, weight)
        ctx.on_gradient = layer.on_gradient
        return layer.value(dtype, ids.flatten()).unflatten(0, ids.shape)

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


def word_slices(count):
    """Slices of a vocabulary of so many words, for what would be large as a whole."""
    return row_slices(count, WORDS)
