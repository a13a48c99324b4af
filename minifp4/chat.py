"""Conversations as tokens: ChatML, the data files, and batches.

Qwen3 reads a conversation as marked turns, and learns (or is asked for) the assistant's part:

    <|im_start|>user\\n你是誰<|im_end|>\\n<|im_start|>assistant\\n我是 F# 之神<|im_end|>\\n
    ------------------- prompt: not learned --------------------|------ learned -----|

Learning `<|im_end|>` is what makes a model stop. The marks are single tokens that are spliced in by number,
and the text between them is encoded with its own special tokens disabled: a user who types `<|im_end|>`
gets those ten characters, not the end of a turn.

A batch is a pure function of (seed, step, rank): nothing has to be saved to continue a run with the same
data.
"""

import functools
from pathlib import Path

import numpy as np
import tokenizers
import torch

from .data import read_conversations, read_examples  # noqa: F401, the other half of `chat`
from .loss import IGNORE
from .template import Template

# Qwen's special tokens, in the order of their numbers; the rest of Qwen's 26 have no use in text.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


class Tokenizer:
    """A tokenizer.json with ChatML on top.

    companions: {name: bytes} of the files that a model directory has beside it, for whoever writes another.
    """

    def __init__(self, path):
        self.path, self.companions = Path(path), {}
        try:
            self.core = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain ones, and a panic, which `cli.run` tells
            raise ValueError(f"{path}: not a readable tokenizer.json ({error})") from None
        self.core.encode_special_tokens = True  # text never becomes a special token
        self.core.no_truncation()  # a tokenizer.json may bring both, for another use
        self.core.no_padding()
        self.end_of_text, self.start, self.end = (self._number(token) for token in SPECIAL_TOKENS)
        self.stop_ids, self.template = (self.end, self.end_of_text), Template()

    def _number(self, token):
        number = self.core.token_to_id(token)
        if number is None:
            raise ValueError(f"{self.path}: the special token {token} is missing; is this a Qwen tokenizer?")
        return number

    @property
    def largest(self):
        """The largest token number."""
        return max(self.core.get_vocab().values())

    def encode(self, text):
        """The numbers of a text's tokens; ValueError if it holds half a character (a lone surrogate)."""
        try:
            return self.core.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            raise ValueError(f"not a text that can be written as UTF-8: {text[:40]!a}") from None

    def decode(self, ids):
        return self.core.decode(list(ids), skip_special_tokens=True)

    def prompt(self, messages, tools=None, thinking=True):
        """The tokens after which the assistant speaks. `messages`: a user's text, or a list of {role,
        content}; thinking: False asks a hybrid model not to."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        ids, _ = self._tokens(self.template.turns(messages, tools))
        return [*ids, self.start, *self.encode("assistant\n" + self.template.prompt_end(thinking))]

    def example(self, messages, tools=None):
        """(ids, labels) of a conversation: what the assistant says and its <|im_end|> are learned."""
        ids, labels = self._tokens(self.template.turns(messages, tools))
        newline = len(self.encode("\n"))  # after the last mark there is nothing to say
        return ids[:-newline], labels[:-newline]

    def _tokens(self, turns):
        ids, labels, newline = [], [], self.encode("\n")
        for turn in turns:
            head = [self.start, *self.encode(turn.head)]
            body = [*self.encode(turn.body or ""), self.end]
            ids += head + body + newline
            learned = body if turn.learned else [IGNORE] * len(body)
            labels += [IGNORE] * len(head) + learned + [IGNORE] * len(newline)
        return ids, labels

    def examples(self, record, length):
        """[(ids, labels)] of a record of `data.read_records`; texts in pieces of `length` tokens."""
        if "messages" in record:
            self.template.check(record["messages"], record.get("tools"))
            contexts = self.template.contexts(record["messages"])
            made = [self.example(context, record.get("tools")) for context in contexts]
            return [one for one in made if set(one[1]) != {IGNORE}]
        if "prompt" in record:
            prompt = self.encode(record["prompt"]) or [self.end_of_text]
            answer = [*self.encode(record["completion"]), self.end_of_text]
            return [(prompt + answer, [IGNORE] * len(prompt) + answer)]
        ids = [*self.encode(record["text"]), self.end_of_text]
        pieces = (ids[at : at + length] for at in range(0, len(ids), length))
        return [(piece, piece) for piece in pieces if len(piece) > 1]  # a lone token foretells nothing


def sample(examples, step, *, batch_size, seed=0, mode="random", rank=0, ranks=1):
    """The examples of batch `step` (0, 1, ...) of process `rank`.

    "sequential" walks through the file again and again; "random" in a new order each time.
    """
    count = len(examples)
    first = (step * ranks + rank) * batch_size
    chosen = []
    for position in range(first, first + batch_size):
        epoch, place = divmod(position, count)
        if mode == "random":
            place = order(count, seed, epoch)[place]
        chosen.append(examples[place])
    return chosen


@functools.lru_cache(2)  # a batch may reach into the next epoch
def order(count, seed, epoch):
    """In which order the examples come in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def collate(examples, pad, device="cpu", multiple=1):
    """(ids, labels), int64 [B, T]: examples padded on the right to the longest, T a multiple of `multiple`;
    padding is not learned."""
    longest = max(len(ids) for ids, _ in examples)
    longest += -longest % multiple
    ids = [row + [pad] * (longest - len(row)) for row, _ in examples]
    labels = [row + [IGNORE] * (longest - len(row)) for _, row in examples]
    return torch.tensor(ids, device=device), torch.tensor(labels, device=device)
