"""A held-out set: does the model get better, or does it only repeat what it has seen?

A training loss of .1 may hide a wrong answer: what was seen often enough is known by heart. So some of the
data never trains. Which is decided by its content: the same conversation always falls on the same side,
however the file is ordered, and of two equal ones not one trains while the other examines.
"""

from dataclasses import dataclass

import torch

from .data import fingerprint, read, read_records
from .loss import IGNORE
from .rows import Rows


def split(settings, tokenizer):
    """(the `Data` that trains, the `Data` that is held out or None) as `settings` say."""
    how = (tokenizer, settings.seq_len, settings.drop_long)
    path, share = settings.train_data, settings.eval_share
    if settings.eval_data:
        held = read(settings.eval_data, *how)
        known = {fingerprint(record) for _, record in read_records(path)}
        shared = sum(fingerprint(record) in known for _, record in read_records(settings.eval_data))
        if shared:
            raise ValueError(
                f"--eval-data {settings.eval_data} shares {shared} of {held.records} with --train-data "
                f"{path}: what trains cannot examine"
            )
        return read(path, *how), held
    if not share:
        return read(path, *how), None
    kept = sum(fingerprint(record) < share for _, record in read_records(path))
    total = len(read_records(path))
    if not 0 < kept < total:
        raise ValueError(f"--eval-share {share:g} of {total} leaves {'nothing to learn' if kept else 'none'}")
    parts = (lambda record: fingerprint(record) >= share, lambda record: fingerprint(record) < share)
    return tuple(read(path, *how, wanted=part) for part in parts)


class HeldOut:
    """`loss()`: the mean over all learned tokens of some `Data`, in packed rows of `size` tokens."""

    def __init__(self, model, data, pad, size, kind):
        examples, records = data.examples, data.records
        self.model, self.kind, self.device = model, kind, model.device
        self.records, self.rows = records, Rows(examples, pad, size=size, mode="sequential")

    def tokens(self):
        return sum(len(ids) for ids, _ in self.rows.examples)

    @torch.no_grad()
    def loss(self):
        total, counted = 0.0, 0
        for number in range(len(self.rows.epoch(0))):
            ids, labels, spans = self.rows.batch(number, self.device)
            count = int((labels[:, 1:] != IGNORE).sum())
            if count:
                loss = self.model.loss(ids, labels, self.kind, select=False, spans=spans).item()
                total, counted = total + loss * count, counted + count
        return total / counted


@dataclass
class Best:
    """The least loss so far, its step, and how many evaluations have passed since."""

    loss: float | None = None
    step: int = 0
    since: int = 0

    def take(self, loss, step):
        """Whether `loss` is the least so far."""
        better = self.loss is None or loss < self.loss
        self.since = 0 if better else self.since + 1
        if better:
            self.loss, self.step = loss, step
        return better
