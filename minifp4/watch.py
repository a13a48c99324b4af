"""What a run says while it trains: a line for each step, metrics.jsonl, and TensorBoard if it is wanted."""

import contextlib
import json
import math
import time
from pathlib import Path

import torch

from . import parallel
from .files.atomic import replacing
from .memory import GIB
from .packed import bytes_of
from .progress import duration

METRICS = "metrics.jsonl"
# 10**12 operations a second of products in bf16 that a data sheet gives, without sparsity.
NOMINAL = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "B200": 2250, "RTX 3090": 71,
           "RTX 4090": 165, "RTX 5090": 209}  # fmt: skip


@contextlib.contextmanager
def warned(what):
    """Something beside the training, such as a line of a log: if it fails, a note says so, and training goes
    on."""
    try:
        yield
    except OSError as error:
        print(f"note    {what} ({error.strerror or error})", flush=True)


def keep_metrics(path, start):
    """Leave the lines of the steps up to `start`, of a run that goes on; a killed run may have left half a
    line."""
    records = read_metrics(path) if start and path.is_file() else []
    kept = (json.dumps(record) + "\n" for record in records if record["step"] <= start)
    with replacing(path) as aside:
        aside.write_text("".join(kept), encoding="utf-8")


def read_metrics(path):
    """The records of a metrics.jsonl; damaged lines are left out: they are no reason to stop."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


class Watch:
    """`watch.after(...)` each step, `watch.held_out(...)` each evaluation.

    start: the step before the first. rate: what `matrix_rate` has found.
    """

    def __init__(self, settings, step, memory, start, rate):
        self.step, self.memory, self.every, self.rate = step, memory, settings.log_every, rate
        self.steps, self.path = settings.steps, Path(settings.out) / METRICS
        self.tokens, self.since = 0, time.perf_counter()
        self.first = None  # (step, time) of the first line: the steps before it may have compiled
        self.writes = parallel.rank() == 0
        self.board = tensorboard(settings.out) if settings.tensorboard and self.writes else None
        if self.writes:
            with warned(f"cannot write {self.path}"):
                keep_metrics(self.path, start)

    def after(self, number, result, tokens, epoch, now=False):
        """Step `number` with its result (loss, norm), of so many tokens. Returns how many steps were skipped,
        or None if it says nothing; now: it does in any case."""
        self.tokens += tokens
        if not (now or number % self.every == 0 or number == self.steps):
            return None
        (loss, norm), optimizer = [number.item() for number in result], self.step.optimizer
        took = time.perf_counter() - self.since  # now: reading the loss has waited for the GPU
        record = {
            "step": number, "loss": loss, "lr": optimizer.lr, "grad_norm": norm,
            "moved": optimizer.moved(), "tokens_per_second": self.tokens / took,
            "peak_memory_gib": self.memory.peak() / GIB, "skipped": self.step.skipped.item(), "epoch": epoch,
        }  # fmt: skip
        record |= shares(record["tokens_per_second"] / parallel.ranks(), self.step.model, self.rate)
        if number == self.steps:  # it takes a pass through all moments
            record["floored"] = optimizer.floored()
        optimizer.reset_moved()
        self._write(record)
        left = self._left(number)
        print(
            f"step    {number}/{self.steps}  epoch {epoch:.2f}  loss {record['loss']:.4f}  "
            f"lr {record['lr']:.1e}  grad {record['grad_norm']:.2f}  moved {record['moved']:.3f}  "
            f"{record['tokens_per_second']:,.0f} tokens/s  peak {record['peak_memory_gib']:.2f} GiB"
            + (f"  {record['matrix_share']:.0%} of {self.rate / 1e12:.0f} TFLOP/s" if self.rate else "")
            + (f"  MFU {record['mfu']:.0%}" if "mfu" in record else "")
            + (f"  floored {record['floored']:.2%}" if record.get("floored", 0) > 1e-4 else "")
            + (f"  skipped {record['skipped']} (not finite)" if record["skipped"] else "")
            + (f"  {duration(left)} left" if left > 2 else ""),
            flush=True,
        )
        self.tokens, self.since = 0, time.perf_counter()
        return record["skipped"]

    def _left(self, number):
        """Seconds until the end, from the time since the first line; 0 in that line."""
        now = time.perf_counter()
        self.first = self.first or (number, now)
        return (now - self.first[1]) / max(1, number - self.first[0]) * (self.steps - number)

    @contextlib.contextmanager
    def paused(self):
        """What is not training: it does not count as time of a step."""
        begin = time.perf_counter()
        yield
        self.since += time.perf_counter() - begin

    def held_out(self, number, loss, best):
        """The loss on the held-out data after a step; best: whether it is the least so far."""
        line = f"held    {number}/{self.steps}  loss {loss:.4f}  perplexity {perplexity(loss):.2f}"
        print(line + ("   the best so far" if best else ""), flush=True)
        self._write({"step": number, "held_out_loss": loss, "held_out_perplexity": perplexity(loss)})

    def _write(self, record):
        if not self.writes:
            return
        valid = {k: v if math.isfinite(v) else None for k, v in record.items()}  # JSON has no NaN
        with warned(f"cannot write {self.path}"), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(valid) + "\n")
        if self.board:
            for name, value in record.items():
                if name != "step":
                    self.board.add_scalar(name, value, record["step"])
            self.board.flush()


def perplexity(loss):
    return math.exp(min(loss, 700))


def tensorboard(out):
    """A writer of TensorBoard's files in `out`."""
    from torch.utils.tensorboard import SummaryWriter  # here, because few have the package

    return SummaryWriter(Path(out) / "tensorboard")


def matrix_rate(device):
    """Operations a second of a large product in bf16, measured; None but on a CUDA that has it."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    size, times = 4096, 16
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    a @ b
    begin.record()
    for _ in range(times):
        a @ b
    end.record()
    torch.cuda.synchronize(device)
    return times * 2 * size**3 / (begin.elapsed_time(end) / 1e3)


def nominal_rate(device):
    """Operations a second of products in bf16 by the data sheet; None for what is not in `NOMINAL`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((rate * 1e12 for card, rate in NOMINAL.items() if card in name), None)


def shares(tokens_per_second, model, rate):
    """What part of the matrix products that a device can do a model's are: of the measured `rate` and of the
    nominal one, each with and without (`_once`) what is computed again; "mfu" is the nominal one without, as
    others count. {} where `rate` is None."""
    if not rate:
        return {}
    once, done = (work(model, again) * tokens_per_second for again in (False, True))
    found = {"matrix_share": done / rate, "matrix_share_once": once / rate}
    if nominal := nominal_rate(model.device):
        found |= {"nominal_share": done / nominal, "mfu": once / nominal}
    return found


def work(model, again=True):
    """Operations of matrix products for a token: 2 a weight forward, 4 backward, and with `again` 2 where a
    layer is computed again. Attention's own are left out; they are few but for long conversations."""
    layers = sum(layer.weight.numel() for layer in model.linears()[:-1])
    recomputed = 0
    if again and model.model.activation_checkpointing:
        recomputed = 1 - model.model.keep_activations / len(model.model.layers)
    return (6 + 2 * recomputed) * layers + 6 * model.lm_head.weight.numel()


def report_memory(path, memory, step):
    """Write and print where the memory went."""
    roles = {
        "weights": sum(bytes_of(p) for p in step.model.parameters()),
        "moments": step.optimizer.nbytes(),
        "gradients": step.gradient_bytes,
        "activations": max(0, memory.phases["forward"]["peak"] - memory.phases["forward"]["before"]),
    }
    report = {
        "device": str(memory.device),
        "limit_gib": memory.limit_gib,
        "phases": memory.phases,
        "roles": roles,
    }
    with replacing(path) as aside:
        aside.write_text(json.dumps(report, indent=1) + "\n")
    print(f"memory  {'GiB by phase':12}{'at its end':>12}{'at most':>12}")
    for name, phase in memory.phases.items():
        print(f"memory  {name:12}{phase['allocated'] / GIB:12.3f}{phase['peak'] / GIB:12.3f}")
    print(
        "memory  at most, by role: " + ", ".join(f"{name} {size / GIB:.3f}" for name, size in roles.items())
    )
    print(f"saved   {path}")
