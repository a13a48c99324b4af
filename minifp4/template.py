"""Qwen3's chat format: what stands around messages, and what of it a model says itself.

ChatML's marked turns are the frame (`chat.py`). Qwen3 puts more into it, and not all Qwen3s the same; which
rule holds is read off the model's own chat_template:

    Instruct-2507, and ours    nothing: the answer alone
    hybrid (2025-04), base     <think> thoughts </think> before the answer; an empty block if there are none
    Thinking-2507              the same, and the prompt itself opens <think>

A thinking model sees thoughts only since the last question: a server leaves them out of earlier turns. So a
conversation of several questions is several examples, each as the server would ask it, with its last answer
learned; otherwise the model would learn to answer without thinking. An empty block is learned too: with
thinking switched on (the default of servers) the model then says it, with thinking switched off it is asked
with it.

Tools are described in the system's turn; the assistant calls them in <tool_call>, and their answers come back
as a user's turn of <tool_response>s.
"""

import json
from typing import NamedTuple

INSTRUCTIONS = (  # the words that Qwen3 was trained on
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with "
    "function signatures within <tools></tools> XML tags:\n<tools>{}\n</tools>\n\nFor each function call, "
    "return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
)


class Turn(NamedTuple):
    head: str  # all that the model does not say: the role, and the text of others
    body: str | None  # what it says; None in others' turns
    learned: bool


class Template:
    """text: the Jinja of a model's chat_template, or None."""

    def __init__(self, text=None):
        text = text or ""
        self.opens = "<|im_start|>assistant\\n<think>" in text  # the prompt
        self.thinks = "</think>" in text
        self.tools = "<tool_call>" in text
        self.known = not text or "<|im_start|>" in text

    def __str__(self):
        thoughts = "an empty <think> block before answers without thoughts" if self.thinks else "no <think>"
        kind = "ChatML, " + ("the prompt opens <think>" if self.opens else thoughts)
        return kind + (", tools" if self.tools else "") + ("" if self.known else "; its own is not ChatML")

    def turns(self, messages, tools=None):
        """The `Turn`s of a conversation: messages as of `data.checked`."""
        turns, query = [], last_query(messages)
        asked = any(map(is_query, messages))
        if tools:
            system = [messages[0]["content"]] if messages and messages[0]["role"] == "system" else []
            listed = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
            turns.append(Turn("system\n" + "\n\n".join([*system, INSTRUCTIONS.format(listed)]), None, False))
            messages, query = messages[len(system) :], query - len(system)
        for index, message in enumerate(messages):
            role, content = message["role"], message["content"]
            if role == "tool":
                answer = f"\n<tool_response>\n{content}\n</tool_response>"
                if index and messages[index - 1]["role"] == "tool":
                    turns[-1] = turns[-1]._replace(head=turns[-1].head + answer)
                else:
                    turns.append(Turn("user" + answer, None, False))
            elif role == "assistant":
                last = index + 1 == len(messages)
                learned = message.get("weight", 1) == 1 and (index > query or not (self.thinks and asked))
                turns.append(Turn(*self._answer(message, index > query, last), learned))
            else:
                turns.append(Turn(f"{role}\n{content}", None, False))
        return turns

    def _answer(self, message, current, last):
        """(head, body) of the assistant's turn; current: it stands after the last question."""
        thoughts, content = thoughts_of(message) if self.thinks else ("", message["content"])
        head, body = "assistant\n", content
        if self.thinks and current and (last or thoughts):
            body = f"<think>\n{thoughts.strip(chr(10))}\n</think>\n\n" + content.lstrip("\n")
            if self.opens:
                head, body = head + "<think>\n", body.removeprefix("<think>\n")
        for number, call in enumerate(message.get("tool_calls") or ()):
            call = call.get("function", call)
            arguments = call["arguments"]
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            gap = "\n" if number or content else ""
            body += f'{gap}<tool_call>\n{{"name": "{call["name"]}", "arguments": {arguments}}}\n</tool_call>'
        return head, body

    def check(self, messages, tools=None):
        """Raise ValueError for what the model's own template would leave out, in silence."""
        calls = tools or any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
        if calls and not self.tools:
            raise ValueError('"tools" and "tool_calls": the chat template of this model knows none')
        if not self.thinks and any(message.get("reasoning_content") for message in messages):
            raise ValueError('"reasoning_content": the chat template of this model has no thoughts')

    def prompt_end(self, thinking=True):
        """What a server puts after "assistant\\n" for the model to go on from."""
        if self.opens:
            return "<think>\n"
        return "<think>\n\n</think>\n\n" if self.thinks and not thinking else ""

    def contexts(self, messages):
        """The parts of a conversation that are examples: all of it, and if the model thinks, the part up to
        each question but the first."""
        if not self.thinks:
            return [messages]
        ends = [index for index, message in enumerate(messages) if is_query(message)][1:]
        return [messages[:end] for end in ends if messages[end - 1]["role"] == "assistant"] + [messages]


def is_query(message):
    """Whether a message asks: a user's, and not the answers of tools."""
    text = message["content"]
    answer = text.startswith("<tool_response>") and text.endswith("</tool_response>")
    return message["role"] == "user" and not answer


def last_query(messages):
    """Where the last question stands; the last message if there is none."""
    return max((n for n, message in enumerate(messages) if is_query(message)), default=len(messages) - 1)


def thoughts_of(message):
    """(thoughts, answer) of an assistant's message, which may hold both in its content."""
    content = message["content"]
    if isinstance(message.get("reasoning_content"), str):
        return message["reasoning_content"], content
    if "</think>" not in content:
        return "", content
    thoughts = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
    return thoughts, content.split("</think>")[-1].lstrip("\n")


def thinks(messages):
    """Whether a conversation holds thoughts."""
    return any(thoughts_of(message)[0] for message in messages if message["role"] == "assistant")
