"""The update of `optim.py` and the storages of `storage.py` as one kernel for each matrix: the same bits.

A GPU computes in blocks of 16 what fits into its registers, and takes a number from memory once. So here a
storage does not read rows. It hands out `parts`, views of its memory with one block of 16 in each row, and
between `values` (read) and `encoded` (to be written) lies arithmetic that a compiler makes one kernel of.
Everything is in `codes.halves`: the even and the odd columns side by side.

A storage of a kind that is not known here (`TWINS`) trains all the same, by `optim.update`.
"""

from typing import NamedTuple

import torch

from ..chance import hashed, stochastic_cast, uniform
from ..nvfp4 import BLOCK, E2M1_MAX, E4M3_MAX, FP32_MAX, row_chunks
from ..optim import MAX_UPDATE, Hyper, Survey, adamw
from ..storage import E4M3_MIN, ROOT, Float, Int8Moment, NVFP4Moment, Weight
from . import codes
from .codes import RANDOM, SIX, e4m3_byte, in_blocks, inverse_scale, paired, pairs, raw, scaled, unpaired
from .compiled import any_length, compiled

LEAST_ROOT, LIMIT = torch.tensor([ROOT[0], MAX_UPDATE]).view(torch.int32).tolist()  # their bits in fp32
LAUNCH = 2**25  # weights that one kernel updates, at most: more are no faster, and `MomentTwin.of_blocks`
# is exact up to twice as many.
# For the compiler, which would split `update`, and check in it that every block's row exists.
ONE_KERNEL = {
    "max_fusion_size": 512, "score_fusion_memory_threshold": 1, "realize_opcount_threshold": 100,
    "assert_indirect_indexing": False,
}  # fmt: skip
A_BLOCK_A_THREAD = {"XBLOCK": 128, "num_warps": 4}  # so that threads exchange nothing


class Gradient(NamedTuple):
    """Some rows of a gradient."""

    data: torch.Tensor  # one block a row, as `codes.pairs`
    dtype: torch.dtype
    largest: torch.Tensor  # magnitude in each row, [rows, 1]
    squares: torch.Tensor  # their sum in the whole matrix, []


class Draw(NamedTuple):
    """What the random bits derive from."""

    key: torch.Tensor  # int32 [2]
    first: torch.Tensor  # the number of the first element in the whole matrix, int32 []


class FloatTwin:
    """`storage.Float` on halves."""

    def __init__(self, store):
        self.tensors, self.dtype = store.tensors, store.tensors["data"].dtype

    def rows(self, rows):
        return {"data": pairs(one_block_a_row(self.tensors["data"][rows]))}

    def bound(self, parts):
        return None

    def values(self, parts):
        return unpaired(parts["data"], self.dtype)

    def encoded(self, x, old, bits=None, bound=None):
        if bits is not None and self.dtype != torch.float32:
            x = [stochastic_cast(half, self.dtype, drawn) for half, drawn in zip(x, bits)]
        return {"data": paired(*(half.to(self.dtype) for half in x))}


class WeightTwin:
    """`storage.Weight` on halves."""

    def __init__(self, store):
        self.tensors, self.global_scale = store.tensors, store.weight.global_scale
        self.finer = "more" in self.tensors

    def rows(self, rows):
        return {name: flat(tensor[rows]) for name, tensor in self.tensors.items()}

    def bound(self, parts):
        return None

    def values(self, parts):
        return codes.stored(parts, self.global_scale, self.finer)

    def encoded(self, x, old, bits=None, bound=None):
        block_bits = None
        if bits is not None:  # bits of its first two numbers that their codes do not use
            even, odd = (half.narrow(1, 0, 1) for half in bits)
            block_bits = even >> 10 ^ odd
        return codes.encoded(old, self.global_scale, self.finer, x, bits, block_bits)


class MomentTwin:
    """`storage.NVFP4Moment` and `Int8Moment` on halves."""

    def __init__(self, store):
        self.tensors, self.positive = store.tensors, store.positive
        device = self.tensors["scale"].device
        self.bits8 = isinstance(store, Int8Moment)
        self.most = store.most if self.bits8 else E2M1_MAX
        # A tensor, so that one kernel serves rows of all lengths.
        self.rows_a_block = 1 / torch.tensor(float(self.tensors["scale"].shape[1]), device=device)

    def rows(self, rows):
        parts = {name: tensor[rows] for name, tensor in self.tensors.items()}
        return parts | {name: flat(parts[name]) for name in ("qdata", "scale")}

    def bound(self, parts):
        return parts["row_scale"] * (self.most * E4M3_MAX / 2)

    def of_blocks(self, x, parts):
        """A number for each row, [rows, 1] -> one for each block of `parts`, [blocks, 1].

        A block's row is its number times the rows a block, rounded down. Half a block is added, more than the
        product's rounding is off for the blocks of one launch.
        """
        blocks = torch.arange(len(parts["scale"]), dtype=torch.int32, device=x.device)
        return x.index_select(0, ((blocks + 0.5) * self.rows_a_block).int())

    def values(self, parts):
        scales = parts["scale"], self.of_blocks(parts["row_scale"], parts)
        if not self.bits8 and not self.positive:
            return codes.decode(parts["qdata"], *scales)
        numbers = parts["qdata"].to(torch.int32)
        if not self.bits8:  # a code's bits are the last three of the exponent and the first of the mantissa
            bits = ((numbers & 15) << 22) + LEAST_ROOT, ((numbers & 15 << 4) << 18) + LEAST_ROOT
            return scaled([half.view(torch.float32) for half in bits], *scales)
        if self.positive:
            numbers = numbers & 0xFF, numbers >> 8 & 0xFF
        else:
            numbers = numbers << 24 >> 24, numbers >> 8  # with the sign
        return scaled([half.float() for half in numbers], *scales)

    def encoded(self, x, old, bits=None, bound=None):
        row_scale = bound * (2 / (self.most * E4M3_MAX))
        encode_scale = self.of_blocks((1 / row_scale).clamp(max=FP32_MAX), old)
        if self.bits8:
            qdata, scale = self._encode8(x, encode_scale, None if self.positive else bits)
        elif self.positive:
            qdata, scale = self._encode_root(x, encode_scale, bits)
        else:
            qdata, scale = codes.encode(x, encode_scale, bits)
        return {"qdata": qdata, "scale": scale, "row_scale": row_scale}

    def _encode_root(self, x, encode_scale, bits):
        y, scale = self._in_units(x, encode_scale, upward=False)
        # From a code to the next is one step of bit 22. Add half of one, and by chance up to as much more or
        # less (`bits >> 10` has a sign); then cut off what is below.
        y = [(half.view(torch.int32) - LEAST_ROOT).clamp(0, SIX - LEAST_ROOT) + RANDOM // 2 for half in y]
        if bits is not None:
            first = bits[0].narrow(1, 0, 1)  # as `storage.shared`
            y = [half + drawn for half, drawn in zip(y, (first, ~first))]
        even, odd = (half >> 22 for half in y)
        return (even | odd << 4).to(torch.uint8), e4m3_byte(scale)

    def _encode8(self, x, encode_scale, bits):
        y, scale = self._in_units(x, encode_scale, upward=True)
        if bits is None:
            y = [half.round() for half in y]
        else:
            y = [(half + uniform(drawn)).floor() for half, drawn in zip(y, bits)]
        least = 1 if self.positive else -self.most
        even, odd = (half.clamp(least, self.most).to(torch.int32) for half in y)
        return (even & 0xFF | odd << 8).to(torch.int16), e4m3_byte(scale)

    def _in_units(self, x, encode_scale, upward):
        """(the halves `x` in units of their blocks' new scales, which are above 0; these scales)"""
        x = in_blocks(x)
        scale = codes.block_scale(codes.block_amax(x, self.positive), encode_scale, upward, self.most)
        scale = scale.clamp(min=E4M3_MIN)
        inverse = inverse_scale(scale, encode_scale)
        return [(half * inverse).flatten(-2) for half in x], scale


def limited(u):
    """`optim.limited`: comparing the bits of magnitudes takes fewer instructions."""
    return codes.limited(u, LIMIT).view(torch.float32).copysign(u)


TWINS = {Float: FloatTwin, Weight: WeightTwin, NVFP4Moment: MomentTwin, Int8Moment: MomentTwin}


def update(stores, parts, gradient, draw, hyper, ok, requested, stored):
    """`optim.update` on some rows of a matrix, in place.

    stores, parts: the twins of w, m and sqrt(v), and these rows of their tensors.
    draw: None rounds to nearest. hyper: fp32 [7], the fields of `Hyper`.
    requested, stored: fp32 [blocks]; the two movements are added here. Their sums are left to the caller: a
    compiler would split them into as many parts as suit the first matrix, and use those for the head too.
    """
    hyper, ok = Hyper(*hyper.unbind()), ok & gradient.squares.isfinite()
    g = unpaired(gradient.data, gradient.dtype)
    weight, mean, root = (store.values(part) for store, part in zip(stores, parts))
    old = [store.bound(part) for store, part in zip(stores[1:], parts[1:])]
    bounds = (None, None) if old[0] is None else adamw(0.0, gradient.largest, *old, hyper)[1:]
    way, mean, root = zip(*[adamw(*half, hyper, limited) for half in zip(weight, g, mean, root)])
    bits = mean_bits = None
    if draw is not None:  # one draw serves both: w its lower 22 bits, m its upper 22
        bits = random_halves(draw, g[0].shape)
        mean_bits = [half >> 10 for half in bits]
    new = [
        stores[0].encoded([w - hyper.lr * half for w, half in zip(weight, way)], parts[0], bits),
        stores[1].encoded(mean, parts[1], mean_bits, bounds[0]),
        stores[2].encoded(root, parts[2], mean_bits, bounds[1]),
    ]
    now = stores[0].values(new[0])
    along = [(w - s) * torch.ones_like(w).copysign(half) for s, w, half in zip(now, weight, way)]
    for part, tensors in zip(parts, new):
        for name, value in tensors.items():
            part[name].copy_(torch.where(ok, value, part[name]))
    requested += torch.where(ok, hyper.lr * (way[0].abs() + way[1].abs()).sum(-1), 0.0)
    stored += torch.where(ok, (along[0] + along[1]).sum(-1), 0.0)


def survey(grad, squares, dtype):
    """(largest magnitude in each row [rows, 1], sum of squares []) of a gradient, given as `pairs`, fp32.

    The sum is also added to `squares`.
    """
    even, odd = unpaired(grad, dtype)
    total = (even.square() + odd.square()).sum(1).sum()
    squares += total
    bits = torch.maximum(codes.magnitude_bits(even), codes.magnitude_bits(odd))
    return bits.amax(1, keepdim=True).view(torch.float32), total


def random_halves(draw, shape):
    """`chance.random_bits` as halves [rows, K/2]; a row is a block of 16."""
    rows, half = shape
    device = draw.first.device
    even = 2 * torch.arange(half, dtype=torch.int32, device=device)
    starts = draw.first + 2 * half * torch.arange(rows, dtype=torch.int32, device=device).unsqueeze(1)
    start, turned = draw.key.unbind()
    u = hashed(starts ^ start)
    v = hashed(u)
    u = u + turned
    return u + even * v, u + (even + 1) * v


def one_block_a_row(x):
    """[rows, K] -> [blocks, 16]; as it is if K is no multiple of 16."""
    return x.view(-1, BLOCK) if x.shape[1] % BLOCK == 0 else x


def flat(x):
    """Codes [rows, K/2] -> [blocks, 8], scales [rows, K/16] -> bytes [blocks, 1]."""
    return raw(x).view(-1, 1) if x.dtype == torch.float8_e4m3fn else x.view(-1, BLOCK // 2)


class Update:
    """What `layers.fuse` puts into an `AdamW`: `survey`, `chunks` and `update_rows` in compiled code."""

    def __init__(self, optimizer):
        self.optimizer, self.plain = optimizer, optimizer.update_rows
        self.twins = {}
        for part in optimizer.all_parts():
            if all(type(store) in TWINS for store in part.stores):
                twins = [TWINS[type(store)](store) for store in part.stores]
                if isinstance(twins[1], MomentTwin):  # one tensor, so that a kernel finds rows once for both
                    twins[2].rows_a_block = twins[1].rows_a_block
                self.twins[part.name, part.rows.start] = twins
        self._update = compiled(update, ONE_KERNEL, A_BLOCK_A_THREAD)
        self._survey = compiled(survey)

    def unknown(self):
        """The kinds of storage that have no kernel, by name."""
        kinds = {type(store) for part in self.optimizer.all_parts() for store in part.stores}
        return sorted(kind.__name__ for kind in kinds - TWINS.keys())

    def survey(self, grad):
        return Survey(*self._survey(pairs(grad), self.optimizer.squares, grad.dtype))

    def chunks(self, grad):
        """The rows for one kernel."""
        return row_chunks(grad, self.optimizer.chunk_rows or max(1, LAUNCH // grad.shape[1]))

    def update_rows(self, part, rows, grad, survey, hyper, ok):
        optimizer, stores = self.optimizer, self.twins.get((part.name, part.rows.start))
        if stores is None:
            self.plain(part, rows, grad, survey, hyper, ok)
            return
        parts = [store.rows(rows) for store in stores]
        gradient = Gradient(pairs(one_block_a_row(grad)), grad.dtype, *survey)
        movement = self._movement(len(gradient.data))
        kept = (tensor for part in parts for tensor in part.values())
        any_length(gradient.data, gradient.largest, *movement, *kept)
        number = part.rows.start + rows.start
        first = optimizer.zero + number * grad.shape[1] if number else optimizer.zero
        draw = Draw(optimizer.key(part.name), first) if optimizer.stochastic else None
        self._update(stores, parts, gradient, draw, hyper, ok, *movement)

    def _movement(self, blocks):
        """Where to add up the movement of so many blocks."""
        optimizer = self.optimizer
        more = -(-blocks // 64) * 64 - optimizer.movement.shape[1]  # both rows begin where kernels like it
        if more > 0:
            optimizer.movement = torch.nn.functional.pad(optimizer.movement, (0, more))
        return optimizer.movement[:, :blocks].unbind()


def fuse_optimizer(optimizer):
    """Let `optimizer` update by compiled code; prints a line for storages that have none."""
    fused = Update(optimizer)
    optimizer.survey, optimizer.chunks, optimizer.update_rows = fused.survey, fused.chunks, fused.update_rows
    optimizer.movement = torch.zeros(2, 64, device=optimizer.movement.device)  # by block of 16 in a chunk
    optimizer.uncounted = optimizer.movement.clone(), optimizer.squares.clone()
    if fused.unknown():
        print(f"note    {', '.join(fused.unknown())} has no kernel: its updates run uncompiled")
