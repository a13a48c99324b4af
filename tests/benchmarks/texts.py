"""The text that `quality.py` learns from: what lies on every machine that has these packages.

    python   the sources of all installed packages
    c++      the headers of torch/include
    talk     conversations about functions: the question names one, the answer is the first line of its
             docstring; from files that are held out of the first domain

A text that is there twice counts once. Files come in the order of the hash of what they hold, so that no
package is all in one place; the first ones are held out, the others are read from there on, each once.
"""

import ast
import hashlib
import sysconfig
import warnings
from pathlib import Path

import numpy as np
import torch

from minifp4 import chat, vocabulary

IGNORE = -100  # a label that is not learned
SHARE = 1 / 8  # of the text, for the tokenizer to learn its words from
CHARACTERS = 4.5  # more than a token has, on average


def make_texts(size, steps, directory):
    """Write {domain}.{train, held}.npz in `directory`: `ids` and `labels`, int16 [rows, size["tokens"]].

    steps: {domain: most steps that anyone takes}, which says how much is read.
    """
    row = size["batch"] * size["tokens"]
    roots = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib", "platlib")]
    headers = Path(torch.__file__).parent / "include"
    places = {"python": (dict.fromkeys(roots), ".py"), "c++": ([headers], (".h", ".hpp", ".cuh"))}
    texts = {}
    for domain, (folders, ends) in places.items():
        parts = read(folders, ends, [size["held"], steps.get(domain, 0) * row])
        texts[domain] = dict(zip(("held", "train"), parts))
    words = [text for parts in texts.values() for text in parts["train"][:: round(1 / SHARE)]]
    vocabulary.train_tokenizer(words, size["vocabulary"], directory)
    tokenizer = chat.Tokenizer(directory / "tokenizer.json")
    for domain, parts in texts.items():
        for part, chosen in parts.items():
            encoded = tokenizer.core.encode_batch_fast(chosen)
            ids = np.array([number for one in encoded for number in one.ids], np.int16)
            ids = ids[: len(ids) - len(ids) % size["tokens"]].reshape(-1, size["tokens"])
            np.savez(directory / f"{domain}.{part}.npz", ids=ids, labels=ids)
    talks = [talk for text in texts["python"]["held"] for talk in talks_of(text)]
    rows = [row_of(tokenizer, talk, size["tokens"]) for talk in dict.fromkeys(talks)]
    ids, labels = np.array([row for row in rows if row is not None], np.int16).swapaxes(0, 1)
    cut = len(ids) // 5
    for part, chosen in (("held", slice(cut)), ("train", slice(cut, None))):
        np.savez(directory / f"talk.{part}.npz", ids=ids[chosen], labels=labels[chosen])


def read(folders, ends, wanted):
    """Texts of files that end so, in hashed order: lists of about as many tokens as `wanted` says, and the
    last one of all that is left if there are fewer."""
    paths = [path for folder in folders for path in folder.rglob("*") if path.name.endswith(ends)]
    texts = {}
    for path in paths:
        if path.is_file():
            data = path.read_bytes()
            texts[hashlib.blake2b(data, digest_size=8).digest()] = data
    left = [texts[key].decode("utf-8", errors="ignore") for key in sorted(texts)]
    lists, place = [], 0
    for tokens in wanted:
        start, characters = place, 0
        while place < len(left) and characters < tokens * CHARACTERS:
            characters += len(left[place])
            place += 1
        lists.append(left[start:place])
    return lists


def talks_of(text):
    """[(question, answer)] of a Python source."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old sources have escapes that are none
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    talks = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (said := ast.get_docstring(node)):
            what = "class" if isinstance(node, ast.ClassDef) else "function"
            first = said.strip().split("\n")[0].strip()
            talks.append((f"What is the {what} {node.name} for?", first))
    return talks


def row_of(tokenizer, talk, tokens):
    """(ids, labels) of a conversation, padded; None if it is too long."""
    question, answer = talk
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    try:
        ids, labels = tokenizer.example(messages)
    except ValueError:  # an empty answer
        return None
    more = tokens - len(ids)
    return None if more < 0 else (ids + [tokenizer.end_of_text] * more, labels + [IGNORE] * more)


class Rows:
    """The rows of a domain on a device: `batch(n, seed)` is the n-th of a seed, no row twice in a pass."""

    def __init__(self, directory, domain, part, size, device):
        with np.load(directory / f"{domain}.{part}.npz") as arrays:
            self.ids, self.labels = (torch.from_numpy(arrays[name]).to(device) for name in ("ids", "labels"))
        self.size, self.orders = size["batch"], {}

    def batch(self, number, seed=None):
        """(ids, labels), int64 [batch, tokens]; in the order of the file if `seed` is None."""
        places = np.arange(number * self.size, (number + 1) * self.size)
        passes, places = places // len(self.ids), places % len(self.ids)
        if seed is not None:
            places = np.array([self._order(seed, p)[q] for p, q in zip(passes.tolist(), places)])
        places = torch.from_numpy(places).to(self.ids.device)
        return self.ids[places].long(), self.labels[places].long()

    def _order(self, seed, number):
        if (seed, number) not in self.orders:
            self.orders[seed, number] = np.random.default_rng((seed, number)).permutation(len(self.ids))
        return self.orders[seed, number]

    def __len__(self):
        return -(-len(self.ids) // self.size)  # batches
