"""How many layers keep their activations: as many as there is memory for; no bit of a step depends on it."""

import contextlib
import gc

import pytest
import torch
from conftest import small_model

from minifp4 import AdamW
from minifp4.keep import SPARE, Keeper
from minifp4.memory import GIB, Memory
from minifp4.step import Step

STATIC, TAKES, EACH = 100, 40, 10  # bytes that are there, that a step takes beside them, that a layer keeps


class Scripted:
    """A `Memory` of so many bytes, in which a layer that is computed alone keeps `EACH`."""

    def __init__(self, size):
        self.device, self.limit_gib = None, size / GIB
        self.highest, self.calls = 0, 0

    @contextlib.contextmanager
    def phase(self, name):
        yield
        self.highest = STATIC + TAKES

    def now(self):
        self.calls += 1
        handed_on = 16 * 64 * 4  # of 16 tokens
        return (STATIC + (EACH + handed_on if self.calls % 3 == 0 else 0), 0)


def trained(memory=None):
    """The weights of a small model after some steps, and how many layers kept theirs in each."""
    model = small_model(num_hidden_layers=4, hidden_size=64)
    model.model.activation_checkpointing = True
    step = Step(model, AdamW(model.named_parameters(), lr=1e-2), memory=memory)
    if memory:
        Keeper(step, memory)
    kept = []
    for number, shape in enumerate([(2, 8), (2, 8), (4, 4), (2, 8), (4, 4)]):
        ids = torch.randint(0, 800, shape, generator=torch.Generator().manual_seed(number))
        step([(ids, ids)])
        kept.append(model.model.keep_activations)
    return [p.detach() for p in model.parameters()], kept


# 15/16 of the memory, less what is there and twice what a step takes: 180.
@pytest.mark.parametrize("size, layers", [(100, 0), (202, 0), (203, 1), (213, 1), (214, 2), (1000, 4)])
def test_as_many_layers_as_fit_keep_their_activations(size, layers, capsys):
    weights, kept = trained(Scripted(size))
    assert kept == [0, layers, 0, layers, layers]  # the first batch of each shape shows what it takes
    assert f"2 x 8 tokens {layers} of 4 layers" in capsys.readouterr().out
    plain, _ = trained()
    assert all(torch.equal(one, other) for one, other in zip(weights, plain))


def on_a_gpu(kept=None, limit=None):
    """(how many of 8 layers kept their activations, GiB between steps, their peak) of three steps; kept:
    None chooses."""
    gc.collect()  # of the run before
    torch.cuda.empty_cache()
    model = small_model(num_hidden_layers=8, hidden_size=512, intermediate_size=2048).cuda()
    model.model.activation_checkpointing = True
    model.model.keep_activations = kept or 0
    device = torch.device("cuda", 0)
    memory = Memory(device, limit)
    step = Step(model, AdamW(model.named_parameters(), lr=1e-4), memory=memory)
    if kept is None:
        Keeper(step, memory)
    ids = torch.randint(0, 800, (4, 512), device=device)
    for _ in range(3):
        step([(ids, ids)])
    return model.model.keep_activations, memory.now()[0] / GIB, memory.peak() / GIB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_they_fit():
    """All of them, or of a GPU that has room for half of them, some."""
    on_a_gpu(0)  # the first one initializes libraries
    (_, between, least), (_, _, most) = on_a_gpu(0), on_a_gpu(8)
    assert on_a_gpu()[0] == 8
    limit = (2 * least - between + (most - least) / 2) / (1 - SPARE)
    try:
        kept, _, peak = on_a_gpu(limit=limit)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 0 < kept < 8 and peak < limit
