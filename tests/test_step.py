"""One step, in any order: the same weights bit for bit, and nothing written when something is not finite."""

import gc

import pytest
import torch
from conftest import small_model

from minifp4 import AdamW, linear, loss, masters
from minifp4.files.atomic import bits
from minifp4.fused import fuse, record
from minifp4.packed import Packed
from minifp4.step import Step

IDS = torch.arange(24).view(2, 12) * 7
SPOILED = "model.norm.weight"


def prepared(tied=False, device="cpu"):
    """A small model and its optimizer."""
    model = small_model(tie_word_embeddings=tied)
    masters.set_masters(model, "nvfp4x2", torch.device(device))
    optimizer = AdamW(model.named_parameters(), lr=1e-2, state="nvfp4")
    if device == "cuda":
        fuse(model, optimizer)
    return model, optimizer


def kept(optimizer):
    """{name: tensor} of all that a step changes."""
    moments = optimizer.tensors()
    weights = {
        f"{name}.{part}": tensor
        for name, p in optimizer.parameters.items()
        for part, tensor in (p.tensors() if isinstance(p, Packed) else {"data": p.data}).items()
    }
    return weights | moments


def stepped(in_backward, steps=3, spoil=None, start=None, tied=False, graph=False, **settings):
    """({name: bits} of a small model after `steps` steps, its Step)."""
    model, optimizer = start or prepared(tied)
    step = Step(model, optimizer, in_backward=in_backward, **settings)
    if graph:
        record(step)
    for number in range(steps):
        if number == spoil:
            model.get_parameter(SPOILED).data[0] = float("nan")
        ids = (IDS + number).to(model.device)
        step([(ids, ids)])
        if number == spoil:
            model.get_parameter(SPOILED).data[0] = 1.0  # mended by hand
    return {name: bits(tensor).clone() for name, tensor in kept(optimizer).items()}, step


def different(a, b):
    """{name: how many bytes differ}"""
    return {name: (a[name] != b[name]).sum().item() for name in a if not torch.equal(a[name], b[name])}


@pytest.mark.parametrize("logits", [2**25, 40_000], ids=["one piece", "several"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_step_in_the_backward_pass_gives_the_same_bits(tied, logits, monkeypatch):
    """A tied weight is updated once, when both of its gradients have been added."""
    monkeypatch.setattr(linear, "WORDS", 100)  # rows of head and embedding at a time
    monkeypatch.setattr(loss, "LOGITS", logits)
    plain, _ = stepped(False, tied=tied)
    hooked, step = stepped(True, tied=tied)
    assert not different(plain, hooked)
    assert all(p.grad is None for p in step.optimizer.parameters.values())
    sizes = {name: p.numel() * 4 for name, p in step.optimizer.parameters.items()}  # fp32 gradients
    a_slice = 100 * step.model.config.hidden_size * 4
    vocabulary = [sizes.pop(name) for name in list(sizes) if "embed" in name or "head" in name]
    # One at a time, but a tied head's waits for that of the embedding: where the logits' are fewer, as those.
    waits = tied and logits < 2**25
    assert step.gradient_bytes == max(a_slice, *sizes.values()) + (vocabulary[0] if waits else 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("in_backward", [False, True], ids=["plain", "in backward"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_recorded_step_gives_the_same_bits(in_backward, tied):
    """Also when updates run beside the backward pass; from the second step on a graph is replayed.

    The first of the three runs only compiles. A kernel is made for one shape, and when it meets another for
    any; the two may sum in different orders.
    """
    model, optimizer = start = prepared(tied, "cuda")
    before, found = {name: tensor.clone() for name, tensor in kept(optimizer).items()}, []
    for graph in (False, False, True):
        optimizer.steps = 0
        for name, tensor in kept(optimizer).items():
            tensor.copy_(before[name])
        result, step = stepped(in_backward, start=start, graph=graph)
        found.append(result)
        assert not graph or len(step.run.recorded) == 1
        step.close()
    assert not different(*found[1:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_largest_batch_is_recorded_first():
    """Its memory serves smaller ones: those recorded before are forgotten, and recorded anew."""
    model, optimizer = prepared(device="cuda")
    step, pools = Step(model, optimizer, in_backward=True), []
    recorder = record(step)
    for tokens in (8, 8, 12, 12, 8, 8, 10, 10):
        ids = IDS[:, :tokens].cuda()
        step([(ids, ids)])
        pools.append(recorder.pool)
    assert [ids[1] for ids, _ in recorder.recorded] == [12, 8, 10]
    assert pools[0] is None and pools[1] != pools[3] and len(set(pools[3:])) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("in_backward", [False, True], ids=["plain", "in backward"])
def test_a_step_too_large_to_be_recorded_runs_kernel_by_kernel(in_backward, monkeypatch):
    for _ in range(2):  # the first compiles
        expected, _ = stepped(in_backward, start=prepared(device="cuda"))
    model, optimizer = prepared(device="cuda")
    update = optimizer.update

    def too_large(name, *rest):
        if torch.cuda.is_current_stream_capturing() and "layers.0" in name:
            raise torch.OutOfMemoryError("as the allocator does")
        return update(name, *rest)

    monkeypatch.setattr(optimizer, "update", too_large)
    gc.collect()  # of the runs before
    found, step = stepped(in_backward, start=(model, optimizer), graph=True)
    assert list(step.run.recorded.values()) == [None] and not different(expected, found)
    step.close()
    there = torch.cuda.memory_allocated()
    gc.collect()
    assert torch.cuda.memory_allocated() == there  # the attempt has left nothing


def test_after_close_gradients_stay():
    _, step = stepped(True)
    step.close()
    step.model.loss(IDS, IDS).backward()
    assert all(p.grad is not None for p in step.model.parameters())


@pytest.mark.parametrize("in_backward", [False, True], ids=["plain", "in backward"])
def test_a_step_that_is_not_finite_writes_nothing(in_backward):
    before, _ = stepped(in_backward, steps=2)
    after, step = stepped(in_backward, steps=3, spoil=2)
    assert step.skipped == 1 and set(different(before, after)) <= {f"{SPOILED}.data"}


def test_selecting_the_learned_tokens_changes_nothing():
    """A recorded step computes the others too, and ignores them."""
    model, labels = small_model(), IDS.clone()
    labels[0, :7] = labels[1, 9:] = -100
    for kind in ("ce", "scalar"):
        found = []
        for select in (True, False):
            loss = model.loss(IDS, labels, kind, select=select)
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
            model.zero_grad()
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found))


def test_what_cannot_be_had_is_refused():
    model = small_model()
    optimizer = AdamW(model.named_parameters())
    with pytest.raises(ValueError, match="no clipping"):
        Step(model, optimizer, in_backward=True, grad_clip=1.0)
    with pytest.raises(ValueError, match="no accumulation"):
        Step(model, optimizer, in_backward=True)([(IDS, IDS)] * 2)


def test_a_large_gradient_is_clipped():
    plain, _ = stepped(False, grad_clip=0.0, steps=1)
    clipped, step = stepped(False, grad_clip=1e-3, steps=1)
    assert different(plain, clipped)
    model = small_model()
    step = Step(model, AdamW(model.named_parameters()))
    _, norm = step([(IDS, IDS)])
    model = small_model()
    model.loss(IDS, IDS).backward()
    whole = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert norm.item() == pytest.approx(whole.norm().item(), rel=1e-4)
