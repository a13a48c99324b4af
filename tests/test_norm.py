"""The norms against what autograd makes of their formula: equal bits in fp32, at most a rounding in bf16."""

import pytest
import torch
from torch._inductor.utils import fresh_cache, run_and_get_code

from minifp4 import norm

EPS = 1e-6


def formula(x, weight):
    return weight.to(x.dtype) * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)).to(
        x.dtype
    )


def turned(x, cos, sin):
    """As in Hugging Face's code, with the sine of a pair's first half as it is."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def made(kind, dtype, *shape, **settings):
    """(the norm, x like `shape`), with numbers of very different sizes."""
    torch.manual_seed(0)
    module = kind(shape[-1], EPS, **settings)
    torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    x = torch.randn(shape) * torch.logspace(-3, 2, shape[1]).view(1, -1, *[1] * (len(shape) - 2))
    return module, x.to(dtype).requires_grad_()


def gradients(outputs, inputs):
    generator = torch.Generator().manual_seed(1)
    dy = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    return torch.autograd.grad(outputs, inputs, dy)


def check(found, expected, dtype):
    for ours, theirs in zip(found, expected, strict=True):
        if dtype == torch.float32:
            assert torch.equal(ours, theirs)
        else:  # theirs rounds each sum
            assert (ours - theirs).float().norm() < 0.01 * theirs.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("readers", [1, 2, 3])
@pytest.mark.parametrize("adds", [False, True], ids=["", "branch"])
def test_a_norm_and_the_sums_around_it(adds, readers, dtype):
    """The last reader's gradient comes first, as autograd has it."""
    module, x = made(norm.AddNorm, dtype, 2, 5, 32, readers=readers)
    branch = torch.randn(2, 5, 32).to(dtype).requires_grad_() if adds else None
    inputs = [x, branch, module.weight] if adds else [x, module.weight]
    outputs = module(x, branch)
    total = x + branch if adds else x * 1
    y = formula(total, module.weight)
    expected = total, *(y * 1 for _ in range(readers))
    check(outputs, expected, torch.float32)
    check(gradients(outputs, inputs), gradients(expected, inputs), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_whose_heads_turn(dtype):
    module, x = made(norm.HeadNorm, dtype, 2, 5, 3, 16)
    positions = torch.arange(5).repeat(2)
    cos, sin = norm.rope_tables(positions, 16, 10_000.0, dtype)
    plain = [table.view(2, 5, 1, 16) for table in (cos, torch.cat((-sin[:, :8], sin[:, 8:]), -1))]
    found, expected = module(x, cos, sin), turned(formula(x, module.weight), *plain)
    check([found], [expected], torch.float32)
    inputs = x, module.weight
    check(gradients([found], inputs), gradients([expected], inputs), dtype)


def test_what_nobody_reads_has_no_gradient():
    module, x = made(norm.AddNorm, torch.float32, 2, 5, 32, readers=2)
    total, first, second = module(x)
    check(gradients([second], [x]), gradients([formula(x, module.weight)], [x]), torch.float32)
    assert total.data_ptr() == x.data_ptr() and first.data_ptr() == second.data_ptr()  # nothing is copied


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_each_direction_is_one_kernel():
    """For many tokens; for few, the weight's gradient is cheap. A second, small one rounds that."""
    tokens, features = norm.MANY, 256
    weight, eps = torch.ones(features, device="cuda"), 1e-6
    head = torch.ones(128, device="cuda")

    def some(*shape):
        return torch.randn(tokens, *shape, device="cuda").bfloat16()

    kernels, x, r = norm.compiled_kernels(), some(features), torch.rand(tokens, 1, device="cuda")
    q, tables, head_r = some(4, 128), (some(128), some(128)), torch.rand(tokens, 4, 1, device="cuda")
    with fresh_cache():
        torch._dynamo.reset()
        for function, inputs, most in (
            (kernels.norm, (x, some(features), weight, eps), 1),
            (kernels.norm_backward, (x, r, weight, x, (x, some(features), x)), 2),
            (kernels.turned, (q, *tables, head, eps), 1),
            (kernels.turned_backward, (q, head_r, head, *tables, some(4, 128)), 2),
        ):
            _, [code] = run_and_get_code(function, *inputs)
            assert code.count("@triton.jit") == most
