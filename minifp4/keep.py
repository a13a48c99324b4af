"""How many layers keep their activations, chosen by the memory there is: `--keep-activations auto`.

With activation checkpointing a layer is computed twice, and a quarter of a step's products are such repeats.
Each layer that keeps its activations instead saves its share of them, for memory that a card may have left.
How much that is nobody needs to count: the first step with a batch of some shape keeps none, and its peak is
what a step takes anyway; then one layer is computed alone, and what it leaves in memory is what each costs.
"""

import math

from . import needs, parallel
from .memory import GIB

SPARE = 1 / 16  # of the memory: what lies unusable between tensors


class Keeper:
    """`Step.run` of a `step` whose model has activation checkpointing; `memory`: that of its phases.

    Nothing else about a step changes: its results are the same bits whatever is kept.
    """

    def __init__(self, step, memory):
        self.model, self.memory, self.run = step.model.model, memory, step.run
        self.chosen = {}  # {shape of a batch: layers}
        step.run = self

    def __call__(self, batches):
        shape = max((tuple(ids.shape) for ids, *_ in batches), key=math.prod)
        self.model.keep_activations = self.chosen.get(shape, 0)
        if shape in self.chosen:
            return self.run(batches)
        self.memory.highest, seen = 0, []
        hook = self.model.layers[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
        result = self.run(batches)
        hook.remove()
        self.chosen[shape] = self._choose(shape, max(seen, key=lambda inputs: inputs[0].numel()))
        return result

    def _choose(self, shape, inputs):
        """How many layers, of which the last one had such inputs."""
        needed, now = self.memory.highest, self.memory.now()[0]
        each = self._kept(*inputs)
        # Twice what a step takes for a while: a recorded one has its own, and an evaluation comes beside it.
        there = needs.available(self.memory.device, self.memory.limit_gib)
        room = there * (1 - SPARE) - needed - (needed - now)
        layers = len(self.model.layers)
        count = max(0, min(layers, int(room / each)))
        count = -parallel.largest(-count)  # as many as the process with the least room
        size = " x ".join(map(str, shape))
        print(
            f"note    with {size} tokens {count} of {layers} layers keep their activations, "
            f"{each / GIB:.2f} GiB each, for which {max(0.0, room) / GIB:.1f} GiB were free",
            flush=True,
        )
        return count

    def _kept(self, x, *others):
        """Bytes that a layer keeps of its inputs' batch, but for what it hands on."""
        before = self.memory.now()[0]
        handed_on = self.model.layers[-1](x.detach().requires_grad_(), *others)
        return self.memory.now()[0] - before - handed_on.nbytes
