"""Ask a model.

    python -m minifp4 你是誰 談談UFO                      each prompt by itself, the bundled model
    python -m minifp4 --model out                        a conversation with what train.py wrote last
    python -m minifp4 --model DIR --temperature 0.7 --top-p 0.8 --top-k 20 "Tell me about tea"

In a conversation, /new forgets what was said and an empty line or end of file ends it.
"""

import sys
import time
from dataclasses import dataclass

import torch

from .cli import MANY, check, choose_device, groups, run
from .files.checkpoint import BASE, load
from .generate import check_sampling, decoded, stream
from .storage import FLOATS


what, how = groups("what", "how")


@dataclass
class Settings:
    prompt: list = what(None, "questions; none: a conversation", positional=True)
    model: str = what(str(BASE), "model directory, .dat file, or a directory of checkpoints (out)")
    system: str = what(None, "a system message", "TEXT")
    thinking: bool = what(True, "a hybrid model may think first")
    max_new_tokens: int = how(256, "tokens of an answer at most", "N", least=1, most=MANY)
    temperature: float = how(0.0, "0: always the likeliest token", least=0.0)
    top_k: int = how(0, "draw among the K likeliest tokens; 0: all", "K", least=0)
    top_p: float = how(1.0, "draw among the likeliest whose probabilities add up to this", least=0.0)
    seed: int = how(None, "makes the draws repeatable")
    quantize: bool = how(True, "read the weights through NVFP4")
    compute_dtype: str = how(None, "default: bf16 on CUDA, else fp32", choices=tuple(FLOATS))
    device: str = how(None, "default: cuda if there is one")


def main(settings):
    """Answer the prompts, or talk; returns the answers."""
    check(settings)
    check_sampling(settings.max_new_tokens, settings.temperature, settings.top_k, settings.top_p)
    device = choose_device(settings.device)
    dtype = FLOATS.get(settings.compute_dtype)
    model, tokenizer = load(settings.model, quantize=settings.quantize, device=device, compute_dtype=dtype)
    generator = torch.Generator(device)
    generator.manual_seed(settings.seed) if settings.seed is not None else generator.seed()
    start = [{"role": "system", "content": settings.system}] if settings.system else []

    def answer(messages):
        return show(model, tokenizer, messages, settings, generator)

    with decoded(model):
        if settings.prompt:
            return [answer([*start, {"role": "user", "content": prompt}]) for prompt in settings.prompt]
        return converse(answer, start)


def converse(answer, start):
    """Read questions from the terminal; each answer knows what was said before."""
    messages, answers = list(start), []
    while question := _read():
        if question == "/new":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": question})
        answers.append(answer(messages))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def _read():
    try:
        return input("> ")
    except EOFError:
        return ""


def show(model, tokenizer, messages, settings, generator):
    """Print the answer as it comes, its speed to stderr; returns it."""
    ids, shown, begin = [], "", time.perf_counter()
    how = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    prompt = tokenizer.prompt(messages, thinking=settings.thinking)
    length, stops = settings.max_new_tokens, tokenizer.stop_ids
    for token in stream(model, prompt, length, stops, generator=generator, **how):
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # a character may take several tokens
            print(text[len(shown) :], end="", flush=True)
            shown = text
    text = tokenizer.decode(ids)
    print(text[len(shown) :])
    seconds = time.perf_counter() - begin
    print(f"[{len(prompt)} + {len(ids)} tokens, {len(ids) / seconds:.1f} tokens/s]", file=sys.stderr)
    return text


if __name__ == "__main__":
    run(main, Settings, __doc__)
