"""What does each precision cost? Small Qwen3s learn Python from scratch, and then another part of it.

    python tests/benchmarks/quality.py --quick            a CPU, three minutes, the same conclusions in small
    python tests/benchmarks/quality.py --jobs 12          a GPU
    python tests/benchmarks/quality.py --jobs 12 --part ideas  ways to a better 4 bits, each alone
    python tests/benchmarks/quality.py --plot FILE.json   the figure of the README

The text is what every machine with Python has: the sources of its standard library, some packages kept back
as a second domain, a BPE trained on the spot. Every run of a seed starts from the same weights and sees the
same batches; losses are means over fixed held-out text of the domain that is learned, and gaps are to fp32
AdamW with the same W4 forward.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import statistics
import sys
import sysconfig
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import minifp4
from minifp4 import chance, chat, masters, nvfp4, storage, vocabulary
from minifp4.fused import fuse, record
from minifp4.model import Config
from minifp4.packed import bytes_of
from minifp4.step import Step

RESULTS = Path(__file__).parent / "results"
SECOND = "asyncio email xml http urllib unittest concurrent multiprocessing json logging".split()
FULL = dict(hidden=384, layers=6, vocabulary=4096, tokens=256, batch=16, steps=2000, tune=300, seeds=4)
QUICK = dict(hidden=64, layers=2, vocabulary=1024, tokens=64, batch=16, steps=150, tune=60, seeds=1)
REFERENCE = "fp32 fp32"
# name: master, state, and what else differs from the usual settings
GRID = {
    "no quantization": {"master": "fp32", "state": "fp32", "quantize": False},
    REFERENCE: {"master": "fp32", "state": "fp32"},
    "bf16 int8": {"master": "bf16", "state": "int8"},
    "bf16 nvfp4": {"master": "bf16", "state": "nvfp4"},
    "nvfp4x2 nvfp4": {"master": "nvfp4x2", "state": "nvfp4"},
    "nvfp4 nvfp4": {"master": "nvfp4", "state": "nvfp4"},
    "nvfp4 nvfp4, nearest": {"master": "nvfp4", "state": "nvfp4", "rounding": "nearest"},
}
IN_FIGURE = {name: GRID[name] for name in (REFERENCE, "nvfp4x2 nvfp4", "nvfp4 nvfp4", "nvfp4 nvfp4, nearest")}
TUNED = {name: GRID[name] for name in (*IN_FIGURE, "bf16 nvfp4")}
IDEAS = {  # each alone, from scratch
    "fp32 fp32, blocks scaled to 6 or 4": {"master": "fp32", "state": "fp32", "four_over_six": True},
    "bf16 nvfp4": {"master": "bf16", "state": "nvfp4"},
    "bf16 nvfp4, sqrt(v) stochastic": {"master": "bf16", "state": "stochastic root"},
    "bf16 nvfp4, sqrt(v) with three exponent bits": {"master": "bf16", "state": "wide root"},
    "nvfp4 nvfp4, beta2 .99": {"master": "nvfp4", "state": "nvfp4", "beta2": 0.99},
    "nvfp4 nvfp4": {"master": "nvfp4", "state": "nvfp4"},
    "nvfp4 nvfp4, head, embedding, last layer x2": {"master": "nvfp4", "state": "nvfp4", "finer_ends": True},
}  # fmt: skip


def four_over_six(layer, dtype, rows=slice(None)):
    """What a 4-bit product makes of a weight if each block's largest number lands on 6 or on 4, whichever
    leaves the smaller error: 4 leaves a finer step at the top. In the place of `Linear.value`."""
    x, scale, tries = layer.weight.detach()[rows].float(), layer.group.global_scale(), []
    blocks = x.unflatten(-1, (-1, nvfp4.BLOCK))
    for top in (6.0, 4.0):
        scales = nvfp4.block_scale(blocks.abs().amax(-1) * (6.0 / top), 1 / scale)
        qdata, _ = nvfp4.encode(x, 1 / scale, scale=scales)
        tries.append(nvfp4.decode(qdata, scales, scale).view_as(blocks))
    errors = [(one - blocks).square().sum(-1, keepdim=True) for one in tries]
    return torch.where(errors[0] <= errors[1], *tries).flatten(-2).to(dtype)


class Root(storage.NVFP4Moment):
    """sqrt(v) in 4 bits with other codes, or another rounding: what the two ideas below share."""

    LEVELS = torch.tensor(storage.ROOT)
    stochastic = False

    def read(self, rows):
        if not self.positive:
            return super().read(rows)
        qdata, scale, row_scale = (tensor[rows] for tensor in self.tensors.values())
        codes = torch.stack([qdata & 15, qdata >> 4], -1).flatten(-2).long()
        return nvfp4.from_units(self.LEVELS.to(qdata.device)[codes], scale, row_scale)

    def encode(self, x, rows, bits=None, bound=None):
        if not self.positive:
            return super().encode(x, rows, bits, bound)
        upward, levels = self.stochastic and bits is not None, self.LEVELS.to(x.device)
        scale, encode_scale, row_scale = storage.new_scales(x, bound, 6.0, upward, never_zero=True)
        y = nvfp4.in_units(x.unflatten(-1, (-1, nvfp4.BLOCK)), scale, encode_scale).flatten(-2)
        y = y.clamp(levels[0], levels[-1])
        above = torch.bucketize(y, levels).clamp(1, len(levels) - 1)
        share = (y - levels[above - 1]) / (levels[above] - levels[above - 1])
        least = chance.uniform(bits) if upward else 0.5
        codes = above - 1 + (share > least)
        return {"qdata": nvfp4.pair(codes.to(torch.uint8)), "scale": scale, "row_scale": row_scale}


class StochasticRoot(Root):
    """sqrt(v) rounded stochastically."""

    stochastic = True


class WideRoot(Root):
    """The idle sign bit as a third exponent bit: 15 codes from 3/64 to 6 instead of 8 from 1/2."""

    LEVELS = torch.tensor([3 / 64] + [m * 2.0**e for e in range(-4, 3) for m in (1, 1.5)])


KINDS = {"stochastic root": StochasticRoot, "wide root": WideRoot}


def make_data(size, directory):
    """Tokens of both domains, {a, b}.{train, val}.npy in `directory`; the last tenth of the files is held
    out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        p for p in root.rglob("*.py") if not {"site-packages", "test", "tests", "idlelib"} & set(p.parts)
    )
    domains = {"a": [], "b": []}
    for path in files:
        text = path.read_text(encoding="utf-8", errors="ignore")
        domains["b" if path.relative_to(root).parts[0] in SECOND else "a"].append(text)
    sample = domains["a"][::3] + domains["b"][::3]
    vocabulary.train_tokenizer(sample, size["vocabulary"], directory)
    tokenizer = chat.Tokenizer(directory / "tokenizer.json")
    for name, texts in domains.items():
        texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]
        cut = len(texts) * 9 // 10
        for part, chosen in (("train", texts[:cut]), ("val", texts[cut:])):
            ids = [number for encoded in tokenizer.core.encode_batch(chosen) for number in encoded.ids]
            np.save(directory / f"{name}.{part}.npy", np.array(ids, np.int32))


def batch_of(tokens, size, seed, device):
    starts = np.random.default_rng(seed).integers(0, len(tokens) - size["tokens"], size["batch"])
    rows = np.stack([tokens[start : start + size["tokens"]] for start in starts])
    return torch.from_numpy(rows.astype(np.int64)).to(device)


@torch.no_grad()
def validate(model, tokens, size):
    batches = [batch_of(tokens, size, (999, n), model.device) for n in range(32)]
    return torch.stack([model.loss(ids, ids, select=False) for ids in batches]).mean().item()


def one_kind(job):
    """Train one model for each seed: {seed: {val, start, losses, moved, bytes}}. `job`: see `main`."""
    torch.set_num_threads(job["threads"])
    return {seed: one_run(job, seed) for seed in range(job["seeds"])}


def one_run(job, seed):
    size, how, device = job["size"], job["how"], job["device"]
    directory, on_gpu = Path(job["directory"]), device == "cuda"
    train, val = (
        np.load(directory / f"{job['domain']}.{part}.npy", mmap_mode="r") for part in ("train", "val")
    )
    heads, wide = size["hidden"] // 64, 3 * size["hidden"]
    shape = (size["vocabulary"], size["hidden"], wide, size["layers"], heads, 1, 64)
    config = Config(*shape, rms_norm_eps=1e-6, rope_theta=1e4)
    model = masters.initialize(config, seed, quantize=how.get("quantize", True), device=device)
    model.set_compute_dtype(torch.bfloat16 if on_gpu else torch.float32)
    base = directory / f"base{seed}.pt"
    if job["domain"] == "b":
        model.load_state_dict(torch.load(base, map_location=device, weights_only=True))
    masters.set_masters(model, how["master"], finer_ends=how.get("finer_ends", False))
    storage.KINDS.update(KINDS)
    optimizer = minifp4.AdamW(
        model.named_parameters(), betas=(0.9, how.get("beta2", 0.95)), weight_decay=0.1, state=how["state"],
        rounding=how.get("rounding", "stochastic"), seed=seed,
    )  # fmt: skip
    step = Step(model, optimizer, grad_clip=1.0)
    if on_gpu:
        fuse(model, optimizer)
        record(step)
    for layer in model.linears() if how.get("four_over_six") else ():
        layer.value = partial(four_over_six, layer)
    begin, losses = validate(model, val, size), []
    for number in range(job["steps"]):
        ids = batch_of(train, size, (seed, number), device)
        optimizer.lr = job["lr"] * min(1, (number + 1) / 50, (job["steps"] - number) / (0.3 * job["steps"]))
        losses.append(step([(ids, ids)])[0])
    if job["save"]:
        torch.save(model.state_dict(), base)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    return {
        "val": validate(model, val, size),
        "start": begin,
        "losses": [round(x, 4) for x in torch.stack(losses).tolist()],
        "moved": optimizer.moved(),
        "bytes": sum(map(bytes_of, matrices)) / sum(p.numel() for p in matrices),
    }


def table(title, runs, seeds):
    """Print and return rows: name, mean loss, spread, gap to the reference in %, share of its improvement,
    moved."""
    heads = ("loss", "spread", "gap %", "spread", "kept %", "moved", "B/weight")
    print(f"\n{title}\n{'master, state':46} " + " ".join(f"{head:>8}" for head in heads))
    reference = [runs[REFERENCE, seed] for seed in range(seeds)]
    rows = []
    for name in dict.fromkeys(name for name, _ in runs):
        mine = [runs[name, seed] for seed in range(seeds)]
        gaps = [100 * (a["val"] / b["val"] - 1) for a, b in zip(mine, reference)]
        kept = [100 * (b["start"] - a["val"]) / (b["start"] - b["val"]) for a, b in zip(mine, reference)]
        vals = [run["val"] for run in mine]
        row = {
            "name": name, "loss": statistics.mean(vals), "spread": max(vals) - min(vals),
            "gap": statistics.mean(gaps), "gap_spread": max(gaps) - min(gaps), "kept": statistics.mean(kept),
            "moved": statistics.mean(run["moved"] for run in mine), "bytes": mine[0]["bytes"],
        }  # fmt: skip
        rows.append(row)
        numbers = [row[key] for key in ("loss", "spread", "gap", "gap_spread", "kept", "moved", "bytes")]
        print(f"{name:46} " + " ".join(f"{number:8.3f}" for number in numbers))
    return rows


def plot(results, path):
    """Training loss against step, smoothed, of fp32, all NVFP4 stochastic, and the predecessor's nearest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), dpi=120)
    labels = {
        REFERENCE: "fp32 weights and moments (12 bytes)",
        "nvfp4x2 nvfp4": "nvfp4x2 weights, nvfp4 moments (2.19 bytes)",
        "nvfp4 nvfp4": "nvfp4 weights and moments (1.69 bytes)",
        "nvfp4 nvfp4, nearest": "the same, rounded to nearest",
    }
    for name, label in labels.items():
        losses = np.array(results["curves"][name])
        window = max(1, len(losses) // 50)
        smooth = np.convolve(losses, np.ones(window) / window, "valid")
        axes.plot(np.arange(len(smooth)) + window, smooth, label=label, linewidth=1.4)
    axes.set(
        xlabel="step", ylabel="training loss", ylim=(None, results["curves"][REFERENCE][len(losses) // 30])
    )
    axes.legend(frameon=False, fontsize="small", loc="center right")
    axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(path)
    print(f"wrote {path}")


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small model for a CPU, one seed")
    parser.add_argument("--part", choices=("scratch", "tune", "ideas"), help="default: scratch, then tune")
    parser.add_argument("--jobs", type=int, default=1, help="kinds that run at the same time")
    parser.add_argument("--steps", type=int, help="of a run from scratch")
    parser.add_argument("--seeds", type=int, help="runs of each kind")
    parser.add_argument("--json", type=Path, default=RESULTS / "quality.json", help="where the results go")
    parser.add_argument("--plot", type=Path, help="draw the figure from this JSON, run nothing")
    return parser.parse_args()


def main():
    chosen = arguments()
    if chosen.plot:
        plot(json.loads(chosen.plot.read_text()), chosen.plot.with_suffix(".png"))
        return
    size = dict(QUICK if chosen.quick else FULL)
    seeds = chosen.seeds or size["seeds"]
    size["steps"] = chosen.steps or size["steps"]
    device = "cuda" if torch.cuda.is_available() and not chosen.quick else "cpu"
    place = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {os.cpu_count()} cores"
    print(f"{place}, torch {torch.__version__}; {size}")
    begin = time.perf_counter()
    record = {"machine": place, "torch": torch.__version__, "size": size, "seeds": seeds, "tables": {}}
    record["command"] = " ".join(["python", *sys.argv])
    chosen.json.parent.mkdir(parents=True, exist_ok=True)

    def note(title, runs):
        record["tables"][title] = table(title, runs, seeds)
        record["seconds"] = time.perf_counter() - begin
        chosen.json.write_text(json.dumps(record) + "\n")

    with tempfile.TemporaryDirectory() as directory:
        make_data(size, Path(directory))
        print(f"data: {[len(np.load(Path(directory) / f'{d}.train.npy')) for d in 'ab']} tokens")
        threads = max(1, (os.cpu_count() or 1) // chosen.jobs)
        common = {"size": size, "directory": directory, "device": device, "threads": threads, "seeds": seeds}
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(chosen.jobs, context, max_tasks_per_child=1) as pool:

            def run(grid, **more):
                jobs = {}
                for name, how in grid.items():
                    save = name == REFERENCE and more["domain"] == "a"
                    jobs[name] = pool.submit(one_kind, common | more | {"how": how, "save": save})
                return {(name, seed): run for name, job in jobs.items() for seed, run in job.result().items()}

            grid = {REFERENCE: GRID[REFERENCE]} if chosen.part == "tune" else GRID
            grid = {REFERENCE: GRID[REFERENCE]} | IDEAS if chosen.part == "ideas" else grid
            scratch = run(grid, domain="a", lr=2e-3, steps=size["steps"])
            record["curves"] = {name: scratch[name, 0]["losses"] for name in grid}
            note("from scratch", scratch)
            for lr in (3e-5, 1e-4) if chosen.part in (None, "tune") else ():
                tuned = run(TUNED, domain="b", lr=lr, steps=size["tune"])
                note(f"fine-tuning to a second domain, lr {lr}", tuned)
    print(f"\n{record['seconds']:.0f} s")


if __name__ == "__main__":
    main()
