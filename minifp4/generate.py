"""Text out of a model: one token at a time, each fed back, with the keys and values of all before it kept.

`python -m minifp4` is the program that talks.
"""

import contextlib
import sys

import torch
import torch.nn.functional as F

from .linear import word_slices

DECODED_LIMIT = 2**31  # bytes of dense weights that `decoded` is willing to keep


class KVCache:
    """Keys and values of the tokens seen so far, for one model: [layers][B, kv heads, capacity, head_dim]."""

    def __init__(self, config, batch, capacity, device, dtype):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer, k, v):
        """Store the new tokens' k, v [B, kv heads, T, head_dim]; give those of all tokens, these included."""
        stop = self.length + k.shape[2]
        if stop > self.keys.shape[3]:
            raise ValueError(f"the KV cache holds {self.keys.shape[3]} tokens, {stop} are needed")
        self.keys[layer, :, :, self.length : stop] = k
        self.values[layer, :, :, self.length : stop] = v
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]


@contextlib.contextmanager
def decoded(model):
    """Decode the weights of `model` once, for many forward passes without training, if they are small."""
    layers = model.linears()
    small = sum(layer.weight.numel() for layer in layers) * 4 <= DECODED_LIMIT
    if layers[-1].decoded is not None or not small:  # inside another `decoded`, or not worth it
        yield
        return
    for layer in layers:
        layer.decoded = layer.value(model.model.compute_dtype)
    try:
        yield
    finally:
        for layer in layers:
            layer.decoded = None


def choose(logits, *, temperature=0.0, top_k=0, top_p=1.0, generator=None):
    """The next token's number from its logits [V].

    temperature 0: the likeliest (greedy). Otherwise a draw from softmax(logits / temperature) among the
    `top_k` likeliest (0: all) and, of these, the fewest whose probabilities add up to `top_p`.
    """
    if temperature == 0:
        return int(logits.argmax())
    logits, order = (logits.float() / temperature).sort(descending=True, stable=True)
    if top_k:
        logits, order = logits[:top_k], order[:top_k]
    probability = logits.softmax(-1)
    before = probability.cumsum(-1) - probability  # of all that are likelier; 0 for the first, which stays
    probability = torch.where(before < top_p, probability, 0.0)
    return int(order[torch.multinomial(probability, 1, generator=generator)])


@torch.no_grad()
def stream(model, ids, max_new_tokens, stop_ids=(), **sampling):
    """Yield up to `max_new_tokens` token numbers that follow `ids`; ends before one of `stop_ids`."""
    capacity = len(ids) + max_new_tokens
    cache = KVCache(model.config, 1, capacity, model.device, model.model.compute_dtype)
    with decoded(model):
        for _ in range(max_new_tokens):
            hidden = model.model(torch.tensor([ids], device=model.device), cache)
            token = choose(last_logits(model.lm_head, hidden[0, -1]), **sampling)
            if token in stop_ids:
                return
            yield token
            ids = [token]


def last_logits(head, hidden):
    """Of a hidden state [D], [V]; the head is decoded some rows at a time, for it is the largest matrix."""
    slices = word_slices(len(head.weight))
    return torch.cat([F.linear(hidden, head.value(hidden.dtype, words)) for words in slices])


def generate(model, tokenizer, prompt, *, max_new_tokens=128, temperature=0.0, top_k=0, top_p=1.0, seed=None,
             tools=None, thinking=True):  # fmt: skip
    """The assistant's answer to `prompt`: a user's text, or a list of {"role", "content"} messages; or what
    follows the tokens [int].

    Greedy unless `temperature` is above 0; `seed` then makes the draws repeatable. tools: what it may call.
    thinking: False asks a hybrid model to answer at once. Raises ValueError for an empty prompt and for
    sampling settings out of range.
    """
    if not prompt:
        raise ValueError("the prompt is empty")
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    generator = torch.Generator(model.device).manual_seed(seed) if seed is not None else None
    if not isinstance(prompt[0], int):
        prompt = tokenizer.prompt(prompt, tools, thinking)
    ids = stream(
        model, prompt, max_new_tokens, tokenizer.stop_ids,
        temperature=temperature, top_k=top_k, top_p=top_p, generator=generator,
    )  # fmt: skip
    return tokenizer.decode(ids)


def check_sampling(max_new_tokens, temperature, top_k, top_p):
    if max_new_tokens < 1 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"sampling needs max_new_tokens >= 1, temperature >= 0, top_k >= 0 and 0 < top_p <= 1, "
            f"got {max_new_tokens}, {temperature}, {top_k}, {top_p}"
        )


if __name__ == "__main__":
    sys.exit("error: the conversation has moved: python -m minifp4")
