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

import torch

from . import precision
from .nvfp4 import row_chunks

STOCHASTIC_ROOT = ("bf16",)  # states whose sqrt(v) is rounded stochastically, not to nearest
MAX_UPDATE = 5.0  # |u|; the exact u exceeds it only when a gradient is far larger than all before it


def adamw(w, g, m, root, *, lr, beta1, beta2, eps, weight_decay, step):
    """One AdamW step on fp32 tensors of one shape, `root` standing for sqrt(v); returns (w, m, root)."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * root.square() + (1 - beta2) * g.square()
    root = v.sqrt()
    m_hat = m / (1 - beta1**step)  # undo the zero start
    root_hat = root / (1 - beta2**step) ** 0.5
    u = (m_hat / (root_hat + eps)).clamp(-MAX_UPDATE, MAX_UPDATE)
    return w * (1 - lr * weight_decay) - lr * u, m, root


class AdamW:
    """`AdamW(model.named_parameters(), lr=1e-4, state="nvfp4")`, then `step()` and `zero_grad()` as in torch.

    parameters: (name, parameter) pairs; the names seed the rounding, and frozen parameters are skipped.
    state: one of `precision.KINDS`, for both moments of matrices.
    rounding: "stochastic", or "nearest" for all that is stored.
    chunk_rows: rows that are in fp32 at once; the result is the same for every choice. 0: as fast as
    possible.
    """

    def __init__(self, parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, *, state="fp32",
                 rounding="stochastic", chunk_rows=0, seed=0):  # fmt: skip
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(f'rounding must be "nearest" or "stochastic", got {rounding!r}')
        self.parameters = {name: p for name, p in parameters if p.requires_grad}
        if not self.parameters:
            raise ValueError("no parameter requires a gradient: nothing to train")
        self.lr, (self.beta1, self.beta2), self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.stochastic, self.state, self.chunk_rows, self.seed = (
            rounding == "stochastic",
            state,
            chunk_rows,
            seed,
        )
        self.steps = 0
        self.moments = {name: self._zeros(p) for name, p in self.parameters.items()}
        self.reset_moved()

    def _zeros(self, p):
        kind, shape = (self.state, p.shape) if p.dim() == 2 else ("fp32", (1, p.numel()))
        return (
            precision.zeros(kind, shape, p.device),
            precision.zeros(kind, shape, p.device, positive=True),
        )

    def tensors(self):
        """{name: tensor} of all that the optimizer remembers beside `steps`."""
        return {
            f"{name}.{moment}.{part}": tensor
            for name, moments in self.moments.items()
            for moment, store in zip(("exp_avg", "sqrt_exp_avg_sq"), moments)
            for part, tensor in store.tensors.items()
        }

    @torch.no_grad()
    def step(self, grad_scale=1.0):
        """Update every parameter that has a gradient; `grad_scale` multiplies it (clipping)."""
        self.steps += 1
        for name, p in self.parameters.items():
            if p.grad is not None:
                self.update(name, p, grad_scale)

    def update(self, name, p, grad_scale=1.0):
        """Update one parameter, `chunk_rows` rows at a time."""
        matrix = p.detach() if p.dim() == 2 else p.detach().view(1, -1)
        grad = p.grad.view_as(matrix)
        master, (mean, root) = precision.master(matrix), self.moments[name]
        weight_decay = self.weight_decay if p.dim() == 2 else 0.0
        for rows in row_chunks(matrix, self.chunk_rows):
            w = master.read(rows)
            new, m, r = adamw(
                w,
                grad[rows].float() * grad_scale,
                mean.read(rows),
                root.read(rows),
                lr=self.lr,
                beta1=self.beta1,
                beta2=self.beta2,
                eps=self.eps,
                weight_decay=weight_decay,
                step=self.steps,
            )
            master.write(rows, new, self._key(name, "weight"))
            mean.write(rows, m, self._key(name, "exp_avg"))
            root.write(rows, r, self._key(name, "sqrt_exp_avg_sq") if self.state in STOCHASTIC_ROOT else None)
            self._requested += (new - w).abs().sum()
            self._arrived += ((master.read(rows) - w) * (new - w).sign()).sum()

    def _key(self, name, what):
        return precision.rounding_key(self.seed, self.steps, name, what) if self.stochastic else None

    def zero_grad(self):
        for p in self.parameters.values():
            p.grad = None

    def moved(self):
        """Stored over requested movement since `reset_moved`; NaN before the first step."""
        return (self._arrived / self._requested).item()

    def reset_moved(self):
        device = next(iter(self.parameters.values())).device
        self._requested, self._arrived = torch.zeros(2, dtype=torch.float64, device=device)
