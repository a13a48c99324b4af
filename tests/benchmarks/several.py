"""A training step on several GPUs, beside one.

    python tests/benchmarks/several.py                      4B and 8B on 1, 2, 4, ... GPUs
    python tests/benchmarks/several.py --size 32B --gpus 4  one size, one number of GPUs
    python tests/benchmarks/several.py --quick              a tiny model in 1 and 2 processes on a CPU

nvfp4 + nvfp4, weights and tokens random, each process its own batch of as many tokens; the updates in the
backward pass. Time: the median of some steps after warm-up, all GPUs waited for. "alone": the same steps
without what the processes send each other (their results are wrong, the work is the same). "sent": that
alone, for all matrices once. So (sent - (ms - alone)) / sent is the share that is hidden behind the work.
Memory: what torch gave out, and what the GPU says is gone, with CUDA's and NCCL's own. Hugging Face's
transformers with fused AdamW and DistributedDataParallel: --theirs.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))
from timing import place, recorded, seconds
from train_step import config_of, our_model, profile, their_parts

import minifp4
from minifp4 import parallel
from minifp4.fused import fuse, record
from minifp4.memory import Memory, one_growing_segment
from minifp4.packed import Packed
from minifp4.step import Step


@contextlib.contextmanager
def silent():
    """The processes send each other nothing. (A `Mock` would keep what it is called with: all gradients.)"""
    nothing = {"add_up_own": lambda *tensors: None, "gather": lambda *tensors: None}
    with mock.patch.multiple(parallel, **nothing):
        yield


def exchange(model):
    """All that a step sends for the matrices."""
    dtype, device = model.model.compute_dtype, model.device
    for p in model.parameters():
        for rows in parallel.stretches(len(p)) if isinstance(p, Packed) else ():
            count = rows.stop - rows.start
            parallel.add_up_own(torch.zeros(count, p.shape[1], dtype=dtype, device=device))
            parallel.gather(p, rows.start, count)


def timed(run, batch, device, steps):
    """Median seconds of a step."""
    parallel.largest(0)
    return statistics.median(seconds(lambda: run(batch), device, steps, 2))


def ours(config, device, recording):
    one_growing_segment()
    torch.manual_seed(0)  # the same weights everywhere
    model = our_model(config, "nvfp4", device)
    optimizer = minifp4.AdamW(model.named_parameters(), lr=1e-5, betas=(0.9, 0.95), state="nvfp4")
    step, recorder = Step(model, optimizer, in_backward=True), None
    model.model.activation_checkpointing = True
    if device == "cuda":
        fuse(model, optimizer)
        recorder = record(step, recording)
    return model, recorder, lambda ids: step([(ids, ids)])


def of_hugging_face(config, device):
    """One step with DistributedDataParallel."""
    torch.manual_seed(0)
    model, optimizer = their_parts(config, "HF + fused AdamW", device)
    if parallel.ranks() > 1:
        model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)

    def step(ids):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def gone():
    """Bytes of the GPU that nobody else can have."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def measure(chosen):
    """In each process: print, in the first, a line for each size and batch."""
    parallel.start("cpu" if chosen.quick else None)
    device, rows = "cpu" if chosen.quick else "cuda", []
    config, forget = config_of(chosen.size), lambda: None
    if chosen.memory_limit_gb:
        Memory(torch.device(device, torch.cuda.current_device()), chosen.memory_limit_gb)
    if chosen.theirs:
        run = of_hugging_face(config, device)
    else:
        model, recorder, run = ours(config, device, not chosen.no_cuda_graph)
        forget = recorder.forget if recorder else forget
    whole = parallel.ranks() > 1 and not chosen.theirs and not chosen.short
    for batch, tokens in chosen.batches:
        generator = torch.Generator().manual_seed(parallel.rank())
        ids = torch.randint(0, config.vocab_size, (batch, tokens), generator=generator).to(device)
        row = {"what": "HF + DDP" if chosen.theirs else "minifp4", "size": chosen.size,
               "gpus": parallel.ranks(), "batch": f"{batch}x{tokens}"}  # fmt: skip
        if whole:
            with silent():
                row["alone_ms"] = 1e3 * timed(run, ids, device, chosen.steps)
            forget()  # a recorded step without what is sent
        run(ids)  # compiles
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        row["ms"] = 1e3 * timed(run, ids, device, chosen.steps)
        row["tokens_per_second"] = parallel.ranks() * ids.numel() / row["ms"] * 1e3
        row["gib"] = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
        row["gone_gib"] = gone() / 2**30 if device == "cuda" else 0.0
        rows.append(row)
        if parallel.rank() == 0:
            print(
                f"{row['what']:10}{row['size']:>5}{row['gpus']:5}{row['batch']:>9}{row['ms']:10.1f}"
                f"{row['tokens_per_second']:10,.0f}{row['gib']:8.2f}{row['gone_gib']:8.2f}"
                + (f"{row['alone_ms']:9.1f}" if whole else ""),
                flush=True,
            )
        if chosen.profile and (batch, tokens) == chosen.batches[-1]:
            profile(run, ids, prints=parallel.rank() == 0)
        forget()  # the memory of this batch
    if whole:  # last, because it takes memory: as much as all gradients
        sent = 1e3 * statistics.median(seconds(recorded(lambda: exchange(model), device, "thread_local"),
                                               device, 3, 1))  # fmt: skip
        for row in rows:
            row["sent_ms"] = sent
            row["hidden"] = max(0.0, 1 - max(0.0, row["ms"] - row["alone_ms"]) / sent)
        if parallel.rank() == 0:
            shares = ", ".join(f"{row['hidden']:.0%} at {row['batch']}" for row in rows)
            print(f"sent: {sent:.1f} ms, hidden {shares}", flush=True)
    if parallel.rank() == 0 and chosen.json:
        chosen.json.write_text(json.dumps(rows))
    parallel.close()
    parallel.leave()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--size", action="append", help="0.6B to 32B (repeatable)")
    parser.add_argument("--gpus", action="append", type=int, help="how many (repeatable)")
    parser.add_argument("--batch", action="append", help="such as 8x2048, for each GPU (repeatable)")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="only the step")
    parser.add_argument("--profile", action="store_true", help="also the kernels of the last batch's step")
    parser.add_argument("--no-cuda-graph", action="store_true")
    parser.add_argument("--memory-limit-gb", type=float, help="torch may take no more of each GPU (GiB)")
    parser.add_argument("--theirs", action="store_true", help="Hugging Face instead")
    parser.add_argument("--json", type=Path, help="write the results here")
    chosen = parser.parse_args()
    words = chosen.batch or (["1x16", "2x32"] if chosen.quick else ["1x2048", "8x2048"])
    chosen.batches = [tuple(map(int, word.split("x"))) for word in words]
    if "RANK" in os.environ:
        [chosen.size] = chosen.size
        measure(chosen)
        return
    device = "cpu" if chosen.quick else "cuda"
    there = 2 if chosen.quick else torch.cuda.device_count()
    print(f"{there} x {place(device)}, torch {torch.__version__}")
    print(f"{'':10}{'':>5}{'GPUs':>5}{'a GPU':>9}{'ms':>10}{'tokens/s':>10}{'GiB':>8}{'gone':>8}"
          f"{'alone':>9}", flush=True)  # fmt: skip
    rows, begin = [], time.perf_counter()
    for size in chosen.size or (["tiny"] if chosen.quick else ["4B", "8B"]):
        for count in chosen.gpus or [n for n in (1, 2, 4, 8) if n <= there]:
            with tempfile.TemporaryDirectory() as folder:
                numbers = Path(folder) / "rows.json"
                switches = "--quick", "--short", "--profile", "--no-cuda-graph", "--theirs"
                flags = [word for word in sys.argv[1:] if word in switches]
                if chosen.memory_limit_gb:
                    flags += ["--memory-limit-gb", str(chosen.memory_limit_gb)]
                flags += ["--size", size, "--steps", str(chosen.steps), "--json", str(numbers)]
                flags += [flag for word in words for flag in ("--batch", word)]
                torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
                environment = {"OMP_NUM_THREADS": "1", **os.environ}
                done = subprocess.run([sys.executable, *torchrun, __file__, *flags], env=environment)
                if done.returncode == 0:
                    rows += json.loads(numbers.read_text())
            if chosen.json:
                result = {"command": " ".join(sys.argv), "machine": f"{there} x {place(device)}",
                          "torch": torch.__version__, "rows": rows}  # fmt: skip
                chosen.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
