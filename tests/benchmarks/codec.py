"""Is the codec the same everywhere, and how fast is it?

    python tests/benchmarks/codec.py [--quick]

First counts the bytes that differ between nvfp4.py on the CPU (the reference), the kernels of fused/ on the
CPU, and both on CUDA; then times quantizing and dequantizing one matrix beside torchao and a
plain copy of the same bytes. Medians of 20 after 3 of warm-up, on random data; on a GPU the copy and compiled
code as CUDA graphs, as they run in a step.
"""

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))
from timing import place, recorded, seconds

import minifp4
from minifp4 import nvfp4
from minifp4.fused import codes
from minifp4.fused.layers import compiled_kernels


def data(kind, rows, columns):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return x * torch.logspace(-12, 3, rows).unsqueeze(1) if kind == "spread" else x * 0.02


def plain(x, bits, scale):
    """Codes and the bytes of scales; `bits` rounds stochastically, None to nearest."""
    qdata, scale = nvfp4.encode(x.float(), scale, bits)
    return qdata, codes.raw(scale)


def fused(x, bits, scale):
    """The same by `fused/`."""
    return codes.encode(codes.halves(x.float()), scale, None if bits is None else codes.halves(bits))


def decoder():
    """A function (NVFP4, dtype) with the compiled kernel that a model on a GPU decodes with."""
    decode = compiled_kernels().decode
    parts = lambda q: {"qdata": q.qdata, "scale": codes.raw(q.scale)}  # noqa: E731
    return lambda q, dtype: decode(parts(q), q.global_scale, False, dtype)


def differences(rows, columns, devices):
    """{way: bytes of codes, scales and decoded values that differ from eager CPU}, of how many."""
    found, scale = {}, torch.tensor(64.0)
    drawn = torch.randint(codes.RANDOM, (rows, columns), dtype=torch.int32)
    hows = {"plain": (plain, nvfp4.dequantize), "compiled": (torch.compile(fused), decoder())}
    for kind, rounding in itertools.product(("normal", "spread"), ("nearest", "stochastic")):
        x, bits = data(kind, rows, columns), drawn if rounding == "stochastic" else None
        expected = plain(x, bits, scale)
        q = nvfp4.NVFP4(expected[0], expected[1].view(torch.float8_e4m3fn), 1 / scale)
        decoded = nvfp4.dequantize(q)
        for device, (how, (encodes, decodes)) in itertools.product(devices, hows.items()):
            given = (None if t is None else t.to(device) for t in (x, bits, scale))
            got = encodes(*given)
            values = decodes(nvfp4.NVFP4(*(t.to(device) for t in q)), torch.float32)
            counts = [(mine.cpu() != right).sum().item() for mine, right in zip(got, expected)]
            counts.append((values.cpu() != decoded).sum().item())
            found[f"{device} {how}, {kind}, {rounding}"] = counts
    return found, [expected[0].numel(), expected[1].numel(), decoded.numel()]


def speed(rows, columns, device):
    """{what: (median ms, spread ms, GB/s of needed bytes)}"""
    x = data("normal", rows, columns).to(device, torch.bfloat16)
    scale = nvfp4.weight_global_scale(x)
    q = minifp4.quantize(x, global_scale=scale)
    compiled, decode, inverse = torch.compile(fused), decoder(), 1 / scale
    needed = x.numel() * 2.5625
    ways = {
        "copy bf16": (lambda: x.clone(), x.numel() * 4),
        "minifp4 quantize": (lambda: minifp4.quantize(x, global_scale=scale), needed),
        "minifp4 quantize, compiled": (lambda: compiled(x, None, inverse), needed),
        "minifp4 dequantize": (lambda: minifp4.dequantize(q, torch.bfloat16), needed),
        "minifp4 dequantize, compiled": (lambda: decode(q, torch.bfloat16), needed),
    }
    try:
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

        theirs = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale)
        ways["torchao quantize"] = (lambda: NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale), needed)
        ways["torchao dequantize"] = (lambda: theirs.dequantize(torch.bfloat16), needed)
    except ImportError:
        print("torchao is not installed: not compared")
    found = {}
    for name, (function, size) in ways.items():
        if "compiled" in name or "copy" in name:
            function = recorded(function, device)
        times = [1e3 * time for time in seconds(function, device, 20)]
        middle, spread = statistics.median(times), max(times) - min(times)
        found[name] = (middle, spread, size / middle / 1e6)
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small matrices")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    print(f"{place(devices[-1])}, torch {torch.__version__}")
    found, sizes = differences(256 if arguments.quick else 4096, 1024, devices)
    print(
        f"\nbytes that differ from the plain code on a CPU (codes of {sizes[0]}, scales of {sizes[1]}), "
        f"decoded numbers (of {sizes[2]})"
    )
    for way, counts in found.items():
        print(f"  {way:36} {counts}")
    shape = (512, 1024) if arguments.quick else (9728, 2560) if len(devices) > 1 else (2048, 2048)
    times = speed(*shape, devices[-1])
    print(f"\n{shape[0]} x {shape[1]} on {devices[-1]}: median ms, spread, GB/s")
    for name, (middle, spread, rate) in times.items():
        print(f"  {name:30} {middle:9.3f} {spread:9.3f} {rate:9.1f}")
    if arguments.json:
        record = {
            "machine": place(devices[-1]),
            "torch": torch.__version__,
            "differences": found,
            "times": times,
        }
        arguments.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
