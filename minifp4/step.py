"""One training step: forward, backward, update. What is computed is `model.py`'s and `optim.py`'s; here is in
which order, and so how much memory it takes.

Plain. All gradients exist when the optimizer begins: 2 bytes a weight in bf16, for Qwen3-4B more than its
weights and moments in NVFP4 together (8.8 GB and 7.4).

In the backward pass (`in_backward`). As soon as autograd has a weight's gradient complete (of a tied weight:
the sum of both uses), a hook updates the weight and drops the gradient. The layers that the backward pass
still has to visit do not read that weight any more. At most one gradient exists at a time, and every weight
gets bit for bit what the plain step gives it. The largest matrices, head and embedding, get theirs some rows
at a time; if they are tied, the head's part waits for the embedding's. What cannot be had is
clipping by the norm of all gradients, for it is known only when the first weights have been updated; AdamW
bounds each update by itself.

Of several processes (`parallel.py`) each updates some rows, by the sum of gradients, and is sent the others.

Nothing is read back from the device: a step whose loss or gradient is not finite discards its own writes.
"""

import contextlib
from functools import partial

import torch

from . import parallel
from .loss import IGNORE, made


class Step:
    """`loss, norm = step(batches)`, tensors on the device (fp32 []); `batches`: [(ids, labels)], or of packed
    rows [(ids, labels, `rows.Spans`)].

    The gradient is that of the mean loss over all tokens learned in `batches`; `norm` is its norm. A step
    whose loss or gradient is not finite leaves the weights alone and counts in `skipped`; with `in_backward`
    those are left alone whose own gradient is not finite (of head and embedding those rows; of several
    processes each one's rows).

    grad_clip: largest norm of the gradient, 0: any; refused with `in_backward`. kind: of the loss.
    memory: `memory.Memory`, to record the phases.
    """

    def __init__(self, model, optimizer, *, grad_clip=0.0, kind="ce", in_backward=False, memory=None):
        if in_backward and grad_clip:
            raise ValueError(
                "the norm of all gradients is known after the backward pass: no clipping with a step in it"
            )
        self.model, self.optimizer = model, optimizer
        self.grad_clip, self.in_backward = grad_clip, in_backward
        self.loss = partial(model.loss, kind=kind)
        self.phase = memory.phase if memory else lambda name: contextlib.nullcontext()
        self.skipped = torch.zeros((), dtype=torch.int64, device=model.device)
        self.gradient_bytes = 0  # most that existed at once
        self.ok = None  # whether the loss is finite, bool []
        self._head_rows = {}  # of a tied head's gradient: {first row: rows, or what makes them}
        self._hooks = []
        if in_backward:
            self._add_hooks()

    def __call__(self, batches):
        if self.in_backward and len(batches) > 1:
            raise ValueError("a step in the backward pass takes one batch: no accumulation")
        self.optimizer.begin()
        return self.run(batches)

    def run(self, batches):
        """The step, once the optimizer has begun."""
        return self.finish(self.accumulate(batches))

    def accumulate(self, batches):
        """The gradients of all `batches`, and with `in_backward` the updates; returns the loss."""
        self._head_rows.clear()  # of a step that did not end
        learned = [(labels[:, 1:] != IGNORE).sum() for _, labels, *_ in batches]
        all_of_them = parallel.add_up(sum(learned))
        shares = [count / all_of_them for count in learned]
        total = torch.zeros((), device=self.model.device)
        for (ids, labels, *spans), share in zip(batches, shares):
            with self.phase("forward"):
                loss = self.loss(ids, labels, spans=spans[0] if spans else None) * share
            everywhere = parallel.add_up(loss.detach().clone())
            total += everywhere
            self.ok = everywhere.isfinite()
            with self.phase("backward"):
                loss.backward()
                self.count(p.grad for p in self.optimizer.parameters.values())
        return total

    def finish(self, total):
        """What is left to update; returns (loss, norm)."""
        if not self.in_backward:
            with self.phase("step"):
                norm = self._apply(total)
        else:
            norm = self.optimizer.norm()
        self.skipped += (norm.isfinite() & total.isfinite()).logical_not()
        self.model.refit()
        return total, norm

    def _apply(self, total):
        """The update by the gradients that all parameters have; returns their norm."""
        trained = [p for p in self.optimizer.parameters.values() if p.grad is not None]
        for p in trained:
            parallel.add_up_own(p.grad)
        norm = self.optimizer.grad_norm()
        scale = (self.grad_clip / norm).clamp(max=1) if self.grad_clip else 1.0
        self.optimizer.apply(scale, norm.isfinite() & total.isfinite())
        self.optimizer.zero_grad()
        for p in trained:
            parallel.gather(p)
        return norm

    def update(self, name, gradient, first_row=0):
        """Update some rows of a weight by their gradient, during the backward pass."""
        self.count([gradient])  # the others have been dropped, or are still to come
        self.renew(name, gradient, first_row)

    def renew(self, name, gradient, first_row):
        """The same, by the sum of all processes' gradients."""
        parallel.add_up_own(gradient)
        self.optimizer.update(name, gradient, self.ok, first_row)
        parallel.gather(self.optimizer.parameters[name], first_row, len(gradient))

    def _add_hooks(self):
        """Have each gradient brought to `update` and dropped."""
        embedding, head = self.model.model.embed_tokens, self.model.lm_head
        for name, p in self.optimizer.parameters.items():
            self._hooks.append(p.register_post_accumulate_grad_hook(partial(self._hook, name)))
            if p is embedding.weight:
                embedding.on_gradient = partial(self._rows, name)
            if p is head.weight:  # if tied, the embedding's part comes last
                head.on_gradient = self._keep if p is embedding.weight else partial(self._rows, name)

    def _hook(self, name, p):
        if p.grad is not None:  # it may have come by rows
            self.update(name, p.grad)
            p.grad = None

    def _keep(self, rows, gradient):
        """The gradient of some rows of a tied head, or what makes it."""
        self._head_rows[rows.start] = gradient

    def _rows(self, name, rows, gradient):
        """The same of head or embedding, or what the embedding adds to a tied head's."""
        gradient = made(gradient)
        if rows.start in self._head_rows:
            gradient = made(self._head_rows.pop(rows.start)).add_(gradient)
        self.update(name, gradient, rows.start)

    def count(self, gradients):
        """Note how many bytes of gradients there are."""
        there = [gradient for gradient in gradients if gradient is not None]
        now = sum(getattr(gradient, "nbytes", 0) for gradient in [*there, *self._head_rows.values()])
        self.gradient_bytes = max(self.gradient_bytes, now)

    def close(self):
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()
        self.model.model.embed_tokens.on_gradient = self.model.lm_head.on_gradient = None
