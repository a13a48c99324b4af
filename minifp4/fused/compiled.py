"""One kernel out of many small operations: how torch.compile is used here.

A training step that is not large products or attention is limited by memory: read, compute a little, write.
Each PyTorch operation does that for itself; the compiler fuses those that it sees together. So what should be
one kernel is one function without loops over data, and called through `compiled`. The same function runs as
it is where nothing is compiled; so the tests compare it with the modules above, step by step.

Compiled code may add up in another order. But for that its bits are those of eager code on a CPU. On a GPU
they need not be: a product and a sum become one instruction, which rounds once instead of twice, and a stored
number near the middle between two places may take the other. The codec has no such sums; its bits are the
same everywhere.

Three things to know of the compiler: a Python float among the arguments is a constant of the code, so all
that changes comes in tensors; every new shape is compiled again, unless `any_length` says what may vary; and
code for any length is as good as its first length made it, unless its thread blocks are fixed.
"""

import torch


def compiled(function, options=None, config=None):
    """`function` through torch.compile, one graph for each shape: a Qwen3 has more of them than torch allows
    by default, and beyond its limit they would run in eager.

    options: of the compiler (`torch._inductor.list_options`).
    config: {"XBLOCK": rows in a thread block, "num_warps": its threads / 32} of all kernels that reduce
    rows, each then read once and as a whole. The compiler would try a few ways when a kernel first runs, but
    times them together with copies of all that it writes, and some of its choices took two or three times as
    long.
    """
    torch._dynamo.config.recompile_limit = 64
    made = torch.compile(function, dynamic=False, options=options)
    return made if config is None else _fixed(made, config)


def any_length(*tensors):
    """The tensors, marked so that code compiled for them serves any number of rows."""
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return tensors


def _fixed(function, config):
    from torch._inductor.choices import InductorChoices  # here, because these take two seconds to import
    from torch._inductor.codegen.triton import FixedTritonConfig
    from torch._inductor.virtualized import V

    class Choices(InductorChoices):
        def should_use_persistent_reduction(self, features, cooperative_reduction):
            return True

        def triton_kernel_kwargs(self, kernel_cls, features, groups, kernel_kwargs):
            if features.reduction_numel == 1:  # no reduction
                return kernel_kwargs
            return {**kernel_kwargs, "fixed_config": FixedTritonConfig(config)}

    choices = Choices()

    def call(*values, **settings):
        with V.set_choices_handler(choices):
            return function(*values, **settings)

    return call
