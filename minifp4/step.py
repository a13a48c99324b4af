"""One training step: forward, backward, update. What is computed is `model.py`'s and `optim.py`'s; here is in
which order, and so how much memory and how many launches it takes.

Plain. All gradients exist when the optimizer begins: 2 bytes a weight in bf16, for Qwen3-4B more than its
weights and moments in NVFP4 together.

In the backward pass (`in_backward`). As soon as autograd has a weight's gradient complete (of a tied weight:
the sum of both uses), a hook updates the weight and drops the gradient. The layers that the backward pass
still has to visit do not read that weight any more. At most one gradient exists at a time, and every weight
gets bit for bit what the plain step gives it. The largest matrices, head and embedding, get theirs some rows
at a time; only if they are tied, the head's part must wait for the embedding's. What cannot be had is
clipping by the norm of all gradients, for it is known only when the first weights have been updated; AdamW
bounds each update by itself.

As a CUDA graph (`graph`). A small batch takes a GPU less time than Python needs to launch the step's
thousands of kernels. So the second step with a batch of some shape is recorded, and each later one is one
launch that replays it. Whatever differs from step to step therefore lies in tensors: the batch, and the
optimizer's numbers (`AdamW.begin`). Nothing is read back: a step whose loss or gradient is not finite
discards its own writes.

In a recorded step with `in_backward` the updates run beside the backward pass, on a stream of lower priority:
an update computes much and a matrix product leaves parts of the GPU idle, at its end or all the time if it is
small. A gradient then lives until its update is over, so a few may wait (`BEHIND`).
"""

import contextlib
from functools import partial

import torch

from .loss import IGNORE
from .memory import Shortage

BEHIND = 2**27  # bytes of gradients that may wait for their update in a recorded step
GRAPHS = 8  # shapes of batches that are recorded; others run kernel by kernel
SMALL = 2**16  # tokens; the kernels of a larger batch take longer than launching them


class Step:
    """`loss, norm = step(batches)`, tensors on the device (fp32 []); `batches`: [(ids, labels)].

    The gradient is that of the mean loss over all tokens learned in `batches`; `norm` is its norm. A step
    whose loss or gradient is not finite leaves the weights alone and counts in `skipped`; with `in_backward`
    those are left alone whose own gradient is not finite.

    grad_clip: largest norm of the gradient, 0: any; refused with `in_backward`. kind: of the loss.
    memory: `memory.Memory`, to record the phases.
    """

    def __init__(self, model, optimizer, *, grad_clip=0.0, kind="ce", in_backward=False, graph=False,
                 memory=None):  # fmt: skip
        if in_backward and grad_clip:
            raise ValueError(
                "the norm of all gradients is known after the backward pass: no clipping with a step in it"
            )
        self.model, self.optimizer, self.grad_clip, self.kind = model, optimizer, grad_clip, kind
        self.in_backward, self.graph = in_backward, graph
        self.phase = memory.phase if memory else lambda name: contextlib.nullcontext()
        self.skipped = torch.zeros((), dtype=torch.int64, device=model.device)
        self.gradient_bytes = 0  # most that existed at once
        self._seen, self._recorded, self._pool = set(), {}, None
        self._hooks = []
        self._beside, self._waiting = None, []  # the stream of updates; [(event after it, gradient)]
        self._head_rows = {}  # of a tied head's gradient: {first row: rows}
        if in_backward:
            self._add_hooks()

    def _add_hooks(self):
        """Have each gradient brought to `_update` and dropped."""
        embedding, head = self.model.model.embed_tokens, self.model.lm_head
        for name, p in self.optimizer.parameters.items():
            self._hooks.append(p.register_post_accumulate_grad_hook(partial(self._hook, name)))
            if p is embedding.weight:
                embedding.on_gradient = partial(self._rows, name)
            if p is head.weight:  # if tied, the embedding's part comes last
                head.on_gradient = self._keep if p is embedding.weight else partial(self._rows, name)

    def close(self):
        """Take the hooks off the parameters, and forget recorded steps."""
        for hook in self._hooks:
            hook.remove()
        self.model.model.embed_tokens.on_gradient = self.model.lm_head.on_gradient = None
        self._forget()

    def _forget(self):
        """Give back the memory of recorded steps. What the largest needs serves the smaller ones as well, but
        not the reverse; so they are recorded again after it."""
        if self._recorded:
            torch.cuda.synchronize()  # none is still running
        self._recorded.clear()
        self._pool = None

    def __call__(self, batches):
        if self.in_backward and len(batches) > 1:
            raise ValueError("a step in the backward pass takes one batch: no accumulation")
        self.optimizer.begin()
        shape = batches[0][0].shape
        if not self.graph or len(batches) > 1 or shape.numel() > SMALL:
            return self._run(batches)
        if shape in self._seen and shape not in self._recorded:  # all its kernels are compiled now
            if all(shape.numel() > other.numel() for other in self._recorded):
                self._forget()
            if len(self._recorded) < GRAPHS:
                self._recorded[shape] = self._record(batches[0])
        self._seen.add(shape)
        if recorded := self._recorded.get(shape):
            return self._replay(*recorded, batches[0])
        return self._run(batches)

    def _run(self, batches):
        """The step, kernel by kernel."""
        self._waiting.clear()
        self._head_rows.clear()  # of a step that did not end
        learned = [(labels[:, 1:] != IGNORE).sum() for _, labels in batches]
        shares = [count / sum(learned) for count in learned]
        total = torch.zeros((), device=self.model.device)
        for (ids, labels), share in zip(batches, shares):
            with self.phase("forward"):
                loss = self.model.loss(ids, labels, self.kind, select=not self.graph) * share
            total += loss.detach()
            self._ok = loss.detach().isfinite()
            with self.phase("backward"):
                loss.backward()
                self._count_gradients(p.grad for p in self.optimizer.parameters.values())
                self._let_finish(0)
        if not self.in_backward:
            with self.phase("step"):
                norm = self.optimizer.grad_norm()
                scale = (self.grad_clip / norm).clamp(max=1) if self.grad_clip else 1.0
                self.optimizer.apply(scale, norm.isfinite() & total.isfinite())
                self.optimizer.zero_grad()
        norm = self.optimizer.squares.sqrt()
        self.skipped += (norm.isfinite() & total.isfinite()).logical_not()
        self.model.refit()
        return total, norm

    def _hook(self, name, p):
        if p.grad is not None:  # it may have come by rows
            self._update(name, p.grad)
            p.grad = None

    def _keep(self, rows, gradient):
        """The gradient of some rows of a tied head."""
        self._head_rows[rows.start] = gradient

    def _rows(self, name, rows, gradient):
        """The gradient of some rows of head or embedding, or what the embedding adds to a tied head's."""
        if rows.start in self._head_rows:
            gradient = self._head_rows.pop(rows.start).add_(gradient)
        self._update(name, gradient, rows.start)

    def _update(self, name, gradient, first_row=0):
        self._count_gradients([gradient])  # the others have been dropped, or are still to come
        if self._beside is None:
            self.optimizer.update(name, gradient, self._ok, first_row)
            return
        self._beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._beside):
            self.optimizer.update(name, gradient, self._ok, first_row)
        self._waiting.append((self._beside.record_event(), gradient))
        self._let_finish(BEHIND)

    def _let_finish(self, size):
        """Drop the oldest waiting gradients until `size` bytes are left, each when its update is over."""
        while sum(gradient.nbytes for _, gradient in self._waiting) > size:
            event, _ = self._waiting.pop(0)
            torch.cuda.current_stream().wait_event(event)

    def _count_gradients(self, gradients):
        kept = [gradient for _, gradient in self._waiting] + [*self._head_rows.values()]
        now = sum(gradient.nbytes for gradient in (*gradients, *kept) if gradient is not None)
        self.gradient_bytes = max(self.gradient_bytes, now)

    def _record(self, batch):
        """(graph, its inputs, its outputs) of the step with batches of this shape; this runs nothing.

        None if a recorded step finds too little memory: what it allocates is its own.
        """
        inputs = [tensor.clone() for tensor in batch]
        graph, self._beside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=torch.cuda.Stream(priority=-1)):
                outputs = self._run_beside([inputs])
        except (Shortage, torch.OutOfMemoryError):
            self.optimizer.zero_grad()
            return None
        finally:
            self._beside = None
        self._pool = graph.pool()
        return graph, inputs, outputs

    def _run_beside(self, batches):
        """`_run` with updates on a stream of their own. Both belong to the recorded step, however it ends."""
        main = torch.cuda.current_stream()
        self._beside.wait_stream(main)
        try:
            return self._run(batches)
        finally:
            main.wait_stream(self._beside)

    def _replay(self, graph, inputs, outputs, batch):
        for mine, theirs in zip(inputs, batch):
            mine.copy_(theirs, non_blocking=True)
        graph.replay()
        return tuple(output.clone() for output in outputs)
