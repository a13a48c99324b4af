"""Several processes, one for each GPU, that train as one:

    torchrun --standalone --nproc-per-node 4 train.py ...

Every process has all weights, for in 4 bits they are small, and computes with its part of the batch. But of
every matrix it updates only some rows, and only of these has it moments:

    exchange    each process sends the others their rows of its gradient       2 bytes a weight
    update      of its own rows, by the sum: 1/n of the work and of the moments
    gather      each process sends the others the new codes of its rows        .56 bytes a weight

So a weight is rounded in one place, and its codes are copied: all processes have the same weights by
construction, whatever a network does. Gradients are added in the order of the processes, not in that in
which they arrive, so that n processes give what one gives with `--grad-accum n`, bit for bit (where gradients
are clipped, but for the last bit of their norm); a library's own all-reduce promises no order. Random bits
depend on the step, the weight and the row (`chance.py`), so it does not matter who has which rows. Vectors,
and rows that cannot be divided, are updated by all alike.

Rows are divided by stretches, those in which head and embedding get their gradients (`linear.word_slices`).

Why not FSDP2, torch's way to divide a model? It divides the weights too, and gathers them whenever a layer
is read: 3 bytes a weight over the network instead of 2.6, five more operations that a packed tensor must
know, and the gradients of a whole layer at a time. It pays where half a byte a weight does not fit on a card
(32B on 24 GB), and only there.

With one process all of this does nothing.
"""

import datetime
import os
import sys

import torch
import torch.distributed as dist

from .linear import word_slices
from .packed import tensors_of

WAIT = datetime.timedelta(minutes=10)  # for another process, which may compile or read a large file


def launched():
    """How many processes torchrun has started, or 1."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def launched_here():
    """How many of them on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", launched()))


def start(name):
    """Meet the other processes, if torchrun has started some; ValueError says why they cannot meet.

    name: of a device, or None, as `own_device` takes it.
    """
    if launched() == 1 or met():
        return
    cuda = torch.cuda.is_available() and name != "cpu"
    device = torch.device(own_device(name)) if cuda else None
    if cuda:
        torch.cuda.set_device(device)
        # A recorded step must not depend on what the others record.
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
        # Each would compile with as many threads as if it had the machine for itself.
        threads = max(1, (os.cpu_count() or 1) // launched_here())
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(32, threads)))
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=WAIT, device_id=device)
    except (dist.DistError, RuntimeError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the {launched()} processes cannot meet at {where} ({reason}); torchrun --standalone finds a "
            "free port"
        ) from None


def close():
    """Part from the other processes, when all have come to their end (and recorded steps are gone: NCCL would
    wait for them)."""
    if met():
        largest(0)
        dist.destroy_process_group()


def leave(status=0):
    """End this process at once if it is one of several. While Python itself ends it may wait for the others,
    or a thread of gloo aborts it, and torchrun would call a good run a failure."""
    if launched() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def own_device(name):
    """The device of this process where nobody, or no number, has said which: one GPU for each."""
    if launched() == 1 or name == "cpu" or not torch.cuda.is_available():
        return name
    if name not in (None, "cuda"):
        raise ValueError(f"--device {name}: {launched()} processes need a device each; leave the number out")
    here, number = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    if number >= here:
        raise ValueError(
            f"torchrun has started {launched_here()} processes here, and there are {here} GPUs; give "
            f"--nproc-per-node {here}, or --device cpu"
        )
    return f"cuda:{number}"


def met():
    """Whether there are several processes, and this one has met the others."""
    return dist.is_available() and dist.is_initialized()


def rank():
    return dist.get_rank() if met() else 0


def ranks():
    return dist.get_world_size() if met() else 1


def stretches(rows):
    """Slices that cover so many rows; each is divided among the processes, or all have it."""
    return word_slices(rows) if ranks() > 1 else [slice(0, rows)]


def own(stretch):
    """The rows of a stretch that this process updates; None if it cannot be divided."""
    each, rest = divmod(stretch.stop - stretch.start, ranks())
    return None if rest else slice(stretch.start + rank() * each, stretch.start + (rank() + 1) * each)


def add_up(tensor):
    """Make `tensor` the sum of those of all processes, in their order; returns it."""
    if ranks() > 1:
        _add(tensor, _of_all(tensor))
    return tensor


def add_up_own(gradient):
    """Make the rows of a gradient that this process updates (`own`) the sum of all processes'; the others are
    left as they are."""
    if ranks() == 1:
        return
    if gradient.dim() == 1:
        add_up(gradient)
        return
    for stretch in stretches(len(gradient)):
        mine = own(stretch)
        if mine is None:
            add_up(gradient[stretch])
            continue
        received = torch.empty_like(gradient[stretch])
        dist.all_to_all_single(_bytes(received), _bytes(gradient[stretch]))
        _add(gradient[mine], received.unflatten(0, (ranks(), -1)))


def _add(tensor, parts):
    first, *others = parts
    tensor.copy_(first)
    for other in others:
        tensor += other


def gather(weight, first_row=0, count=None):
    """Bring into some rows of a weight what the other processes have made of theirs."""
    if ranks() == 1 or weight.dim() == 1:
        return
    for stretch in stretches(len(weight) if count is None else count):
        stretch = slice(first_row + stretch.start, first_row + stretch.stop)
        if mine := own(stretch):
            tensors = [tensor for tensor in tensors_of(weight) if tensor.dim()]
            sent = torch.cat([_bytes(tensor[mine]).flatten() for tensor in tensors])
            sizes = [tensor[mine].nbytes for tensor in tensors]
            for tensor, part in zip(tensors, _of_all(sent).split(sizes, 1)):
                _bytes(tensor[stretch]).view(ranks(), -1).copy_(part)


def _of_all(tensor):
    """Every process's `tensor`, [processes, *its shape]."""
    found = tensor.new_empty(ranks(), *tensor.shape)
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # since torch 2.13, and before
    gather(_bytes(found).flatten(), _bytes(tensor).flatten())
    return found


def _bytes(tensor):
    """What is only copied needs no type; gloo knows few."""
    return (tensor if tensor.dim() else tensor.view(1)).view(torch.uint8)


def share(items):
    """The stretch of `items` (a list whose length the number of processes divides) that is this process's."""
    each = len(items) // ranks()
    return items[rank() * each : (rank() + 1) * each]


def largest(number):
    """The largest of all processes' whole numbers; they wait for each other."""
    if ranks() == 1:
        return number
    found = torch.tensor([number])
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def from_first(value):
    """The first process's `value`, anything that can be pickled."""
    values = [value]
    if ranks() > 1:
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def check_same(**values):
    """Raise ValueError, everywhere, if a process has another of these `values` than the first."""
    if ranks() == 1:
        return
    found = [None] * ranks()
    dist.all_gather_object(found, values)
    for number, theirs in enumerate(found):
        for name, value in theirs.items():
            if value != found[0][name]:
                other = found[0][name]
                raise ValueError(f"process {number} has another {name} than process 0: {value}, not {other}")


def lost(error):
    """Whether a RuntimeError says that another process is gone."""
    return ranks() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


def first_to_fail():
    """Whether no other process has said what went wrong: then this one does."""
    if launched() == 1:
        return True
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=10)))
        return store.add("minifp4/failed", 1) == 1
    except (dist.DistError, RuntimeError, ValueError):  # nobody there to ask
        return True
