"""What does each precision cost? Small Qwen3s learn Python from scratch, then C++, then to converse.

    python tests/benchmarks/quality.py                a GPU, in under ten minutes
    python tests/benchmarks/quality.py --quick        a CPU, in under four: it says what it cannot decide
    python tests/benchmarks/quality.py --middle       a CPU, two minutes a run
    python tests/benchmarks/quality.py lora           beside LoRA on the same base in 4 bits (needs peft)
    python tests/benchmarks/quality.py ideas          ways to a better 4 bits, each alone (`ideas.py`)
    python tests/benchmarks/quality.py ideas tuned-ideas        also fine-tuned to C++
    python tests/benchmarks/quality.py lengths        half and four times as many steps
    python tests/benchmarks/quality.py --plot FILE.json   the figure of the README

Two things make a small difference visible. No text is seen twice (`texts.py`), so that a run measures what is
learned, not what is remembered. And every kind of a seed starts from the same weights and sees the same
batches, so that luck is common to all and leaves the difference: a gap is that of a kind to fp32 AdamW with
the same seed and the same forward pass through NVFP4, and the mean of these gaps has a 95 % confidence
interval (Student's t over the seeds). Where it includes 0, nothing is decided.
"""

import argparse
import concurrent.futures
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import ideas
import minifp4
from minifp4 import masters
from minifp4.fused import fuse, record
from minifp4.model import Config
from minifp4.packed import Packed, bytes_of
from minifp4.step import Step
from texts import Rows, make_texts

RESULTS = Path(__file__).parent / "results"
FULL = dict(hidden=512, layers=6, vocabulary=8192, tokens=256, batch=64, steps=1000, tune=250, talk=60,
            lr=1e-3, seeds=4, held=400_000)  # fmt: skip
QUICK = dict(hidden=64, layers=2, vocabulary=1024, tokens=64, batch=16, steps=80, tune=30, talk=15, lr=3e-3,
             seeds=4, held=16_000)  # fmt: skip
MIDDLE = dict(hidden=128, layers=3, vocabulary=1024, tokens=128, batch=16, steps=400, tune=100, talk=30,
              lr=2e-3, seeds=4, held=30_000)  # fmt: skip
RUN_GIB = 5.0  # of GPU memory that one run in FULL takes, with what the process itself does
# Student's t, two-sided, for 1, 2, ... degrees of freedom
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
       2.131)  # fmt: skip
REFERENCE = "fp32 fp32"
# name: master, state, and what else differs from the usual settings
GRID = {
    "no quantization": {"master": "fp32", "state": "fp32", "quantize": False},
    REFERENCE: {"master": "fp32", "state": "fp32"},
    "bf16 nvfp4": {"master": "bf16", "state": "nvfp4"},
    "nvfp4x2 nvfp4": {"master": "nvfp4x2", "state": "nvfp4"},
    "nvfp4 nvfp4": {"master": "nvfp4", "state": "nvfp4"},
    "nvfp4 nvfp4, nearest": {"master": "nvfp4", "state": "nvfp4", "rounding": "nearest"},
}
LENGTHS = {name: GRID[name] for name in (REFERENCE, "nvfp4x2 nvfp4", "nvfp4 nvfp4")}
TUNED = {name: GRID[name] for name in (REFERENCE, *list(GRID)[2:])}
TUNING = [("c++", 1e-5), ("c++", 1e-4), ("talk", 1e-4)]  # domain and learning rate
RATES = 3e-4, 1e-3, 3e-3, 1e-2  # of which the comparison with LoRA takes the best of each
LORA = {f"LoRA, r {rank}": {"rank": rank} for rank in (16, 64)}
BESIDE = {name: GRID[name] for name in (REFERENCE, "nvfp4x2 nvfp4", "nvfp4 nvfp4")}


class Trainer:
    """A model of one kind and its optimizer, which begin anew for each run: compiled and recorded once."""

    def __init__(self, job):
        self.size, self.how, self.device = job["size"], job["how"], job["device"]
        self.directory = Path(job["directory"])
        ideas.apply(self.how)
        self.model = self.new(0)
        self.optimizer = minifp4.AdamW(
            self.model.named_parameters(), betas=(self.how.get("beta1", 0.9), self.how.get("beta2", 0.95)),
            weight_decay=self.how.get("decay", 0.1), state=self.how["state"],
            rounding=self.how.get("rounding", "stochastic"),
        )  # fmt: skip
        self.step = Step(self.model, self.optimizer, grad_clip=1.0)
        if self.device != "cpu":
            fuse(self.model, self.optimizer)
            record(self.step)
        ideas.change(self.model, self.how)

    def new(self, seed, base=None):
        """The model at the start of a run, from scratch or from the weights in the file `base`."""
        model = masters.initialize(
            config_of(self.size), seed, quantize=self.how.get("quantize", True), device=self.device
        )
        if base:
            model.load_state_dict(torch.load(base, map_location=self.device, weights_only=True))
        masters.set_masters(model, self.how["master"], finer_ends=self.how.get("finer_ends", False))
        model.set_compute_dtype(torch.float32 if self.device == "cpu" else torch.bfloat16)
        ideas.change_weights(model, self.how)
        return model

    def begin(self, seed, base):
        """Start anew in the same memory, which a recorded step reads."""
        for mine, theirs in zip(self.model.parameters(), self.new(seed, base).parameters()):
            for kept, new in zip(memory_of(mine), memory_of(theirs)):
                kept.copy_(new)
        for tensor in self.optimizer.tensors().values():
            tensor.zero_()
        self.optimizer.steps, self.optimizer.seed = 0, seed
        self.optimizer.reset_moved()

    def run(self, domain, lr, steps, seed, base=None, keep=None):
        """One run; `keep`: the file to leave its weights in."""
        self.begin(seed, base)
        train, held = self.rows(domain, "train"), self.rows(domain, "held")
        begin, losses, together = self.loss(held), [], self.how.get("accumulate", 1)
        start = time.perf_counter()
        updates = max(1, steps // together)
        for number in range(updates):
            batches = [train.batch(number * together + part, seed) for part in range(together)]
            losses.append(self.learn(batches, rate(self.how, lr, number, updates)))
        losses = [round(x, 4) for x in torch.stack(losses).tolist()]  # waits for the GPU
        seconds = time.perf_counter() - start
        if keep:
            torch.save(self.model.state_dict(), keep)
        return {
            "val": self.loss(held), "start": begin, "losses": losses, "seconds": seconds, **self.facts(),
            "forgets": self.loss(self.rows("python", "held")) if base else None,
        }  # fmt: skip

    def learn(self, batches, lr):
        """One step; returns its loss."""
        self.optimizer.lr = lr
        loss = self.step(batches)[0].detach().clone()
        ideas.after_step(self.model, self.how, lr)
        return loss

    def facts(self):
        """What else is reported of a run."""
        matrices = [p for p in self.model.parameters() if p.dim() == 2]
        moments = sum(t.nbytes for name, t in self.optimizer.tensors().items() if "norm" not in name)
        weights = sum(p.numel() for p in matrices)
        return {
            "moved": self.optimizer.moved(), "floored": self.optimizer.floored(),
            "bytes": (sum(map(bytes_of, matrices)) + moments) / weights,
        }  # fmt: skip

    def rows(self, domain, part):
        return Rows(self.directory, domain, part, self.size, self.device)

    @torch.no_grad()
    def loss(self, held):
        return mean_loss(held, lambda ids, labels: self.model.loss(ids, labels, select=False))


def memory_of(p):
    return list(p.tensors().values()) if isinstance(p, Packed) else [p.detach()]


def config_of(size):
    hidden = size["hidden"]
    shape = (size["vocabulary"], hidden, 3 * hidden, size["layers"], hidden // 64, 1, 64)
    return Config(*shape, rms_norm_eps=1e-6, rope_theta=1e4)


def rate(how, lr, number, steps):
    """The learning rate of a step: up for 50 steps, and down to 0 in the last 30 % of all."""
    up, down = (number + 1) / min(50, steps / 4), (steps - number) / (how.get("down", 0.3) * steps)
    return how.get("lr", 1.0) * lr * min(1, up, down)


def mean_loss(held, loss):
    """The mean over all learned tokens of some rows."""
    total = counted = 0
    for ids, labels in (held.batch(number) for number in range(len(held))):
        count = (labels[:, 1:] != -100).sum()
        total, counted = total + loss(ids, labels) * count, counted + count
    return (total / counted).item()


class Lora(Trainer):
    """Hugging Face's Qwen3 with the values of the 4-bit base, frozen, and `peft`'s LoRA beside every linear
    layer."""

    def __init__(self, job):
        self.size, self.rank, self.device = job["size"], job["how"]["rank"], job["device"]
        self.directory, self.how = Path(job["directory"]), {"master": "fp32"}

    def begin(self, seed, base):
        from peft import LoraConfig, get_peft_model
        from transformers import Qwen3Config, Qwen3ForCausalLM

        dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        source = self.new(seed, base)
        c, values = source.config, source.state_dict()
        modules = dict(source.named_modules())
        for name in [name for name, p in source.named_parameters() if p.dim() == 2]:
            if "embed" not in name:
                values[name] = modules[name.removesuffix(".weight")].value(dtype)
        shape = {name: getattr(c, name) for name in list(Config.__annotations__)[:8]}
        config = Qwen3Config(**shape, rope_parameters={"rope_theta": c.rope_theta, "rope_type": "default"},
                             tie_word_embeddings=False)  # fmt: skip
        frozen = Qwen3ForCausalLM(config)
        frozen.load_state_dict(values)
        torch.manual_seed(seed)
        lora = LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules="all-linear")
        self.model = get_peft_model(frozen.to(self.device, dtype), lora)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        weights = sum(p.numel() for p in source.parameters())
        self.bytes = 0.5625 + 12 * sum(p.numel() for p in trained) / weights

    def learn(self, batches, lr):
        [(ids, labels)], [group] = batches, self.optimizer.param_groups
        group["lr"] = lr
        loss = self.model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def facts(self):
        return {"moved": 1.0, "floored": 0.0, "bytes": self.bytes}

    @torch.no_grad()
    def loss(self, held):
        return mean_loss(held, lambda ids, labels: self.model(input_ids=ids, labels=labels).loss)


def one_kind(job):
    """All runs of a kind in a process of its own: {(title, seed): what `run` returns}."""
    torch.set_num_threads(job["threads"])
    if job["gpu"] is not None:
        torch.cuda.set_device(job["gpu"])
    trainer = (Lora if "rank" in job["how"] else Trainer)(job)
    found = {}
    for title, settings in job["runs"].items():
        for seed in range(job["seeds"]):
            base = Path(job["directory"]) / f"base{seed}.pt"
            files = {"base": None, "keep": base if job["keep"] else None}
            if settings["domain"] != "python":
                files = {"base": base}
            found[title, seed] = trainer.run(**settings, **files, seed=seed)
    return found


def interval(values):
    """(mean, half of the 95 % confidence interval or NaN)."""
    n = len(values)
    half = T95[n - 2] * statistics.stdev(values) / n**0.5 if 1 < n <= len(T95) + 1 else float("nan")
    return statistics.mean(values), half


def table(title, runs, seeds):
    """Print and return the rows of a table: what `runs` {(kind, seed): run} say beside the reference."""
    tuned = runs[next(iter(runs))]["forgets"] is not None
    more = ["kept %", "+-", "python"] if tuned else []
    heads = " ".join(f"{head:>8}" for head in ["loss", "gap %", "+-", *more, "moved", "floor %", "bytes"])
    width = max(len(name) for name, _ in runs)
    print(f"\n{title}\n{'weights, moments':{width}} {heads}  decided")
    rows, reference = [], [runs[REFERENCE, seed] for seed in range(seeds)]
    for name in dict.fromkeys(name for name, _ in runs):
        mine = [runs[name, seed] for seed in range(seeds)]
        row = {"name": name, "loss": statistics.mean(run["val"] for run in mine)}
        row["gaps"] = [100 * (a["val"] / b["val"] - 1) for a, b in zip(mine, reference)]
        row["gap"], row["gap_interval"] = interval(row["gaps"])
        if tuned:
            kept = [100 * (b["start"] - a["val"]) / (b["start"] - b["val"]) for a, b in zip(mine, reference)]
            row["kept"], row["kept_interval"] = interval(kept)
            row["python"] = statistics.mean(run["forgets"] for run in mine)
        row["moved"] = statistics.mean(run["moved"] for run in mine)
        row["floored"] = 100 * statistics.mean(run["floored"] for run in mine)
        row["bytes"] = mine[0]["bytes"]
        row["seconds"] = statistics.median(run["seconds"] for run in mine)
        if name == REFERENCE:
            word = ""
        elif not row["gap_interval"] < abs(row["gap"]):
            word = "no"
        else:
            word = "worse" if row["gap"] > 0 else "better"
        row["decided"] = word
        rows.append(row)
        numbers = [value for key, value in row.items() if key not in ("name", "gaps", "seconds", "decided")]
        print(f"{name:{width}} " + " ".join(f"{number:8.3f}" for number in numbers) + f"  {word}")
    open_ones = [row["name"] for row in rows if row["decided"] == "no"]
    if open_ones:
        print(f"cannot tell from {REFERENCE}, {seeds} seeds: {'; '.join(open_ones)}")
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
    if missing := labels.keys() - results.get("curves", {}).keys():
        sys.exit(f"error: no losses of {', '.join(sorted(missing))} in it: the figure needs the part scratch")
    top = 0
    for name, label in labels.items():
        losses = np.array(results["curves"][name])
        window = max(1, len(losses) // 50)
        smooth = np.convolve(losses, np.ones(window) / window, "valid")
        top = max(top, smooth[-1])
        axes.plot(np.arange(len(smooth)) + window, smooth, label=label, linewidth=1.4)
    axes.set(xlabel="step", ylabel="training loss", ylim=(None, top + 0.3))
    axes.legend(frameon=False, fontsize="small", loc="center right", bbox_to_anchor=(1, 0.6))
    axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(path)
    print(f"wrote {path}")


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART",
                        help=f"of {', '.join(PARTS)}; default: scratch and tune")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a small model for a CPU")
    parser.add_argument("--middle", action="store_true", help="a larger one for a CPU")
    parser.add_argument("--jobs", type=int, help="kinds that run at the same time; default: what fits")
    parser.add_argument("--steps", type=int, help="of a run from scratch")
    parser.add_argument("--seeds", type=int, help=f"runs of each kind, at most {len(T95) + 1}")
    parser.add_argument("--json", type=Path, help="where the results go; default: results/quality-PART.json")
    parser.add_argument("--plot", type=Path, help="draw the figure from this JSON, run nothing")
    parser.add_argument("--only", help="the kinds of this name, of several divided by |, and the reference")
    chosen = parser.parse_args()
    for part in chosen.parts:
        if part not in PARTS:
            parser.error(f"no part {part!r}: choose from {', '.join(PARTS)}")
    if chosen.seeds is not None and not 1 <= chosen.seeds <= len(T95) + 1:
        parser.error(f"--seeds {chosen.seeds}: from 1 to {len(T95) + 1}")
    if chosen.plot and not chosen.plot.is_file():
        parser.error(f"--plot {chosen.plot}: there is no such file")
    chosen.parts = chosen.parts or ["scratch", "tune"]
    chosen.json = chosen.json or RESULTS / f"quality-{'-'.join(chosen.parts)}.json"
    if not chosen.json.parent.is_dir():
        parser.error(f"--json {chosen.json}: there is no directory {chosen.json.parent}")
    if "lora" in chosen.parts and not importlib.util.find_spec("peft"):
        parser.error("lora needs the package peft: pip install peft")
    return chosen


def places_for(chosen, device):
    """(GPUs or [None], runs at the same time)."""
    if device == "cpu":
        return [None], chosen.jobs or max(1, (os.cpu_count() or 1))
    gpus = list(range(torch.cuda.device_count()))
    free = min(torch.cuda.mem_get_info(gpu)[0] for gpu in gpus) / 2**30
    fit = int(free / RUN_GIB) * len(gpus)
    if fit < (chosen.jobs or 1):
        sys.exit(f"error: a run takes about {RUN_GIB:.0f} GiB and {free:.1f} are free on the GPU, so "
                 f"{fit} fit side by side: give --jobs {fit}" if fit else
                 f"error: a run takes about {RUN_GIB:.0f} GiB, only {free:.1f} are free on the GPU; "
                 "--quick runs on a CPU")  # fmt: skip
    return gpus, chosen.jobs or min(fit, 8 * len(gpus))


def only(kinds, chosen):
    """Of `kinds` those that --only names."""
    if not chosen.only:
        return kinds
    names = {REFERENCE, *chosen.only.split("|")}
    if unknown := names - kinds.keys():
        sys.exit(f"error: --only: no kind {', '.join(unknown)}; there are: {', '.join(kinds)}")
    return {name: how for name, how in kinds.items() if name in names}


def scratch(size, title="from scratch"):
    return {title: {"domain": "python", "lr": size["lr"], "steps": size["steps"]}}


def tuning(size, which):
    lengths = {"c++": size["tune"], "talk": size["talk"]}
    return {
        f"{domain}, lr {lr:g}": {"domain": domain, "lr": lr, "steps": lengths[domain]} for domain, lr in which
    }


def lengths(size):
    found = {}
    for steps in (size["steps"] // 2, 4 * size["steps"]):
        found |= scratch(size | {"steps": steps}, f"{steps} steps from scratch")
    return found


# name: (kinds, settings of the runs)
PARTS = {
    "scratch": (GRID, scratch),
    "tune": (TUNED, lambda size: tuning(size, TUNING if size["hidden"] == FULL["hidden"] else TUNING[1:])),
    "talk": (TUNED, lambda size: tuning(size, TUNING[2:])),
    "lora": (BESIDE | LORA, lambda size: tuning(size, [("c++", lr) for lr in RATES])),
    "ideas": (ideas.IDEAS, scratch),
    "tuned-ideas": (ideas.IDEAS, lambda size: tuning(size, TUNING[:2])),
    "lengths": (LENGTHS, lengths),
}


def main():
    chosen = arguments()
    if chosen.plot:
        plot(json.loads(chosen.plot.read_text()), chosen.plot.with_suffix(".png"))
        return
    size = dict(QUICK if chosen.quick else MIDDLE if chosen.middle else FULL)
    seeds, size["steps"] = chosen.seeds or size["seeds"], chosen.steps or size["steps"]
    small = chosen.quick or chosen.middle
    device = "cuda" if torch.cuda.is_available() and not small else "cpu"
    gpus, at_once = places_for(chosen, device)
    place = f"CPU, {os.cpu_count()} cores"
    if device == "cuda":
        place = f"{len(gpus)} x {torch.cuda.get_device_name()}"
    print(f"{place}, torch {torch.__version__}; {seeds} seeds; {size}", flush=True)
    begin = time.perf_counter()
    results = {"machine": place, "torch": torch.__version__, "size": size, "seeds": seeds, "tables": {},
               "command": " ".join(["python", *sys.argv])}  # fmt: skip
    parts = [PARTS[part] for part in chosen.parts]
    plans = [(only(kinds, chosen), settings(size)) for kinds, settings in parts]
    needs_base = any(run["domain"] != "python" for _, runs in plans for run in runs.values())
    if needs_base and chosen.parts[0] not in ("scratch", "ideas"):
        plans.insert(0, ({REFERENCE: GRID[REFERENCE]}, scratch(size)))
    most = {}
    for run in (run for _, runs in plans for run in runs.values()):
        most[run["domain"]] = max(most.get(run["domain"], 0), run["steps"])
    with tempfile.TemporaryDirectory() as directory:
        make_texts(size, most, Path(directory))
        print(f"{time.perf_counter() - begin:5.0f} s  texts", flush=True)
        for domain, steps in most.items():
            rows = len(Rows(Path(directory), domain, "train", size, "cpu").ids)
            print(f"{domain:8}{rows * size['tokens'] / 1e6:.1f} M tokens to learn, "
                  f"{steps * size['batch'] / rows:.2f} of them in the longest run")  # fmt: skip
        threads = max(1, (os.cpu_count() or 1) // at_once)
        common = {"size": size, "directory": directory, "device": device, "threads": threads, "seeds": seeds}
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(at_once, context, max_tasks_per_child=1) as pool:
            for kinds, runs in plans:
                keep = needs_base and next(iter(runs.values()))["domain"] == "python"
                jobs = {}
                for number, (name, how) in enumerate(kinds.items()):
                    job = common | {"how": how, "runs": runs, "keep": keep and name == REFERENCE}
                    jobs[pool.submit(one_kind, job | {"gpu": gpus[number % len(gpus)]})] = name
                done = {}
                for job in concurrent.futures.as_completed(jobs):
                    done[jobs[job]] = job.result()
                    vals = " ".join(f"{run['val']:.4f}" for run in job.result().values())
                    print(f"{time.perf_counter() - begin:5.0f} s  {jobs[job]}: {vals}", flush=True)
                for title in runs:
                    found = {(name, seed): done[name][title, seed] for name in kinds for seed in range(seeds)}
                    results["tables"][title] = table(title, found, seeds)
                    results.setdefault("curves", {name: found[name, 0]["losses"] for name in kinds})
                results["seconds"] = time.perf_counter() - begin
                chosen.json.write_text(json.dumps(results) + "\n")
                print(f"\n{results['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
