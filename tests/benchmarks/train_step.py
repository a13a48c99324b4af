"""Time and memory of one training step, beside what people use today.

    python tests/benchmarks/train_step.py              Qwen3-4B's shape, three batches, on a GPU
    python tests/benchmarks/train_step.py --scaling    0.6B to 32B, and 512 to 16,384 tokens
    python tests/benchmarks/train_step.py --quick      tiny shapes on a CPU, a minute

Weights and tokens are random, every token is learned. Time: the median of 5 steps after 2 of warm-up, and the
spread of the 5. Memory: the most that the allocator gave out after the first step, weights and moments
included. share: the operations of the matrix products (recomputation counted, as it is done) over the time,
as a part of a large bf16 product measured in the same run. MFU: without recomputation, as a part of what the
data sheet says. Baselines are Hugging Face transformers in bf16 with torch's fused AdamW and torchao's, with
gradient checkpointing. minifp4 recomputes no layer at 1x96, all but a few at 1x2048 and all at 8x2048; its
first two kinds also none there. FP8: of the products (`train.py --product fp8`); shares are of bf16's rates.
"""

import argparse
import dataclasses
import json
import math
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))
from ideas import Backward
from timing import place, seconds

import minifp4
from minifp4 import fp8, masters, packed
from minifp4.fused import fuse, record
from minifp4.linear import Products
from minifp4.memory import one_growing_segment
from minifp4.model import Config, Qwen3
from minifp4.step import Step
from minifp4.watch import nominal_rate

RESULTS = Path(__file__).parent / "results"
SHAPES = {  # hidden, intermediate, layers, heads, kv heads, head_dim, vocabulary
    "tiny": (64, 128, 2, 4, 2, 32, 896),
    "0.6B": (1024, 3072, 28, 16, 8, 128, 151936),
    "1.7B": (2048, 6144, 28, 16, 8, 128, 151936),
    "4B": (2560, 9728, 36, 32, 8, 128, 151936),
    "8B": (4096, 12288, 36, 32, 8, 128, 151936),
    "14B": (5120, 17408, 40, 40, 8, 128, 151936),
    "32B": (5120, 25600, 64, 64, 8, 128, 151936),
}
OURS = {  # masters, moments, products
    "minifp4 nvfp4 + nvfp4": ("nvfp4", "nvfp4", Products),
    "minifp4 nvfp4 + nvfp4, FP8": ("nvfp4", "nvfp4", fp8.FP8),
    "minifp4 nvfp4 + nvfp4, FP8 backward": ("nvfp4", "nvfp4", Backward),
    "minifp4 nvfp4x2 + nvfp4": ("nvfp4x2", "nvfp4", Products),
    "minifp4 bf16 + int8": ("bf16", "int8", Products),
}
THEIRS = ("HF + fused AdamW", "HF + torchao AdamW8bit", "HF + torchao AdamW4bit")
ALL, KEPT = 1000, 7  # layers of minifp4 that keep their activations, at 1x96 and, in 9.5 GiB, at 1x2048
ORDER = (*list(OURS)[:2], *THEIRS, *list(OURS)[2:])


def config_of(name):
    hidden, intermediate, layers, heads, pairs, head_dim, words = SHAPES[name]
    return Config(words, hidden, intermediate, layers, heads, pairs, head_dim, 1e-6, 5e6)


def our_model(config, master, device):
    """A model with random weights, each packed as soon as it is made."""
    with torch.device("meta"):
        model = Qwen3(config)
    for name, p in list(model.named_parameters()):
        value = torch.ones(p.shape, device=device)
        if p.dim() == 2:
            value = torch.empty(p.shape, device=device, dtype=torch.bfloat16).normal_(std=0.02)
            if master != "bf16":
                value = packed.pack(value, torch.tensor(2.0**-13, device=device), master == "nvfp4x2")
        masters.set_weight(model, name, value)
    model.set_compute_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    return model


def ours(config, what, device):
    """A function (ids, kept) -> one step in which so many layers keep their activations."""
    master, state, products = OURS[what]
    one_growing_segment()
    model = our_model(config, master, device)
    fp8.use(model, products)
    optimizer = minifp4.AdamW(model.named_parameters(), lr=1e-5, betas=(0.9, 0.95), state=state)
    step, recorder = Step(model, optimizer, in_backward=True), None
    if device == "cuda":
        fuse(model, optimizer)
        recorder = record(step)
    model.model.activation_checkpointing = True

    def run(batch, kept):
        """A batch as of `Step`, or token ids that are all learned."""
        kept = kept if isinstance(kept, int) else 0
        if recorder and kept != model.model.keep_activations:
            recorder.forget()  # a recorded step would keep as many as before
        model.model.keep_activations = kept
        return step([batch if isinstance(batch, tuple) else (batch, batch)])

    return run


def their_parts(config, what, device):
    """(model, optimizer) of a baseline; ImportError if a package is missing."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    if "torchao" in what:
        from torchao.optim import AdamW4bit, AdamW8bit
    names = [field.name for field in dataclasses.fields(config)][:7]
    their_config = Qwen3Config(**{name: getattr(config, name) for name in names}, tie_word_embeddings=False)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Qwen3ForCausalLM._from_config(their_config, attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)
    model.gradient_checkpointing_enable()
    model.train()
    if "torchao" in what:
        kind = AdamW8bit if "8bit" in what else AdamW4bit
        optimizer = kind(model.parameters(), lr=1e-5, betas=(0.9, 0.95), bf16_stochastic_round=True)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True)
    return model, optimizer


def theirs(config, what, device):
    """The same for a baseline."""
    model, optimizer = their_parts(config, what, device)

    def run(batch, kept):
        ids, labels, *spans = batch if isinstance(batch, tuple) else (batch, batch)
        how = {"position_ids": spans[0].positions(ids.shape[1]).long()} if spans else {}
        model(input_ids=ids, labels=labels, use_cache=False, **how).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def flops(config, batch, tokens, recomputed, skipped):
    """Of the matrix products of a step: 2 a weight and token forward, 4 backward, 2 in `recomputed` layers.

    skipped: the recomputation leaves out each block's last product.
    """
    c = config
    attention = c.hidden_size * c.head_dim * 2 * (c.num_attention_heads + c.num_key_value_heads)
    attention += c.num_attention_heads * c.head_dim * tokens  # scores and values, causal: half of 2 * T
    one = c.hidden_size * c.intermediate_size
    once = c.num_hidden_layers * 6 * (attention + 3 * one) + 6 * c.vocab_size * c.hidden_size
    return batch * tokens * (once + recomputed * 2 * (attention + (2 if skipped else 3) * one))


def measure(run, config, batch, tokens, kept, device, steps=5, warm_up=2):
    """{ms, spread, gib, reserved_gib, tokens_per_second}"""
    ids = torch.randint(0, config.vocab_size, (steps + warm_up, batch, tokens), device=device)
    on_gpu, times = device == "cuda", []
    for number in range(steps + warm_up):
        if on_gpu:
            torch.cuda.synchronize()
            if number == 1:  # the first step compiles, and tries kernels on copies
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        run(ids[number], kept)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    middle, timed = statistics.median(times[warm_up:]), times[warm_up:]
    return {
        "ms": middle * 1e3, "spread_ms": (max(timed) - min(timed)) * 1e3, "first_s": times[0],
        "gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if on_gpu else None,
        "tokens_per_second": batch * tokens / middle,
    }  # fmt: skip


def matmul_rate(device):
    """Operations per second of a large bf16 product (fp32 on a CPU)."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (512, torch.float32)
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return 2 * n**3 / statistics.median(seconds(lambda: a @ b, device, 10))


def profile(run, *inputs, prints=True):
    """Run one step and print the kernels that take most of it."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as seen:
        run(*inputs)
        torch.cuda.synchronize()
    if not prints:
        return
    rows = sorted(seen.key_averages(), key=lambda row: -row.self_device_time_total)
    print(f"    all kernels: {sum(row.self_device_time_total for row in rows) / 1e3:.1f} ms")
    for row in rows[:24]:
        print(f"    {row.self_device_time_total / 1e3:8.2f} ms {row.count:6} {row.key[:100]}")


def measure_all(size, what, batches, device, rate, profiled):
    """Measure and print one optimizer on some batches; the rows of the record."""
    config, rows = config_of(size), []
    try:
        run = (ours if what in OURS else theirs)(config, what, device)
    except ImportError as error:
        print(f"{size:6}{what:36} not measured: {error}")
        return rows
    for batch, tokens, kept in batches:
        kept = min(kept, config.num_hidden_layers) if what in OURS else 0
        found = measure(run, config, batch, tokens, kept, device)
        work = flops(config, batch, tokens, config.num_hidden_layers - kept, what in OURS)
        once = flops(config, batch, tokens, 0, False)
        nominal, per_second = nominal_rate(torch.device(device)), 1e3 / found["ms"]
        found["matrix_share"], found["matrix_share_once"] = (x * per_second / rate for x in (work, once))
        for name, operations in (("nominal_share", work), ("mfu", once)):
            found[name] = operations * per_second / nominal if nominal else None
        rows.append({"size": size, "what": what, "batch": batch, "tokens": tokens, "kept": kept, **found})
        memory = [f"{found[key]:.2f}" if found[key] else "-" for key in ("gib", "reserved_gib")]
        print(
            f"{size:6}{what:36}{f'{batch}x{tokens}':>9}{found['ms']:9.1f}{found['spread_ms']:8.1f}"
            f"{found['tokens_per_second']:10,.0f}{memory[0]:>8}{memory[1]:>9}"
            f"{found['matrix_share']:7.2f}{found['mfu'] or math.nan:6.2f}{found['first_s']:7.1f}",
            flush=True,
        )
        if profiled and device == "cuda":
            profile(run, torch.randint(0, config.vocab_size, (batch, tokens), device=device), kept)
    return rows


def compare(rows):
    """Print for each batch how minifp4 does beside the fastest of the others."""
    for shape in dict.fromkeys((row["size"], row["batch"], row["tokens"]) for row in rows):
        here = [row for row in rows if (row["size"], row["batch"], row["tokens"]) == shape]
        others = [row for row in here if row["what"] not in OURS]
        best = min(others, key=lambda row: row["ms"], default=None)
        for row in here:
            if best and row["what"] in OURS:
                faster = f"{best['ms'] / row['ms']:.2f} times as fast as {best['what']}"
                memory = f", {row['gib'] / best['gib']:.0%} of its memory" if row["gib"] else ""
                print(f"{shape[0]} {shape[1]}x{shape[2]}: {row['what']} is {faster}{memory}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--scaling", action="store_true", help="other sizes and lengths, minifp4 alone")
    parser.add_argument("--only", action="append", help="only sizes and names with this (repeatable)")
    parser.add_argument(
        "--batch", action="append", help="only such a batch: 1x96, 1x2048, 8x2048 (repeatable)"
    )
    parser.add_argument(
        "--keep", type=int, default=KEPT, help="layers that keep activations at 1x2048, not with --scaling"
    )
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step")
    parser.add_argument("--json", type=Path, help="write the results here")
    chosen = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not chosen.quick else "cpu"
    rate, record = matmul_rate(device), []
    print(f"{place(device)}, torch {torch.__version__}; large product {rate / 1e12:.1f} TFLOP/s")
    three = [(1, 96, ALL), (1, 2048, chosen.keep), (8, 2048, 0)]
    jobs = [("4B", what, three + [(8, 2048, ALL)] * (what in ORDER[:2])) for what in ORDER]
    if chosen.quick:
        jobs = [("tiny", what, [(1, 16, ALL), (2, 32, 0)]) for what in ORDER]
    if chosen.scaling:
        jobs = [(size, next(iter(OURS)), [(1, 96, ALL), (1, 2048, 0)]) for size in ("0.6B", "1.7B", "8B")]
        jobs += [(size, next(iter(OURS)), [(1, 2048, 0)]) for size in ("14B", "32B")]
        jobs += [("4B", next(iter(OURS)), [(1, tokens, 0) for tokens in (512, 2048, 8192, 16384)])]
    heads = "{:6}{:36}{:>9}{:>9}{:>8}{:>10}{:>8}{:>9}{:>7}{:>6}{:>7}"
    names = "batch", "ms", "spread", "tokens/s", "GiB", "reserved", "share", "MFU", "1st s"
    print(heads.format("", "", *names))
    for size, what, batches in jobs:
        batches = [batch for batch in batches if not chosen.batch or f"{batch[0]}x{batch[1]}" in chosen.batch]
        if not batches or chosen.only and not any(word in f"{size} {what}" for word in chosen.only):
            continue
        # A process of its own: what the one before has left on the GPU is not counted.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            record += pool.submit(measure_all, size, what, batches, device, rate, chosen.profile).result()
        if chosen.json:  # now, should a later one fail
            numbers = {"machine": place(device), "torch": torch.__version__, "matmul": rate, "rows": record}
            chosen.json.write_text(json.dumps({"command": " ".join(sys.argv), **numbers}, indent=1) + "\n")
    compare(record)


if __name__ == "__main__":
    main()
