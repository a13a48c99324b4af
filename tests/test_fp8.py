"""Products in FP8: what is rounded, what is not lost, and who multiplies like this."""

import math

import pytest
import torch
from conftest import small_directory, small_model, train
from torch import nn

from minifp4 import AdamW, fp8, linear
from minifp4.fused import layers, record
from minifp4.step import Step

IDS = torch.arange(24).view(2, 12) * 7
GPU = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs FP8"
)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(x):
    """What an operand really is, by torch's own E4M3."""
    exponent = math.frexp(x.abs().max().item())[1] - 1  # the largest number is 1 to 2 times 2**exponent
    return torch.ldexp(
        torch.ldexp(x, torch.tensor(7 - exponent)).to(fp8.E4M3).float(), torch.tensor(exponent - 7)
    )


def test_an_operand_by_hand():
    """The largest number is 1.5 x 2**1, so all are multiplied by 2**6: 192, 64, 19.2, .064, and rounded to
    four significant bits, or to a multiple of 2**-9."""
    x = torch.tensor([[3.0, -1.0, 0.3, 0.001] * 4])
    codes, inverse = fp8.FP8().rows(x)
    assert codes[0, :4].tolist() == [192, -64, 20, 0.0625] and inverse == 1 / 64


@pytest.mark.parametrize("largest", [1e-35, 1e-6, 1.0, 1.999, 448.0, 3e38])
def test_no_number_is_cut_off(largest):
    """Whatever the largest is, it keeps four significant bits, and so do those a thousandth as large."""
    x = normal(16, 32).clamp(-3, 3) / 3 * largest
    codes, inverse = fp8.FP8().rows(x)
    found = codes.double() * inverse.double()
    assert 128 <= codes.float().abs().max() <= 256
    large = x.abs() > largest / 1000
    assert ((found / x.double() - 1).abs()[large] <= 1 / 16).all()


def test_zeros_stay_zeros_and_what_is_not_finite_spreads():
    assert not fp8.FP8().multiply(*[fp8.FP8().rows(torch.zeros(16, 16))] * 2, torch.float32).any()
    for wrong in (math.nan, math.inf, -math.inf):
        x = normal(16, 16)
        x[3, 5] = wrong
        assert fp8.FP8().multiply(fp8.FP8().rows(x), fp8.FP8().rows(normal(16, 16)), x.dtype).isnan().all()


@pytest.mark.parametrize("tokens", [1, 5, 16, 33])
def test_the_three_products_are_those_of_rounded_operands(tokens):
    """Also of a number of tokens that FP8 cannot add up as it is."""
    layer = linear.Linear(32, 48, quantized=False)
    nn.init.normal_(layer.weight)
    layer.products = fp8.FP8()
    x, dy = normal(1, tokens, 32, seed=1).requires_grad_(), normal(1, tokens, 48, seed=2) * 1e-7
    y = layer(x)
    y.backward(dy)
    a, w, d = rounded(x.detach()[0]), rounded(layer.weight.detach()), rounded(dy[0])
    for found, expected in ((y[0], a @ w.T), (x.grad[0], d @ w), (layer.weight.grad, d.T @ a)):
        torch.testing.assert_close(found, expected)


def test_only_training_multiplies_in_fp8_and_not_the_head():
    model, plain = small_model(), small_model()
    fp8.use(model)
    assert [type(layer.products) for layer in model.linears()].count(fp8.FP8) == len(model.linears()) - 1
    with torch.no_grad():
        assert torch.equal(model(IDS), plain(IDS))
    error = (model(IDS) - plain(IDS)).norm() / plain(IDS).norm()
    assert 0.01 < error < 0.15


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_those_who_read_the_same_numbers_round_them_once(checkpointing):
    """A layer has seven weights and four inputs: q, k and v read one, gate and up another. What goes back to
    them are seven gradients; the backward pass rounds the weights' columns and the gated input again."""
    model, calls = small_model(), []
    fp8.use(model)
    counted = fp8.Kernels(lambda x: calls.append(x.shape) or fp8.measure(x))
    layers.fuse_model(model, layers.EAGER._replace(fp8=counted))
    model.model.activation_checkpointing = checkpointing
    loss = model.loss(IDS, IDS)
    assert len(calls) == (7 + 4) * 2
    calls.clear()
    loss.backward()
    again = 7 + 3 if checkpointing else 7  # without the last product and its input
    assert len(calls) == (7 + 1 + again) * 2


class Sixteen(linear.Products):
    """Another kind, as one would write to try a format: operands in bf16, sums in fp32."""

    def rows(self, x):
        return (x.bfloat16().float(),)

    def columns(self, x):
        return self.rows(x.T)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_another_kind_of_products_is_a_class(checkpointing):
    """Two methods; the wing takes it as it is."""
    gradients = []
    for in_wing in (False, True):
        model = small_model()
        fp8.use(model, Sixteen)
        if in_wing:
            layers.fuse_model(model, layers.EAGER)
        model.model.activation_checkpointing = checkpointing
        model.loss(IDS, IDS).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients)
    plain = small_model()
    plain.loss(IDS, IDS).backward()
    error = torch.cat([p.grad.flatten() for p in plain.parameters()]) - gradients[0]
    assert 1e-4 < error.norm() / gradients[0].norm() < 1e-2


def test_compiled_kernels_have_the_same_bits():
    kernels = layers.compiled_kernels().fp8
    for tokens in (16, 48, 64):
        x = normal(tokens, 32, seed=tokens).bfloat16()
        found, expected = (fp8.FP8(k) for k in (kernels, fp8.Kernels()))
        for operand in ("rows", "columns"):
            mine, theirs = (getattr(way, operand)(x) for way in (found, expected))
            assert all(torch.equal(a.float(), b.float()) for a, b in zip(mine, theirs))
        for mine, theirs in zip(found.both(x), expected.both(x)):
            assert all(torch.equal(a.float(), b.float()) for a, b in zip(mine, theirs))


def test_a_step_that_is_not_finite_is_skipped():
    model = small_model()
    fp8.use(model)
    optimizer = AdamW(model.named_parameters(), lr=1e-2)
    with torch.no_grad():
        model.model.norm.weight[3] = math.inf
    before = [p.clone() for p in model.parameters()]
    step = Step(model, optimizer)
    step([(IDS, IDS)])
    assert step.skipped == 1 and all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_what_cannot_be_is_said(tmp_path, tsv, monkeypatch):
    directory = small_directory(tmp_path / "odd", small_model(False, intermediate_size=136))
    settings = {"train_data": str(tsv), "product": "fp8", "out": str(tmp_path / "out"), "device": "cpu"}
    with pytest.raises(ValueError, match=r"--product fp8: .*gate_proj is 136 x 64, no multiples of 16"):
        train(model=str(directory), quantize=False, master_dtype="fp32", optimizer_state="fp32", **settings)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    reason = fp8.why_not(torch.device("cuda"))
    assert reason == "NVIDIA A100 has compute capability 8.0, FP8 products need 8.9"


@GPU
@pytest.mark.parametrize("tokens", [16, 33, 4096])
def test_tensor_cores_on_a_gpu_multiply_the_same_numbers(tokens):
    """Exactly, but they add up in another order and with fewer bits, and round to bf16. Sums over tokens have
    more bits: x times itself is all squares, which lean to one side."""
    x, w = (normal(count, 256).cuda().bfloat16() for count in (tokens, 512))
    for way in (fp8.FP8(), fp8.FP8(layers.compiled_kernels().fp8)):
        for a, b in ((way.rows(x), way.rows(w)), (way.gradient(x)[1], way.columns(x))):
            found = way.multiply(a, b, torch.bfloat16).float()
            exact = (a[0].double() * a[1]) @ (b[0].double() * b[1]).T
            assert (found - exact).norm() / exact.norm() < 2**-8


@GPU
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_a_recorded_step_on_a_gpu_trains(checkpointing):
    """Beside one in bf16: as good, and not the same."""
    losses = []
    for in_fp8 in (False, True):
        model = small_model().cuda()
        model.set_compute_dtype(torch.bfloat16)
        if in_fp8:
            fp8.use(model)
        optimizer = AdamW(model.named_parameters(), lr=1e-2)
        layers.fuse(model, optimizer)
        step = Step(model, optimizer, in_backward=True)
        model.model.activation_checkpointing = checkpointing
        recorder = record(step)
        losses.append([step([(IDS.cuda(), IDS.cuda())])[0].item() for _ in range(8)])
        assert len(recorder.recorded) == 1
    assert losses[0] != losses[1] and losses[1][-1] < 0.5 * losses[1][0]
    assert abs(losses[0][-1] - losses[1][-1]) < 0.1 * losses[0][0]
