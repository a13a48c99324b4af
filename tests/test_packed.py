"""Weights that live in 4 bits: right on average, bit for bit the same everywhere, exported as the codes
that trained."""

import copy
import math

import pytest
import torch
from conftest import small_directory, small_model, train

import minifp4
from minifp4 import chance, masters, nvfp4, packed, storage
from minifp4.files import layouts
from minifp4.files.atomic import bits
from minifp4.linear import Linear

ALL = slice(0, 64)


def some_weight(finer, seed=0):
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(seed)) * 0.05
    return packed.pack(x, nvfp4.weight_global_scale(x), finer)


def write(weight, wanted, step):
    """Store `wanted` as the optimizer does in `step`."""
    key = torch.tensor(chance.rounding_key(0, step, "w"), dtype=torch.int32)
    bits = chance.random_bits(key, torch.zeros((), dtype=torch.int32), (64, 128))
    store = storage.master(weight)
    storage.write(store, ALL, store.encode(wanted, ALL, bits), torch.tensor(True))


def parameter(finer):
    """A weight that trains, with gradients in fp32."""
    weight = torch.nn.Parameter(some_weight(finer))
    weight.grad_dtype = torch.float32
    return weight


UPDATES = {
    "small": lambda w: torch.randn(w.shape) * 1e-4,
    "signs": lambda w: torch.randn(w.shape).sign() * 5e-4,
    "growing": lambda w: 0.01 * w,
    "large": lambda w: torch.randn(w.shape) * 0.05,
    "shrinking": lambda w: -0.7 * w,
}


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("finer", [False, True], ids=["nvfp4", "nvfp4x2"])
def test_stores_what_was_asked_for_on_average(finer, update):
    """The mean of 400 writes is the wanted value within four standard errors, for blocks that grow or
    shrink too."""
    torch.manual_seed(0)
    base = some_weight(finer)
    before = base.stored()
    wanted = before + UPDATES[update](before)
    drawn = []
    for step in range(400):
        weight = base.clone()
        write(weight, wanted, step)
        drawn.append(weight.stored())
    drawn = torch.stack(drawn).double()
    error, deviation = drawn.mean(0) - wanted, drawn.std(0) / math.sqrt(400)
    assert error.mean().abs() <= 4 * deviation.norm() / wanted.numel()
    assert (error * before.sign()).mean().abs() <= 4 * deviation.norm() / wanted.numel() + 1e-8
    moved = ((drawn.mean(0) - before) * (wanted - before).sign()).sum() / (wanted - before).abs().sum()
    assert moved == pytest.approx(1, abs=0.03)


def test_only_neighbouring_codes_are_drawn_and_unmoved_weights_stay():
    base = some_weight(False)
    before, wanted = base.stored(), base.stored()
    wanted[:, ::2] *= 0.995
    for step in range(20):
        weight = base.clone()
        write(weight, wanted, step)
        code, old = (w.qdata & 7 for w in (weight, base))  # magnitudes of the even elements
        assert ((old.int() - code.int()) >= 0).all() and ((old.int() - code.int()) <= 1).all()
        assert torch.equal(weight.stored()[:, 1::2], before[:, 1::2])


def test_nearest_rounding_does_not_move():
    """The predecessor's mode: a hundred steps of lr 1e-5, and not one code has changed."""
    moved = {}
    for rounding in ("nearest", "stochastic"):
        weight = parameter(False)
        before = weight.stored()
        optimizer = minifp4.AdamW(
            [("w", weight)], lr=1e-5, weight_decay=0.0, rounding=rounding, state="nvfp4"
        )
        for _ in range(100):
            weight.grad = before.sign()  # towards zero, so that no block outgrows its scale
            optimizer.step()
        moved[rounding] = optimizer.moved()
    assert abs(moved["nearest"]) < 0.02 and moved["stochastic"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("finer", [False, True], ids=["nvfp4", "nvfp4x2"])
def test_any_chunk_size_gives_the_same_bits(finer):
    results = []
    for chunk_rows in (0, 1, 7):
        weight = parameter(finer)
        optimizer = minifp4.AdamW([("w", weight)], lr=1e-3, state="nvfp4")
        optimizer.chunk_rows = chunk_rows
        for step in range(3):
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        results.append([*weight.tensors().values(), *optimizer.tensors().values()])
    for other in results[1:]:
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(results[0], other))


def test_sixteen_places_for_each_code():
    """The worked example of minifp4/packed.py, and every place once: stored exactly, read as the nearest
    code."""
    one = torch.full((1, 16), 1.22)
    one[0, 0] = 6  # this makes the block's scale 1
    weight = packed.pack(one, torch.tensor(1.0), True)
    assert weight.scale.item() == 1 and weight.stored()[0, 1] == 1.21875 and weight.decode()[0, 1] == 1
    assert weight.more[0, 1].item() == 0xEF and weight.qdata[0, 1].item() == 0x22
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 8])
    places = torch.cat([torch.linspace(a, b, 17)[:-1] for a, b in zip(grid, grid[1:])])[: packed.LAST - 7]
    x = torch.cat([places, torch.full((-len(places) % 15,), 6.0)]).view(-1, 15)
    x = torch.cat([x, torch.full((len(x), 1), 6.0)], 1)
    for sign in (1, -1):
        weight = packed.Packed(nvfp4.NVFP4(*minifp4.quantize(torch.full_like(x, 6.0), global_scale=1.0)))
        weight = packed.pack(weight, None, True)
        weight.store(sign * x.clamp(max=6))
        assert torch.equal(weight.stored(), sign * x.clamp(max=6))
        nearest = (weight.decode().abs().unsqueeze(-1) - grid[:-1]).abs().argmin(-1)
        distance = (x.clamp(max=6).unsqueeze(-1) - grid[:-1]).abs()
        assert (distance.gather(-1, nearest.unsqueeze(-1)).squeeze(-1) == distance.amin(-1)).all()


def test_the_middle_between_two_codes_is_read_as_either():
    """Read always as the higher one, a 32nd of all weights would be a step too large: the slope of what is
    read against what is stored would be 1.0039 instead of .9955. The middle costs 1 % of squared error."""
    x = torch.randn(512, 2048, generator=torch.Generator().manual_seed(0)) * 0.05
    scale = nvfp4.weight_global_scale(x)
    plain, finer = (packed.pack(x, scale, kind) for kind in (False, True))
    assert torch.equal(plain.qdata, finer.qdata)  # a new weight has no such place on the wrong side
    finer.store(x)
    slopes = [((weight.decode() * x).sum() / (x * x).sum()).item() for weight in (plain, finer)]
    assert slopes[1] == pytest.approx(slopes[0], abs=3e-4)
    errors = [(weight.decode() - x).square().sum().item() for weight in (plain, finer)]
    assert errors[1] < 1.015 * errors[0]


@pytest.mark.parametrize("finer", [False, True], ids=["nvfp4", "nvfp4x2"])
def test_the_largest_number_of_a_block_is_read_as_it_shrinks(finer):
    """All numbers come .001 nearer to 0, the largest by 1 % of themselves. Those lie near 6 times their
    scale, and in nvfp4x2 all from 5 on are read as 6: without a new scale they would be read as before."""
    moved, steps, lr = [], 100, 1e-5
    for seed in range(8):
        weight = some_weight(finer, seed)
        start, read = weight.stored(), weight.decode()
        blocks = start.abs().unflatten(-1, (-1, 16))
        largest = (blocks == blocks.amax(-1, keepdim=True)).flatten(-2)
        for step in range(steps):
            write(weight, weight.stored() - lr * start.sign(), step)
        moved.append(((read - weight.decode()) * start.sign())[largest].mean() / (lr * steps))
    assert 0.5 < torch.stack(moved).mean() < 1.2


def test_what_does_not_move_stays():
    """Rows of words that do not occur, or any at a rate of 0: also after their blocks have got new scales."""
    weight = some_weight(True)
    for step in range(20):
        write(weight, weight.stored() * (1.03 if step < 10 else 0.97), step)
    before = weight.stored()
    for step in range(20, 40):
        write(weight, weight.stored(), step)
    assert torch.equal(weight.stored(), before)


def test_a_scale_that_another_program_chose_stays():
    """Some scale blocks so that the largest code is 4. A new scale would move all 16."""
    codes = torch.randint(0, 6, (64, 128), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    codes[:, ::16] = 6  # 4
    q = nvfp4.NVFP4(nvfp4.pair(codes), torch.full((64, 8), 2.0).to(torch.float8_e4m3fn), torch.tensor(0.01))
    weight = packed.pack(packed.Packed(q), None, True)
    before = weight.decode()
    write(weight, weight.stored() * 1.001, 1)
    assert (weight.scale.float() == 2).all() and (weight.decode() != before).float().mean() < 0.01


def test_more_bits_are_much_finer_than_the_codes():
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 0.05
    scale = nvfp4.weight_global_scale(x)
    errors = [(packed.pack(x, scale, finer).stored() - x).norm() / x.norm() for finer in (False, True)]
    assert errors[0] == pytest.approx(0.095, abs=0.005) and errors[1] < errors[0] / 13


def test_growth_beyond_the_global_scale():
    """Doubling the global scale and halving the block scales changes no number, and makes room."""
    weight = some_weight(True)
    big = weight.stored() * 3
    weight.store(big)
    before, top = weight.stored(), weight.scale.float().max()
    packed.refit([weight])
    assert top > 224 >= weight.scale.float().max() and torch.equal(weight.stored(), before)
    for _ in range(4):
        big = big * 1.9
        weight.store(big)
        packed.refit([weight])
    assert (weight.stored() - big).norm() < 0.02 * big.norm()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["nvfp4", "nvfp4x2"])
def test_training_a_packed_model_and_exporting_its_codes(tmp_path, tsv, kind, tied):
    """Every matrix, the embedding and a tied head included; the export holds the very codes, re-quantizing
    none."""
    directory = small_directory(tmp_path / "model", small_model(tie_word_embeddings=tied))
    path = train(
        model=str(directory), train_data=str(tsv), steps=3, lr=1e-2, train_embed=True, train_lm_head=True,
        master_dtype=kind, out=str(tmp_path / "out"),
    )  # fmt: skip
    model, _ = minifp4.load(path)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    assert all(isinstance(p, packed.Packed) and (p.more is not None) == (kind == "nvfp4x2") for p in matrices)
    tensors = layouts.tensors_of(model, "hf")
    for name, p in model.named_parameters():
        if "_proj" in name:
            assert torch.equal(tensors[f"{name}_packed"], p.qdata)
            assert torch.equal(tensors[f"{name}_scale"].view(torch.uint8), p.scale.view(torch.uint8))
        elif p.dim() == 2:
            assert torch.equal(tensors[name].float(), p.decode())


def test_finer_ends_are_head_embedding_and_last_layer(tmp_path, tsv):
    directory = small_directory(tmp_path / "model", small_model())
    flags = dict(model=str(directory), train_data=str(tsv), steps=1, train_embed=True, train_lm_head=True)
    path = train(**flags, master_dtype="nvfp4", finer_ends=True, out=str(tmp_path / "out"))
    model, _ = minifp4.load(path)
    matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    finer = {name for name, p in matrices.items() if p.more is not None}
    assert finer == {name for name in matrices if "layers.0." not in name} and len(finer) == 9


def test_one_gradient_for_the_two_uses_of_a_tied_weight():
    """A packed tied weight collects the gradient that a dense one with the same values does."""
    models = [small_model(tie_word_embeddings=True) for _ in range(2)]
    with torch.no_grad():
        weight = models[0].lm_head.weight
        weight.copy_(models[0].lm_head.value(torch.float32))
        models[1].lm_head.weight.copy_(weight)
    masters.set_masters(models[1], "nvfp4")
    ids = torch.arange(12).view(2, 6)
    for model in models:
        model.loss(ids, ids).backward()
    assert isinstance(models[1].lm_head.weight, packed.Packed)
    gradients = [model.lm_head.weight.grad for model in models]
    assert type(gradients[1]) is torch.Tensor and torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_without_quantizing_packed_weights_are_read_as_they_are_stored(tied):
    """All 16 places of a code in nvfp4x2, where a quantized model reads the nearest code."""
    ids, logits = torch.arange(12).view(2, 6), {}
    for quantize in (True, False):
        model = small_model(quantize=quantize, tie_word_embeddings=tied)
        plain = small_model(quantize=False, tie_word_embeddings=tied)
        masters.set_masters(model, "nvfp4x2")
        with torch.no_grad():
            for name, p in plain.named_parameters():
                packed_p = model.get_parameter(name)
                p.copy_(packed_p.decode() if quantize and p.dim() == 2 else packed.stored_values(packed_p))
        logits[quantize] = model(ids)
        assert torch.equal(logits[quantize], plain(ids))
        model.loss(ids, ids).backward()
        plain.loss(ids, ids).backward()
        for name, p in plain.named_parameters():
            assert torch.allclose(model.get_parameter(name).grad, p.grad, atol=1e-6), name
    assert not torch.equal(logits[True], logits[False])


def test_packed_weights_find_room_to_grow_in_an_unquantized_model():
    model = small_model(quantize=False)
    masters.set_masters(model, "nvfp4")
    weight = model.lm_head.weight
    before = weight.stored() * 3
    weight.store(before)
    top, stored = weight.scale.float().max(), weight.stored()
    model.refit()
    assert top > 224 >= weight.scale.float().max() and torch.equal(weight.stored(), stored)


@pytest.mark.parametrize("finer", [False, True], ids=["nvfp4", "nvfp4x2"])
def test_a_packed_weight_behaves_like_a_parameter(finer):
    layer = Linear(128, 64)
    layer.weight = torch.nn.Parameter(some_weight(finer))
    x = torch.randn(3, 128)
    expected = layer(x).detach()
    assert torch.equal(copy.deepcopy(layer)(x), expected) and torch.equal(layer.to("cpu")(x), expected)
    other = Linear(128, 64)
    other.weight = torch.nn.Parameter(some_weight(finer, seed=1))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected) and torch.equal(
        layer.weight.detach().stored(), layer.weight.stored()
    )
    seen = []
    layer.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
    layer(x).sum().backward()
    assert seen == [(64, 128)]
    assert packed.bytes_of(layer.weight) == 64 * 128 * (1.0625 if finer else 0.5625) + 4


def test_a_compiled_layer_gives_the_same_output():
    layer = Linear(128, 64)
    layer.weight = torch.nn.Parameter(some_weight(True))
    x = torch.randn(3, 128)
    assert torch.allclose(torch.compile(layer)(x), layer(x), atol=1e-6)


def test_a_matrix_of_decoded_values_is_recognized():
    """Whatever multiple of its scale a block's largest number is; anything else stays dense."""
    weight = some_weight(False)
    weight.store(weight.stored() * torch.linspace(0.5, 1, 64).unsqueeze(1))
    again = layouts.pack_exactly(weight.decode().bfloat16())
    assert isinstance(again, packed.Packed) and torch.equal(again.decode(), weight.decode())
    other = weight.decode()
    other[63, 127] += 1e-4
    assert not isinstance(layouts.pack_exactly(other), packed.Packed)
