"""What random draws that turn do for a weight: AdamW on a noisy quadratic, weights on an even grid; what
moments of few bits make of a step; and what stored weights of few bits add to the distance from a goal.

    python tests/benchmarks/draws.py        a CPU, two minutes

4,096 weights seek their goals by gradients that are as noisy as they are long (moments in fp32, a constant
rate). For some ratios of the rate to the gap of the grid: how much rounding adds to the mean square of the
distance, with draws that turn (`chance.py`) as a part of that with draws that are new in each step, and
`moved` of both.

Then AdamW's moments of gradients that are twice as noisy as they are long, in 1,024 blocks whose sizes spread
by some octaves (standard deviation): how large the stored m is, how long steps are for the stored sqrt(v),
both as parts of the exact ones, and by how much these lengths spread.

Last, 131,072 weights (standard deviation .02) on their way to goals of .04, with moments in fp32, a rate of
1e-3 that falls to 0 and gradients at what products read, two times as noisy as they are long: the mean square
of the distance at the end, beside that of weights in fp32, of what is stored and of what products read.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))
import ideas

import minifp4
from minifp4 import chance, nvfp4, optim, packed, storage

WEIGHTS, STEPS, SPREAD = 4096, 2000, 0.02
RATIOS = 1 / 27, 1 / 8, 0.6, 2.0


def trained(lr, gap, key=chance.rounding_key):
    """(mean square of the distance over the second half of the steps, `moved`); gap 0: no rounding."""
    generator = torch.Generator().manual_seed(0)
    goal = torch.randn(WEIGHTS // 16, 16, generator=generator) * SPREAD
    w, m, v = torch.zeros_like(goal), torch.zeros_like(goal), torch.zeros_like(goal)
    first, total, stored, requested = torch.tensor(0, dtype=torch.int32), 0.0, 0.0, 0.0
    for step in range(1, STEPS + 1):
        gradient = w - goal + SPREAD * torch.randn(goal.shape, generator=generator)
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient.square()
        way = lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        new = w - way
        if gap:
            bits = chance.random_bits(torch.tensor(key(0, step, "w"), dtype=torch.int32), first, goal.shape)
            new = (new / gap + chance.uniform(bits)).floor() * gap
        stored, requested = stored + ((w - new) * way.sign()).sum(), requested + way.abs().sum()
        w = new
        total += (w - goal).square().mean().item() * (step > STEPS // 2)
    return total / (STEPS // 2), (stored / requested).item()


def moments(state, octaves, steps=300):
    """(size of m, mean length of a step, its standard deviation) of AdamW's `state`, after 100 steps."""
    generator, everything = torch.Generator().manual_seed(0), slice(None)
    size = 2 ** (torch.randn(32, 512, generator=generator) * octaves)
    mean = torch.randn(size.shape, generator=generator) * size / 2
    weight = torch.nn.Parameter(torch.zeros_like(size))
    optimizer = minifp4.AdamW([("w", weight)], lr=1e-3, betas=(0.9, 0.95), state=state)
    [part], m, v, sizes, lengths = optimizer.all_parts(), 0.0, 0.0, [], []
    for step in range(1, steps + 1):
        weight.grad = mean + size * torch.randn(size.shape, generator=generator)
        m, v = 0.9 * m + 0.1 * weight.grad, 0.95 * v + 0.05 * weight.grad.square()
        optimizer.step()
        if step > 100:
            stored_m, root = (store.read(everything) for store in part.stores[1:])
            sizes.append((stored_m * mean).sum() / (m * mean).sum())
            lengths.append(v.sqrt() / root)
    lengths = torch.stack(lengths)
    return torch.stack(sizes).mean().item(), lengths.mean().item(), lengths.std().item()


def weights(kind, steps=1000):
    """Mean squares of the distance of (what is stored, what products read) of weights of one kind."""
    generator, scale = torch.Generator().manual_seed(0), torch.tensor(2.0**-11)
    goal, start = (torch.randn(256, 512, generator=generator) * size for size in (0.04, 0.02))
    optim.master = ideas.EvenPlaces if kind == "8 even bits" else storage.master
    if kind.startswith("nvfp4"):
        start = packed.pack(start, scale, kind == "nvfp4x2")
    weight = torch.nn.Parameter(start.bfloat16() if kind == "bf16" else start)
    optimizer = minifp4.AdamW([("w", weight)], betas=(0.9, 0.95), weight_decay=0.1, state="fp32")
    for step in range(steps):
        gradient = read(weight, scale) - goal + 0.08 * torch.randn(goal.shape, generator=generator)
        weight.grad = gradient.bfloat16().to(weight.dtype)
        optimizer.lr = 1e-3 * min(1, (steps - step) / (0.3 * steps))
        optimizer.step()
    stored = packed.stored_values(weight).float()
    return [(x - goal).square().mean().item() for x in (stored, read(weight, scale))]


def read(weight, scale):
    """What products read of it."""
    if isinstance(weight, packed.Packed):
        return weight.decode()
    return nvfp4.fake_quantize(weight.detach().float(), scale)


def main():
    print(f"{'lr / gap':>8}{'turning':>9}{'moved':>8}{'moved, new':>12}")
    for ratio in RATIOS:
        lr = 1e-3 if ratio == 2 else 3e-4
        exact, _ = trained(lr, 0)
        turning, moved = trained(lr, lr / ratio)
        new, moved_new = trained(lr, lr / ratio, ideas.new_key)
        part = (turning - exact) / (new - exact)
        print(f"{ratio:8.3f}{part:9.2f}{moved:8.3f}{moved_new:12.3f}", flush=True)
    print(f"\n{'moments':10}{'octaves':>10}{'m':>8}{'step':>8}{'spread':>8}")
    storage.KINDS.update(ideas.KINDS)
    for state in ("int8", "nvfp4", "fine top"):
        for octaves in (0.3, 0.5, 1.0):
            found = moments(state, octaves)
            print(f"{state:10}{octaves:10.1f}" + "".join(f"{x:8.3f}" for x in found), flush=True)
    print(f"\n{'weights':12}{'stored':>8}{'read':>8}")
    exact = weights("fp32")
    for kind in ("bf16", "8 even bits", "nvfp4x2", "nvfp4"):
        more = [mine / best - 1 for mine, best in zip(weights(kind), exact)]
        print(f"{kind:12}" + "".join(f"{x:+8.1%}" for x in more), flush=True)


if __name__ == "__main__":
    main()
