"""AdamW (Loshchilov & Hutter 2019) whose weights and moments may be stored in any precision.

For a gradient g at step t:

    m = beta1 * m + (1 - beta1) * g          the mean gradient, of the last 1 / (1 - beta1) steps
    v = beta2 * v + (1 - beta2) * g**2       the mean square
    u = (m / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps)       |u| is about 1 or less
    w = w - lr * (u + weight_decay * w)

All of it is computed in fp32 on a few rows at a time: read, compute, write back. Only what is stored is
rounded, and the update is made from the moments before they are rounded. What the precisions ask for
(`storage.py` says why):

    w  stochastic rounding. A step of lr 1e-5 is far below the gap between neighbours even in bf16.
    m  stochastic rounding.
    v  stored as sqrt(v), which halves its range of exponents; never 0 beside larger neighbours. nvfp4 and
       bf16 round it stochastically, because a step changes it by less than their gap; int8 to nearest.

One number shows whether the weights really move: `moved`, the stored change along the requested one,

    moved = sum((w_stored - w) * sign(w_new - w)) / sum(|w_new - w|)

It is 1 when all updates are stored, above 1 where weights swing between two codes (`chance.py`), and near 0
when rounding eats them. It cannot show an update that was too small before it was stored: where sqrt(v) is
less than the smallest number of its block, that is read instead. `floored` is the share of such numbers.

Vectors (norm weights) are few: they and their moments stay in fp32, and no weight decay pulls them to 0.
"""

import contextlib
import math
from typing import NamedTuple

import torch

from .chance import random_bits, rounding_key
from .nvfp4 import FP32_MIN, row_chunks
from .packed import Packed
from .parallel import add_up, own, rank, stretches
from .storage import master, write, zeros

# The largest |u|. AdamW's own is at most 7.3 (betas .9 and .999, a gradient far above all before it); what
# goes beyond is noise: an m that was rounded up from almost nothing over an exact sqrt(v).
MAX_UPDATE = 10.0


class Hyper(NamedTuple):
    """The numbers of one step, each fp32 []: tensors, so that a recorded step can be given new ones."""

    lr: torch.Tensor
    beta1: torch.Tensor
    beta2: torch.Tensor
    weight_decay: torch.Tensor
    root_gain: torch.Tensor  # (1 - beta1**t) / sqrt(1 - beta2**t) undoes the zero starts, for sqrt(v)
    eps: torch.Tensor  # times (1 - beta1**t)
    grad_scale: torch.Tensor  # multiplies the gradient: clipping


class Survey(NamedTuple):
    """What is known of a gradient before the update."""

    largest: torch.Tensor  # magnitude in each row, fp32 [rows, 1]
    squares: torch.Tensor  # their sum, fp32 []


class Part(NamedTuple):
    """Rows of a parameter that this optimizer updates: all, or one of several processes' (`parallel.py`)."""

    name: str
    rows: slice
    stores: tuple  # of w, m and sqrt(v) of these rows
    counts: bool  # its squares and its movement; of what all processes update alike, only the first one's

    def among(self, first, count):
        """Which of `count` rows from number `first` on are its, a slice of them."""
        start, stop = max(self.rows.start, first), min(self.rows.stop, first + count)
        return slice(start - first, max(start, stop) - first)


class Piece(NamedTuple):
    """Some rows of a tensor that the optimizer remembers."""

    name: str
    tensor: torch.Tensor
    first: int  # number of its first row in the whole
    rows: int  # of the whole


def limited(u):
    """`u`, but never longer than MAX_UPDATE."""
    return u.clamp(-MAX_UPDATE, MAX_UPDATE)


def adamw(w, g, m, root, hyper, limited=limited):
    """(u + weight_decay * w, the new m, the new sqrt(v)): everything that AdamW is, element by element.

    `root` is sqrt(v). `x.rsqrt()` is 1 / sqrt(x), for which a GPU has an instruction.
    """
    m = hyper.beta1 * m + (1 - hyper.beta1) * hyper.grad_scale * g
    v = hyper.beta2 * root.square() + (1 - hyper.beta2) * hyper.grad_scale.square() * g.square()
    root = v * (v + FP32_MIN).rsqrt()
    u = m * (root * hyper.root_gain + hyper.eps).rsqrt().square()
    return limited(u) + hyper.weight_decay * w, m, root


def update(stores, rows, grad, survey, bits, hyper, ok, movement):
    """One step on some rows of a matrix, in place.

    stores: the storages of w, m and sqrt(v). rows: which rows (a slice). grad: theirs, [rows, K].
    survey: of that gradient. bits: random int32 [rows, K], or None to round to nearest.
    ok: bool []; if false, or the gradient is not finite, everything stays as it is.
    movement: float64 [2, 1]; the requested movement and the stored one are added.
    """
    ok = ok & survey.squares.isfinite()
    w, m, root = (store.read(rows) for store in stores)
    u, m, root = adamw(w, grad.float(), m, root, hyper)
    m_bound, root_bound = bounds(stores, rows, survey, hyper)
    m_bits = None if bits is None else bits >> 10  # one draw serves both: w its lower 22 bits, m its upper
    new = [
        stores[0].encode(w - hyper.lr * u, rows, bits),
        stores[1].encode(m, rows, m_bits, m_bound),
        stores[2].encode(root, rows, m_bits, root_bound),
    ]
    for store, tensors in zip(stores, new):
        write(store, rows, tensors, ok)
    along = (w - stores[0].read(rows)) * torch.ones_like(u).copysign(u)
    requested_and_stored = torch.stack([hyper.lr * u.abs().sum(), along.sum()])
    movement += torch.where(ok, requested_and_stored, 0.0).unsqueeze(1)


def bounds(stores, rows, survey, hyper):
    """What no number of a row exceeds by much in the new m and sqrt(v): the moments of its largest gradient,
    after the bounds that these storages had. None for storages that have none."""
    old = [store.bound(rows) for store in stores[1:]]
    return (None, None) if old[0] is None else adamw(0.0, survey.largest, *old, hyper)[1:]


class AdamW:
    """`AdamW(model.named_parameters(), lr=1e-4, state="nvfp4")`, then `step()` and `zero_grad()` as in torch.

    parameters: (name, parameter) pairs; the names seed the rounding, and frozen parameters are skipped.
    state: one of `storage.KINDS`, for both moments of matrices.
    rounding: "stochastic", or "nearest" for all that is stored; seed: of the former.

    The attribute `chunk_rows` says how many rows are in fp32 at once (0: as many as are fast). The result is
    the same for every choice.
    """

    def __init__(self, parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, *, state="fp32",
                 rounding="stochastic", seed=0):  # fmt: skip
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(f'rounding must be "nearest" or "stochastic", got {rounding!r}')
        self.parameters = {name: p for name, p in parameters if p.requires_grad}
        if not self.parameters:
            raise ValueError("no parameter requires a gradient: nothing to train")
        self.lr, (self.beta1, self.beta2), self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.stochastic, self.state = rounding == "stochastic", state
        self.chunk_rows, self.seed, self.steps = 0, seed, 0
        self._numbers = {name: number for number, name in enumerate(self.parameters)}
        self.parts = {name: self._parts(name, as_rows(p)) for name, p in self.parameters.items()}
        device = next(iter(self.parameters.values())).device
        # What differs from step to step lies on the device: Hyper for matrices and for vectors, and a key for
        # each parameter.
        self._hyper = torch.zeros(2, len(Hyper._fields), device=device)
        self._keys = torch.zeros(len(self.parameters), 2, dtype=torch.int32, device=device)
        self.zero = torch.zeros((), dtype=torch.int32, device=device)
        self.true = torch.ones((), dtype=torch.bool, device=device)
        self._surveys, self.squares = {}, torch.zeros((), device=device)
        # Requested and stored; more columns are added up like the first (`fused/` has many).
        self.movement = torch.zeros(2, 1, dtype=torch.float64, device=device)
        self.uncounted = self.movement.clone(), self.squares.clone()  # of rows that another process counts

    def _parts(self, name, p):
        """The `Part`s of a parameter [rows, K]."""
        kind, found = (self.state if self.parameters[name].dim() == 2 else "fp32"), []
        for stretch in stretches(len(p)):
            mine = own(stretch)
            rows = mine or stretch
            weight = p.part(rows) if isinstance(p, Packed) else p[rows]
            moments = (zeros(kind, weight.shape, p.device, positive) for positive in (False, True))
            found.append(Part(name, rows, (master(weight), *moments), bool(mine or rank() == 0)))
        return found

    def all_parts(self):
        """Of all parameters."""
        return [part for parts in self.parts.values() for part in parts]

    def pieces(self):
        """All that this optimizer remembers beside `steps`, as `Piece`s."""
        for part in self.all_parts():
            rows = len(as_rows(self.parameters[part.name]))
            for moment, store in zip(("exp_avg", "sqrt_exp_avg_sq"), part.stores[1:]):
                for kind, tensor in store.tensors.items():
                    yield Piece(f"{part.name}.{moment}.{kind}", tensor, part.rows.start, rows)

    def tensors(self):
        """The same as {name: tensor}, of one process, which has all rows."""
        return {piece.name: piece.tensor for piece in self.pieces()}

    def nbytes(self):
        """Of all these tensors."""
        return sum(piece.tensor.nbytes for piece in self.pieces())

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
            for part in self.parts[name] if p.grad is not None else ():
                with self._counting(part):
                    self._surveys[name, part.rows.start] = self.survey(as_rows(p.grad)[part.rows])
        return self.norm()

    def norm(self):
        """The norm of all gradients that this step has seen, fp32 []; once a step."""
        return add_up(self.squares).sqrt()

    @torch.no_grad()
    def update(self, name, grad, ok=None, first_row=0):
        """Update one parameter by its gradient, if that is finite, and add its squares to `squares`.

        A matrix may also be updated some rows at a time, those from `first_row` on; with the same result. Of
        several processes each updates its rows.
        """
        hyper, grad = self._hyper[0 if grad.dim() == 2 else 1], as_rows(grad)
        ok = self.true if ok is None else ok
        for part in self.parts[name]:
            mine = grad[part.among(first_row, len(grad))]
            if len(mine):
                with self._counting(part):
                    self._update_part(part, max(0, first_row - part.rows.start), mine, ok, hyper)

    def _update_part(self, part, first, grad, ok, hyper):
        """The same for rows of one part, from its row number `first` on."""
        survey = self._surveys.pop((part.name, part.rows.start), None) or self.survey(grad)
        for rows in self.chunks(grad):
            some = Survey(survey.largest[rows], survey.squares)
            self.update_rows(part, slice(first + rows.start, first + rows.stop), grad[rows], some, hyper, ok)

    @contextlib.contextmanager
    def _counting(self, part):
        """Leave `movement` and `squares` alone if another process counts these rows."""
        kept = self.movement, self.squares
        if not part.counts:
            self.movement, self.squares = self.uncounted
        yield
        if not part.counts:
            self.uncounted = self.movement, self.squares
            self.movement, self.squares = kept

    def survey(self, grad):
        """The `Survey` of a gradient [rows, K], whose squares are also added to `squares`.

        Clipping multiplies every gradient by their sum, so its last bit matters: it is added up in the same
        order whatever `chunk_rows` is, and in pairs of columns, as `fused/` does.
        """
        largest, total = [], 0.0
        for rows in row_chunks(grad):
            g = grad[rows].float()
            squares = g.square()
            piece = (squares[:, 0::2] + squares[:, 1::2]).sum(1).sum()
            self.squares += piece
            total = total + piece
            largest.append(g.abs().amax(1, keepdim=True))
        return Survey(torch.cat(largest), total)

    def chunks(self, grad):
        """The rows to compute at once, as slices."""
        return row_chunks(grad, self.chunk_rows)

    def update_rows(self, part, rows, grad, survey, hyper, ok):
        """`update` for some rows of a `Part`; hyper: fp32 [7]."""
        bits = None
        if self.stochastic:
            first = self.zero + (part.rows.start + rows.start) * grad.shape[1]
            bits = random_bits(self.key(part.name), first, grad.shape)
        hyper = Hyper(*hyper.unbind())
        update(part.stores, rows, grad, survey, bits, hyper, ok, self.movement[:, :1])

    def key(self, name):
        """What the random bits of a parameter's update derive from, int32 [2]."""
        return self._keys[self._numbers[name]]

    def zero_grad(self):
        for p in self.parameters.values():
            p.grad = None

    def moved(self):
        """Stored over requested movement since `reset_moved`; NaN before the first step."""
        requested, stored = add_up(self.movement.sum(1, dtype=torch.float64)).tolist()
        return stored / requested if requested else math.nan

    def floored(self):
        """The share of sqrt(v) that is stored as the smallest number of a block; NaN where none has one."""
        roots = (part.stores[2] for part in self.all_parts() if part.counts)
        counts = [torch.stack(root.floored()) for root in roots if hasattr(root, "floored")]
        none = torch.zeros(2, dtype=torch.int64, device=self.zero.device)
        floored, all_of_them = add_up(sum(counts, none)).tolist()
        return floored / all_of_them if all_of_them else math.nan

    def reset_moved(self):
        self.movement.zero_()


def as_rows(p):
    """A parameter or gradient as a matrix: a vector is one row."""
    return p.detach() if p.dim() == 2 else p.detach().view(1, -1)
