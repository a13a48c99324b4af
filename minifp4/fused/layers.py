"""`fuse(model, optimizer)`: kernels in the place of the reference's arithmetic, from outside.

Modules and parameters stay what they are. Some methods of some objects are replaced by the functions here:

    Linear.value           decoding, as one kernel
    Linear.forward         `Product`, which also multiplies with SwiGLU's gate
    Linear.products        rounding to FP8, as kernels
    Block.forward          the norms with the sums around them, rotary positions with their norm (`norms.py`)
    Block.recomputed       the same, which decodes each weight once and leaves out the last product
    Group.refit            the largest block scale of a group
    Qwen3.cross_entropy    what is done with logits beside products
    AdamW.update_rows      the update of a matrix (`update.py`)

Matrix products and attention are large enough, and stay as they are.
"""

from functools import partial
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .. import fp8
from ..linear import Linear, value_of
from ..loss import Elementwise, become_gradient, cross_entropy, log_sum
from ..packed import Packed
from . import codes, norms
from .codes import BLOCK, paired, pairs, raw, unpaired
from .compiled import any_length, compiled
from .norms import add_norm, rotated_norm
from .update import fuse_optimizer


def fuse(model, optimizer, kernels=None):
    """Make one kernel each of what is many small operations (torch.compile).

    kernels: `Kernels`; those that are compiled if None.
    """
    fuse_model(model, kernels or compiled_kernels())
    fuse_optimizer(optimizer)


class Kernels(NamedTuple):
    """What a model does in many small operations."""

    decode: Callable  # (tensors of a packed weight, global_scale, whether as stored, dtype)
    fake_quantize: Callable  # (weight, global_scale, dtype)
    refit: Callable  # `codes.refit`
    gated: Callable  # `_gated`
    gated_backward: Callable  # `_gated_backward`
    norms: norms.Kernels
    elementwise: Elementwise  # of the loss
    fp8: fp8.Kernels  # what its products read


def fuse_model(model, kernels):
    """Let `model` compute by `kernels`."""
    for layer in model.linears():
        layer.value = partial(value, layer, kernels)
        layer.forward = Product(layer, kernels)
        if isinstance(layer.products, fp8.FP8):
            layer.products = type(layer.products)(kernels.fp8)
    for group in dict.fromkeys(layer.group for layer in [*model.linears(), model.model.embed_tokens]):
        group.refit = partial(refit, group, kernels, group.refit)
    for block in model.model.layers:
        block.forward = partial(block_forward, block, kernels.norms)
        block.recomputed = partial(block_recomputed, block)
    model.model.norm.forward = partial(norm_forward, model.model.norm, kernels.norms)
    model.cross_entropy = partial(cross_entropy, elementwise=kernels.elementwise)


def value(layer, kernels, dtype, rows=slice(None)):
    """`Linear.value`."""
    weight = layer.weight
    if layer.decoded is not None:
        return layer.decoded[rows]
    if isinstance(weight, Packed):
        tensors = {name: raw(tensor)[rows] for name, tensor in weight.tensors().items() if tensor.dim()}
        return kernels.decode(tensors, weight.global_scale, not layer.quantized, dtype)
    if not layer.quantized:
        return value_of(layer, dtype, rows)  # nothing to compute
    return kernels.fake_quantize(weight.detach()[rows], layer.group.global_scale(), dtype)


def refit(group, kernels, plain):
    """`Group.refit`."""
    if not group.packed():
        plain()
    elif group.trains():
        weights = [layer.weight for layer in group.layers]
        kernels.refit([raw(weight.scale) for weight in weights], [weight.global_scale for weight in weights])


def block_forward(block, kernels, x, cos, sin, cache=None, spans=None):
    """`Block.forward`."""
    attention, mlp = block.self_attn, block.mlp
    x, for_q, for_k, for_v = add_norm(block.input_layernorm, kernels, x, readers=3)
    seen = []  # what the three make of the same numbers
    q, k, v = (
        attention.heads(layer(read, seen=seen))
        for layer, read in ((attention.q_proj, for_q), (attention.k_proj, for_k), (attention.v_proj, for_v))
    )
    q = rotated_norm(attention.q_norm, kernels, q, cos, sin)
    k = rotated_norm(attention.k_norm, kernels, k, cos, sin)
    branch, seen = attention.attend(q, k, v, cache, spans), []
    x, for_gate, for_up = add_norm(block.post_attention_layernorm, kernels, x, branch, readers=2)
    gate, up = mlp.gate_proj(for_gate, seen=seen), mlp.up_proj(for_up, seen=seen)
    return x + mlp.down_proj(up, gate=gate)


def norm_forward(module, kernels, x):
    """`RMSNorm.forward`."""
    return add_norm(module, kernels, x)[1]


def block_recomputed(block, *inputs):
    """`Block.recomputed`."""
    return checkpoint(
        block, *inputs, use_reentrant=False, preserve_rng_state=False,
        context_fn=lambda: (Recomputed(block, False), Recomputed(block, True)),
    )  # fmt: skip


class Recomputed:
    """While a block runs (`with` it) whose activations are not kept, or runs `again` to get them back for the
    backward pass.

    The block's last product was needed for the next block alone. Its own backward pass wants its input: a
    quarter of a block's operations need not be done again.
    """

    def __init__(self, block, again):
        self.products = [layer.forward for layer in block.modules() if isinstance(layer, Linear)]
        self.last, self.again = block.mlp.down_proj.forward, again

    def __enter__(self):
        self._set(True)

    def __exit__(self, *error):
        self._set(False)

    def _set(self, running):
        for product in self.products:
            product.recomputed, product.first = running, running and not self.again
        self.last.unread = running and self.again


class Product:
    """`Linear.forward`; with a gate (SwiGLU) `(silu(gate) * x) @ weight.T`.

    recomputed: the forward pass is one of a checkpointed block, which keeps what it saves only when it runs
    again, not the `first` time. So it saves the decoded weight too.
    unread: nobody reads the product now, only its derivatives are wanted.
    """

    def __init__(self, layer, kernels):
        self.layer, self.kernels = layer, kernels
        self.recomputed = self.first = self.unread = False

    def __call__(self, x, gate=None, seen=None):
        """seen: a list that is given to all who read the same x, for what they make of it."""
        seen = [] if seen is None else seen
        return _GatedProduct.apply(x, gate, self.layer.weight, self, self.layer.now(), seen)

    def operands(self, x, gate, products, seen):
        """(x's rows, the weight's rows, the columns of both), each None if nobody will read it."""
        w4, kept = self.layer.value(x.dtype), not self.first
        if self.unread:
            return None, None, None, products.columns(w4)
        if gate is None:
            if not seen:
                seen.append(products.both(x.flatten(0, -2), columns=kept))
            of_x, x_columns = seen[0]
        else:
            of_x, x_columns = products.rows(self.kernels.gated(gate, x).flatten(0, -2)), None
        if self.recomputed:
            return of_x, x_columns, *products.both(w4, columns=kept)
        return of_x, x_columns, products.rows(w4), None


class _GatedProduct(torch.autograd.Function):
    """With a gate, silu(gate) * x is not kept for the backward pass, which makes it again."""

    @staticmethod
    def forward(ctx, x, gate, weight, product, products, seen):
        ctx.layer, ctx.kernels, ctx.products, ctx.shape = product.layer, product.kernels, products, x.shape
        of_x, x_columns, of_w, w_columns = product.operands(x, gate, products, seen)
        ctx.save_for_backward(
            x if gate is not None else None, gate, weight, *x_columns or (), *w_columns or ()
        )
        ctx.from_x = len(x_columns or ())
        if product.unread:
            return x.new_zeros(()).expand(*x.shape[:-1], len(weight))
        return products.multiply(of_x, of_w, x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, dy):
        x, gate, _, *saved = ctx.saved_tensors
        x_columns, w_columns, products = saved[: ctx.from_x], saved[ctx.from_x :], ctx.products
        wants_x, wants_gate, wants_weight = ctx.needs_input_grad[:3]
        dx = dgate = dweight = None
        dy_rows, dy_columns = products.gradient(dy.flatten(0, -2))
        if wants_x or wants_gate:
            w_columns = w_columns or products.columns(ctx.layer.value(dy.dtype))
            dx = products.multiply(dy_rows, w_columns, dy.dtype).view(ctx.shape)
        if gate is not None:
            if dx is None:
                x = ctx.kernels.gated(gate, x)
            else:
                ctx.kernels.gated_backward(dx, x, gate)
                x, dx, dgate = dx, x, gate  # what they have become
        if wants_weight:
            x_columns = x_columns or products.columns(x.flatten(0, -2))
            dweight = products.multiply(dy_columns, x_columns, dy.dtype)
        return dx, dgate, dweight, None, None, None


def _gated(gate, x):
    """SwiGLU (Shazeer 2020)."""
    return F.silu(gate) * x


def _gated_backward(dx, x, gate):
    """From dx, the gradient of silu(gate) * x, in place, for nothing that a layer keeps is larger: `dx`
    becomes that product, `x` and `gate` their gradients."""
    silu = F.silu(gate)
    gate.copy_(torch.ops.aten.silu_backward(dx * x, gate))
    product = silu * x
    x.copy_(dx * silu)
    dx.copy_(product)


def compiled_kernels():
    """`Kernels` that are compiled. Decoding is fastest with one kernel for each shape, and a group's largest
    scale is found well only by a kernel made for its size; the others serve all shapes.

    Weights are read by them even where a caller asked for eager code (`torch.compiler.set_stance`), because
    in eager each temporary would be as large as the dense matrix.
    """
    decode_blocks, fake_blocks = compiled(_decode_blocks), compiled(_fake_blocks)

    def decode(tensors, global_scale, stored, dtype):
        with torch.compiler.set_stance("default"):
            return _decode(tensors, global_scale, stored, dtype, decode_blocks)

    def fake_quantize(weight, global_scale, dtype):
        with torch.compiler.set_stance("default"):
            return _fake_quantize(weight, global_scale, dtype, fake_blocks)

    return Kernels(
        decode, fake_quantize, compiled(codes.refit), torch.compile(_gated), torch.compile(_gated_backward),
        norms.compiled_kernels(), Elementwise(torch.compile(log_sum), torch.compile(become_gradient)),
        fp8.Kernels(*(partial(_any_length, compiled(kernel)) for kernel in fp8.Kernels())),
    )  # fmt: skip


def _any_length(kernel, x, *scale):
    """A kernel of `fp8.Kernels` for any number of rows."""
    return kernel(*any_length(x), *scale)


def _decode(tensors, global_scale, stored, dtype, decode_blocks=None):
    """The values of a packed weight: those of its codes, or `stored` ones."""
    rows = len(tensors["qdata"])
    parts = {name: tensors[name].view(-1, BLOCK // 2) for name in ("qdata", "more") if name in tensors}
    if not stored:
        parts.pop("more", None)
    parts["scale"] = tensors["scale"].view(-1, 1)
    return (decode_blocks or _decode_blocks)(parts, global_scale, dtype).view(dtype).view(rows, -1)


def _decode_blocks(parts, global_scale, dtype):
    """The numbers as `codes.pairs`: with half as many instructions as one by one."""
    return paired(*(half.to(dtype) for half in codes.stored(parts, global_scale, "more" in parts)))


def _fake_quantize(weight, global_scale, dtype, fake_blocks=None):
    """`nvfp4.fake_quantize`."""
    blocks = any_length(pairs(weight.view(-1, BLOCK)))
    found = (fake_blocks or _fake_blocks)(*blocks, global_scale, weight.dtype, dtype)
    return found.view(dtype).view_as(weight)


def _fake_blocks(weight, global_scale, stored, dtype):
    """The same of `pairs` in `stored`, as `pairs` in `dtype`."""
    qdata, scale = codes.encode(unpaired(weight, stored), 1 / global_scale)
    return paired(*(half.to(dtype) for half in codes.decode(qdata, scale, global_scale)))


EAGER = Kernels(
    _decode, _fake_quantize, codes.refit, _gated, _gated_backward, norms.EAGER, Elementwise(), fp8.Kernels()
)  # fmt: skip
