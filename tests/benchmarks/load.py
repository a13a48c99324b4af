"""A large checkpoint from disk to trained weights, with train.py itself and a limit to its memory.

    python tests/benchmarks/load.py            Qwen3-4B's exact shapes (tied): 8 GB of random bf16 weights
    python tests/benchmarks/load.py --quick    a tiny model

Writes the checkpoint as Hugging Face directory, then trains every weight of it for a few steps on the bundled
conversations and saves. train.py says how much memory each phase took; on a GPU it must do with 10 GiB, where
the dense weights alone, their gradients and fp32 moments would take 60.
"""

import argparse
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
from minifp4.files import checkpoint
from minifp4.model import Qwen3

ROOT = Path(__file__).parents[2]
LIMIT = 10  # GiB
TRAIN = (
    "--train-lm-head --train-embed --master-dtype nvfp4 --optimizer-state nvfp4 --step-in-backward "
    "--activation-checkpointing --steps 5 --batch-size 8 --test-prompt 你是誰 --test-max-tokens 4"
)


def write(directory, size, device):
    """A checkpoint with random weights in the shapes of `size`, tied as Qwen3-4B is; the number of bytes."""
    config = config_of(size)
    config.tie_word_embeddings = True
    names = list(config.__annotations__)[:9]
    config.source = {"model_type": "qwen3", **{name: getattr(config, name) for name in names}}
    with torch.device("meta"):
        model = Qwen3(config)

    def value(p):
        x = torch.empty(p.shape, dtype=torch.bfloat16, device=device)
        return (x.normal_(std=0.02) if p.dim() == 2 else x.fill_(1.0)).cpu()

    tensors = {name: value(p) for name, p in model.named_parameters()}
    directory.mkdir()
    tokenizer = checkpoint.read_tokenizer(minifp4.BASE)
    checkpoint.write_model(directory, config, tokenizer, tensors)
    return sum(tensor.nbytes for tensor in tensors.values())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--size", help="0.6B, 1.7B, 4B or 8B; default: 4B")
    chosen = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{place(device)}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        folder, start = Path(folder), time.perf_counter()
        size = write(folder / "model", chosen.size or ("tiny" if chosen.quick else "4B"), device)
        print(f"wrote {size / 2**30:.3f} GiB in {time.perf_counter() - start:.1f} s", flush=True)
        files = {"--model": "model", "--out": "out", "--memory-report": "memory.json"}
        arguments = [word for flag, name in files.items() for word in (flag, str(folder / name))]
        if device == "cuda":
            arguments += ["--memory-limit-gb", str(LIMIT)]
            torch.cuda.empty_cache()
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "train.py", *TRAIN.split(), *arguments], cwd=ROOT)
        if done.returncode:
            sys.exit(f"train.py failed with exit code {done.returncode}")
        print(f"train.py took {time.perf_counter() - start:.1f} s in all")


if __name__ == "__main__":
    main()
