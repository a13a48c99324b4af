"""The wing against the reference: the same bits, eagerly and compiled, for every kind of number."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, small_model
from test_nvfp4 import e4m3
from test_optim import MASTERS, Log8
from torch import nn
from torch._inductor.utils import fresh_cache, run_and_get_code

import minifp4
from minifp4 import AdamW, fp8, linear, masters, nvfp4, packed, storage
from minifp4.files.atomic import bits
from minifp4.fused import codes, fuse, layers, update
from minifp4.step import Step

IDS = torch.arange(24).view(2, 12) * 7
ROUNDINGS = "nearest", "stochastic"


def data(kind):
    """Numbers [32, 256] of one kind."""
    normal = torch.randn(32, 256, generator=torch.Generator().manual_seed(3)) * 0.02
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6]).repeat(32, 32) / 64
    return {
        "normal": normal,
        "spread": normal * torch.logspace(-9, 2, 32).unsqueeze(1),
        "zero": normal * 0,
        "tiny": normal.sign() * 1e-42,
        "huge": normal.clamp(-0.02, 0.02) * 1e40,
        "ties": ties * normal.sign(),
        "nan": torch.where(normal > 0.06, math.nan, normal),
    }[kind]


def drawn(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31 - 1, shape, generator=generator).to(torch.int32)


def same(a, b):
    """Equal in all bits; NaN of the same places counts as equal."""
    return torch.equal(bits(torch.nan_to_num(a.float(), 7e7)), bits(torch.nan_to_num(b.float(), 7e7)))


def test_every_code_times_every_scale():
    """NaN and minus zero included, and scales of either sign."""
    qdata = torch.arange(256, dtype=torch.uint8).view(32, 8).repeat(256, 1)
    scale = torch.arange(256, dtype=torch.uint8).repeat_interleave(32).view(-1, 1)
    expected = nvfp4.decode(qdata, scale.view(torch.float8_e4m3fn), torch.tensor(0.25))
    assert same(codes.joined(*codes.decode(qdata, scale, torch.tensor(0.25))), expected)


def test_every_place_of_nvfp4x2():
    qdata, more = torch.meshgrid(*[torch.arange(256, dtype=torch.uint8)] * 2, indexing="ij")
    q = minifp4.NVFP4(qdata, torch.ones(256, 32).to(torch.float8_e4m3fn), torch.tensor(0.5))
    weight = packed.Packed(q, more.contiguous())
    parts = {name: codes.raw(tensor) for name, tensor in weight.tensors().items() if tensor.dim()}
    found = codes.joined(*codes.stored(parts, weight.global_scale, True))
    there = [(code % 8 > 0) | (further >= 8) for code, further in zip(halves(qdata), halves(more))]
    there = (there[0] & there[1]).repeat_interleave(2, -1)  # nothing is stored below place 0
    assert same(found[there], weight.stored()[there]) and there.sum() == 2 * 240 * 240


def halves(byte):
    return byte % 16, byte // 16


def test_scales_are_rounded_as_torch_rounds_them():
    """Every E4M3 number, the middle between each two, and one fp32 step to either side of it."""
    numbers = torch.tensor([e4m3(byte) for byte in range(127)])
    ties = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, ties, ties.nextafter(torch.tensor(0.0)), ties.nextafter(torch.tensor(448.0))])
    theirs = x.to(torch.float8_e4m3fn)
    _, nearest, _ = codes.nearest_e4m3(x)
    assert torch.equal(nearest, theirs.float())
    assert torch.equal(codes.e4m3_byte(nearest), theirs.view(torch.uint8))
    _, _, gap = codes.nearest_e4m3(ties)
    assert torch.equal(gap, numbers.diff())
    amax = torch.tensor([449.0, 1e30, math.inf, math.nan])
    assert codes.e4m3_byte(codes.block_scale(amax, 1.0, most=1)).tolist() == [126, 126, 127, 127]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_encoding_gives_the_same_bits(rounding):
    """On all kinds of numbers; where a block holds NaN, its scale is NaN and its codes mean nothing. Compiled
    too: the arithmetic is IEEE's, without fused multiply-adds, so a compiler has no freedom on a CPU."""
    compiled = torch.compile(codes.encode)
    for kind in ("normal", "spread", "zero", "tiny", "huge", "ties", "nan"):
        x = data(kind)
        random = drawn(x.shape) if rounding == "stochastic" else None
        random_halves = None if random is None else codes.halves(random)
        qdata, scale = nvfp4.encode(x, torch.tensor(64.0), random)
        meant = scale.float().isfinite().repeat_interleave(8, 1)
        for encode in (codes.encode, compiled):
            found = encode(codes.halves(x), torch.tensor(64.0), random_halves)
            assert torch.equal(found[0][meant], qdata[meant]), kind
            assert torch.equal(found[1], codes.raw(scale)), kind
    assert not meant.all()  # of "nan"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reading_weights_gives_the_same_bits(dtype):
    head, x = small_model().lm_head, data("normal")
    weight, scale = head.weight.detach().to(dtype), head.group.global_scale()
    expected = nvfp4.fake_quantize(weight, scale, dtype)
    assert torch.equal(layers.EAGER.fake_quantize(weight, scale, dtype), expected)
    finer = packed.pack(x, nvfp4.weight_global_scale(x), True)
    tensors = {name: codes.raw(tensor) for name, tensor in finer.tensors().items() if tensor.dim()}
    for stored, values in ((False, finer.decode()), (True, finer.stored())):
        found = layers.EAGER.decode(tensors, finer.global_scale, stored, dtype)
        assert found.dtype == dtype and torch.equal(found, values.to(dtype))


@pytest.mark.filterwarnings("ignore:bf16 and fp16 are mixed")  # the compiler's note to itself
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_read_by_compiled_code_even_in_eager(dtype, monkeypatch):
    """train.py answers in eager, texts of any length; a large head with its temporaries takes gigabytes."""
    head, compiled = small_model().lm_head, []
    weight, scale = head.weight.detach().to(dtype), head.group.global_scale()
    q = nvfp4.quantize(weight, global_scale=scale)

    def spied(*args, decode=layers._decode_blocks):
        compiled.append(torch.compiler.is_compiling())
        return decode(*args)

    monkeypatch.setattr(layers, "_decode_blocks", spied)
    kernels = layers.compiled_kernels()
    with torch.compiler.set_stance("force_eager"):
        tensors = {"qdata": q.qdata, "scale": codes.raw(q.scale)}
        found = kernels.decode(tensors, scale, False, dtype), kernels.fake_quantize(weight, scale, dtype)
    assert compiled == [True]
    assert all(torch.equal(value, nvfp4.dequantize(q, dtype)) for value in found)


def trained(kind, state, rounding, wing, chunk_rows=0, columns=208):
    """(all stored bytes, moved) after five steps: small, growing and shrinking ones, and one that is not ok.

    wing: "plain"; "eager", the wing's update as it is; or "compiled".
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, columns, generator=generator) * torch.logspace(-4, 0, 24).unsqueeze(1)
    weight = nn.Parameter(MASTERS[kind](x))
    weight.grad_dtype = torch.bfloat16
    optimizer = AdamW([("w", weight)], state=state, rounding=rounding)
    optimizer.chunk_rows = chunk_rows
    if wing != "plain":
        update.fuse_optimizer(optimizer)
    for number, (lr, size) in enumerate([(1e-3, 1.0), (0.3, 1.0), (1e-2, 1e-9), (0.3, -1.0), (1e-2, 1e6)]):
        towards = packed.stored_values(weight).float() * -size  # grows, or shrinks
        weight.grad = (towards + 1e-3 * torch.randn(24, columns, generator=generator)).bfloat16()
        optimizer.lr = lr
        optimizer.step(ok=torch.tensor(number != 2))
    stored = [tensor for store in optimizer.parts["w"][0].stores for tensor in store.tensors.values()]
    return torch.cat([bits(tensor) for tensor in stored]), optimizer.moved()


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("state", storage.KINDS)
@pytest.mark.parametrize("kind", MASTERS)
def test_the_fused_update_stores_the_same_bits(kind, state, rounding, monkeypatch):
    """All masters, states and roundings; the plain one in pieces of 1, 7 and all rows, the fused one too."""
    monkeypatch.setattr(update, "compiled", lambda function, *how: function)
    found = [trained(kind, state, rounding, "plain", rows) for rows in (0, 1, 7)]
    found += [trained(kind, state, rounding, "eager", rows) for rows in (0, 7)]
    for stored, moved in found[1:]:
        assert torch.equal(stored, found[0][0]) and moved == pytest.approx(found[0][1], rel=1e-5)


@pytest.mark.parametrize("kind, state", [("bf16", "int8"), ("nvfp4x2", "nvfp4")])
def test_on_a_cpu_a_compiled_update_stores_the_same_bits(kind, state, long):
    """Not on a GPU; `fused/compiled.py` says why."""
    if kind == "bf16" and not long:
        pytest.skip("compiles for a quarter of a minute: --long")
    plain, moved = trained(kind, state, "stochastic", "plain")
    fused, also = trained(kind, state, "stochastic", "compiled")
    assert torch.equal(plain, fused) and moved == pytest.approx(also, rel=1e-5)


@pytest.mark.parametrize("columns", [16, 256])
def test_moments_find_the_scale_of_their_row(columns):
    x = torch.logspace(-6, 6, 64).unsqueeze(1) * torch.ones(64, columns)
    for kind in ("int8", "nvfp4"):
        store = storage.zeros(kind, x.shape, "cpu", positive=True)
        new = store.encode(x, slice(None), None, x[:, :1])
        storage.write(store, slice(None), new, torch.tensor(True))
        twin = update.MomentTwin(store)
        found = codes.joined(*twin.values(twin.rows(slice(8, 40)))).view(-1, columns)
        assert torch.equal(found, store.read(slice(8, 40)))


def test_each_block_finds_its_row():
    """In fp32, up to the last block of a launch and beyond it."""
    blocks = torch.arange(2 * update.LAUNCH // 16, dtype=torch.int32)
    for k in (16, 48, 2560, 9728, 25600, 2**16):
        twin = update.MomentTwin(storage.zeros("nvfp4", (1, k), "cpu"))
        found = ((blocks + 0.5) * twin.rows_a_block).int()
        assert torch.equal(found, blocks // (k // 16))


def test_refit_gives_the_same_bits():
    """Where a block scale nears the end of its range, and where none does; a NaN stays one."""
    for growth in (1, 3):
        plain, fused = (MASTERS["nvfp4"](data("spread")) for _ in range(2))
        for weight in (plain, fused):
            weight.store(weight.stored() * growth)
            weight.scale.view(torch.uint8)[0, 0] = 0x7F
        packed.refit([plain])
        codes.refit([codes.raw(fused.scale)], [fused.global_scale])
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(plain.nvfp4(), fused.nvfp4()))


def fused_twins(kind, monkeypatch, checkpointing=False, quantize=True, in_fp8=False):
    """Two equal models of which one has the wing's functions, uncompiled, and their optimizers."""
    monkeypatch.setattr(update, "compiled", lambda function, *how: function)
    twins = []
    for _ in range(2):
        model = small_model(quantize)
        masters.set_masters(model, kind)
        if in_fp8:
            fp8.use(model)
        model.model.activation_checkpointing = checkpointing
        twins.append((model, AdamW(model.named_parameters(), lr=1e-2, state="nvfp4")))
    fuse(*twins[1], kernels=layers.EAGER)
    return twins


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("quantize", [True, False], ids=["", "no-quantize"])
@pytest.mark.parametrize("kind", ["fp32", "nvfp4x2"])
@pytest.mark.parametrize("product", ["full", "fp8"])
def test_a_fused_model_trains_the_same_bits(product, kind, quantize, checkpointing, monkeypatch):
    """Three whole steps in fp32: blocks, norms, rotary positions, SwiGLU, the loss, the update, refit."""
    stored, losses = [], []
    for model, optimizer in fused_twins(kind, monkeypatch, checkpointing, quantize, product == "fp8"):
        step = Step(model, optimizer, in_backward=True)
        losses.append([step([(IDS + number, IDS + number)])[0].item() for number in range(3)])
        stores = [store for part in optimizer.all_parts() for store in part.stores]
        stored.append(torch.cat([bits(t) for store in stores for t in store.tensors.values()]))
    assert losses[0] == losses[1] and torch.equal(*stored)


@pytest.mark.parametrize("kept", [0, 1, 5])
def test_a_recomputed_layer_leaves_out_its_last_product(kept, monkeypatch):
    """Which nobody reads; and decodes its weights no more often than one that keeps its activations."""
    _, (model, optimizer) = fused_twins("fp32", monkeypatch)
    calls, found, product, read = [], [], linear.Products.multiply, layers.value
    monkeypatch.setattr(linear.Products, "multiply", lambda *args: calls.append("product") or product(*args))
    for layer in model.linears():
        layer.value = lambda *args, layer=layer: calls.append("read") or read(layer, layers.EAGER, *args)
    model.model.keep_activations = kept
    for model.model.activation_checkpointing in (False, True):
        calls.clear()
        model.loss(IDS, IDS).backward()
        gradients = [p.grad for p in model.parameters()]
        found.append((calls.count("product"), calls.count("read"), gradients))
        model.zero_grad()
    (products, reads, gradients), again = found
    assert again[0] - products == 6 * max(0, len(model.model.layers) - kept) and again[1] == reads
    assert all(torch.equal(a, b) for a, b in zip(gradients, again[2]))


@pytest.mark.parametrize("wanted", ["x gate weight", "x", "gate", "weight"])
def test_a_gated_product_has_the_gradients_of_swiglu(wanted):
    """Bit for bit, though silu(gate) * x is not kept, and its parts are overwritten."""
    layer = linear.Linear(32, 48, quantized=False)
    nn.init.normal_(layer.weight).requires_grad_("weight" in wanted)
    x, gate = (torch.randn(2, 5, 32, requires_grad=name in wanted.split()) for name in ("x", "gate"))
    leaves = [p for p in (x, gate, layer.weight) if p.requires_grad]
    product = layers.Product(layer, layers.EAGER)
    found = product(x * 1, gate=gate * 1)  # copies, to be overwritten
    expected = F.linear(F.silu(gate) * x, layer.weight)
    assert torch.equal(found, expected)
    dy = torch.randn_like(found)
    for ours, theirs in zip(*(torch.autograd.grad(y, leaves, dy) for y in (found, expected))):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("master", ["bf16", "nvfp4x2", "nvfp4"])
def test_compiled_code_has_no_floats_of_8_bits(master, monkeypatch):
    """Triton knows them only for GPUs of compute capability 8.9 and later; many have 8.0 or 8.6."""
    dtypes = set()

    def look(graph, _):
        values = [node.meta.get("example_value") for node in graph.graph.nodes]
        dtypes.update(value.dtype for value in values if isinstance(value, torch.Tensor))
        return graph

    def compiled(function, *how):
        return torch.compile(function, backend=look, dynamic=False)

    for module in (layers, update):
        monkeypatch.setattr(module, "compiled", compiled)
    model = small_model()
    masters.set_masters(model, master, torch.device("cpu"))
    optimizer = AdamW(model.named_parameters(), state="nvfp4")
    kernels = layers.compiled_kernels()
    kernels = layers.EAGER._replace(
        decode=kernels.decode, fake_quantize=kernels.fake_quantize, refit=kernels.refit
    )
    fuse(model, optimizer, kernels)
    Step(model, optimizer)([(IDS, IDS)])
    assert torch.uint8 in dtypes and torch.float8_e4m3fn not in dtypes


def test_a_storage_without_a_kernel_trains_uncompiled_and_the_program_says_so(monkeypatch, capsys):
    monkeypatch.setitem(storage.KINDS, "log8", Log8)
    stored = []
    for wing in (False, True):
        model = small_model()
        optimizer = AdamW(model.named_parameters(), lr=1e-2, state="log8")
        if wing:
            monkeypatch.setattr(update, "compiled", lambda function, *how: function)
            fuse(model, optimizer, layers.EAGER)
        Step(model, optimizer)([(IDS, IDS)])
        stored.append(torch.cat([bits(tensor) for tensor in optimizer.tensors().values()]))
        assert optimizer.moved() == pytest.approx(1, abs=1e-4)
    assert torch.equal(*stored)
    assert capsys.readouterr().out == "note    Log8 has no kernel: its updates run uncompiled\n"


WITHOUT = """
import sys
import train
train.main(train.Settings(steps=2, batch_size=2, test_max_tokens=1, device="cpu", out=sys.argv[1]))
print([name for name in sys.modules if name.startswith("minifp4.fused") or "dynamo" in name])
"""


def test_training_on_a_cpu_needs_nothing_of_the_wing(tmp_path):
    command = [sys.executable, "-c", WITHOUT, str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = [name for name in eval(done.stdout.splitlines()[-1]) if name.startswith("minifp4")]
    assert loaded == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("state", ["bf16", "int8", "nvfp4"])
@pytest.mark.parametrize("kind", ["bf16", "nvfp4x2", "nvfp4"])
def test_on_a_gpu_an_update_is_one_kernel(kind, state):
    """All of it, from reading codes to writing them, and with a chosen size of thread blocks."""
    weight = nn.Parameter(MASTERS[kind](torch.randn(256, 128, device="cuda")))
    weight.grad_dtype = torch.bfloat16
    weight.grad = torch.randn(256, 128, device="cuda").bfloat16()
    optimizer = AdamW([("w", weight)], state=state)
    update.fuse_optimizer(optimizer)
    optimizer.begin()
    with fresh_cache():
        torch._dynamo.reset()
        _, sources = run_and_get_code(optimizer.update, "w", weight.grad)
    _, code = sources  # of `survey`, of `update`
    assert code.count("fixed_config(") == 1 and code.count("@triton.jit") <= 2  # a small one for bounds
