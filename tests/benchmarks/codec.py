"""Is the codec the same everywhere, and how fast is it?

    python tests/benchmarks/codec.py [--quick]

First counts the bytes that differ between the CPU in eager mode (the reference) and the CPU compiled, CUDA
in eager mode and CUDA compiled; then times quantizing and dequantizing one matrix beside torchao and a
plain copy of the same bytes. Medians of 20 after 3 of warm-up, on random data.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import minifp4
from minifp4 import nvfp4


def data(kind, rows, columns):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return x * torch.logspace(-12, 3, rows).unsqueeze(1) if kind == "spread" else x * 0.02


def differences(rows, columns, devices):
    """{way: bytes of codes, scales and decoded values that differ from eager CPU}, of how many."""
    found = {}
    for kind in ("normal", "spread"):
        x = data(kind, rows, columns)
        drawn = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
        for rounding, noise in (("nearest", None), ("stochastic", drawn)):
            scale = torch.tensor(64.0)
            expected = nvfp4.encode(x, scale, noise)
            for device in devices:
                arguments = [None if t is None else t.to(device) for t in (x, scale, noise)]
                for how in ("eager", "compiled"):
                    encode = torch.compile(nvfp4.encode) if how == "compiled" else nvfp4.encode
                    decode = torch.compile(nvfp4.decode) if how == "compiled" else nvfp4.decode
                    got = [t.cpu() for t in encode(*arguments)]
                    values = decode(*(t.to(device) for t in expected), 1 / scale.to(device)).cpu()
                    counts = [
                        (a.view(torch.uint8) != b.view(torch.uint8)).sum().item()
                        for a, b in zip(got, expected)
                    ]
                    counts.append((values != nvfp4.decode(*expected, 1 / scale)).sum().item())
                    found[f"{device} {how}, {kind}, {rounding}"] = counts
    return found, [expected[0].numel(), expected[1].numel(), x.numel()]


def median_ms(function, device, repeats=20):
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times), max(times) - min(times)


def speed(rows, columns, device):
    """{what: (median ms, spread ms, GB/s of needed bytes)}"""
    x = data("normal", rows, columns).to(device, torch.bfloat16)
    scale = nvfp4.weight_global_scale(x)
    q = minifp4.quantize(x, global_scale=scale)
    compiled = torch.compile(minifp4.quantize), torch.compile(minifp4.dequantize)
    needed = x.numel() * 2.5625
    ways = {
        "copy bf16": (lambda: x.clone(), x.numel() * 4),
        "minifp4 quantize": (lambda: minifp4.quantize(x, global_scale=scale), needed),
        "minifp4 quantize, compiled": (lambda: compiled[0](x, global_scale=scale), needed),
        "minifp4 dequantize": (lambda: minifp4.dequantize(q, torch.bfloat16), needed),
        "minifp4 dequantize, compiled": (lambda: compiled[1](q, torch.bfloat16), needed),
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
        middle, spread = median_ms(function, device)
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
    place = torch.cuda.get_device_name() if len(devices) > 1 else f"CPU, {torch.get_num_threads()} threads"
    print(f"{place}, torch {torch.__version__}")
    found, sizes = differences(256 if arguments.quick else 4096, 1024, devices)
    print(
        f"\nbytes that differ from eager CPU (codes of {sizes[0]}, scales of {sizes[1]}), "
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
        record = {"machine": place, "torch": torch.__version__, "differences": found, "times": times}
        arguments.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
