"""AdamW (Loshchilov & Hutter 2019) whose weights and moments may be stored in any precision.

For a gradient g at step t:

    m = beta1 * m + (1 - beta1) * g          the mean gradient, of the last 1 / (1 - beta1) steps
    v = beta2 * v + (1 - beta2) * g**2       the mean square
    u = (m / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps)       |u| is about 1 or less
    w = w - lr * (u + weight_decay * w)

All of it is computed in fp32 on a few rows at a time: read, compute, write back. Only what is stored is
rounded, and the update is made from the moments before they are rounded. What the precisions ask for
(`precision.py` says why):

    w  stochastic rounding. A step of lr 1e-5 is far below the gap between neighbours even in bf16.
    m  stochastic rounding.
    v  stored as sqrt(v), which halves its range of exponents; never 0 beside larger neighbours. int8 and
       nvfp4 round it to nearest; bf16 stochastically, because a step changes it by less than bf16's gap.

One number shows whether the weights really move: `moved`, the stored change along the requested one,

    moved = sum((w_stored - w) * sign(w_new - w)) / sum(|w_new - w|)

It is 1 when all updates arrive (in the mean) and near 0 when rounding eats them.

Vectors (norm weights) are few: they and their moments stay in fp32, and no weight decay pulls them to 0.
"""

import math
from typing import NamedTuple

import torch

from .kernels import any_length, compiled, usual
from .nvfp4 import limited, magnitude_bits, pairs, row_chunks, unpaired
from .precision import (
    Blocks,
    counter_bits,
    master,
    one_block_a_row,
    rounding_key,
    write,
    zeros,
)

STOCHASTIC_ROOT = ("bf16",)  # states whose sqrt(v) is rounded stochastically, not to nearest
TINY = 2.0**-126  # the least normal fp32 number
MAX_UPDATE = 0x40A00000  # the bits of 5.0, for |u|: only a gradient far above all before it asks for more
LAUNCH = 2**26  # weights that one kernel updates, at most: more are no faster, and `moved` needs memory
# For the compiler, which would split `update`, and check in it that every block's row exists.
ONE_KERNEL = {"max_fusion_size": 512, "assert_indirect_indexing": False, "realize_opcount_threshold": 100}
A_BLOCK_A_THREAD = {"XBLOCK": 128, "num_warps": 4}  # so that threads exchange nothing


class Hyper(NamedTuple):
    """The numbers of one step, each fp32 []: tensors, so that compiled code and CUDA graphs need not change
    with them."""

    lr: torch.Tensor
    beta1: torch.Tensor
    beta2: torch.Tensor
    weight_decay: torch.Tensor
    root_gain: torch.Tensor  # (1 - beta1**t) / sqrt(1 - beta2**t) undoes the zero starts, for sqrt(v)
    eps: torch.Tensor  # times (1 - beta1**t)
    grad_scale: torch.Tensor  # multiplies the gradient: clipping


def moments(g, m, root, hyper):
    """The new (m, root), `root` standing for sqrt(v)."""
    m = hyper.beta1 * m + (1 - hyper.beta1) * hyper.grad_scale * g
    v = hyper.beta2 * root.square() + (1 - hyper.beta2) * hyper.grad_scale.square() * g.square()
    return m, v * (v + TINY).rsqrt()  # sqrt(v): a GPU has an instruction for rsqrt, not for sqrt


def direction(w, m, root, hyper):
    """What AdamW subtracts from `w`, but for the factor lr, from the new moments."""
    inverse = (root * hyper.root_gain + hyper.eps).rsqrt().square()
    u = limited(m * inverse, MAX_UPDATE).view(torch.float32).copysign(m)
    return u + hyper.weight_decay * w


def update(
    stores, parts, grad, largest, squares, first, key, hyper, ok, asked, arrived, *, grad_dtype, stochastic,
    stochastic_root,
):  # fmt: skip
    """One step on some rows of a matrix, in place.

    stores, parts: the storages of w, m and sqrt(v), and these rows of their tensors.
    grad: one block a row, as `nvfp4.pairs`. largest, squares: what `survey` says of it.
    first, key: what the random bits derive from (`precision.counter_bits`).
    hyper: [7], the fields of `Hyper`. ok: bool []; if false, or the gradient is not finite, everything stays
    as it is.
    asked, arrived: fp32 [blocks]; the movement that was asked for and the one that arrived are added here.
    Their sums are left to the caller: a compiler would split them into as many parts as suit the first
    matrix, and use those for the head too.
    """
    hyper, ok = Hyper(*hyper.unbind()), ok & squares.isfinite()
    g = unpaired(grad, grad_dtype)
    weight, mean, root = (store.values(part) for store, part in zip(stores, parts))
    mean_bound, root_bound = _bounds(stores, parts, largest, hyper)
    mean, root = zip(*[moments(*half, hyper) for half in zip(g, mean, root)])
    way = [direction(*half, hyper) for half in zip(weight, mean, root)]
    bits = mean_bits = None
    if stochastic:  # one draw serves both: w its lower 22 bits, m its upper 22
        bits = counter_bits(key, first, g[0].shape)
        mean_bits = [half >> 10 for half in bits]
    new = [
        stores[0].encoded([w - hyper.lr * half for w, half in zip(weight, way)], parts[0], bits),
        stores[1].encoded(mean, parts[1], mean_bits, mean_bound),
        stores[2].encoded(root, parts[2], mean_bits if stochastic_root else None, root_bound),
    ]
    stored = stores[0].values(new[0])
    arrives = [(w - s) * torch.ones_like(w).copysign(half) for s, w, half in zip(stored, weight, way)]
    for part, fresh in zip(parts, new):
        write(part, fresh, ok)
    asked += torch.where(ok, hyper.lr * (way[0].abs() + way[1].abs()).sum(-1), 0.0)
    arrived += torch.where(ok, (arrives[0] + arrives[1]).sum(-1), 0.0)


def _bounds(stores, parts, largest, hyper):
    """What no number of a row exceeds by much in the new m and sqrt(v), for storages that want to know:
    moments of the row's largest gradient."""
    if not isinstance(stores[1], Blocks):
        return None, None
    old = [store.bound(part) for store, part in zip(stores[1:], parts[1:])]
    return moments(largest, *old, hyper)


def survey(grad, squares, grad_dtype):
    """(largest magnitude in each row [rows, 1], sum of squares []) of a gradient, given as `pairs`, fp32.

    The sum is also added to `squares`.
    """
    even, odd = unpaired(grad, grad_dtype)
    total = (even.square() + odd.square()).sum(1).sum()
    squares += total
    bits = torch.maximum(magnitude_bits(even), magnitude_bits(odd))
    return bits.amax(1, keepdim=True).view(torch.float32), total


class AdamW:
    """`AdamW(model.named_parameters(), lr=1e-4, state="nvfp4")`, then `step()` and `zero_grad()` as in torch.

    parameters: (name, parameter) pairs; the names seed the rounding, and frozen parameters are skipped.
    state: one of `precision.KINDS`, for both moments of matrices.
    rounding: "stochastic", or "nearest" for all that is stored.
    chunk_rows: rows that are in fp32 at once; the result is the same for every choice. 0: as fast as
    possible.
    compile: make one kernel of each matrix's update (torch.compile); if None, where that is `usual`.
    """

    def __init__(self, parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, *, state="fp32",
                 rounding="stochastic", chunk_rows=0, seed=0, compile=None):  # fmt: skip
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(f'rounding must be "nearest" or "stochastic", got {rounding!r}')
        self.parameters = {name: p for name, p in parameters if p.requires_grad}
        if not self.parameters:
            raise ValueError("no parameter requires a gradient: nothing to train")
        self.lr, (self.beta1, self.beta2), self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.stochastic, self.state = rounding == "stochastic", state
        self.chunk_rows, self.seed, self.steps = chunk_rows, seed, 0
        self._numbers = {name: number for number, name in enumerate(self.parameters)}
        self.stores = {name: self._stores(p) for name, p in self.parameters.items()}
        device = next(iter(self.parameters.values())).device
        self.compiled = usual(device) if compile is None else compile
        self._update, self._survey = update, survey
        if self.compiled:
            self._update = compiled(update, ONE_KERNEL, A_BLOCK_A_THREAD)
            self._survey = compiled(survey)
        # What differs from step to step lies on the device: Hyper for matrices and for vectors, and a key for
        # each parameter.
        self._hyper = torch.zeros(2, len(Hyper._fields), device=device)
        self._keys = torch.zeros(len(self.parameters), 2, dtype=torch.int32, device=device)
        self._zero = torch.zeros((), dtype=torch.int32, device=device)
        self._true = torch.ones((), dtype=torch.bool, device=device)
        self._surveys, self.squares = {}, torch.zeros((), device=device)
        self._movement = torch.zeros(2, 0, device=device)  # asked for and arrived, by block of 16 in a piece

    def _stores(self, p):
        """The storages of a parameter, its m and its sqrt(v)."""
        kind, shape = (self.state if p.dim() == 2 else "fp32"), _matrix(p).shape
        mean, root = zeros(kind, shape, p.device), zeros(kind, shape, p.device, positive=True)
        return master(_matrix(p)), mean, root

    def tensors(self):
        """{name: tensor} of all that the optimizer remembers beside `steps`."""
        return {
            f"{name}.{moment}.{part}": tensor
            for name, stores in self.stores.items()
            for moment, store in zip(("exp_avg", "sqrt_exp_avg_sq"), stores[1:])
            for part, tensor in store.tensors.items()
        }

    def nbytes(self):
        """Of all these tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @torch.no_grad()
    def step(self, grad_scale=1.0, ok=None):
        """Update every parameter that has a gradient; `grad_scale` multiplies it (clipping).

        ok: a bool tensor [] on the device; if it is false, nothing changes but the count of steps.
        """
        self.begin()
        self.apply(grad_scale, ok)

    def begin(self):
        """Count a step and bring its numbers to the device. Then `apply`, or `update` each parameter once."""
        self.steps += 1
        t = self.steps
        start = 1 - self.beta1**t
        hyper = [
            Hyper(self.lr, self.beta1, self.beta2, decay, start * (1 - self.beta2**t) ** -0.5,
                  start * self.eps, 1.0)
            for decay in (self.weight_decay, 0.0)
        ]  # fmt: skip
        keys = [rounding_key(self.seed, t, name) for name in self.parameters]
        for mine, numbers in ((self._hyper, hyper), (self._keys, keys)):
            mine.copy_(torch.tensor(numbers, dtype=mine.dtype), non_blocking=True)
        self.squares.zero_()

    @torch.no_grad()
    def apply(self, grad_scale=1.0, ok=None):
        """Update every parameter that has a gradient; see `step`."""
        self._hyper[:, Hyper._fields.index("grad_scale")] = grad_scale
        for name, p in self.parameters.items():
            if p.grad is not None:
                self.update(name, p.grad, ok)

    @torch.no_grad()
    def grad_norm(self):
        """The norm of all gradients together, fp32 []; once a step, after `begin`."""
        for name, p in self.parameters.items():
            if p.grad is not None:
                self._surveys[name] = self._survey_of(_matrix(p.grad))
        return self.squares.sqrt()

    def _survey_of(self, grad):
        if self.compiled:
            return self._survey(pairs(grad), self.squares, grad.dtype)
        # Not in pieces of `chunk_rows`: the sum's bits depend on them.
        pieces = [pairs(grad[rows]) for rows in row_chunks(grad)]
        largest, squares = zip(*(self._survey(piece, self.squares, grad.dtype) for piece in pieces))
        return torch.cat(largest), sum(squares)

    @torch.no_grad()
    def update(self, name, grad, ok=None, first_row=0):
        """Update one parameter by its gradient, if that is finite, and add its squares to `squares`.

        A matrix may also be updated some rows at a time, those from `first_row` on; with the same result.
        """
        stores, key = self.stores[name], self._keys[self._numbers[name]]
        hyper, grad = self._hyper[0 if grad.dim() == 2 else 1], _matrix(grad)
        largest, squares = self._surveys.pop(name, None) or self._survey_of(grad)
        for rows in self._pieces(grad):
            start = first_row + rows.start
            first = self._zero + start * grad.shape[1] if start else self._zero
            parts = [store.rows(slice(start, first_row + rows.stop)) for store in stores]
            blocks, limits = pairs(one_block_a_row(grad[rows])), largest[rows]
            asked, arrived = self._movement_of(len(blocks))
            if self.compiled:
                kept = (tensor for part in parts for tensor in part.values())
                any_length(blocks, limits, asked, arrived, *kept)
            self._update(
                stores, parts, blocks, limits, squares, first, key, hyper, self._true if ok is None else ok,
                asked, arrived, grad_dtype=grad.dtype, stochastic=self.stochastic,
                stochastic_root=self.stochastic and self.state in STOCHASTIC_ROOT,
            )  # fmt: skip

    def _movement_of(self, blocks):
        """Where to add up the movement of so many blocks."""
        more = -(-blocks // 64) * 64 - self._movement.shape[1]  # both rows begin where kernels like it
        if more > 0:
            self._movement = torch.nn.functional.pad(self._movement, (0, more))
        return self._movement[:, :blocks].unbind()

    def _pieces(self, grad):
        """The rows to compute at once: in compiled code those for one kernel, else those for which
        temporaries stay small."""
        compiled = max(1, LAUNCH // grad.shape[1]) if self.compiled else 0
        return row_chunks(grad, self.chunk_rows or compiled)

    def zero_grad(self):
        for p in self.parameters.values():
            p.grad = None

    def moved(self):
        """Stored over requested movement since `reset_moved`; NaN before the first step."""
        asked, arrived = self._movement.sum(1, dtype=torch.float64).tolist()
        return arrived / asked if asked else math.nan

    def reset_moved(self):
        self._movement.zero_()


def _matrix(p):
    """A parameter or gradient as a matrix: a vector is one row."""
    return p.detach() if p.dim() == 2 else p.detach().view(1, -1)
