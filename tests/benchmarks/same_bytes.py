"""Do two checkouts train the same bits? Six bundled steps with every master, state and rounding.

    python tests/benchmarks/same_bytes.py OTHER          this checkout against that in the directory OTHER
    python tests/benchmarks/same_bytes.py OTHER --steps 2 --only nvfp4x2

Each combination runs in a process of its own on the CPU, and its model.safetensors and optimizer.safetensors
are compared byte for byte. For changes that must not change what is computed; a change that must, says so.
"""

import argparse
import hashlib
import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
MASTERS = ("fp32", "bf16", "fp16", "nvfp4x2", "nvfp4")
STATES = ("fp32", "bf16", "int8", "nvfp4")
FILES = ("model.safetensors", "optimizer.safetensors")


def digests(checkout, flags):
    """The hashes of what `train.py` in a checkout writes."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "train.py", "--train-lm-head", "--train-embed", "--device", "cpu",
                   "--test-max-tokens", "1", "--out", out, *flags]  # fmt: skip
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{checkout}: {done.stderr.splitlines()[-1]}")
        [directory] = Path(out).glob("step-*")
        return [hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in FILES]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, help="directory of the other checkout")
    parser.add_argument("--steps", default="6", help="of each run")
    parser.add_argument("--only", help="masters with this in their name")
    parser.add_argument("flags", nargs="*", help="more flags for train.py, after --")
    chosen, differing = parser.parse_args(), 0
    for master, state, rounding in itertools.product(MASTERS, STATES, ("stochastic", "nearest")):
        if chosen.only and chosen.only not in master:
            continue
        flags = ["--master-dtype", master, "--optimizer-state", state, "--rounding", rounding]
        flags += ["--steps", chosen.steps, *chosen.flags]
        same = [a == b for a, b in zip(digests(ROOT, flags), digests(chosen.other.resolve(), flags))]
        differing += not all(same)
        says = ", ".join(f"{name} {'same' if equal else 'DIFFERS'}" for name, equal in zip(FILES, same))
        print(f"{master:8} {state:6} {rounding:11} {says}", flush=True)
    sys.exit(f"{differing} combinations differ" if differing else None)


if __name__ == "__main__":
    main()
