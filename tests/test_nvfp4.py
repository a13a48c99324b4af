"""The format, as a lesson: what the bytes are, how numbers become codes, and what must never happen."""

import math

import pytest
import torch

import minifp4
from minifp4 import nvfp4

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]  # the magnitudes of codes 0 to 7


def e4m3(byte):
    """E4M3 by its definition: sign, four bits of exponent (bias 7), three of mantissa; 0x7f is NaN."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if sign else value


def bits(q):
    return q.qdata, q.scale.view(torch.uint8), q.global_scale


def test_worked_example():
    """The sixteen numbers in the docstring of minifp4/nvfp4.py."""
    x = [0, 0.1, -0.2, 0.3, 0.45, -0.6, 0.75, 0.9, 1.0, -1.1, 1.3, 1.5, -1.9, 2.2, 2.6, 3.0]
    q = minifp4.quantize(torch.tensor(x), global_scale=2.0**-9)
    assert q.qdata.numpy().tobytes().hex() == "0019a243c4556e77"
    assert q.scale.tolist() == [256.0] and q.global_scale == 2.0**-9
    expected = [0, 0, -0.25, 0.25, 0.5, -0.5, 0.75, 1, 1, -1, 1.5, 1.5, -2, 2, 3, 3]
    assert minifp4.dequantize(q).tolist() == expected


def test_golden_bytes():
    """Two codes a byte, the even element in the low half; minus zero keeps its sign."""
    code = nvfp4.e2m1_code(torch.tensor([[0, 0.5, 4, -0.0], [-0.0, 1, -6, 3]]))
    assert (code[:, 0::2] | code[:, 1::2] << 4).tolist() == [[0x10, 0x86], [0x28, 0x5F]]


def test_every_code_times_every_scale():
    byte = torch.arange(256, dtype=torch.uint8)
    qdata = torch.tensor(
        [[low | high << 4 for low, high in zip(range(0, 16, 2), range(1, 16, 2))]] * 256
    ).byte()
    q = minifp4.NVFP4(qdata, byte.view(torch.float8_e4m3fn).unsqueeze(1), torch.tensor(0.25))
    rows = minifp4.dequantize(q)
    for row, scale in zip(rows, range(256)):
        expected = torch.tensor(
            [(-1 if code > 7 else 1) * E2M1[code & 7] * e4m3(scale) / 4 for code in range(16)]
        )
        assert torch.equal(row.nan_to_num(7e7), expected.nan_to_num(7e7))


def test_scales_in_fp16_are_read_too():
    """Old .dat files have them, and E4M3 has not all of them."""
    codes, third = torch.tensor([[0x10, 0x32, 0x54, 0x76] * 2]).byte(), torch.tensor([[1 / 3]]).half()
    values = minifp4.dequantize(minifp4.NVFP4(codes, third, torch.tensor(1.0)))
    assert torch.equal(values, torch.tensor([E2M1 * 2]) * third.float())


def test_ties_go_to_the_even_code():
    """Half way between two codes the even one wins; one fp32 step to either side, the nearer."""
    for code, (below, above) in enumerate(zip(E2M1, E2M1[1:])):
        tie = torch.tensor((below + above) / 2)
        around = torch.stack([tie.nextafter(torch.tensor(0.0)), tie, tie.nextafter(torch.tensor(9.0))])
        expected = [code, code + code % 2, code + 1]
        assert nvfp4.e2m1_code(around).tolist() == expected
        assert nvfp4.e2m1_code(-around).tolist() == [8 + c for c in expected]
    assert nvfp4.e2m1_code(torch.tensor([6.0, 7.0, 1e30, math.inf])).tolist() == [7] * 4


def transformer_engine(x):
    """TransformerEngine's order of operations, one block and one number at a time."""
    fp32 = lambda value: torch.as_tensor(value, dtype=torch.float32)  # noqa: E731
    largest = fp32(torch.finfo(torch.float32).max)
    amax = x.float().abs().max()
    s = fp32(1.0) if amax == 0 else torch.minimum(fp32(2688.0) / amax, largest)
    codes, scales = [], []
    for block in x.float().reshape(-1, 16):
        s8 = torch.minimum(block.abs().max() * (s * (fp32(1.0) / fp32(6.0))), fp32(448.0)).to(
            torch.float8_e4m3fn
        )
        inverse = torch.minimum(fp32(1.0) / (s8.float() * (fp32(1.0) / s)), largest)
        for number in (block * inverse).clamp(-6, 6).tolist():
            distance = [abs(abs(number) - magnitude) for magnitude in E2M1]
            near = [code for code in range(8) if distance[code] == min(distance)]
            code = near[0] if len(near) == 1 or near[0] % 2 == 0 else near[1]
            codes.append(code + 8 * (math.copysign(1, number) < 0))
        scales.append(s8)
    codes = torch.tensor(codes, dtype=torch.uint8)
    return codes[0::2] | codes[1::2] << 4, torch.stack(scales), s


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["normal", "spread", "zeros", "tiny", "huge"])
def test_equals_transformer_engine_bit_for_bit(kind, dtype):
    normal = torch.randn(64 * 16, generator=torch.Generator().manual_seed(1))
    x = {
        "normal": normal,
        "spread": normal
        * torch.logspace(-12, 3, 64).repeat_interleave(16),  # blocks that underflow among them
        "zeros": normal * 0,
        "tiny": normal.sign() * 1e-42,
        "huge": normal.clamp(-1, 1) * 3e38,
    }[kind].to(dtype)
    q = minifp4.quantize(x)
    qdata, scale, s = transformer_engine(x)
    assert torch.equal(q.qdata, qdata) and torch.equal(q.scale.view(torch.uint8), scale.view(torch.uint8))
    assert q.global_scale == 1 / s
    assert minifp4.dequantize(q).isfinite().all()


def test_a_block_that_underflows_decodes_to_zero():
    x = torch.tensor([1.0] * 16 + [1e-9] * 16)
    assert minifp4.dequantize(minifp4.quantize(x))[16:].tolist() == [0.0] * 16


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("global_scale", [None, 2.0**-9])
def test_what_is_not_finite_stays_visible(bad, global_scale):
    x = torch.full((2, 32), 1.5)
    x[1, 20] = bad
    decoded = minifp4.dequantize(minifp4.quantize(x, global_scale=global_scale))
    assert decoded[1, 16:].isnan().all()
    if global_scale is not None:  # the other blocks do not depend on the bad one
        assert decoded[0].eq(1.5).all()
    assert not nvfp4.weight_global_scale(x).isfinite()


def test_quality_on_normal_numbers():
    x = torch.randn(4096, 1024, generator=torch.Generator().manual_seed(0))
    for global_scale in (None, nvfp4.weight_global_scale(x)):
        error = (minifp4.dequantize(minifp4.quantize(x, global_scale=global_scale)) - x).square().sum()
        assert -math.log2(error / x.square().sum()) / 2 >= 3.38


def test_stochastic_rounding_is_right_on_average_and_never_far():
    """0.7 of the way from code 2 to code 3 means: up in 70 % of the draws. 4,096 blocks draw for each
    number."""
    x = torch.tensor([0, 0.1, 0.6, 0.9, 1.2, 1.7, 2.3, 2.9, 3.5, 4.2, 5.9, -0.3, -1.1, -2.6, -4.9, 6]).repeat(
        4096
    )
    generator = torch.Generator().manual_seed(0)
    q = minifp4.quantize(x, "stochastic", global_scale=1.0, generator=generator)
    drawn = minifp4.dequantize(q).view(4096, 16).double()
    grid = torch.tensor(sorted({sign * magnitude for magnitude in E2M1 for sign in (-1, 1)})).double()
    for exact, values in zip(x[:16].double(), drawn.T):
        below, above = grid[grid <= exact].max(), grid[grid >= exact].min()
        assert set(values.tolist()) <= {below.item(), above.item()}
        standard_error = ((exact - below) * (above - exact) / 4096).sqrt()
        assert (values.mean() - exact).abs() <= 4 * standard_error + 1e-6
    again = minifp4.quantize(x, "stochastic", global_scale=1.0, generator=torch.Generator().manual_seed(0))
    other = minifp4.quantize(x, "stochastic", global_scale=1.0, generator=generator)
    assert torch.equal(again.qdata, q.qdata) and not torch.equal(other.qdata, q.qdata)


def test_weight_global_scale_is_a_shared_power_of_two():
    """2688 / 2688 = 1 is a power of two; a hair more needs the next. One spare power of two lets weights
    grow."""
    assert nvfp4.weight_global_scale(torch.tensor([-2688.0])) == 2.0
    assert nvfp4.weight_global_scale(torch.tensor([2688.0]).nextafter(torch.tensor(3e3))) == 4.0
    assert nvfp4.weight_global_scale(torch.tensor([1.0]), torch.tensor([100.0])) == 2.0**-3
    assert nvfp4.weight_global_scale(torch.zeros(16)) == 1.0


def test_quantizing_the_decoded_numbers_again_changes_nothing():
    """So a checkpoint may be decoded, saved and quantized again without loss."""
    x = torch.randn(512, 256, generator=torch.Generator().manual_seed(2)) * 0.02
    q = minifp4.quantize(x, global_scale=nvfp4.weight_global_scale(x))
    once = minifp4.dequantize(q, torch.bfloat16)
    again = minifp4.quantize(once, global_scale=nvfp4.weight_global_scale(once))
    assert torch.equal(minifp4.dequantize(again), once.float())


@pytest.mark.parametrize("shape", [(16,), (3, 32), (2, 3, 4, 48), (0, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_and_types(shape, dtype):
    x = torch.randn(shape).to(dtype)
    q = minifp4.quantize(x)
    assert q.qdata.shape == (*shape[:-1], shape[-1] // 2) and q.qdata.dtype == torch.uint8
    assert q.scale.shape == (*shape[:-1], shape[-1] // 16) and q.scale.dtype == torch.float8_e4m3fn
    assert q.global_scale.shape == () and q.global_scale.dtype == torch.float32
    back = minifp4.dequantize(q, dtype=dtype)
    assert back.shape == x.shape and back.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(bits(q), bits(minifp4.quantize(x.float()))))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="multiple of 16.*24"):
        minifp4.quantize(torch.zeros(2, 24))
    with pytest.raises(ValueError, match="int64"):
        minifp4.quantize(torch.zeros(16, dtype=torch.int64))
    with pytest.raises(ValueError, match="up"):
        minifp4.quantize(torch.zeros(16), rounding="up")


def test_decodes_as_compressed_tensors_does():
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(4)) * 0.03
    q = minifp4.quantize(x, global_scale=nvfp4.weight_global_scale(x))
    values = unpack_fp4_from_uint8(q.qdata, *x.shape, dtype=torch.float32)
    theirs = values.unflatten(-1, (-1, 16)) * (q.scale.float() / (1 / q.global_scale)).unsqueeze(-1)
    assert torch.equal(minifp4.dequantize(q), theirs.flatten(-2))


@pytest.mark.filterwarnings("ignore")
def test_decodes_as_torchao_does():
    pytest.importorskip("torchao")
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(5)) * 0.03
    theirs = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=torch.tensor(0.00013))  # not a power of two
    ours = minifp4.NVFP4(theirs.qdata, theirs.scale.view(64, 16), torch.tensor(0.00013))
    assert torch.equal(minifp4.dequantize(ours), theirs.dequantize(torch.float32))
