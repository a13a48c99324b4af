"""How many layers keep their activations: as many as there is memory for; no bit of a step depends on it."""

import contextlib

import pytest
import torch
from conftest import small_model

from minifp4 import AdamW
from minifp4.keep import Keeper
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("limit", [None, 2.0])
def test_on_a_gpu_they_fit(limit):
    model = small_model(num_hidden_layers=8, hidden_size=512, intermediate_size=2048).cuda()
    model.model.activation_checkpointing = True
    device = torch.device("cuda", 0)
    memory = Memory(device, limit)
    step = Step(model, AdamW(model.named_parameters(), lr=1e-4), memory=memory)
    Keeper(step, memory)
    ids = torch.randint(0, 800, (16, 1024), device=device)
    for _ in range(3):
        step([(ids, ids)])
    assert model.model.keep_activations == 8 if limit is None else model.model.keep_activations < 8
    assert memory.peak() < (limit or 70) * GIB
