"""`record(step)`: a training step as a CUDA graph, and updates beside the backward pass.

A small batch takes a GPU less time than Python needs to launch the step's thousands of kernels. So the second
step with a batch of some shape is recorded, and each later one is one launch that replays it. Whatever
differs from step to step therefore lies in tensors: the batch, and the optimizer's numbers (`AdamW.begin`).

In a recorded step with `in_backward` the updates run beside the backward pass, on a stream of lower priority:
an update computes much and a matrix product leaves parts of the GPU idle, at its end or all the time if it is
small. A gradient then lives until its update is over, so a few may wait (`BEHIND`).
"""

import contextlib
import gc
from functools import partial

import torch

from ..memory import Shortage
from ..parallel import ranks

BEHIND = 2**27  # bytes of gradients that may wait for their update in a recorded step
GRAPHS = 8  # shapes of batches that are recorded; others run kernel by kernel
SMALL = 2**16  # tokens; the kernels of a larger batch take longer than launching them


def record(step, recorded=True):
    """Let the `Step` record itself; returns its `Recorder`.

    recorded: False leaves it to run kernel by kernel; of several processes only the updates, and what they
    send each other, run beside the backward pass.
    """
    step.loss = partial(step.loss, select=False)  # the number of learned tokens is not read back
    recorder = Recorder(step, GRAPHS if recorded else 0)
    step.run, step.close = recorder, recorder.close
    return recorder


class Recorder:
    """`Step.run`, recorded and replayed."""

    def __init__(self, step, graphs):
        self.step, self.plain_run, self.plain_close, self.graphs = step, step.run, step.close, graphs
        self.seen, self.recorded, self.pool = set(), {}, None
        self.stream, self.waiting = None, []  # of updates; [(event after it, gradient)]
        self.main = None  # on which steps are recorded: one, for each has memory of its own for products

    def __call__(self, batches):
        shape = tuple(part.shape for part in batches[0])
        if len(batches) > 1 or shape[0].numel() > SMALL:
            return self._run(batches)
        if shape in self.seen and shape not in self.recorded:  # all its kernels are compiled now
            if all(shape[0].numel() > other[0].numel() for other in self.recorded):
                self.forget()
            if len(self.recorded) < self.graphs:
                self.recorded[shape] = self._record(batches[0])
        self.seen.add(shape)
        if recorded := self.recorded.get(shape):
            return self._replay(*recorded, batches[0])
        return self._run(batches)

    def _run(self, batches):
        """The step, not recorded."""
        if ranks() == 1 or not self.step.in_backward:
            return self.plain_run(batches)
        with self._beside():
            return self._run_beside(batches)

    def close(self):
        """`Step.close`; forget recorded steps."""
        self.plain_close()
        self.forget()

    def forget(self):
        """Give back the memory of recorded steps. What the largest needs serves the smaller ones as well, but
        not the reverse; so they are recorded again after it."""
        if self.recorded:
            torch.cuda.synchronize()  # none is still running
        self.recorded.clear()
        self.pool = None

    def _record(self, batch):
        """(graph, its inputs, its outputs) of the step with batches of this shape; this runs nothing.

        None if a recorded step finds too little memory: what it allocates is its own.
        """
        inputs = [tensor.clone() for tensor in batch]
        graph, self.main = torch.cuda.CUDAGraph(), self.main or torch.cuda.Stream(priority=-1)
        # With others, NCCL has threads that look at what runs, which is no part of what is recorded.
        mode = "global" if ranks() == 1 else "thread_local"
        try:
            with (
                self._beside(),
                torch.cuda.graph(graph, pool=self.pool, stream=self.main, capture_error_mode=mode),
            ):
                outputs = self._run_beside([inputs])
        except (Shortage, torch.OutOfMemoryError):
            self.step.optimizer.zero_grad()
            graph = None
        if graph is None:
            gc.collect()  # what the error still held: the next step needs it
            return None
        self.pool = graph.pool()
        return graph, inputs, outputs

    @contextlib.contextmanager
    def _beside(self):
        """Updates run on a stream of their own."""
        self.stream = self.stream or torch.cuda.Stream()
        plain_update, self.step.update = self.step.update, self._update
        try:
            yield
        finally:
            self.step.update = plain_update
            self.waiting.clear()

    def _run_beside(self, batches):
        """The step with updates on a stream of their own. Both belong to the recorded step, however it
        ends."""
        main = torch.cuda.current_stream()
        self.stream.wait_stream(main)
        try:
            total = self.step.accumulate(batches)
            self._let_finish(0)
            return self.step.finish(total)
        finally:
            main.wait_stream(self.stream)

    def _update(self, name, gradient, first_row=0):
        """`Step.update`."""
        self.step.count([gradient, *(waiting for _, waiting in self.waiting)])
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.step.renew(name, gradient, first_row)
        self.waiting.append((self.stream.record_event(), gradient))
        self._let_finish(BEHIND)

    def _let_finish(self, size):
        """Drop the oldest waiting gradients until `size` bytes are left, each when its update is over."""
        while sum(gradient.nbytes for _, gradient in self.waiting) > size:
            event, _ = self.waiting.pop(0)
            torch.cuda.current_stream().wait_event(event)

    def _replay(self, graph, inputs, outputs, batch):
        for mine, theirs in zip(inputs, batch):
            mine.copy_(theirs, non_blocking=True)
        graph.replay()
        return tuple(output.clone() for output in outputs)
