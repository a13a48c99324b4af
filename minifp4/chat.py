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
import json
from pathlib import Path

import numpy as np
import tokenizers
import torch

from .loss import IGNORE

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
        self.stop_ids = (self.end, self.end_of_text)

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

    def turn(self, message):
        """One finished turn; the content is not stripped."""
        return [
            self.start,
            *self.encode(f"{message['role']}\n{message['content']}"),
            self.end,
            *self.encode("\n"),
        ]

    def prompt(self, messages):
        """The tokens after which the assistant speaks. `messages`: a user's text, or a list of {role,
        content}."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        ids = [number for message in messages for number in self.turn(message)]
        return [*ids, self.start, *self.encode("assistant\n")]

    def example(self, messages):
        """(ids, labels) of a conversation: every assistant turn's content and its <|im_end|> are learned."""
        ids, labels = [], []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                turn = self.turn(message)
                ids += turn
                labels += [IGNORE] * len(turn)
                continue
            before = self.prompt([])
            answer = [*self.encode(message["content"]), self.end]
            after = self.encode("\n") if index + 1 < len(messages) else []
            ids += before + answer + after
            labels += [IGNORE] * len(before) + answer + [IGNORE] * len(after)
        return ids, labels


def read_conversations(path):
    """The conversations of a file: TSV (`prompt<TAB>target` a line) or, if it ends in .jsonl, {"messages":
    [...]}.

    Returns [(line number, messages)]. Raises ValueError naming the file and the line, FileNotFoundError.
    """
    path = Path(path)
    if not path.is_file():
        wrong = "is a directory, not a file" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {wrong}")
    if path.suffix == ".json":
        raise ValueError(f"{path}: one conversation a line is read, in .jsonl; try: jq -c '.[]' {path.name}")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # a lone \r is part of a text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None
    parse = _parse_json if path.suffix == ".jsonl" else _parse_tsv
    conversations = []
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r")
        if not line.strip():
            continue
        try:
            conversations.append((number, parse(line)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not conversations:
        raise ValueError(f"{path}: no conversations in this file")
    return conversations


def _parse_tsv(line):
    cells = line.split("\t")
    if len(cells) != 2 or not cells[0].strip() or not cells[1].strip():
        empty = " with text in both" if len(cells) == 2 else ""
        raise ValueError(f"expected prompt<TAB>target{empty}, got {len(cells)} cell(s): {line[:60]!r}")
    return [{"role": "user", "content": cells[0]}, {"role": "assistant", "content": cells[1]}]


def _parse_json(line):
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError('expected {"messages": [...]}')
    if record.get("tools"):
        raise ValueError('"tools" are not supported: they would change the prompt')
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f'a message needs the role "system", "user" or "assistant": {str(message)[:60]}')
        if isinstance(message.get("content"), list):
            raise ValueError(f'"content" in parts is not supported, only a text: {str(message)[:60]}')
        if not isinstance(message.get("content"), str) or not message["content"]:
            raise ValueError(f'a message needs a "content" that is a text and not empty: {str(message)[:60]}')
        for key in ("tool_calls", "reasoning_content", "weight"):
            if message.get(key) and message[key] != 1 or message.get(key) == 0:
                raise ValueError(f'"{key}" in a message is not supported: it would change what is learned')
    if messages[-1]["role"] != "assistant":
        raise ValueError("the last message must be the assistant's")
    return messages


def read_examples(path, tokenizer, seq_len):
    """All conversations of a file as [(ids, labels)], cut to `seq_len`, and how many were cut.

    A prompt that leaves no room for one token of its answer is an error that names the line.
    """
    examples, cut, too_long = [], 0, []
    for number, messages in read_conversations(path):
        try:
            ids, labels = tokenizer.example(messages)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        prompt = next(place for place, label in enumerate(labels) if label != IGNORE)
        if prompt >= seq_len:
            too_long.append((number, prompt, len(ids)))
        cut += len(ids) > seq_len
        examples.append((ids[:seq_len], labels[:seq_len]))
    if too_long:
        number, prompt, _ = too_long[0]
        lines = ", ".join(str(line) for line, _, _ in too_long[1:6]) + (", ..." if len(too_long) > 6 else "")
        raise ValueError(
            f"{path}, line {number}: the prompt has {prompt} tokens, --seq-len {seq_len} leaves no room "
            f"for an answer; use --seq-len {max(length for *_, length in too_long)} or shorten the prompt"
            + (f" (likewise {len(too_long) - 1} more, in line {lines})" if lines else "")
        )
    return examples, cut


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
