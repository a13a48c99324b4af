"""Matrix products with NVFP4 weights (W4A16), the embedding look-up, and the cross entropy of a large
vocabulary.

The forward pass multiplies with what the 4-bit weight really is, in the activations' precision:

    w4 = dequantize(quantize(weight))      y = x @ w4.T

Rounding has no useful derivative (it is 0 almost everywhere), so the backward pass takes it for the
identity, the straight-through estimator (STE, Bengio et al. 2013):

    dx = dy @ w4           d weight = dy.T @ x

w4 is not kept between the two passes: it is as large as a bf16 weight, and computing it again costs a few
microseconds a megabyte. Only the weight itself is saved, and that exists anyway.

Biases do not occur in Qwen3's projections and are left out.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .nvfp4 import fake_quantize, quantize, row_slices, weight_global_scale
from .packed import Packed, dense, refit

IGNORE = -100  # the label of a token that is not learned, as in torch's cross_entropy
WORDS = 16384  # of the vocabulary that `cross_entropy` looks at at once
LOGITS = 2**24  # numbers in its largest piece of logits: 64 MiB in fp32


class Linear(nn.Module):
    """`x @ weight.T`, through NVFP4 if `quantized`.

    group: the layers that a server fuses with this one (q/k/v, gate/up); they share one global scale.
    decoded: what the product reads, kept while weights do not change (`Qwen3.decoded`), else None.
    """

    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.quantized = False
        self.group = [self]
        self.decoded = None

    def global_scale(self):
        """The fp32 [] scale of the group's weights; None if the product reads the weight as it is stored."""
        if not self.quantized or isinstance(self.weight, Packed):
            return None
        return group_scale(self)

    def codes(self):
        """The weight as `NVFP4`: what the product reads if `quantized`."""
        if isinstance(self.weight, Packed):
            return self.weight.nvfp4()
        return quantize(dense(self.weight), global_scale=group_scale(self))

    def value(self, dtype):
        """The weight as the product reads it, dense, in `dtype`."""
        return weight_value(self.weight, self.global_scale(), dtype)

    def forward(self, x):
        if self.decoded is not None:
            return F.linear(x, self.decoded)
        return _MatrixProduct.apply(x, self.weight, self.global_scale())


class Embedding(nn.Module):
    """Rows of `weight` by number, in `dtype`. Quantized only where the matrix is the NVFP4 head's too
    (tied)."""

    def __init__(self, rows, features):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, features))
        self.quantized = False
        self.group = [self]

    def global_scale(self):
        as_stored = not self.quantized or isinstance(self.weight, Packed)
        return None if as_stored else group_scale(self)

    def value(self, dtype):
        """All rows as the look-up reads them, in `dtype`."""
        return weight_value(self.weight, self.global_scale(), dtype)

    def forward(self, ids, dtype):
        return _LookUp.apply(ids, self.weight, self.global_scale(), dtype)


def group_scale(layer):
    """The power-of-two global scale, fp32 [], for all weights of the layer's group."""
    return weight_global_scale(*(dense(other.weight) for other in layer.group))


def refit_global_scales(layers):
    """After a step: give packed weights that have grown a larger global scale, each group one."""
    for group in {id(layer.group[0]): layer.group for layer in layers}.values():
        if all(isinstance(layer.weight, Packed) for layer in group):
            refit([layer.weight for layer in group])


def share_global_scale(*layers):
    """Make `layers` one group."""
    for layer in layers:
        layer.group = list(layers)


def weight_value(weight, global_scale, dtype, rows=slice(None)):
    """A weight, or some rows of it (a slice or row numbers), as the forward pass reads it: dense, in
    `dtype`."""
    if isinstance(weight, Packed):
        return weight.decode(rows).to(dtype)
    if global_scale is None:
        return weight.detach()[rows].to(dtype)
    return fake_quantize(weight.detach()[rows], global_scale, dtype)


class _MatrixProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, global_scale):
        ctx.save_for_backward(x, weight)
        ctx.global_scale = global_scale
        return F.linear(x, weight_value(weight, global_scale, x.dtype))

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight_value(weight, ctx.global_scale, dy.dtype)
        if ctx.needs_input_grad[1]:
            dweight = dy.flatten(0, -2).T @ x.flatten(0, -2)
        return dx, dweight, None


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, global_scale, dtype):
        ctx.save_for_backward(ids, weight)
        return weight_value(weight, global_scale, dtype, ids.flatten()).unflatten(0, ids.shape)

    @staticmethod
    def backward(ctx, dy):
        ids, weight = ctx.saved_tensors
        dweight = dy.new_zeros(weight.shape)
        dweight.index_add_(0, ids.flatten(), dy.flatten(0, -2))
        return None, dweight, None, None


def cross_entropy(hidden, head, targets):
    """Mean cross entropy of `hidden` [N, D] through the layer `head` (a `Linear`) against `targets` [N],
    fp32 [].

    For 2,048 tokens and Qwen3's 151,936 words the logits would fill 1.2 GB in fp32, their gradient as much
    again. Here they exist one slice of the vocabulary and one piece of the tokens at a time, in both
    passes: the forward pass keeps only logsumexp, one number a token, from which the backward pass makes
    the probabilities again.
    """
    return _CrossEntropy.apply(hidden, head.weight, head.global_scale(), targets)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, global_scale, targets):
        total = hidden.new_full(targets.shape, -torch.inf, dtype=torch.float32)  # logsumexp so far, [N]
        wanted = torch.zeros_like(total)  # the target's logit, [N]
        for words, w4 in _vocabulary_slices(hidden, weight, global_scale):
            for tokens in row_slices(len(hidden), max(1, LOGITS // len(w4))):
                logits = (hidden[tokens] @ w4.T).float()
                total[tokens] = torch.logaddexp(total[tokens], logits.logsumexp(-1))
                index, here = _place_in(words, targets[tokens])
                wanted[tokens] += torch.where(here, logits.gather(-1, index).squeeze(-1), 0.0)
        ctx.save_for_backward(hidden, weight, targets, total)
        ctx.global_scale = global_scale
        return (total - wanted).mean()

    @staticmethod
    def backward(ctx, dloss):
        hidden, weight, targets, total = ctx.saved_tensors
        dhidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        dweight = hidden.new_zeros(weight.shape) if ctx.needs_input_grad[1] else None
        for words, w4 in _vocabulary_slices(hidden, weight, ctx.global_scale):
            for tokens in row_slices(len(hidden), max(1, LOGITS // len(w4))):
                # d loss / d logits = (probability - 1 at the target) / N
                dlogits = ((hidden[tokens] @ w4.T).float() - total[tokens].unsqueeze(-1)).exp()
                index, here = _place_in(words, targets[tokens])
                dlogits.scatter_add_(-1, index, -here.float().unsqueeze(-1))
                dlogits = (dlogits * (dloss / len(targets))).to(hidden.dtype)
                if dhidden is not None:
                    dhidden[tokens] += dlogits @ w4
                if dweight is not None:
                    dweight[words] += dlogits.T @ hidden[tokens]
        return dhidden, dweight, None, None


def _vocabulary_slices(hidden, weight, global_scale):
    for words in row_slices(len(weight), WORDS):
        yield words, weight_value(weight, global_scale, hidden.dtype, words)


def _place_in(words, targets):
    """Where each target stands in the slice `words` ([N, 1], 0 if elsewhere), and whether it does ([N])."""
    here = (targets >= words.start) & (targets < words.stop)
    return torch.where(here, targets - words.start, 0).unsqueeze(-1), here
