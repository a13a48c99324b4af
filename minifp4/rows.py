"""Packed rows: conversations of all lengths, one after the other, in rows of the same number of tokens.

Put each conversation into a row of its own, and most of a batch is padding, which takes as long to compute as
text:

    padded   你 是 誰 . . . . .        packed   你 是 誰 U F O ? 我 | 是 ...
             U F O ? . . . . .
             我 是 . . . . . .

In a packed row each conversation is computed as if it were alone: attention looks only at its own tokens,
and positions start anew (`Spans`). So the loss and all gradients are those of padded rows, and a row has one
shape, whatever is in it.

Which conversations share a row depends on the order of the epoch and on nothing else, so a batch remains a
pure function of (seed, step), and a run that resumes needs no memory of its data.
"""

import functools
import inspect
import math

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from . import parallel
from .chat import order, sample
from .loss import IGNORE

OPEN = 32  # rows that wait for a conversation which still fits


class Spans:
    """Where the conversations of a packed row lie.

    starts: int32 [N + 1], the first token of each, and the row's length, as often as is left.
    longest: at most so many tokens has one.

    As part of a batch it is copied like a tensor.
    """

    def __init__(self, starts, longest):
        self.starts, self.longest = starts, longest
        self.shape = (len(starts), longest)

    def clone(self):
        return Spans(self.starts.clone(), self.longest)

    def copy_(self, other, non_blocking=False):
        self.starts.copy_(other.starts, non_blocking)

    def positions(self, tokens):
        """Each token's place in its conversation, [1, tokens]."""
        place = torch.arange(tokens, device=self.starts.device, dtype=torch.int32)
        number = torch.searchsorted(self.starts, place, right=True) - 1
        return (place - self.starts[number]).unsqueeze(0)

    def attend(self, q, k, v):
        """Causal attention of each conversation alone; q [1, H, T, head_dim], k and v [1, kv heads, T,
        head_dim] -> as q.

        On GPUs that have it, torch's attention for rows of all lengths in one kernel; else one by one.
        """
        if in_one_kernel(q.device, q.dtype):
            q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
            return _variable_length(q, k, v, self.starts, self.longest).transpose(0, 1).unsqueeze(0)
        lengths = [length for length in self.starts.diff().tolist() if length]
        alone = zip(*(x.split(lengths, 2) for x in (q, k, v)))
        return torch.cat(
            [F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True) for one in alone], 2
        )


def in_one_kernel(device, dtype):
    """Whether the GPU has attention for rows of all lengths: from compute capability 8.0 on, in 16 bits."""
    if device.type != "cuda" or dtype == torch.float32:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _variable_length(q, k, v, starts, longest):
    """torch's `varlen_attn`, causal; torch 2.11 takes grouped queries without being asked to."""
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0), **grouped)


class Rows:
    """The packed rows of some examples [(ids, labels)]: row after row, epoch after epoch.

    size: tokens of a row; None: one row holds `count` examples and is as long as they are.
    pad: the token that fills a row up. mode, seed: as in `chat.sample`.
    """

    def __init__(self, examples, pad, *, size=None, count=None, mode="random", seed=0, multiple=1):
        self.examples, self.pad, self.size, self.count = examples, pad, size, count
        self.mode, self.seed, self.multiple = mode, seed, multiple
        self.longest = max(len(ids) for ids, _ in examples)
        if size and self.longest > size:
            raise ValueError(f"a conversation of {self.longest} tokens does not fit into a row of {size}")
        self.epoch = functools.lru_cache(2)(self._epoch)
        self.ends = [0]  # the rows before each epoch so far

    def _epoch(self, number):
        """The rows of an epoch, each a list of numbers of examples; only with a `size`."""
        places = range(len(self.examples))
        if self.mode == "random":
            places = order(len(self.examples), self.seed, number).tolist()
        return fill([len(ids) for ids, _ in self.examples], places, self.size)

    def _before(self, epoch):
        """How many rows the epochs before `epoch` have."""
        while len(self.ends) <= epoch:
            self.ends.append(self.ends[-1] + len(self.epoch(len(self.ends) - 1)))
        return self.ends[epoch]

    def _find(self, number):
        """(epoch, which of its rows) of row `number`."""
        epoch = 0
        while self._before(epoch + 1) <= number:
            epoch += 1
        return epoch, number - self._before(epoch)

    def chosen(self, number):
        """The numbers of the examples in row `number`."""
        if self.size:
            epoch, row = self._find(number)
            return self.epoch(epoch)[row]
        numbers = range(len(self.examples))
        return sample(numbers, number, batch_size=self.count, seed=self.seed, mode=self.mode)

    def passed(self, number):
        """How many epochs are over after so many rows."""
        if self.size is None:
            return number * self.count / len(self.examples)
        epoch, row = self._find(number)
        return epoch + row / len(self.epoch(epoch))

    def until(self, epochs):
        """How many rows so many epochs have."""
        if self.size is None:
            return math.ceil(epochs * len(self.examples) / self.count)
        whole = int(epochs)
        return self._before(whole) + math.ceil((epochs - whole) * len(self.epoch(whole)))

    def tokens(self, number):
        """How many tokens of text row `number` has."""
        return sum(len(self.examples[place][0]) for place in self.chosen(number))

    def full(self):
        """The share of the first epoch's rows that is text."""
        if self.size is None:
            return 1.0
        return sum(len(ids) for ids, _ in self.examples) / (self.size * len(self.epoch(0)))

    def batch(self, number, device="cpu"):
        """(ids [1, T], labels [1, T], `Spans`) of row `number`."""
        return self.laid([self.examples[place] for place in self.chosen(number)], device)

    def mine(self, numbers, device, joined=False):
        """[batch]: what this process computes of some rows: its share of them, or where these are too few,
        its share of each one's conversations; joined: all of it in one row."""
        rows = [self.chosen(number) for number in numbers]
        if len(rows) % parallel.ranks() == 0:
            rows = parallel.share(rows)
        else:
            rows = [parallel.share(row) for row in rows]
        count = len(rows) if joined else 1
        rows = [sum(rows, [])] if joined else rows
        return [self.laid([self.examples[place] for place in row], device, count) for row in rows]

    def laid(self, examples, device, rows=1):
        """Some examples as one row, as long as so many."""
        ids = [token for one, _ in examples for token in one]
        labels = [label for _, one in examples for label in (IGNORE, *one[1:])]  # nobody foretells the first
        starts = [0]
        for one, _ in examples:
            starts.append(starts[-1] + len(one))
        size = rows * self.size if self.size else len(ids) + -len(ids) % self.multiple
        ids += [self.pad] * (size - len(ids))
        labels += [IGNORE] * (size - len(labels))
        while starts[-1] < size:  # what is left, in pieces that are no longer than a conversation
            starts.append(min(starts[-1] + self.longest, size))
        if self.size:  # the same number for all rows, as far as that is possible
            starts += [size] * (-(len(starts) - 1) % 16)
        long = {"dtype": torch.int64, "device": device}
        starts = torch.tensor(starts, dtype=torch.int32, device=device)
        return torch.tensor([ids], **long), torch.tensor([labels], **long), Spans(starts, self.longest)


def fill(lengths, places, size):
    """Lay examples, in the order `places`, into rows of `size` tokens, each into the first of at most OPEN
    rows where it fits: [[numbers]]."""
    rows, waiting = [], []  # waiting: [tokens that are left, row]
    for place in places:
        for entry in waiting:
            if lengths[place] <= entry[0]:
                break
        else:
            entry = [size, []]
            rows.append(entry[1])
            waiting.append(entry)
            if len(waiting) > OPEN:
                waiting.remove(min(waiting[:-1], key=lambda one: one[0]))
        entry[0] -= lengths[place]
        entry[1].append(place)
    return rows
