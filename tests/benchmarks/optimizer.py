"""How long one AdamW step takes for all weights of a model, beside torch's fused AdamW and torchao's.

    python tests/benchmarks/optimizer.py [--size 4B] [--quick]

Every matrix of the model is updated once, from a random gradient in bf16; one of each shape is measured, and
its time counted as often as there are such. Medians of 10 after 3 of warm-up (and compilation). TB/s
counts each stored byte read and written once and the gradient read once; `copy` is what a plain copy does.
"""

import argparse
import collections
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))
from timing import place, recorded, seconds
from train_step import config_of

import minifp4
from minifp4 import nvfp4, packed
from minifp4.packed import bytes_of

KINDS = (("nvfp4", "nvfp4"), ("nvfp4x2", "nvfp4"), ("bf16", "nvfp4"), ("bf16", "int8"), ("bf16", "bf16"))
THEIRS = ("torch fused AdamW", "torchao AdamW8bit", "torchao AdamW4bit")


def shapes_of(config):
    """{(rows, columns): how many such matrices}"""
    with torch.device("meta"):
        model = minifp4.model.Qwen3(config)
    return collections.Counter(tuple(p.shape) for p in model.parameters() if p.dim() == 2)


def median_ms(function, device):
    return statistics.median(seconds(function, device, 10)) * 1e3


def ours(shape, kind, device):
    """(function that updates one matrix, bytes that this must move)"""
    master, state = kind
    x = torch.randn(shape, device=device) * 0.02
    if master == "bf16":
        x = x.bfloat16()
    else:
        x = packed.pack(x, nvfp4.weight_global_scale(x), master == "nvfp4x2")
    p = torch.nn.Parameter(x)
    p.grad_dtype = torch.bfloat16
    p.grad = torch.randn(shape, device=device).bfloat16()
    optimizer = minifp4.AdamW([("weight", p)], lr=1e-5, state=state, compile=device == "cuda")
    kept = bytes_of(x) + optimizer.nbytes()
    optimizer.begin()
    return recorded(lambda: optimizer.update("weight", p.grad), device), 2 * kept + p.grad.nbytes


def theirs(shape, what, device):
    p = torch.nn.Parameter(torch.randn(shape, device=device).bfloat16() * 0.02)
    p.grad = torch.randn(shape, device=device).bfloat16()
    if "fused" in what:
        optimizer, kept = torch.optim.AdamW([p], lr=1e-5, fused=True), 6
    else:
        from torchao.optim import AdamW4bit, AdamW8bit

        kind, kept = (AdamW8bit, 4) if "8bit" in what else (AdamW4bit, 3)
        optimizer = kind([p], lr=1e-5, bf16_stochastic_round=True)
    return optimizer.step, p.numel() * (2 * kept + 2)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="4B", help="tiny, 0.6B, 1.7B, 4B or 8B")
    parser.add_argument("--quick", action="store_true", help="the tiny model on the CPU")
    parser.add_argument("--json", type=Path, help="write the results here")
    chosen = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not chosen.quick else "cpu"
    shapes, rows = shapes_of(config_of("tiny" if chosen.quick else chosen.size)), {}
    total = sum(rows * columns * count for (rows, columns), count in shapes.items())
    source = torch.randn(2**26 if device == "cuda" else 2**22, device=device)
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / median_ms(lambda: target.copy_(source), device) / 1e9
    print(f"{place(device)}, torch {torch.__version__}; {total / 1e6:,.1f} M weights; copy {rate:.3f} TB/s")
    print(f"{'':28}{'ms':>10}{'TB/s':>8}")
    for what in (*KINDS, *THEIRS):
        name, ms, size = f"minifp4 {' + '.join(what)}" if what in KINDS else what, 0.0, 0
        try:
            for shape, count in shapes.items():
                function, moved = (ours if what in KINDS else theirs)(shape, what, device)
                ms, size = ms + count * median_ms(function, device), size + count * moved
        except ImportError as error:
            print(f"{name:28} not measured: {error}")
            continue
        rows[name] = {"ms": ms, "tb_per_second": size / ms / 1e9}
        print(f"{name:28}{ms:10.1f}{size / ms / 1e9:8.3f}", flush=True)
    if chosen.json:
        record = {
            "machine": place(device),
            "torch": torch.__version__,
            "weights": total,
            "copy": rate,
            "rows": rows,
        }
        chosen.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
