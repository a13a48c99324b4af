"""Started by torchrun, or alone: trains small models on the same batches, and keeps what came of it.

    torchrun --standalone --nproc-per-node 3 tests/ranks.py DIR     each process takes one of a step's 3 parts
    python tests/ranks.py DIR --parts 3                             one takes them in turn

`test_parallel.py` compares. On GPUs (`--device cuda`) the steps are compiled, and recorded.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import small_model

from minifp4 import AdamW, linear, masters, parallel
from minifp4.files.atomic import bits
from minifp4.fused import fuse, record
from minifp4.packed import Packed
from minifp4.step import Step

STEPS = 2
CASES = list(itertools.product(
    ("untied", "tied"), ("nvfp4", "nvfp4x2", "bf16"), (torch.float32, torch.bfloat16),
    ("plain", "in backward"),
))  # fmt: skip

ON_GPUS = ("untied", "nvfp4", torch.bfloat16), ("tied", "nvfp4x2", torch.bfloat16)


def batches(step, parts, device):
    """The parts of a step, of different lengths, with some tokens that are not learned."""
    generator = torch.Generator().manual_seed(step)
    for part in range(parts):
        ids = torch.randint(3, 800, (2, 12 + 2 * part), generator=generator)
        yield ids.to(device), torch.where(ids % 7 == part, -100, ids).to(device)


def trained(case, parts, device, steps=STEPS, spoil=False):
    """The weights and this process's moments after some steps, and what was told.

    spoil: in the last step the last process's loss is not a number.
    """
    tied, master, dtype, how = case
    model = small_model(tie_word_embeddings=tied == "tied", intermediate_size=192, vocab_size=900)
    masters.choose_trained(model, lm_head=True, embed=True)
    masters.set_masters(model, master, device)
    model.set_compute_dtype(dtype)
    optimizer = AdamW(model.named_parameters(), lr=1e-2, state="nvfp4")
    step = Step(model, optimizer, in_backward=how == "in backward" and parallel.ranks() > 1)
    if device.type == "cuda":
        fuse(model, optimizer)
        record(step)
    losses = []
    for number in range(steps):
        mine = [batch for batch in batches(number, parts, device)]
        mine = mine if parallel.ranks() == 1 else parallel.share(mine)
        if spoil and number == steps - 1 and parallel.rank() == parallel.ranks() - 1:
            step.loss = lambda *args, **how: model.loss(*args, **how) * torch.nan
        losses.append(step(mine)[0].item())
    step.close()
    weights = {}
    for name, p in model.named_parameters():
        parts = p.tensors() if isinstance(p, Packed) else {"data": p.detach()}
        weights |= {f"{name}.{part}": bits(tensor) for part, tensor in parts.items()}
    moments = [(piece.name, piece.first, piece.rows, bits(piece.tensor)) for piece in optimizer.pieces()]
    told = {"losses": losses, "moved": optimizer.moved(), "floored": optimizer.floored(),
            "skipped": step.skipped.item(), "bytes": optimizer.nbytes()}  # fmt: skip
    return {"weights": weights, "moments": moments, **told}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="cases with this in their names")
    chosen = parser.parse_args()
    parallel.start(chosen.device)
    device = torch.device(parallel.own_device(chosen.device))
    linear.WORDS = 256  # so that these small heads have several slices, of which the last is shorter
    torch.set_num_threads(1)
    parts = chosen.parts or parallel.ranks()
    cases = CASES if device.type == "cpu" else [case for case in CASES if case[:3] in ON_GPUS]
    cases = [case for case in cases if chosen.only in str(case)]
    found = {str(case): trained(case, parts, device) for case in cases}
    for how in ("plain", "in backward") if device.type == "cpu" else ():
        spoil = parallel.ranks() > 1  # a process that has others to spoil it for
        found[f"spoiled, {how}"] = trained((*CASES[0][:3], how), parts, device, STEPS - (not spoil), spoil)
    torch.save(found, chosen.folder / f"{parallel.ranks()}-{parallel.rank()}-{parts}.pt")
    parallel.close()
    parallel.leave()


if __name__ == "__main__":
    main()
