"""What people bring to train on: conversations, completions and plain texts, as tokens.

    FILE.tsv      prompt<TAB>answer on each line
    FILE.jsonl    on each line one of
                      {"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}
                      {"prompt": ..., "completion": ...}    texts: the completion is learned; or messages
                      {"text": ...}                         all of it is learned
    FILE.txt      documents divided by blank lines
    DIR           of .txt files, each a document

A message may have "reasoning_content", "tool_calls" and "weight" (0: not learned); its content may be a list
of text parts. Whatever else would change what is learned is refused by line, not dropped.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from .loss import IGNORE
from .progress import watched
from .template import thinks

ROLES = "system", "user", "assistant", "tool"
OTHERS = {  # layouts that are not read: a key of theirs, and what makes ours of them
    "conversations": 'jq -c \'{messages: [.conversations[] | {role: ({"human": "user", "gpt": "assistant"}'
    "[.from] // .from), content: .value}]}'",
    "instruction": 'jq -c \'{messages: [{role: "user", content: (.instruction + "\\n" + (.input // ""))}, '
    '{role: "assistant", content: .output}]}\'',
}


class Data(NamedTuple):
    """The examples [(ids, labels)] of a file."""

    examples: list
    records: int  # conversations or texts
    cut: int  # examples that were longer than --seq-len
    lost: int  # tokens that this cost
    dropped: int  # with --drop-long: records that were left out
    thinks: bool  # whether an answer has thoughts
    first: tuple | None  # (messages before the first answer, tools) of the first conversation, if it has any

    def tokens(self):
        return sum(len(ids) for ids, _ in self.examples)


def read(path, tokenizer, seq_len, drop_long=False, records=None):
    """The `Data` in `path`. Longer examples are cut to `seq_len` tokens, texts divided into so many.

    records: those of `path` that count; None: all. ValueError names the line.
    """
    examples, cut, lost, dropped, count, too_long, with_thoughts, first = [], 0, 0, 0, 0, [], False, None
    for line, record in watched(read_records(path) if records is None else records, "tokenizing"):
        try:
            made = tokenizer.examples(record, seq_len)
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from None
        if not made:
            raise ValueError(f"{path}, line {line}: nothing in it is learned")
        messages = record.get("messages", ())
        with_thoughts = with_thoughts or thinks(messages)
        first = first or opening(record)
        if drop_long and any(len(ids) > seq_len for ids, _ in made):
            dropped += 1
            continue
        count += 1
        for ids, labels in made:
            prompt = next(place for place, label in enumerate(labels) if label != IGNORE)
            if prompt >= seq_len:
                too_long.append((line, prompt, len(ids)))
            cut, lost = cut + (len(ids) > seq_len), lost + max(0, len(ids) - seq_len)
            examples.append((ids[:seq_len], labels[:seq_len]))
    if too_long:
        raise ValueError(f"{path}, {_too_long(too_long, seq_len)}")
    if not examples:
        raise ValueError(f"{path}: nothing to learn in it" + (" with --drop-long" if dropped else ""))
    return Data(examples, count, cut, lost, dropped, with_thoughts, first)


def _too_long(found, seq_len):
    line, prompt, _ = found[0]
    lines = ", ".join(str(line) for line, _, _ in found[1:6]) + (", ..." if len(found) > 6 else "")
    return (
        f"line {line}: the prompt has {prompt} tokens, --seq-len {seq_len} leaves no room "
        f"for an answer; use --seq-len {max(length for *_, length in found)} or shorten the prompt"
        + (f" (likewise {len(found) - 1} more, in line {lines})" if lines else "")
    )


def read_examples(path, tokenizer, seq_len):
    """(examples, how many were cut) of `read`."""
    found = read(path, tokenizer, seq_len)
    return found.examples, found.cut


def opening(record):
    """(messages before the first answer, tools) of a conversation, else None."""
    for place, message in enumerate(record.get("messages", ())):
        if message["role"] == "assistant":
            return record["messages"][:place], record["tools"]
    return None


def read_conversations(path):
    """[(line number, messages)] of a file of conversations. Raises ValueError naming the file and the line,
    FileNotFoundError."""
    return [(line, record["messages"]) for line, record in read_records(path) if "messages" in record]


def read_records(path):
    """[(line number, record)] of a file or directory: {"messages", "tools"}, {"prompt", "completion"} or
    {"text"}, with messages as of `checked`."""
    path = Path(path)
    texts = sorted(path.glob("*.txt")) if path.is_dir() else []
    if texts:
        return [(number, {"text": _text(text)}) for number, text in enumerate(texts, 1)]
    if not path.is_file():
        wrong = "is a directory, not a file, and holds no .txt" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {wrong}")
    if path.suffix == ".json":
        raise ValueError(f"{path}: one conversation a line is read, in .jsonl; try: jq -c '.[]' {path.name}")
    lines, records = _text(path).split("\n"), []  # a lone \r is part of a text
    if path.suffix == ".txt":
        return _documents(path, lines)
    parse = _parse_json if path.suffix == ".jsonl" else _parse_tsv
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r")
        if not line.strip():
            continue
        try:
            records.append((number, parse(line)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not records:
        raise ValueError(f"{path}: no conversations in this file")
    return records


def _text(path):
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None


def _documents(path, lines):
    """Those of a .txt: what stands between blank lines."""
    found, begin = [], None
    for number, line in enumerate([*lines, ""], 1):
        if line.strip():
            begin = begin or number
        elif begin:
            found.append((begin, {"text": "\n".join(lines[begin - 1 : number - 1])}))
            begin = None
    if not found:
        raise ValueError(f"{path}: no text in this file")
    return found


def _parse_tsv(line):
    cells = line.split("\t")
    if len(cells) != 2 or not cells[0].strip() or not cells[1].strip():
        empty = " with text in both" if len(cells) == 2 else ""
        raise ValueError(f"expected prompt<TAB>target{empty}, got {len(cells)} cell(s): {line[:60]!r}")
    said = [{"role": "user", "content": cells[0]}, {"role": "assistant", "content": cells[1]}]
    return {"messages": said, "tools": None}


def _parse_json(line):
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    record = record if isinstance(record, dict) else {}
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        record = {"messages": [*prompt, *completion], "tools": record.get("tools")}
    if "messages" in record:
        return checked(record)
    if isinstance(prompt, str) and isinstance(completion, str) and completion:
        return {"prompt": prompt, "completion": completion}
    if isinstance(record.get("text"), str) and record["text"].strip():
        return {"text": record["text"]}
    for key, advice in OTHERS.items():
        if key in record:
            raise ValueError(f'"{key}" is another layout; make this one of it: {advice}')
    raise ValueError('expected {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}')


def checked(record):
    """{"messages", "tools"} of a record, each message with a text as content; ValueError says what is
    wrong."""
    messages, tools = record["messages"], record.get("tools") or None
    if not isinstance(messages, list) or not messages:
        raise ValueError('expected {"messages": [...]}')
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f'"tools" must be a list of objects, got {str(tools)[:60]}')
    messages = [_message(message) for message in messages]
    if messages[-1]["role"] != "assistant":
        raise ValueError("the last message must be the assistant's")
    if not any(message["role"] == "assistant" and message.get("weight", 1) for message in messages):
        raise ValueError('every answer has "weight" 0: there is nothing to learn')
    return {"messages": messages, "tools": tools}


def _message(message):
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        roles = ", ".join(f'"{role}"' for role in ROLES)
        raise ValueError(f"a message needs the role {roles}: {str(message)[:60]}")
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise ValueError(f'"content" in parts must be of texts alone: {str(message)[:60]}')
        content = "".join(part["text"] for part in content)
    if content is None and calls:
        content = ""
    if not isinstance(content, str) or not (content or calls):
        raise ValueError(f'a message needs a "content" that is a text and not empty: {str(message)[:60]}')
    if message.get("weight", 1) not in (0, 1) or isinstance(message.get("weight"), bool):
        raise ValueError(f'"weight" must be 0 or 1, got {message["weight"]!r}')
    if not isinstance(message.get("reasoning_content"), (str, type(None))):
        raise ValueError(f'"reasoning_content" must be a text: {str(message)[:60]}')
    if calls and not (isinstance(calls, list) and all(map(_is_call, calls))):
        raise ValueError(f'"tool_calls" must be a list of {{"name", "arguments"}}: {str(calls)[:60]}')
    if message["role"] != "assistant" and (calls or message.get("reasoning_content")):
        raise ValueError(f'"tool_calls" and "reasoning_content" are the assistant\'s: {str(message)[:60]}')
    return {**message, "content": content}


def _is_call(call):
    call = call.get("function", call) if isinstance(call, dict) else None
    return isinstance(call, dict) and isinstance(call.get("name"), str) and "arguments" in call


def fingerprint(record):
    """What tells one record from another by its content, a number from 0 to 1."""
    text = json.dumps(record, sort_keys=True, ensure_ascii=False).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64
