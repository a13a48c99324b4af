"""AdamW in fp32 is torch's; stored in fewer bits it still follows; nearest rounding is seen to fail."""

import math

import pytest
import torch

import minifp4
from minifp4 import optim, precision

ALL = slice(0, 64)


def problem(dtype=torch.float32, seed=0):
    """A linear regression: (weight [32, 64], function that gives its loss on a fresh random batch)."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(32, 64, generator=generator)
    weight = torch.nn.Parameter(torch.zeros(32, 64, dtype=dtype))
    weight.grad_dtype = torch.float32

    def loss():
        x = torch.randn(256, 64, generator=generator) * torch.logspace(-1, 0, 64)
        return (x @ (weight.float() - truth).T).square().mean()

    return weight, loss


def descend(weight, loss, optimizer, steps):
    losses = []
    for step in range(steps):
        value = loss()
        value.backward()
        optimizer.lr = 0.05 * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return sum(losses[-20:]) / 20


def test_fp32_equals_torch():
    """50 steps with decay, on a matrix and on a vector; ours never decays vectors, so torch's group has
    none."""
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((24, 80), (80,))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = minifp4.AdamW(zip("wn", ours), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    groups = [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:], "weight_decay": 0.0}]
    b = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for step in range(50):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=generator) * (1 + step)
            q.grad = p.grad.clone()
        a.step()
        b.step()
        for p, q in zip(ours, theirs):
            assert torch.allclose(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("state, margin", [("bf16", 0.03), ("int8", 0.03), ("nvfp4", 0.15)])
def test_small_states_follow_fp32(state, margin):
    """The final loss stays within the stated margin of fp32 states', as the mean of three seeds."""
    gaps = []
    for seed in range(3):
        final = {}
        for kind in ("fp32", state):
            weight, loss = problem(seed=seed)
            start = loss().item()
            final[kind] = descend(
                weight, loss, minifp4.AdamW([("w", weight)], state=kind, weight_decay=0.0), 300
            )
        gaps.append((final[state] - final["fp32"]) / start)
    assert abs(sum(gaps) / 3) < margin / 100, gaps


@pytest.mark.parametrize("state", precision.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_chunk_size_gives_the_same_bits(state, dtype):
    results = []
    for chunk_rows in (0, 1, 5, 32):
        weight, loss = problem(dtype)
        optimizer = minifp4.AdamW([("w", weight)], state=state, chunk_rows=chunk_rows)
        descend(weight, loss, optimizer, 4)
        results.append([weight.detach(), *optimizer.tensors().values()])
    for other in results[1:]:
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(results[0], other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nearest_rounding_eats_updates_and_stochastic_rounding_does_not(dtype):
    """A hundred steps of 1e-5 on weights of 1: the gaps of bf16 and fp16 there are 400 and 50 times as
    wide."""
    moved, change = {}, {}
    for rounding in ("nearest", "stochastic"):
        weight = torch.nn.Parameter(torch.ones(16, 64, dtype=dtype))
        optimizer = minifp4.AdamW([("w", weight)], lr=1e-5, weight_decay=0.0, rounding=rounding)
        for _ in range(100):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[rounding], change[rounding] = optimizer.moved(), 1 - weight.detach().double().mean().item()
    assert moved["nearest"] == 0 and change["nearest"] == 0
    assert moved["stochastic"] == pytest.approx(1, abs=0.1)
    assert change["stochastic"] == pytest.approx(100 * 1e-5, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_cast_takes_one_of_two_neighbours_right_on_average(dtype):
    """On numbers of all sizes, fp16's subnormals included."""
    exact = torch.tensor([1.001, -0.3, 3e-5, -7e-6, 1e-7, 0.02, -1234.5, 0.0]).repeat_interleave(1 << 14)
    bits = precision.counter_bits((1, 2), slice(0, 1), exact.shape, "cpu")
    drawn = precision.stochastic_cast(exact, dtype, bits)
    nearest = exact.to(dtype)
    for x, values, near in zip(exact[:: 1 << 14], drawn.view(8, -1), nearest[:: 1 << 14]):
        other = near.nextafter(near.new_tensor(math.copysign(9e3, x - near)))
        assert set(values.tolist()) <= {near.item(), other.item()}
        gap = abs(other.double() - near.double())
        assert abs(values.double().mean() - x.double()) <= 4 * gap / 2 / 128


@pytest.mark.parametrize("kind", ["int8", "nvfp4"])
def test_the_root_of_v_never_becomes_zero(kind):
    """One large number beside small ones: they round to the smallest code, not to 0, or m / sqrt(v) would
    explode."""
    x = torch.full((4, 256), 1e-6)
    x[:, 0] = 1e3
    x[3] = 0
    store = precision.zeros(kind, x.shape, "cpu", positive=True)
    assert (store.read(ALL) == 0).all()
    store.write(ALL, x)
    read = store.read(ALL)
    assert (read[:3] > 0).all() and (read[3] == 0).all()
    assert read[:3, 0] == pytest.approx(1e3, rel=0.07)


@pytest.mark.parametrize("kind", precision.KINDS)
@pytest.mark.parametrize("columns", [64, 192])
def test_storage_reads_what_was_written(kind, columns):
    """Within the precision's own step; 192 is not a multiple of int8's 128."""
    x = torch.randn(64, columns, generator=torch.Generator().manual_seed(0))
    step = {"fp32": 0, "bf16": 2**-9, "fp16": 2**-12, "int8": 0.5 / 127, "nvfp4": 1 / 5.6}[kind]
    for positive in (False, True):
        store = precision.zeros(kind, x.shape, "cpu", positive=positive)
        store.write(ALL, x.abs() if positive else x)
        error = (store.read(ALL) - (x.abs() if positive else x)).abs()
        assert (error <= step * x.abs().max() + 1e-7).all()


def test_bytes_per_number():
    sizes = {}
    for kind in precision.KINDS:
        store = precision.zeros(kind, (64, 2560), "cpu")
        sizes[kind] = sum(t.numel() * t.element_size() for t in store.tensors.values()) / (64 * 2560)
    assert sizes == {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1 + 4 / 128, "nvfp4": 0.5625 + 4 / 2560}


def test_counter_bits_are_random_and_belong_to_their_element():
    whole = precision.counter_bits((7, 8), slice(0, 64), torch.Size((64, 1024)), "cpu")
    part = precision.counter_bits((7, 8), slice(5, 9), torch.Size((4, 1024)), "cpu")
    assert torch.equal(whole[5:9], part)
    uniform = precision.counter_uniform((7, 8), slice(0, 64), torch.Size((64, 1024)), "cpu").double()
    assert 0 <= uniform.min() and uniform.max() < 1
    n = uniform.numel()
    assert abs(uniform.mean() - 0.5) < 4 / math.sqrt(12 * n) and abs(uniform.var() - 1 / 12) < 0.001
    histogram = torch.histc(uniform, 256, 0, 1)
    assert ((histogram - n / 256) ** 2 / (n / 256)).sum() < 255 + 5 * math.sqrt(2 * 255)  # chi-squared
    other = precision.counter_uniform((8, 8), slice(0, 64), torch.Size((64, 1024)), "cpu").double()
    for a, b in ((uniform, other), (uniform[:-1], uniform[1:]), (uniform[:, :-1], uniform[:, 1:])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 4 / math.sqrt(n)
    assert precision.rounding_key(0, 1, "w", "m") != precision.rounding_key(0, 2, "w", "m")


def test_a_huge_gradient_after_small_ones_moves_at_most_five_steps():
    ones = torch.ones(1, 1)
    w, _, _ = optim.adamw(
        ones,
        ones * 1e6,
        ones * 0,
        ones * 1e-6,
        lr=0.1,
        beta1=0.0,
        beta2=0.9999,
        eps=1e-8,
        weight_decay=0.0,
        step=10**6,
    )
    assert w.item() == pytest.approx(1 - 5 * 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moved_is_one_when_all_updates_arrive(dtype):
    weight, loss = problem(dtype)
    optimizer = minifp4.AdamW([("w", weight)], state="nvfp4")
    assert math.isnan(optimizer.moved())
    descend(weight, loss, optimizer, 30)
    assert optimizer.moved() == pytest.approx(1, abs=1e-6 if dtype == torch.float32 else 0.01)


def test_bad_settings_are_refused():
    weight = torch.nn.Parameter(torch.zeros(4, 16))
    with pytest.raises(ValueError, match="fp4"):
        minifp4.AdamW([("w", weight)], state="fp4")
    with pytest.raises(ValueError, match="up"):
        minifp4.AdamW([("w", weight)], rounding="up")
    with pytest.raises(ValueError, match="nothing to train"):
        minifp4.AdamW([("w", weight.requires_grad_(False))])
    with pytest.raises(ValueError, match="16"):
        minifp4.AdamW([("w", torch.nn.Parameter(torch.zeros(4, 24)))], state="nvfp4")
