"""A held-out set: does the model get better, or does it only repeat what it has seen?

A training loss of .1 may hide a wrong answer: what was seen often enough is known by heart. So some of the
data never trains. Which is decided by its content: the same conversation always falls on the same side,
however the file is ordered, and of two equal ones not one trains while the other examines.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from . import parallel
from .data import fingerprint, read, read_records
from .files import checkpoint
from .loss import IGNORE
from .rows import Rows


def split(settings, tokenizer):
    """(the `Data` that trains, the `Data` that is held out or None) as `settings` say."""
    how = (tokenizer, settings.seq_len, settings.drop_long)
    path, share, other = settings.train_data, settings.eval_share, settings.eval_data
    records, held = read_records(path), []
    if other:
        held, known = read_records(other), {fingerprint(record) for _, record in records}
        shared = sum(fingerprint(record) in known for _, record in held)
        if shared:
            raise ValueError(
                f"--eval-data {other} shares {shared} of {len(held)} with --train-data {path}: what trains "
                "cannot examine"
            )
    elif share:
        marks = [fingerprint(record) < share for _, record in records]
        held = [one for one, mark in zip(records, marks) if mark]
        trains = [one for one, mark in zip(records, marks) if not mark]
        if not held or not trains:
            what = "nothing to learn" if held else "none"
            raise ValueError(f"--eval-share {share:g} of {len(records)} leaves {what}")
        records = trains
    return read(path, *how, records), read(other or path, *how, held) if held else None


class HeldOut:
    """`loss()`: the mean over all learned tokens of some `Data`, in packed rows of `size` tokens, or as long
    as the longest example."""

    def __init__(self, model, data, pad, size, kind):
        self.model, self.kind, self.device, self.data = model, kind, model.device, data
        size = max(size, *(len(ids) for ids, _ in data.examples))
        self.rows = Rows(data.examples, pad, size=size, mode="sequential")

    @torch.no_grad()
    def loss(self):
        total, counted = 0.0, 0
        for number in range(parallel.rank(), len(self.rows.epoch(0)), parallel.ranks()):
            ids, labels, spans = self.rows.batch(number, self.device)
            count = int((labels[:, 1:] != IGNORE).sum())
            if count:
                loss = self.model.loss(ids, labels, self.kind, select=False, spans=spans).item()
                total, counted = total + loss * count, counted + count
        total, counted = parallel.add_up(torch.tensor([total, counted], dtype=torch.float64)).tolist()
        return total / counted if counted else math.nan


@dataclass
class Best:
    """The least loss so far, its step, and how many evaluations have passed since."""

    loss: float | None = None
    step: int = 0
    since: int = 0

    def take(self, loss, step):
        """Whether `loss` is the least so far."""
        better = math.isfinite(loss) and (self.loss is None or loss < self.loss)
        self.since = 0 if better else self.since + 1
        if better:
            self.loss, self.step = loss, step
        return better


def best_so_far(out, run, before):
    """The `Best` of a run that goes on, from its checkpoint of that name in `out`; a new one if there is none
    or it is another run's. before: the train.json of the checkpoint from which it goes on, or {}."""
    path = Path(out) / checkpoint.BEST / "train.json"
    record = checkpoint.read_json(path) if path.is_file() else {}
    if record.get("run") != run:
        return Best()
    found = record.get("best")
    if not isinstance(found, dict) or not isinstance(found.get("loss"), float):
        raise ValueError(f'{path}: "best" must have the loss and the step')
    older = before.get("best")
    since = older.get("since") if isinstance(older, dict) else 0
    return Best(found["loss"], checkpoint.number_in(found, "step", path), since if type(since) is int else 0)
