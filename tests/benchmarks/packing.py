"""Conversations of all lengths: packed rows beside padded ones and beside Hugging Face's packing.

    python tests/benchmarks/packing.py             Qwen3-4B's shape, on a GPU
    python tests/benchmarks/packing.py --quick     tiny shapes on a CPU
    python tests/benchmarks/packing.py --attention ways to compute attention in a packed row, on a GPU

Lengths are log-normal, median 180 tokens, sigma 1, at most 2,048 (mean 277): half of what people collect is
short. Tokens are random and all are learned. Time is the median of some steps after a warm-up over the same
batches; speed is that of real tokens, without padding. Padded: 16 conversations to the longest, rounded up to
64. Packed: rows of 8,192 tokens. Hugging Face's: the same rows with positions that start anew, from which
transformers makes its mask, with fused AdamW and gradient checkpointing.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))
from timing import place as machine
from timing import seconds
from train_step import config_of, ours, theirs

from minifp4 import chat
from minifp4.rows import Rows

OURS = "minifp4 nvfp4 + nvfp4"
WAYS = {"padded": OURS, "packed": OURS, "packed by transformers": "HF + fused AdamW"}


def examples(count, vocabulary, quick):
    """Conversations of random tokens."""
    draw = np.random.default_rng(0)
    lengths = np.clip(np.exp(draw.normal(np.log(180), 1, count)), 8, 2048).astype(int)
    lengths = np.maximum(lengths // (8 if quick else 1), 2)
    return [(ids, ids) for ids in (draw.integers(0, vocabulary, length).tolist() for length in lengths)]


def measure(way, size, steps, quick):
    """{way, ms, tokens_per_second of real tokens, gib, share of real tokens}"""
    config, device = config_of(size), "cpu" if quick else "cuda"
    some = examples(2000, config.vocab_size, quick)
    row = 512 if quick else 8192
    run = (theirs if "transformers" in way else ours)(config, WAYS[way], device)
    rows = Rows(some, 0, size=row)
    batches, real = [], []
    for number in range(steps):
        chosen = [some[place] for place in rows.chosen(number)]
        if way == "padded":
            chosen = chat.sample(some, number, batch_size=16)
            batches.append(chat.collate(chosen, 0, device, 64))
        else:
            batches.append(rows.laid(chosen, device))
        real.append(sum(len(ids) for ids, _ in chosen))
    times = []
    for turn in range(3):  # the first compiles, the second records what is recorded
        if device == "cuda" and turn == 2:
            torch.cuda.reset_peak_memory_stats()
        for batch in batches:
            start = time.perf_counter()
            run(batch, way)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    times = times[2 * steps :]
    speeds = [count / taken for count, taken in zip(real, times)]
    return {
        "way": way, "ms": 1e3 * statistics.median(times),
        "tokens_per_second": sum(real) / sum(times), "slowest": min(speeds), "fastest": max(speeds),
        "gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
        "real": sum(real) / sum(batch[0].numel() for batch in batches),
    }  # fmt: skip


def attention(quick):
    """Print how long a packed row's attention takes, forward and backward, in several ways."""
    device, (heads, pairs, dim, size) = ("cpu", (4, 2, 32, 512)) if quick else ("cuda", (32, 8, 128, 8192))
    dtype = torch.float32 if quick else torch.bfloat16
    some = examples(500, 100, quick)
    _, _, spans = Rows(some, 0, size=size).batch(0, device)
    q = torch.randn(1, heads, size, dim, device=device, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(1, pairs, size, dim, device=device, dtype=dtype, requires_grad=True) for _ in "kv")
    place = torch.arange(size, device=device, dtype=torch.int32)
    number = torch.searchsorted(spans.starts, place, right=True)
    mask = (number[:, None] == number[None, :]).tril()
    ways = {
        "variable length" if device == "cuda" else "one by one": lambda: spans.attend(q, k, v),
        "a mask": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True),
        "one conversation of that length": lambda: F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        ),
    }
    if device == "cuda":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        flex = torch.compile(flex_attention)
        blocks = create_block_mask(
            lambda b, h, i, j: (number[i] == number[j]) & (i >= j), None, None, size, size, device
        )
        ways["flex_attention"] = lambda: flex(q, k, v, block_mask=blocks, enable_gqa=True)
    first = None
    for name, way in ways.items():
        def both(way=way):
            way().sum().backward()

        with torch.no_grad():
            found = way()
            first = found if first is None else first
            forward = statistics.median(seconds(way, device, 10))
        whole = statistics.median(seconds(both, device, 10))
        far = (found.float() - first.float()).abs().max().item()
        print(f"{name:34}{1e3 * forward:9.3f} ms forward{1e3 * whole:9.3f} with backward   differs {far:.4f}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--attention", action="store_true", help="attention alone")
    parser.add_argument("--size", default="4B", help="0.6B, 1.7B, 4B or 8B")
    parser.add_argument("--steps", type=int, default=6, help="batches")
    parser.add_argument("--json", type=Path, help="write the results here")
    chosen = parser.parse_args()
    quick = chosen.quick or not torch.cuda.is_available()
    print(f"{machine('cpu' if quick else 'cuda')}, torch {torch.__version__}")
    if chosen.attention:
        attention(quick)
        return
    rows = []
    print(f"{'':24}{'ms':>9}{'real tokens/s':>15}{'slowest':>9}{'fastest':>9}{'GiB':>7}{'real':>7}")
    for way in WAYS:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            size = "tiny" if quick else chosen.size
            row = pool.submit(measure, way, size, chosen.steps, quick).result()
        rows.append(row)
        print(f"{way:24}{row['ms']:9.1f}{row['tokens_per_second']:15,.0f}{row['slowest']:9,.0f}"
              f"{row['fastest']:9,.0f}{row['gib'] or 0:7.1f}{row['real']:7.0%}", flush=True)  # fmt: skip
    if chosen.json:
        numbers = {"command": " ".join(sys.argv), "machine": machine("cpu" if quick else "cuda"),
                   "torch": torch.__version__, "rows": rows}  # fmt: skip
        chosen.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
