"""AdamW in fp32 is torch's; stored in fewer bits it still follows; nearest rounding is seen to fail."""

import math

import pytest
import torch

import minifp4
from minifp4 import chance, nvfp4, optim, packed, storage

ALL = slice(None)


def whole_bits(key, rows, columns):
    """The random bits of a whole matrix, [rows, columns]."""
    key, first = torch.tensor(key, dtype=torch.int32), torch.zeros((), dtype=torch.int32)
    return chance.random_bits(key, first, (rows, columns))


def write(store, x):
    new = store.encode(x, ALL, None, x.abs().amax(1, keepdim=True))
    storage.write(store, ALL, new, torch.tensor(True))


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
            assert torch.allclose(p, q, rtol=2e-6, atol=1e-6)


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


@pytest.mark.parametrize("state", storage.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_chunk_size_gives_the_same_bits(state, dtype):
    results = []
    for chunk_rows in (0, 1, 5, 32):
        weight, loss = problem(dtype)
        optimizer = minifp4.AdamW([("w", weight)], state=state)
        optimizer.chunk_rows = chunk_rows
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
    bits = whole_bits((1, 2), 1, exact.numel()).view(-1)
    drawn = chance.stochastic_cast(exact, dtype, bits)
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
    store = storage.zeros(kind, x.shape, "cpu", positive=True)
    assert (store.read(ALL) == 0).all()
    write(store, x)
    now = store.read(ALL)
    assert (now[:3] > 0).all() and (now[3] == 0).all()
    assert now[:3, 0] == pytest.approx(1e3, rel=0.07)


LEVELS = [1/32, 3/64, 1/16, 3/32, 1/8, 3/16, 1/4, 3/8, 1/2, 3/4, 1, 1.5, 2, 3, 4, 6]  # fmt: skip


def root_store(x, bits=None):
    """Storage of sqrt(v) that holds `x` [rows, K], of which the largest should be 6: block scales of 1."""
    store = storage.zeros("nvfp4", x.shape, "cpu", positive=True)
    bound = torch.full((len(x), 1), nvfp4.E2M1_MAX * nvfp4.E4M3_MAX / 2)
    for name, tensor in store.encode(x, ALL, bits, bound).items():
        store.tensors[name].copy_(tensor)
    return store


def test_sqrt_v_in_four_bits_has_sixteen_positive_levels():
    """Each is read as it was written; what lies between two goes to the nearer one, and in the middle up."""
    middles = [(a + b) / 2 for a, b in zip(LEVELS, LEVELS[1:])]
    below = [x * 0.9999 for x in middles]
    x = torch.tensor([LEVELS, [*middles, 6], [*below, 6], [0, 1e-9, 0.03, *[6] * 13]])
    store = root_store(x)
    assert store.tensors["scale"].tolist() == [[1]] * 4
    expected = [LEVELS, [*LEVELS[1:], 6], [*LEVELS[:-1], 6], [*[1 / 32] * 3, *[6] * 13]]
    assert store.read(ALL).tolist() == expected
    assert store.tensors["qdata"][0].numpy().tobytes().hex() == "1032547698badcfe"


def test_sqrt_v_is_right_on_average_between_all_levels():
    """Also far below what E2M1 could hold beside 6; what is on a level stays there."""
    for low, high in zip(LEVELS, LEVELS[1:]):
        x = low + (high - low) * torch.tensor([0.0, 0.1, 0.37, 0.5, 0.8])
        x = torch.cat([x, torch.full((11,), 6.0)]).expand(20_000, 16)
        read = root_store(x, whole_bits((1, 2), *x.shape)).read(ALL)
        noise = 4 * (high - low) / 2 / math.sqrt(len(x))
        assert (read.mean(0) - x[0]).abs().max() < noise
        assert (read[:, 0] == low).all() and set(read[:, 1:5].unique().tolist()) == {low, high}


def test_numbers_of_sqrt_v_that_span_150_to_1_keep_their_size():
    x = torch.logspace(0, math.log10(150), 16).expand(4000, 16)
    for bits in (None, whole_bits((1, 2), *x.shape)):
        read = root_store(x / 25, bits).read(ALL).mean(0) * 25
        assert ((read / x[0] - 1).abs() < 0.33 if bits is None else (read / x[0] - 1).abs() < 0.05).all()


def test_a_small_gradient_beside_large_ones_moves_as_far_as_adamw():
    """16 constant gradients from .01 to 1 times 1e-2 in a block: each weight moves lr a step. With sqrt(v)'s
    range of 12 the smallest went an eighth of it, and `moved` did not show it; `floored` does."""
    weight = torch.nn.Parameter(torch.zeros(256, 16))
    optimizer = minifp4.AdamW([("w", weight)], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, state="nvfp4")
    for _ in range(150):
        weight.grad = (1e-2 * torch.logspace(-2, 0, 16)).expand(256, 16).clone()
        optimizer.step()
    share = -weight.detach().mean(0) / (150 * 1e-3)
    assert (share > 0.75).all() and (share < 1.08).all()
    assert optimizer.floored() < 0.01
    weight.grad = (1e-2 * torch.logspace(-4, 0, 16)).expand(256, 16).clone()
    for _ in range(100):
        optimizer.step()
    assert 0.3 < optimizer.floored() < 0.7


@pytest.mark.parametrize("kind", storage.KINDS)
@pytest.mark.parametrize("columns", [64, 208])
def test_storage_reads_what_was_written(kind, columns):
    """Within the precision's own step; 13 blocks."""
    x = torch.randn(64, columns, generator=torch.Generator().manual_seed(0))
    step = {"fp32": 0, "bf16": 2**-9, "int8": 0.5 / 127, "nvfp4": 1 / 5.6}[kind]
    for positive in (False, True):
        store = storage.zeros(kind, x.shape, "cpu", positive=positive)
        write(store, x.abs() if positive else x)
        error = (store.read(ALL) - (x.abs() if positive else x)).abs()
        assert (error <= step * x.abs().max() + 1e-7).all()


def test_bytes_per_number():
    sizes = {}
    for kind in storage.KINDS:
        store = storage.zeros(kind, (64, 2560), "cpu")
        sizes[kind] = sum(t.numel() * t.element_size() for t in store.tensors.values()) / (64 * 2560)
    assert sizes == {"fp32": 4, "bf16": 2, "int8": 1.0625 + 4 / 2560, "nvfp4": 0.5625 + 4 / 2560}


def test_random_bits_are_random_and_belong_to_their_element():
    """Uniform, and those of one element unrelated to its neighbours', to other keys' and to its upper bits,
    which round another number: any two numbers of a block are independent."""
    whole, key = whole_bits((7, 8), 4096, 16), torch.tensor((7, 8), dtype=torch.int32)
    part = chance.random_bits(key, torch.tensor(5 * 16, dtype=torch.int32), (4, 16))
    assert torch.equal(whole[5:9], part)
    uniform = chance.uniform(whole).double()
    assert 0 <= uniform.min() and uniform.max() < 1
    n = uniform.numel()
    assert abs(uniform.mean() - 0.5) < 4 / math.sqrt(12 * n) and abs(uniform.var() - 1 / 12) < 0.001
    histogram = torch.histc(uniform, 256, 0, 1)
    assert ((histogram - n / 256) ** 2 / (n / 256)).sum() < 255 + 5 * math.sqrt(2 * 255)  # chi-squared
    other, upper = (chance.uniform(bits).double() for bits in (whole_bits((8, 8), 4096, 16), whole >> 10))

    def correlation(a, b):
        return abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])

    for a, b in ((uniform, other), (uniform, upper), (uniform[:-1], uniform[1:])):
        assert correlation(a, b) < 4 / math.sqrt(n)
    for step in range(1, 9):  # in a block all differences are multiples of one number: a sample for each row
        assert correlation(uniform[:, :-step], uniform[:, step:]) < 4 * math.sqrt(1 / 5 / len(whole))


def drawn(steps, shape=(4, 16)):
    """The draws of some elements in each of so many steps [steps, rows, columns]."""
    keys = [torch.tensor(chance.rounding_key(0, step, "w"), dtype=torch.int32) for step in range(steps)]
    return torch.stack([chance.random_bits(key, torch.tensor(0, dtype=torch.int32), shape) for key in keys])


@pytest.mark.parametrize("what", ["nvfp4", "nvfp4x2", "a moment", "bf16"])
def test_an_elements_draws_are_spread_evenly_over_any_few_steps(what):
    """Of 100 draws in a row about 100 * x are below x, for every x: within 4; luck would be off by 7."""
    bits, n = drawn(400).long(), 100
    kept, last = {"nvfp4": (22, 0), "nvfp4x2": (18, 0), "a moment": (22, 10), "bf16": (16, 0)}[what]
    share = (bits >> last & 2**kept - 1) / 2**kept
    for start in (0, 123, 300):
        ordered = share[start : start + n].sort(0).values
        below = (torch.arange(n) + 0.5).view(-1, 1, 1)
        assert (ordered * n - below).abs().max() < 4
    luck = torch.rand(n, 64, generator=torch.Generator().manual_seed(0)).sort(0).values
    assert (luck * n - below[:, :, 0]).abs().max() > 7


@pytest.mark.parametrize("master, gap", [("nvfp4", 0.02), ("bf16", 2.0**-11)])
def test_a_steady_update_is_stored_as_often_as_it_should(master, gap):
    """40 steps of a twentieth of the gap between two codes: no weight is further than a gap and a half from
    where it should be. With new draws in each step some would be off by 3."""
    start = torch.full((8, 64), 0.08)
    start[:, ::16] = 0.12  # largest of its block, so that no scale changes
    store = storage.master(MASTERS[master](start))
    rows, moved, ok = slice(0, 8), torch.full_like(start, gap / 20), torch.tensor(True)
    moved[:, ::16] = 0
    first = store.read(rows).clone()
    for bits in drawn(40, (8, 64)):
        storage.write(store, rows, store.encode(store.read(rows) - moved, rows, bits), ok)
    wrong = (store.read(rows) - (first - 40 * moved)).abs() / gap
    assert wrong.max() < 1.5


def test_draws_that_turn_bring_less_noise_into_weights(monkeypatch):
    """Weights in nvfp4 that seek their goal by noisy gradients, 200 steps with draws that turn and with new
    ones in each step: how far they are from it, beyond what fp32 weights are."""

    def distance(master):
        generator, total = torch.Generator().manual_seed(0), 0.0
        goal = torch.randn(16, 64, generator=generator) * 0.02
        value = MASTERS[master](goal)
        weight = torch.nn.Parameter(value)
        weight.grad_dtype = torch.float32
        optimizer = optim.AdamW([("w", weight)], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
        for step in range(200):
            now = storage.master(weight.detach()).read(slice(0, 16))
            total += (now - goal).square().mean().item() * (step >= 50)
            weight.grad = now - goal + 0.02 * torch.randn(16, 64, generator=generator)
            optimizer.step()
        return total

    turned = distance("nvfp4")
    new = lambda seed, step, name: chance.rounding_key(0, 0, f"{seed}/{step}/{name}")  # noqa: E731
    monkeypatch.setattr(optim, "rounding_key", new)
    exact = distance("fp32")
    ratio = (turned - exact) / (distance("nvfp4") - exact)
    assert ratio < 0.8, ratio


def test_a_huge_gradient_after_small_ones_moves_at_most_ten_steps():
    hyper = optim.Hyper(lr=0.1, beta1=0.0, beta2=0.9999, weight_decay=0.0, root_gain=1.0, eps=1e-8,
                        grad_scale=torch.tensor(1.0))  # fmt: skip
    ones = torch.ones(1, 1)
    u, _, _ = optim.adamw(ones, ones * 1e6, ones * 0, ones * 1e-6, hyper)
    assert u.item() == pytest.approx(10)


MASTERS = {
    "fp32": lambda x: x.clone(),
    "fp16": lambda x: x.half(),
    "bf16": lambda x: x.bfloat16(),
    "nvfp4": lambda x: packed.pack(x, nvfp4.weight_global_scale(x), False),
    "nvfp4x2": lambda x: packed.pack(x, nvfp4.weight_global_scale(x), True),
}


def test_a_step_that_is_not_ok_changes_nothing():
    for kind in MASTERS:
        weight = torch.nn.Parameter(MASTERS[kind](torch.randn(16, 128)))
        weight.grad_dtype = torch.float32
        optimizer = minifp4.AdamW([("w", weight)], lr=0.1, state="nvfp4")
        for gradient, ok in ((1.0, True), (math.nan, False)):
            stores = optimizer.parts["w"][0].stores
            before = [tensor.clone() for store in stores for tensor in store.tensors.values()]
            weight.grad = torch.full((16, 128), gradient)
            optimizer.step(ok=torch.tensor(ok))
            after = [tensor for store in stores for tensor in store.tensors.values()]
            same = [torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(before, after)]
            assert all(same) != ok
        assert optimizer.moved() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moved_is_one_when_all_updates_arrive(dtype):
    weight, loss = problem(dtype)
    optimizer = minifp4.AdamW([("w", weight)], state="nvfp4")
    assert math.isnan(optimizer.moved())
    descend(weight, loss, optimizer, 30)
    assert optimizer.moved() == pytest.approx(1, abs=1e-6 if dtype == torch.float32 else 0.01)


class Log8:
    """A storage that nobody had thought of: 8 bits of a logarithm, 2**-31.75 to 2**31.75 in steps of 2**(1/2)
    and a sign, rounded stochastically; the example of what a new kind takes."""

    def __init__(self, shape, device, positive):
        self.tensors = {"code": torch.zeros(shape, dtype=torch.int8, device=device)}

    def bound(self, rows):
        return None

    def read(self, rows):
        code = self.tensors["code"][rows].float()
        return code.sign() * torch.exp2(code.abs() / 2 - 48)

    def encode(self, x, rows, bits=None, bound=None):
        place = 2 * (x.abs().clamp(2.0**-47, 2.0**15).log2() + 48)
        below, above = (torch.exp2(end / 2 - 48) for end in (place.floor(), place.floor() + 1))
        share = (x.abs() - below) / (above - below)
        least = 0.5 if bits is None else chance.uniform(bits)
        return {"code": ((place.floor() + (share > least)) * x.sign()).to(torch.int8)}


def test_a_new_kind_of_storage_is_one_class_and_trains_at_once(monkeypatch):
    monkeypatch.setitem(storage.KINDS, "log8", Log8)
    final = {}
    for kind in ("fp32", "log8"):
        weight, loss = problem()
        optimizer = minifp4.AdamW([("w", weight)], state=kind, weight_decay=0.0)
        start, final[kind] = loss().item(), descend(weight, loss, optimizer, 300)
    assert abs(final["log8"] - final["fp32"]) < 0.001 * start
    assert optimizer.tensors()["w.exp_avg.code"].dtype == torch.int8 and optimizer.nbytes() == 2 * 32 * 64


def test_bad_settings_are_refused():
    weight = torch.nn.Parameter(torch.zeros(4, 16))
    with pytest.raises(ValueError, match="fp4"):
        minifp4.AdamW([("w", weight)], state="fp4")
    with pytest.raises(ValueError, match="fp32, bf16, int8, nvfp4, got 'fp16'"):
        minifp4.AdamW([("w", weight)], state="fp16")  # where sqrt(v) of a gradient of 1e-8 would be 0
    with pytest.raises(ValueError, match="up"):
        minifp4.AdamW([("w", weight)], rounding="up")
    with pytest.raises(ValueError, match="nothing to train"):
        minifp4.AdamW([("w", weight.requires_grad_(False))])
    with pytest.raises(ValueError, match="16"):
        minifp4.AdamW([("w", torch.nn.Parameter(torch.zeros(4, 24)))], state="nvfp4")
