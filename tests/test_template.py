"""Qwen3's chat format beside transformers' own rendering of the real templates: token by token."""

import importlib.util
import json
from pathlib import Path

import pytest
from conftest import train

import minifp4
from minifp4 import chat, data
from minifp4.files import checkpoint
from minifp4.loss import IGNORE
from minifp4.template import Template

USER, ANSWER = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}
SYSTEM = {"role": "system", "content": "Be brief."}
AGAIN = {"role": "user", "content": "Sure?"}
THOUGHT = {"role": "assistant", "content": "Yes.", "reasoning_content": "\nOne and one.\n"}
INSIDE = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "二"}}}]}  # fmt: skip
TWO_CALLS = {"role": "assistant", "content": "Two.", "reasoning_content": "Both.", "tool_calls": [
    {"name": "add", "arguments": '{"a": 1}'}, {"name": "add", "arguments": {}}]}  # fmt: skip
RESULT = {"role": "tool", "content": "2"}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "和", "parameters": {"a": None}}}]
TABLE = {
    "one turn": ([USER, ANSWER], None),
    "system": ([SYSTEM, USER, ANSWER], None),
    "two turns": ([USER, ANSWER, AGAIN, ANSWER], None),
    "thoughts": ([USER, THOUGHT], None),
    "thoughts in the content": ([USER, INSIDE], None),
    "earlier thoughts": ([SYSTEM, USER, THOUGHT, AGAIN, INSIDE], None),
    "a call": ([USER, CALL, RESULT, ANSWER], TOOLS),
    "calls, thoughts and two results": ([SYSTEM, USER, TWO_CALLS, RESULT, RESULT, THOUGHT], TOOLS),
    "a call, then another question": ([USER, CALL, RESULT, ANSWER, AGAIN, THOUGHT], TOOLS),
    "a system message later": ([USER, ANSWER, SYSTEM, AGAIN, ANSWER], None),
    "answer without a question": ([ANSWER], None),
}
MARKS = [f"<{slash}{name}>" for name in ("think", "tool_call", "tool_response") for slash in ("", "/")]


def jinja(kind):
    """The text of a template that trl ships; Thinking-2507's is the hybrid one but for the prompt."""
    spec = importlib.util.find_spec("trl")
    if spec is None:
        pytest.skip("needs the package trl")
    name = "qwen3_instruct_2507.jinja" if kind == "instruct" else "qwen3.jinja"
    text = (Path(spec.origin).parent / "chat_templates" / name).read_text()
    if kind == "thinking":
        before, end = text.split("{%- if add_generation_prompt %}")
        assert "enable_thinking" in end
        prompt = "{{- '<|im_start|>assistant\\n<think>\\n' }}"
        text = before + "{%- if add_generation_prompt %}\n    " + prompt + "\n{%- endif %}"
    return text


@pytest.fixture
def both(tmp_path):
    """A function: the template's kind -> (our tokenizer, theirs), whose files are the same."""
    transformers = pytest.importorskip("transformers")

    def make(kind):
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(minifp4.BASE / "tokenizer.json"))
        theirs.add_tokens(MARKS)
        theirs.chat_template = jinja(kind)
        theirs.save_pretrained(tmp_path / kind)
        return checkpoint.read_tokenizer(tmp_path / kind), theirs

    return make


@pytest.mark.parametrize("kind", ["instruct", "hybrid", "thinking"])
@pytest.mark.parametrize("messages, tools", TABLE.values(), ids=TABLE.keys())
def test_tokens_are_those_of_the_models_own_template(both, kind, messages, tools):
    ours, theirs = both(kind)
    record = data.checked({"messages": messages, "tools": tools})
    how = {"tools": tools, "return_dict": False}
    expected = theirs.apply_chat_template(messages, **how)
    ids, labels = ours.example(record["messages"], tools)
    assert ids + ours.encode("\n") == expected, ours.core.decode(ids, skip_special_tokens=False)
    assert all(label in (IGNORE, number) for number, label in zip(ids, labels))
    asked = messages[: max(n for n, message in enumerate(messages) if message["role"] == "assistant")]
    if asked:
        expected = theirs.apply_chat_template(asked, add_generation_prompt=True, **how)
        assert ours.prompt(data.checked({"messages": [*asked, ANSWER]})["messages"][:-1], tools) == expected
    if asked and kind == "hybrid":
        how |= {"add_generation_prompt": True, "enable_thinking": False}
        expected = theirs.apply_chat_template(asked, **how)
        assert ours.prompt(asked if not tools else record["messages"][: len(asked)], tools, False) == expected


def learned(tokenizer, messages, tools=None):
    """The texts that are learned, of each example of a conversation."""
    found = []
    for ids, labels in tokenizer.examples(data.checked({"messages": messages, "tools": tools}), 10**6):
        parts = [[]]
        for number, label in zip(ids, labels):
            if label != IGNORE:
                parts[-1].append(number)
            elif parts[-1]:
                parts.append([])
        found.append([tokenizer.core.decode(part, skip_special_tokens=False) for part in parts if part])
    return found


def test_what_is_learned_is_what_the_model_says(both):
    """Read these by eye: each answer as a server would ask for it, its thoughts included."""
    instruct, hybrid, thinking = (both(kind)[0] for kind in ("instruct", "hybrid", "thinking"))
    two = [USER, ANSWER, AGAIN, THOUGHT]
    yes = {"role": "assistant", "content": "Yes."}
    assert learned(instruct, [USER, ANSWER, AGAIN, yes]) == [["2<|im_end|>", "Yes.<|im_end|>"]]
    block = "<think>\n\n</think>\n\n2<|im_end|>"
    assert learned(hybrid, two) == [[block], ["<think>\nOne and one.\n</think>\n\nYes.<|im_end|>"]]
    assert learned(thinking, two) == [
        [block.removeprefix("<think>\n")], ["One and one.\n</think>\n\nYes.<|im_end|>"]]  # fmt: skip
    assert learned(instruct, [USER, ANSWER | {"weight": 0}, AGAIN, ANSWER]) == [["2<|im_end|>"]]
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "二"}}\n</tool_call><|im_end|>'
    assert learned(instruct, [USER, CALL, RESULT, ANSWER], TOOLS) == [[call, "2<|im_end|>"]]


def test_the_rule_is_read_off_the_template(both):
    names = {kind: str(both(kind)[0].template) for kind in ("instruct", "hybrid", "thinking")}
    assert names == {
        "instruct": "ChatML, no <think>, tools",
        "hybrid": "ChatML, an empty <think> block before answers without thoughts, tools",
        "thinking": "ChatML, the prompt opens <think>, tools",
    }
    assert str(Template()) == str(minifp4.load()[1].template) == "ChatML, no <think>"
    assert "not ChatML" in str(Template("{% for m in messages %}[INST]{% endfor %}"))


def test_a_template_may_lie_in_either_file():
    one, two = "<|im_start|>", "</think><|im_start|>"
    config = json.dumps({"chat_template": one}).encode()
    assert checkpoint.chat_template({"tokenizer_config.json": config}) == one
    both = {"tokenizer_config.json": config, "chat_template.jinja": two.encode()}
    assert checkpoint.chat_template(both) == two
    several = [{"name": "rag", "template": two}, {"name": "default", "template": one}]
    config = json.dumps({"chat_template": several}).encode()
    assert checkpoint.chat_template({"tokenizer_config.json": config}) == one
    assert checkpoint.chat_template({}) is None


def test_texts_and_completions(tmp_path):
    tokenizer = minifp4.load()[1]
    lines = [{"text": "天" * 40}, {"prompt": "a: ", "completion": "b"}]
    lines += [{"prompt": [USER], "completion": [ANSWER]}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    found = data.read(tmp_path / "a.jsonl", tokenizer, 24)
    *texts, pair, chatted = found.examples
    whole = [number for ids, _ in texts for number in ids]
    assert whole == [*tokenizer.encode("天" * 40), tokenizer.end_of_text]
    assert all(ids == labels and 1 < len(ids) <= 24 for ids, labels in texts) and found.lost == 0
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "天"}))
    length = len(tokenizer.encode("天"))
    [(ids, _)] = data.read(tmp_path / "b.jsonl", tokenizer, max(2, length)).examples  # the end would be alone
    assert ids == tokenizer.encode("天") + [tokenizer.end_of_text] * (length == 1)
    prompt = tokenizer.encode("a: ")
    assert pair[0] == [*prompt, *tokenizer.encode("b"), tokenizer.end_of_text]
    assert pair[1] == [IGNORE] * len(prompt) + pair[0][len(prompt) :]
    assert chatted == tokenizer.example([USER, ANSWER])


def test_documents_are_divided_by_blank_lines_or_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n \nthree\n")
    assert data.read_records(tmp_path / "a.txt") == [(1, {"text": "one\ntwo"}), (5, {"text": "three"})]
    (tmp_path / "b.txt").write_text("four\n\nfive\n")
    texts = [record["text"] for _, record in data.read_records(tmp_path)]
    assert texts == ["one\ntwo\n\n \nthree\n", "four\n\nfive\n"]
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="b.txt: not UTF-8"):
        data.read_records(tmp_path)


def test_a_text_trains(tmp_path):
    (tmp_path / "a.txt").write_text("談談UFO。\n\nUFO 是不明飛行物。\n")
    how = dict(train_data=str(tmp_path / "a.txt"), test_prompt=["談談"], test_max_tokens=2)
    assert train(**how, steps=2, out=str(tmp_path / "out")).is_dir()


def test_parts_of_a_content_are_one_text():
    parts = {"role": "user", "content": [{"type": "text", "text": "1 "}, {"type": "text", "text": "+ 1?"}]}
    assert data.checked({"messages": [parts, ANSWER]})["messages"][0]["content"] == USER["content"]


def test_thoughts_are_asked_for_if_the_data_has_them(tmp_path):
    tokenizer = chat.Tokenizer(minifp4.BASE / "tokenizer.json")
    tokenizer.template = Template("<|im_start|></think>")
    plain, empty = (tokenizer.prompt("hi", thinking=thinking) for thinking in (True, False))
    assert tokenizer.decode(empty) == tokenizer.decode(plain) + "<think>\n\n</think>\n\n"
    for message, thinks in ((ANSWER, False), (THOUGHT, True), (INSIDE, True)):
        (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [USER, message]}))
        assert data.read(tmp_path / "a.jsonl", tokenizer, 256).thinks == thinks
