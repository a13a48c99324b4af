"""The fused norms against what autograd makes of `model.py`'s formulas: equal bits in fp32, in bf16 at most
a rounding apart."""

import pytest
import torch
from torch._inductor.utils import fresh_cache, run_and_get_code

from minifp4.fused import norms
from minifp4.model import RMSNorm, rope_tables, rotated

EPS = 1e-6


def huggingface(x, cos, sin):
    """Rotary positions as in Hugging Face's code, with the sine of a pair's first half as it is."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def made(dtype, *shape):
    """(the norm, x like `shape`), with numbers of very different sizes."""
    torch.manual_seed(0)
    module = RMSNorm(shape[-1], EPS)
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
    module, x = made(dtype, 2, 5, 32)
    branch = torch.randn(2, 5, 32).to(dtype).requires_grad_() if adds else None
    inputs = [x, branch, module.weight] if adds else [x, module.weight]
    outputs = norms.add_norm(module, norms.EAGER, x, branch, readers)
    total = x + branch if adds else x * 1
    y = module(total)
    expected = total, *(y * 1 for _ in range(readers))
    check(outputs, expected, torch.float32)
    check(gradients(outputs, inputs), gradients(expected, inputs), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_whose_heads_are_rotated(dtype):
    module, x = made(dtype, 2, 5, 3, 16)
    cos, sin = rope_tables(torch.arange(5).expand(2, 5), 16, 10_000.0, dtype)
    found = norms.rotated_norm(module, norms.EAGER, x, cos, sin)
    expected = rotated(module(x), cos, sin)
    check([found], [expected], torch.float32)
    plain = [table.unsqueeze(2) for table in (cos, torch.cat((-sin[..., :8], sin[..., 8:]), -1))]
    check([expected], [huggingface(module(x), *plain)], torch.float32)
    inputs = x, module.weight
    check(gradients([found], inputs), gradients([expected], inputs), dtype)


def test_what_nobody_reads_has_no_gradient():
    module, x = made(torch.float32, 2, 5, 32)
    total, first, second = norms.add_norm(module, norms.EAGER, x, readers=2)
    check(gradients([second], [x]), gradients([module(x)], [x]), torch.float32)
    assert total.data_ptr() == x.data_ptr() and first.data_ptr() == second.data_ptr()  # nothing is copied


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_each_direction_is_one_kernel():
    """For many tokens; for few, the weight's gradient is cheap. A second, small one rounds that."""
    tokens, features = norms.MANY, 256
    weight, eps = torch.ones(features, device="cuda"), 1e-6
    head = torch.ones(128, device="cuda")

    def some(*shape):
        return torch.randn(tokens, *shape, device="cuda").bfloat16()

    kernels, x, r = norms.compiled_kernels(), some(features), torch.rand(tokens, 1, device="cuda")
    q, tables, head_r = some(4, 128), (some(128), some(128)), torch.rand(tokens, 4, 1, device="cuda")
    with fresh_cache():
        torch._dynamo.reset()
        for function, inputs, most in (
            (kernels.norm, (x, some(features), weight, eps), 1),
            (kernels.norm_backward, (x, r, weight, x, (x, some(features), x)), 2),
            (kernels.rotated, (q, *tables, head, eps), 1),
            (kernels.rotated_backward, (q, head_r, head, *tables, some(4, 128)), 2),
        ):
            _, [code] = run_and_get_code(function, *inputs)
            assert code.count("@triton.jit") == most
