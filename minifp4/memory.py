"""Where memory goes: by phase of a run (load, answer, forward, backward, step, evaluate, save), and by role.

On a GPU the numbers are the allocator's: tensors that exist, and the most that existed at once. On a CPU they
are the process's, interpreter and libraries included; `roles` counts the tensors alone in both cases.
"""

import contextlib
import os
import platform
import re
import sys
from pathlib import Path

import torch

GIB = 2**30
KINDS = "--master-dtype nvfp4", "--optimizer-state nvfp4"
BATCH = "a smaller --batch-size", "a smaller --batch-tokens", "a smaller --seq-len"
ADVICE = {  # what lowers the peak of a phase
    "load": (*KINDS, "a smaller model"),
    "answer": (*KINDS, "a smaller --test-max-tokens"),
    "forward": ("--activation-checkpointing", *BATCH, "--no-cuda-graph"),  # a recorded step keeps memory
    "backward": ("--step-in-backward", "--activation-checkpointing", *BATCH, "--no-cuda-graph"),
    "step": ("--step-in-backward", "--step-chunk-rows", *KINDS),
    "evaluate": BATCH[1:],
    "save": ("closing other programs",),
}


def one_growing_segment():
    """Ask torch's GPU allocator, before it is first used, for segments that grow instead of many of fixed
    size: in those, little is left unusable between tensors that come and go. A user's own settings stay.
    """
    if {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        return
    # Windows has none, and under WSL the first allocation may fail (pytorch issue 192330).
    if sys.platform == "linux" and "microsoft" not in platform.release().lower():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


class Shortage(ValueError):
    """Memory is not enough; the text says for what, and what lowers it."""


class Memory:
    """`with memory.phase("forward"): ...` keeps the bytes at its end and its peak, the largest of all times.

    limit_gib: at most so much for this process (None: all there is). The allocator of a GPU keeps it, on
    Linux the kernel for a CPU. Raises ValueError where neither can.
    in_use: what of `ADVICE` need not be said.
    """

    def __init__(self, device, limit_gib=None, in_use=()):
        self.device, self.limit_gib, self.phases, self.current = device, limit_gib, {}, "load"
        self.in_use = in_use
        self.highest = 0  # peak of a phase, bytes, since somebody has set this to 0
        self.base = 0 if device.type == "cuda" else self.now()[0]  # the limit of a process is beside this
        if limit_gib is None:
            return
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gib * GIB / total), device)
        else:
            _limit_process(int(limit_gib * GIB))

    @contextlib.contextmanager
    def phase(self, name):
        outer, self.current = self.current, name
        self._reset_peak()
        before = self.now()[0]
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            raise Shortage(self._shortage(error)) from None
        finally:
            allocated, peak = self.now()
            old = self.phases.get(name, {"before": 0, "allocated": 0, "peak": 0})
            new = {"before": before, "allocated": allocated, "peak": peak}
            self.highest = max(self.highest, peak)
            self.phases[name] = {key: max(old[key], new[key]) for key in new}
            self.current = outer

    def now(self):
        """(bytes in use, their peak since the phase began)"""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
        return _process()

    def _reset_peak(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with contextlib.suppress(OSError):  # where it cannot be reset, peaks are those of the whole run
            Path("/proc/self/clear_refs").write_text("5")

    def _shortage(self, error):
        """One line: the phase, how much, and what lowers it."""
        limit = f"--memory-limit-gb {self.limit_gib:g}" if self.limit_gib else "the memory of this device"
        used = f"{(self.now()[0] - self.base) / GIB:.2f} GiB were in use"
        if self.base:
            used += " beside the interpreter"
        if self.device.type == "cuda":
            used += f" ({torch.cuda.memory_reserved(self.device) / GIB:.2f} with what the allocator keeps)"
        if size := wanted(error):
            used += f" and {size} more were asked for"
        advice = " or ".join(what for what in ADVICE[self.current] if what not in self.in_use)
        return f"{limit} is not enough: in the phase {self.current!r} {used}; less is needed with {advice}"

    def peak(self):
        """The largest peak of all phases so far, bytes."""
        return max((phase["peak"] for phase in self.phases.values()), default=self.now()[1])


def is_shortage(error):
    """Whether an error says that memory is short."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def wanted(error):
    """What such an error says was asked for, "742.0 MiB", or None."""
    if not (found := re.search(r"allocate ([\d.]+) (\w+)", str(error))):
        return None
    size, unit = float(found[1]), found[2]  # "742.00 MiB" on a GPU, "13762560 bytes" on a CPU
    return f"{size / 2**20:.2f} MiB" if unit == "bytes" else f"{size} {unit}"


def _process():
    """(resident bytes of this process, their peak)"""
    try:
        text = Path("/proc/self/status").read_text()
        return tuple(int(re.search(rf"{key}:\s+(\d+) kB", text)[1]) * 1024 for key in ("VmRSS", "VmHWM"))
    except OSError:  # not Linux
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return peak, peak


def _limit_process(size):
    """Let this process use at most `size` more bytes of private memory than it has now."""
    try:
        import resource

        in_use = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    except (ImportError, OSError):
        raise ValueError("--memory-limit-gb on a CPU needs Linux") from None
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (in_use + size, hard))
