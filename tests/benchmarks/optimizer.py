"""How long one AdamW step takes for all weights of a model, beside torch's fused AdamW and torchao's.

    python tests/benchmarks/optimizer.py [--size 4B] [--quick]

Every weight of the model is updated from a random gradient in bf16, minifp4's as a CUDA graph, as in a
training step; "plain" is the update of optim.py itself, uncompiled: what a GPU without Triton runs. Medians
of 10 after 3 of warm-up (and compilation). TB/s counts each stored byte read and written once and the
gradient read once; `copy` is what a plain copy does. The gradients lie over one another in a tenth of their
memory, which no cache holds either: fused AdamW takes 28 GiB for Qwen3-4B's shape.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))
from timing import place, recorded, seconds
from train_step import config_of, our_model

import minifp4
from minifp4.fused import fuse
from minifp4.model import Qwen3
from minifp4.packed import bytes_of

PLAIN = ", plain"
KINDS = "nvfp4 + nvfp4", "nvfp4x2 + nvfp4", "bf16 + nvfp4", "bf16 + int8", "bf16 + bf16"
OURS = (*(f"minifp4 {what}" for what in KINDS), f"minifp4 {KINDS[0]}{PLAIN}", f"minifp4 {KINDS[1]}{PLAIN}")
THEIRS = ("torch fused AdamW", "torchao AdamW8bit", "torchao AdamW4bit")


def set_gradients(parameters, device):
    """Give each a part of one random tensor, as large as the largest, in turn."""
    source, start = torch.randn(max(p.numel() for p in parameters), device=device).bfloat16(), 0
    for p in parameters:
        if start + p.numel() > len(source):
            start = 0
        p.grad = source[start : start + p.numel()].view(p.shape)
        start += p.numel()


def ours(config, what, device):
    """(function that updates all weights, bytes of weights and moments)"""
    master, state = what.removeprefix("minifp4 ").removesuffix(PLAIN).split(" + ")
    model = our_model(config, master, device)
    model.set_compute_dtype(torch.bfloat16)
    optimizer = minifp4.AdamW(model.named_parameters(), lr=1e-5, state=state)
    if device == "cuda" and not what.endswith(PLAIN):
        fuse(model, optimizer)
    set_gradients(list(model.parameters()), device)
    kept = optimizer.nbytes() + sum(bytes_of(p) for p in model.parameters())
    optimizer.begin()
    return recorded(optimizer.apply, device), kept


def theirs(config, what, device):
    """The same for a baseline; ImportError if a package is missing."""
    with torch.device("meta"):
        model = Qwen3(config)
    model = model.bfloat16().to_empty(device=device)
    for p in model.parameters():
        p.data.normal_(std=0.02)
    parameters = list(model.parameters())
    set_gradients(parameters, device)
    if "fused" in what:
        optimizer, each = torch.optim.AdamW(parameters, lr=1e-5, fused=True), 6
    else:
        from torchao.optim import AdamW4bit, AdamW8bit

        kind, each = (AdamW8bit, 4) if "8bit" in what else (AdamW4bit, 3)
        optimizer = kind(parameters, lr=1e-5, bf16_stochastic_round=True)
    return optimizer.step, each * sum(p.numel() for p in parameters)


def measure(what, config, weights, device):
    """{ms, spread_ms, tb_per_second}"""
    function, kept = (ours if what in OURS else theirs)(config, what, device)
    times = seconds(function, device, 10)
    middle, moved = statistics.median(times), 2 * (kept + weights)  # a gradient has 2 bytes a weight
    return {
        "ms": middle * 1e3,
        "spread_ms": (max(times) - min(times)) * 1e3,
        "tb_per_second": moved / middle / 1e12,
    }


def copy_rate(device):
    """TB/s of a copy, read and written."""
    source = torch.randn(2**26 if device == "cuda" else 2**22, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(seconds(lambda: target.copy_(source), device, 10)) / 1e12


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="4B", help="tiny, 0.6B, 1.7B, 4B or 8B")
    parser.add_argument("--quick", action="store_true", help="the tiny model on the CPU")
    parser.add_argument("--only", action="append", help="only names with this (repeatable)")
    parser.add_argument("--json", type=Path, help="write the results here")
    chosen = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not chosen.quick else "cpu"
    config, rows = config_of("tiny" if chosen.quick else chosen.size), {}
    with torch.device("meta"):
        total = sum(p.numel() for p in Qwen3(config).parameters())
    rate = copy_rate(device)
    print(f"{place(device)}, torch {torch.__version__}; {total / 1e6:,.1f} M weights; copy {rate:.3f} TB/s")
    print(f"{'':28}{'ms':>10}{'spread':>8}{'TB/s':>8}")
    for what in (*OURS, *THEIRS):
        if chosen.only and not any(word in what for word in chosen.only):
            continue
        try:
            found = rows[what] = measure(what, config, total, device)
        except ImportError as error:
            print(f"{what:28} not measured: {error}")
            continue
        print(
            f"{what:28}{found['ms']:10.1f}{found['spread_ms']:8.1f}{found['tb_per_second']:8.3f}", flush=True
        )
    if chosen.json:
        record = {
            "command": " ".join(sys.argv),
            "machine": place(device),
            "torch": torch.__version__,
            "weights": total,
            "copy": rate,
            "rows": rows,
        }
        chosen.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
