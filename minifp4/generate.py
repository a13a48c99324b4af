"""Ask a model.

    python -m minifp4.generate 你是誰 談談UFO                      each prompt by itself, the bundled model
    python -m minifp4.generate --model out                        a conversation with what train.py wrote last
    python -m minifp4.generate --model DIR --temperature 0.7 --top-p 0.8 --top-k 20 "Tell me about tea"

In a conversation, /new forgets what was said and an empty line or end of file ends it.
"""

import sys
import time
import types
from dataclasses import dataclass

import torch

from .checkpoint import BASE, load
from .cli import check, choose_device, option, run
from .precision import FLOATS
from .sampling import check_sampling, generate, stream


@dataclass
class Settings:
    prompt: list = option(None, "what", "questions; none: a conversation", positional=True)
    model: str = option(str(BASE), "what", "model directory, .dat file, or a directory of checkpoints (out)")
    system: str = option(None, "what", "a system message", metavar="TEXT")
    max_new_tokens: int = option(256, "how", "tokens of an answer at most", metavar="N", least=1)
    temperature: float = option(0.0, "how", "0: always the likeliest token", least=0.0)
    top_k: int = option(0, "how", "draw among the K likeliest tokens; 0: all", metavar="K", least=0)
    top_p: float = option(
        1.0, "how", "draw among the likeliest whose probabilities add up to this", least=0.0
    )
    seed: int = option(None, "how", "makes the draws repeatable")
    quantize: bool = option(True, "how", "read the weights through NVFP4")
    compute_dtype: str = option(None, "how", "default: bf16 on CUDA, else fp32", choices=tuple(FLOATS))
    device: str = option(None, "how", "default: cuda if there is one")


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

    with model.decoded():
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
    prompt = tokenizer.prompt(messages)
    for token in stream(
        model, prompt, settings.max_new_tokens, tokenizer.stop_ids, generator=generator, **how
    ):
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


class _CallableModule(types.ModuleType):
    """Importing this module hides the function `minifp4.generate` behind it: let it be called all the
    same."""

    def __call__(self, *args, **how):
        return generate(*args, **how)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    run(main, Settings, __doc__)
