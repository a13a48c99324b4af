"""Ways to a better 4 bits that were tried, each alone: what `quality.py ideas` measures.

An idea is a kind of run like those of `quality.py`, with a few more settings; here is what they mean. Those
that store moments in another way are classes like those of `minifp4/storage.py`.
"""

from functools import partial, partialmethod

import torch

from minifp4 import chance, fp8, masters, nvfp4, optim, packed, storage
from minifp4.fused import codes
from minifp4.fused import update as fused
from minifp4.nvfp4 import BLOCK, DRAWS, E2M1_MAX, code_table, e2m1_code, in_units, pair
from minifp4.storage import new_scales, root_code


class Backward(fp8.FP8):
    """Products of the backward pass alone, so that the forward pass is as it was."""

    def rows(self, x):
        return (x,)

    def both(self, x, columns=True):
        return (x,), self.columns(x) if columns else fp8.absent(x)

    def gradient(self, dy):
        return fp8.FP8(self.kernels).gradient(dy)

    def multiply(self, a, b, dtype):
        return a[0] @ b[0].T if len(a) == 1 else super().multiply(a, b, dtype)


class FastSums(fp8.FP8):
    """All sums as the tensor cores make them."""

    def gradient(self, dy):
        return self.both(dy)


class ExactSums(fp8.FP8):
    """All sums in fp32."""

    def multiply(self, a, b, dtype):
        return super().multiply((*a[:2], True), b, dtype)


X2 = {"master": "nvfp4x2", "state": "nvfp4"}
SINGLE = {"master": "nvfp4", "state": "nvfp4"}
FP32 = {"master": "fp32", "state": "fp32"}
BF16 = {"master": "bf16", "state": "nvfp4"}
IDEAS = {
    "fp32 fp32": FP32,
    "bf16 nvfp4": BF16,
    "nvfp4x2 nvfp4": X2,
    "nvfp4 nvfp4": SINGLE,
    # the forward pass
    "fp32 fp32, four over six": FP32 | {"four_over_six": True},
    # products
    "nvfp4x2 nvfp4, products in FP8": X2 | {"fp8": fp8.FP8},
    "nvfp4x2 nvfp4, products in FP8, fast sums": X2 | {"fp8": FastSums},
    "nvfp4x2 nvfp4, products in FP8, exact sums": X2 | {"fp8": ExactSums},
    "nvfp4x2 nvfp4, products of gradients in FP8": X2 | {"fp8": Backward},
    # moments
    "bf16 int8": BF16 | {"state": "int8"},
    "nvfp4x2 int8": X2 | {"state": "int8"},
    "nvfp4x2 nvfp4, sqrt(v) in int8": X2 | {"state": "int8 root"},
    "bf16 nvfp4, m in int8": BF16 | {"state": "int8 m"},
    "bf16 nvfp4, sqrt(v) in int8": BF16 | {"state": "int8 root"},
    "bf16 nvfp4, 8 levels to nearest": BF16 | {"state": "eight levels"},
    "bf16 nvfp4, 16 levels to nearest": BF16 | {"state": "nearest root"},
    "bf16 nvfp4, 16 draws a block for sqrt(v)": BF16 | {"state": "own draws"},
    "bf16 nvfp4, sqrt(v) finer at the top": BF16 | {"state": "fine top"},
    "nvfp4x2 nvfp4, sqrt(v) finer at the top": X2 | {"state": "fine top"},
    "nvfp4 nvfp4, sqrt(v) finer at the top": SINGLE | {"state": "fine top"},
    "bf16 nvfp4, block scale of sqrt(v) upward": BF16 | {"state": "upward root"},
    "bf16 nvfp4, block scale of m to nearest": BF16 | {"state": "nearest scale"},
    "bf16 nvfp4, updates of at most 5 x lr": BF16 | {"limit": 5.0},
    "bf16 nvfp4, m relative to sqrt(v)": BF16 | {"relative": True},
    "nvfp4x2 nvfp4, m relative to sqrt(v)": X2 | {"relative": True},
    "nvfp4 nvfp4, m relative to sqrt(v)": SINGLE | {"relative": True},
    "bf16 nvfp4, moments of head, embedding, last layer int8": BF16 | {"ends_state": "int8"},
    "nvfp4x2 nvfp4, moments of head, embedding, last layer int8": X2 | {"ends_state": "int8"},
    # draws
    "bf16 nvfp4, new draws in each step": BF16 | {"new_draws": True},
    "nvfp4x2 nvfp4, new draws in each step": X2 | {"new_draws": True},
    "nvfp4 nvfp4, new draws in each step": SINGLE | {"new_draws": True},
    "bf16 nvfp4, moments' draws new in each step": BF16 | {"moments_turn": None},
    "bf16 nvfp4, moments' draws turn by .05": BF16 | {"moments_turn": 0.05},
    "bf16 nvfp4, moments' draws turn by .1": BF16 | {"moments_turn": 0.1},
    "nvfp4x2 nvfp4, moments' draws new in each step": X2 | {"moments_turn": None},
    "nvfp4 nvfp4, moments' draws new in each step": SINGLE | {"moments_turn": None},
    # what rounding a weight leaves over goes into m (ECO, Nikdan et al. 2026)
    "nvfp4x2 nvfp4, errors into m": X2 | {"state": "wide", "errors": 1.0},
    "nvfp4 nvfp4, errors into m": SINGLE | {"state": "wide", "errors": 1.0},
    "nvfp4 nvfp4, half of the errors into m": SINGLE | {"state": "wide", "errors": 0.5},
    # a weight's 8 bits as even places
    "8 even bits, nvfp4": FP32 | {"state": "nvfp4", "even": True},
    "8 even bits, sqrt(v) finer at the top": FP32 | {"state": "fine top", "even": True},
    "8 even bits, int8": FP32 | {"state": "int8", "even": True},
    # settings
    "nvfp4x2 nvfp4, head, embedding, last layer bf16": X2 | {"ends": "bf16"},
    "nvfp4x2 nvfp4, the same bf16, their moments int8": X2 | {"ends": "bf16", "ends_state": "int8"},
    "nvfp4x2 nvfp4, beta1 .95": X2 | {"beta1": 0.95},
    "fp32 fp32, beta1 .95": FP32 | {"beta1": 0.95},
    "nvfp4 nvfp4, beta1 .95": SINGLE | {"beta1": 0.95},
    "nvfp4 nvfp4, beta1 .98": SINGLE | {"beta1": 0.98},
    "nvfp4 nvfp4, beta2 .99": SINGLE | {"beta2": 0.99},
    "fp32 fp32, twice the lr": FP32 | {"lr": 2.0},
    "nvfp4x2 nvfp4, twice the lr": X2 | {"lr": 2.0},
    "nvfp4 nvfp4, twice the lr": SINGLE | {"lr": 2.0},
    "nvfp4 nvfp4, half of the lr": SINGLE | {"lr": 0.5},
    "nvfp4 nvfp4, lr falls all the time": SINGLE | {"down": 1.0},
    # fewer writes, of single nvfp4
    "nvfp4 nvfp4, four batches a step, twice the lr": SINGLE | {"accumulate": 4, "lr": 2.0},
    "nvfp4 nvfp4, four batches a step, 4 x the lr": SINGLE | {"accumulate": 4, "lr": 4.0},
    "nvfp4 nvfp4, a random quarter of the blocks, 4 x": SINGLE | {"state": "plain", "quarter": True},
    # scales and ends, of single nvfp4
    "nvfp4x2 nvfp4, middles at the start": X2 | {"middles": True},
    "nvfp4x2 nvfp4, block scales kept up to 6": X2 | {"keep": (2.9, 6.0)},
    "nvfp4x2 nvfp4, block scales kept from 5.4 to 6.6": X2 | {"keep": (5.4, 6.6)},
    "nvfp4 nvfp4, block scales kept from 4 on": SINGLE | {"keep": (4.0, 5.0)},
    "nvfp4 nvfp4, block scales kept from 5.5 on": SINGLE | {"keep": (5.5, 5.0)},
    "nvfp4 nvfp4, ends x2, twice the lr": SINGLE | {"finer_ends": True, "lr": 2.0},
    "nvfp4 nvfp4, global scale x 8": SINGLE | {"global_scale": 8.0},
    "nvfp4 nvfp4, weight decay by the global scale": SINGLE | {"decay": 0.0, "outside": True},
    "nvfp4 nvfp4, head, embedding, last layer x2": SINGLE | {"finer_ends": True},
}


class Plain(storage.NVFP4Moment):
    """NVFP4 moments that the wing does not know, so that the update is the plain one."""


class Wide(Plain):
    """Moments whose rows are scaled by what they hold, which `bounds` of gradients do not say."""

    def encode(self, x, rows, bits=None, bound=None):
        return super().encode(x, rows, bits, x.abs().amax(1, keepdim=True))


class Variant(storage.NVFP4Moment):
    """sqrt(v) with other codes or another rounding; the other moment as usual."""

    of_roots, upward = True, False  # upward: block scales that cut nothing

    def encode(self, x, rows, bits=None, bound=None):
        if self.positive != self.of_roots:
            return super().encode(x, rows, bits, bound)
        scale, encode_scale, row_scale = new_scales(x, bound, E2M1_MAX, self.upward, never_zero=self.positive)
        y = in_units(x.unflatten(-1, (-1, BLOCK)), scale, encode_scale).flatten(-2)
        return {"qdata": pair(self.code(y, bits)), "scale": scale, "row_scale": row_scale}


class EightLevels(Variant):
    """8 levels from 1/2 to 6, rounded to nearest: the upper half of the 16."""

    least = 8

    def code(self, y, bits):
        return root_code(y.clamp(min=0.5))


class NearestRoot(Variant):
    """Rounded to nearest."""

    def code(self, y, bits):
        return root_code(y)


class OwnDraws(Variant):
    """A draw for each number."""

    def code(self, y, bits):
        return root_code(y, bits)


class FineTop(Variant):
    """Four levels an octave down to a sixth of the largest number, one an octave below."""

    roots = code_table([1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6])

    def code(self, y, bits):
        octaves = y.clamp(1 / 32, E2M1_MAX).view(torch.int32) - (127 << 23)  # above 1, 23 bits each
        fine = torch.maximum(octaves >> 1, octaves << 1) + (5 << DRAWS)  # a code is 22 bits long
        return root_code((fine + (122 << 23)).view(torch.float32), storage.shared(bits))  # on its ruler


class EvenPlaces(storage.Float):
    """Weights in places of a twentieth of their block's scale, from -127 to 127: as many bits as nvfp4x2 has,
    whose places are four times closer at 0 than at 6. Here they lie in fp32 and are read as that."""

    def encode(self, x, rows, bits=None, bound=None):
        x = x.unflatten(-1, (-1, BLOCK))
        unit = nvfp4.block_scale(x.abs().amax(-1), 2.0**11).float().clamp(min=2.0**-9) * (2.0**-11 / 20)
        share = 0.5 if bits is None else chance.uniform(bits).view_as(x)
        place = (x / unit.unsqueeze(-1) + share).floor().clamp(-127, 127)
        return {"data": (place * unit.unsqueeze(-1)).flatten(-2)}


class UpwardRoot(Variant):
    upward = True

    def code(self, y, bits):
        return root_code(y, storage.shared(bits))


class NearestScale(Variant):
    """Block scales of m to nearest: 6.37 is cut to 6."""

    of_roots = False

    def code(self, y, bits):
        return e2m1_code(y, bits)


def mixed(m, root):
    """A kind of moments of which m is stored in one way and sqrt(v) in another."""
    return lambda shape, device, positive: (root if positive else m)(shape, device, positive)


KINDS = {
    "int8 m": mixed(storage.Int8Moment, storage.NVFP4Moment),
    "int8 root": mixed(storage.NVFP4Moment, storage.Int8Moment),
    "plain": Plain, "wide": Wide, "eight levels": EightLevels, "nearest root": NearestRoot,
    "own draws": OwnDraws, "upward root": UpwardRoot, "nearest scale": NearestScale,
    "fine top": FineTop,
}  # fmt: skip


def apply(how):
    """What is to be changed before an optimizer is made, in a process that runs this idea alone."""
    storage.KINDS.update(KINDS)
    if "keep" in how:
        packed.KEPT_FROM, packed.KEPT_TO = codes.KEPT_FROM, codes.KEPT_TO = how["keep"]
    if "limit" in how:
        optim.MAX_UPDATE = how["limit"]
        fused.LIMIT = torch.tensor(how["limit"]).view(torch.int32).item()
    if "ends_state" in how:
        optim.AdamW._parts = partialmethod(parts_of, optim.AdamW._parts, how["ends_state"])
    if how.get("new_draws"):
        optim.rounding_key = new_key
    if "moments_turn" in how:
        optim.rounding_key = partial(other_key, how["moments_turn"])
    if how.get("even"):  # matrices; a norm's weights are one row
        optim.master = lambda weight: (EvenPlaces if len(weight) > 1 else storage.Float)(weight)
    if how.get("relative"):
        optim.adamw = fused.adamw = partial(relative, optim.adamw)
    if how.get("middles"):
        masters.pack = partial(with_middles, masters.pack)
    if "errors" in how:
        optim.update = partial(errors_into_m, how["errors"])
    if how.get("quarter"):
        optim.adamw = partial(quarter, optim.adamw)


def parts_of(optimizer, plain, state, name, p):
    """`AdamW._parts` with other moments for head, embedding and last layer."""
    layers = {other.split(".")[2] for other in optimizer.parameters if ".layers." in other}
    ends = masters.ends(len(layers))
    kept, optimizer.state = optimizer.state, state if name.startswith(ends) else optimizer.state
    try:
        return plain(optimizer, name, p)
    finally:
        optimizer.state = kept


def new_key(seed, step, name):
    """Draws that have nothing to do with those of the step before."""
    return chance.rounding_key(0, 0, f"{seed}/{step}/{name}")


def other_key(turn, seed, step, name):
    """Draws whose upper ten bits, the first ones of a moment's, turn by another part of the circle, or by a
    random one in each step."""
    start, turned = chance.rounding_key(seed, step, name)
    upper = new_key(seed, step, name)[0] if turn is None else int(step * turn * 2**32)
    return start, ((upper & 2**32 - 2**22 | turned & 2**22 - 1) + 2**31) % 2**32 - 2**31


def relative(adamw, w, g, m, root, hyper, limited=optim.limited):
    """AdamW whose m is kept divided by sqrt(v): the update itself, of the same size everywhere."""
    u, mean, root = adamw(w, g, m * root, root, hyper, limited)
    if isinstance(w, float):  # what bounds a row: |m| is at most about 1.2 sqrt(v)
        return u, torch.full_like(root, 1.0), root
    inverse = (root.square() + nvfp4.FP32_MIN).rsqrt()
    return u, mean * inverse, root


def with_middles(pack, weight, global_scale, finer):
    """`packed.pack` that rounds to the nearest place, whichever code that is read as."""
    new = pack(weight, global_scale, finer)
    if finer and not isinstance(weight, packed.Packed):
        new.store(weight.detach().float())
    return new


def errors_into_m(part, stores, rows, grad, survey, bits, hyper, ok, movement):
    """`optim.update` that puts `part` of what is not stored in a weight into its m, which asks for it again:
    if m were exact, a weight and what m owes it would together move as an exact weight does."""
    ok = ok & survey.squares.isfinite()
    w, m, root = (store.read(rows) for store in stores)
    u, m, root = optim.adamw(w, grad.float(), m, root, hyper)
    wanted, new = w - hyper.lr * u, [None] * 3
    new[0] = stores[0].encode(wanted, rows, bits)
    storage.write(stores[0], rows, new[0], ok)
    left = (wanted - stores[0].read(rows)) * (root * hyper.root_gain + hyper.eps) / hyper.lr
    m = m - part * (1 / hyper.beta1 - 1) * left
    for number, moment in ((1, m), (2, root)):
        new[number] = stores[number].encode(moment, rows, bits >> 10)
        storage.write(stores[number], rows, new[number], ok)
    along = (w - stores[0].read(rows)) * torch.ones_like(u).copysign(u)
    movement += torch.where(ok, torch.stack([hyper.lr * u.abs().sum(), along.sum()]), 0.0).unsqueeze(1)


def quarter(adamw, w, g, m, root, hyper, limited=optim.limited):
    """Each step moves a quarter of the blocks, four times as far."""
    u, m, root = adamw(w, g, m, root, hyper, limited)
    if isinstance(w, float) or w.shape[-1] % BLOCK or len(w) == 1:
        return u, m, root
    chosen = torch.rand(*w.shape[:-1], w.shape[-1] // BLOCK, device=w.device) < 0.25
    return u * 4 * chosen.repeat_interleave(BLOCK, -1), m, root


def change_weights(model, how):
    """What is to be changed in a new model."""
    if "fp8" in how:
        fp8.use(model, how["fp8"])
    if kind := how.get("ends"):
        masters.choose_trained(model, lm_head=True, embed=True, last_layers=1)
        masters.set_masters(model, kind)
        masters.choose_trained(model, lm_head=True, embed=True)
    if factor := how.get("global_scale"):
        for layer in [*model.linears(), model.model.embed_tokens]:
            layer.weight.scale.copy_(layer.weight.scale.float() / factor)
            layer.weight.global_scale.mul_(factor)


def change(model, how):
    """What is to be changed in the model that trains."""
    for layer in model.linears() if how.get("four_over_six") else ():
        layer.value = partial(four_over_six, layer)


def four_over_six(layer, dtype, rows=slice(None)):
    """What a 4-bit product makes of a weight if each block's largest number lands on 6 or on 4, whichever
    leaves the smaller error: 4 leaves a finer step at the top. In the place of `Linear.value`."""
    x, scale, tries = layer.weight.detach()[rows].float(), layer.group.global_scale(), []
    blocks = x.unflatten(-1, (-1, nvfp4.BLOCK))
    for top in (6.0, 4.0):
        scales = nvfp4.block_scale(blocks.abs().amax(-1) * (6.0 / top), 1 / scale)
        qdata, _ = nvfp4.encode(x, 1 / scale, scale=scales)
        tries.append(nvfp4.decode(qdata, scales, scale).view_as(blocks))
    errors = [(one - blocks).square().sum(-1, keepdim=True) for one in tries]
    return torch.where(errors[0] <= errors[1], *tries).flatten(-2).to(dtype)


def after_step(model, how, lr):
    """What is to be changed after each step."""
    if how.get("outside"):  # weight decay that rounds nothing
        scales = {p.global_scale for p in model.parameters() if isinstance(p, packed.Packed)}
        for scale in scales:
            scale.mul_(1 - 0.1 * lr)
