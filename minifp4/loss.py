"""The cross entropy of a large vocabulary, in pieces.

For 16,384 tokens and Qwen3's 151,936 words the logits would fill 5 GB in bf16, and computing them again in
the backward pass costs as much as a whole layer. So they exist for a piece of the tokens at a time, and the
forward pass turns each piece into its gradient, in place: that is known but for one factor, the gradient of
the loss itself.

The last piece's part of the head's gradient is left to the backward pass, where `head.on_gradient`, if there
is one, takes it, or what makes it, a slice of the vocabulary at a time. Then a batch of one piece holds
neither the head nor its gradient whole; one of several holds both, but its activations are larger.
"""

import math
from functools import partial
from typing import Callable, NamedTuple

import torch

from .linear import word_slices
from .nvfp4 import row_slices

IGNORE = -100  # the label of a token that is not learned, as in torch's cross_entropy
LOGITS = 640 * 2**20  # bytes of logits that may exist at once: of 2,208 tokens of Qwen3 in bf16


def log_sum(logits, targets):
    """(logsumexp [N], the target's logit [N], 0 where it is not among the words of `logits` [N, words])."""
    here = (targets >= 0) & (targets < logits.shape[1])
    target = logits.gather(1, torch.where(here, targets, 0).unsqueeze(1)).squeeze(1)
    return logits.float().logsumexp(-1), torch.where(here, target.float(), 0.0)


def become_gradient(logits, targets, total, share):
    """In the place of `logits` [N, words] their gradient, (probability - 1 at the target) * share."""
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets.unsqueeze(-1)
    probability = (logits.float() - total.unsqueeze(-1)).exp()
    logits.copy_((probability - is_target.float()) * share.unsqueeze(-1))


class Elementwise(NamedTuple):
    """What is done with logits, beside products; `fused/` has kernels of these two."""

    log_sum: Callable = log_sum
    become_gradient: Callable = become_gradient


def cross_entropy(hidden, head, targets, elementwise=Elementwise()):  # noqa: B008
    """Mean cross entropy of `hidden` [N, D] through the layer `head` (a `Linear`) against `targets` [N],
    fp32 []; those that are IGNORE do not count."""
    return _CrossEntropy.apply(hidden, head.weight, targets, head, elementwise, torch.is_grad_enabled())


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, head, elementwise, training):
        wants_hidden, wants_weight = (training and wanted for wanted in ctx.needs_input_grad[:2])
        pieces, read = _pieces(hidden, len(weight)), _Reader(head, hidden.dtype)
        earlier = None  # the head's gradient from all pieces but the last
        if len(pieces) > 1:
            read.keep_whole()
            earlier = hidden.new_empty(weight.shape) if wants_weight else None
        learned = targets != IGNORE
        share = learned / learned.sum()  # of each token in the mean
        losses = torch.empty_like(share)
        dhidden = torch.empty_like(hidden) if wants_hidden else None
        space = hidden.new_empty(pieces[0].stop, len(weight))
        for tokens in pieces:
            x, logits = hidden[tokens], space[: tokens.stop - tokens.start]
            for words, w4 in read():
                torch.mm(x, w4.T, out=logits[:, words])
            total, target = _log_sums(logits, targets[tokens], elementwise)
            losses[tokens] = total - target
            if wants_hidden or wants_weight:
                for words in word_slices(len(weight)):
                    here = targets[tokens] - words.start
                    elementwise.become_gradient(logits[:, words], here, total, share[tokens])
            if wants_hidden:
                for words, w4 in read():  # beta 0: overwrite what was there
                    dhidden[tokens].addmm_(logits[:, words], w4, beta=float(words.start > 0))
            if earlier is not None and tokens is not pieces[-1]:
                earlier.addmm_(logits.T, x, beta=float(tokens.start > 0))
        ctx.save_for_backward(x, logits if wants_weight else None, dhidden, earlier)
        ctx.on_gradient = head.on_gradient
        return (losses * share).sum()

    @staticmethod
    def backward(ctx, dloss):
        x, dlogits, dhidden, earlier = ctx.saved_tensors  # None for what is not wanted
        dhidden = None if dhidden is None else dhidden * dloss
        if dlogits is None:
            return dhidden, *[None] * 5
        by_rows, vocabulary, x = ctx.on_gradient is not None, dlogits.shape[1], x * dloss
        dweight = None if by_rows else x.new_empty(vocabulary, x.shape[1])
        for words in word_slices(vocabulary):
            make = partial(_rows, dlogits, x, earlier, dloss, words)
            if not by_rows:
                dweight[words] = make()
            elif earlier is None and len(x) < x.shape[1]:  # what makes it is smaller, should it have to wait
                ctx.on_gradient(words, make)
            else:
                ctx.on_gradient(words, make())
        return dhidden, dweight, *[None] * 4


def made(gradient):
    """The gradient that `on_gradient` was given, or what makes it."""
    return gradient() if callable(gradient) else gradient


def _rows(dlogits, x, earlier, dloss, words):
    """Some rows of the head's gradient."""
    rows = dlogits[:, words].T @ x
    return rows if earlier is None else rows.add_(earlier[words] * dloss)


def _pieces(hidden, vocabulary):
    """Slices of the tokens, about equally long, each of as many as may have their logits at once."""
    count = max(1, math.ceil(len(hidden) * vocabulary * hidden.itemsize / LOGITS))
    return row_slices(len(hidden), math.ceil(len(hidden) / count) or 1) or [slice(0, 0)]


class _Reader:
    """`for words, w4 in reader():` the head, decoded, a slice of the vocabulary at a time."""

    def __init__(self, head, dtype):
        self.head, self.dtype, self.whole = head, dtype, None

    def keep_whole(self):
        """Decode it now, once."""
        self.whole = [(slice(0, len(self.head.weight)), self.head.value(self.dtype))]

    def __call__(self):
        if self.whole:
            return self.whole
        return ((words, self.head.value(self.dtype, words)) for words in word_slices(len(self.head.weight)))


def _log_sums(logits, targets, elementwise):
    """(logsumexp [N], the target's logit [N]) of logits [N, vocabulary], fp32."""
    total = logits.new_full(targets.shape, -torch.inf, dtype=torch.float32)
    target = torch.zeros_like(total)
    for words in word_slices(logits.shape[1]):
        some, found = elementwise.log_sum(logits[:, words], targets - words.start)
        total, target = torch.logaddexp(total, some), target + found
    return total, target
