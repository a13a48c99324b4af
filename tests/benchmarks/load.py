"""Which Qwen3 trains on which card: from a checkpoint on the disk to an export, by the programs themselves.

    python tests/benchmarks/load.py                                 4B on a card of 12 GB
    python tests/benchmarks/load.py --size 32B --card 80 --source nvfp4
    python tests/benchmarks/load.py --quick                         a tiny model on a CPU

Writes a checkpoint with random weights, tied or untied as that Qwen3 is released, tensor by tensor: bf16, or
NVFP4 (embedding, head and norms bf16) as servers take it. Then train.py trains every weight for a few packed
rows and saves, goes on from there, and export.py exports, all with `--memory-limit-gb` of what such a card
offers: its GiB less OTHERS for CUDA itself and a desktop. Printed are the most that was allocated, the time
of a step, and the most host memory, in which the mapped files count.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))
from timing import place
from train_step import config_of

import minifp4
from minifp4.files import checkpoint, layouts, safetensors
from minifp4.model import Qwen3
from minifp4.storage import MASTERS

ROOT = Path(__file__).parents[2]
OTHERS = 1.0  # GiB
TIED = "tiny", "0.6B", "1.7B", "4B"  # as released
SCALE = torch.tensor(2.0**-13)  # global scale of weights with a standard deviation of .02
FLAGS = (
    "--train-lm-head --train-embed --optimizer-state nvfp4 --step-in-backward --activation-checkpointing "
    "--test-prompt 你是誰 --test-max-tokens 2"
).split()


def stored(name, shape, source, device):
    """What the file has of a parameter: {name: tensor}, random."""
    if len(shape) == 1:
        return {name: torch.ones(shape, dtype=torch.bfloat16)}
    value = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=0.02)
    if source == "bf16" or "_proj" not in name:
        return {name: value.cpu()}
    q = minifp4.quantize(value, global_scale=SCALE.to(device))
    return layouts.write_nvfp4(name, q, "hf")


def write(directory, size, source, device):
    """A checkpoint with random weights in the shapes of `size`; the number of bytes."""
    config = config_of(size)
    config.tie_word_embeddings = size in TIED
    names = list(config.__annotations__)[:10]
    with torch.device("meta"):
        model = Qwen3(config)
    directory.mkdir()
    checkpoint.write_json(
        directory / "config.json", {"model_type": "qwen3", **{name: getattr(config, name) for name in names}}
    )
    checkpoint.write_companions(directory, checkpoint.read_tokenizer(minifp4.BASE))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    entries = {}
    for name, shape in shapes.items():
        few = (16, *shape[1:]) if len(shape) == 2 else shape  # to see what parts there are
        for part, tensor in stored(name, few, source, "cpu").items():
            rows = shape[:1] if tensor.shape[:1] == few[:1] else tensor.shape[:1]
            entries[part] = (tensor.dtype, (*rows, *tensor.shape[1:]))
    safetensors.lay_out(directory / checkpoint.WEIGHTS, entries)
    for name, shape in shapes.items():
        pieces = [(part, 0, tensor) for part, tensor in stored(name, shape, source, device).items()]
        safetensors.write_rows(directory / checkpoint.WEIGHTS, pieces, name)
    return (directory / checkpoint.WEIGHTS).stat().st_size


def run(*words):
    """(seconds, GiB of host memory at most) of one of the programs; ends this one if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{words[0]} failed with exit code {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def measure(size, card, source, master, tokens, more, steps, device, folder):
    """One cell of the table."""
    start = time.perf_counter()
    row = {"size": size, "card": card, "source": source, "master": master, "tokens": tokens, "more": more}
    row["source_gib"] = write(folder / "model", size, source, device) / 2**30
    print(f"wrote {row['source_gib']:.3f} GiB in {time.perf_counter() - start:.1f} s", flush=True)
    out, report = folder / "out", folder / "memory.json"
    limit = ["--memory-limit-gb", card - OTHERS] if device == "cuda" else []
    if device == "cuda":
        torch.cuda.empty_cache()
    first = ["--model", folder / "model", "--steps", steps, "--master-dtype", master, *FLAGS]
    first += ["--batch-tokens", tokens, *more.split()]
    row["train_s"], row["host_gib"] = run("train.py", *first, "--out", out, "--memory-report", report, *limit)
    phases = json.loads(report.read_text())["phases"]
    row["phases_gib"] = {name: phase["peak"] / 2**30 for name, phase in phases.items()}
    row["peak_gib"] = max(row["phases_gib"].values())
    row["resume_s"], _ = run("train.py", "--resume", "--out", out, "--steps", steps + 1, *limit)
    row["export_s"], row["export_host_gib"] = run("export.py", "--checkpoint", out, "--format", "hf")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    row["tokens_per_second"] = lines[steps - 1]["tokens_per_second"]
    row["skipped"] = lines[-1]["skipped"]
    return row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--size", default="4B", help="0.6B to 32B")
    parser.add_argument("--card", type=float, default=12, help="GiB of the card")
    parser.add_argument("--source", default="bf16", choices=("bf16", "nvfp4"))
    parser.add_argument("--master", default="nvfp4", choices=MASTERS)
    parser.add_argument("--tokens", type=int, default=2048, help="in a packed row")
    parser.add_argument("--more", default="", help='further flags of train.py: --more="--no-cuda-graph"')
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--folder", help="where to write; default: the system's for temporary files")
    parser.add_argument("--json", type=Path, help="add the row to this file")
    chosen = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not chosen.quick else "cpu"
    size = "tiny" if chosen.quick else chosen.size
    print(f"{place(device)}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        kinds = chosen.source, chosen.master, chosen.tokens, chosen.more
        row = measure(size, chosen.card, *kinds, chosen.steps, device, Path(folder))
    print(
        f"{size} in {chosen.master} on {chosen.card:g} GiB less {OTHERS:g}, from {chosen.source}, rows of "
        f"{chosen.tokens} tokens: "
        f"{row['peak_gib']:.2f} GiB at most, {row['tokens_per_second']:,.0f} tokens/s, {row['host_gib']:.1f} "
        f"and {row['export_host_gib']:.1f} GiB of the host (train.py, export.py); train.py "
        f"{row['train_s']:.0f} s, --resume {row['resume_s']:.0f} s, export.py {row['export_s']:.0f} s"
    )
    if chosen.json:
        rows = json.loads(chosen.json.read_text()) if chosen.json.is_file() else []
        rows.append({"machine": place(device), "torch": torch.__version__, **row})
        chosen.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
