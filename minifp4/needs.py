"""What training a model takes at least, before any of it is loaded.

Counted are what lies in memory all the time, weights and moments, and the gradients if all exist at once. The
activations come on top: they depend on the batch, and a run says itself when they are too many (`memory.py`).
"""

import os

import torch

from . import parallel
from .memory import GIB, Shortage
from .nvfp4 import BLOCK
from .storage import FLOATS

# Weights of the released Qwen3s, 10**9; of the first three head and embedding are one.
SIZES = {"0.6B": 0.596, "1.7B": 1.72, "4B": 4.02, "8B": 8.19, "14B": 14.8, "32B": 32.8}
PACKED = 0.5 + 1 / BLOCK
BYTES = {**{kind: dtype.itemsize for kind, dtype in FLOATS.items()}, "int8": 1 + 1 / BLOCK,
         "nvfp4": PACKED, "nvfp4x2": PACKED + 0.5}  # fmt: skip
SMALLER = {"step_in_backward": True, "master_dtype": "nvfp4", "optimizer_state": "nvfp4"}


def matrices(config):
    """(weights in the matrices of the layers, in the embedding, in the head if it is another one)."""
    c = config
    heads = 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    layer = heads + 3 * c.hidden_size * c.intermediate_size
    ends = c.vocab_size * c.hidden_size
    return c.num_hidden_layers * layer, ends, 0 if c.tie_word_embeddings else ends


def least(config, stored, gradient, **settings):
    """Bytes that are there all the time with such `settings` of train.py, but for norms and the scales of
    rows; of several processes, for each. stored: bytes a weight of what does not train, as the file has it;
    gradient: bytes of a number in a gradient."""
    layers, embedding, head = matrices(config)
    total = layers + embedding + head
    trained = layers * (settings["train_last_layers"] or config.num_hidden_layers) / config.num_hidden_layers
    if settings["train_embed"] or settings["train_lm_head"] and not head:
        trained += embedding
    if settings["train_lm_head"]:
        trained += head
    each = BYTES[settings["master_dtype"]] + 2 * BYTES[settings["optimizer_state"]] / parallel.ranks()
    each += 0 if settings["step_in_backward"] else gradient
    return trained * each + (total - trained) * stored


def available(device, limit_gib):
    """Bytes that a run may take, those included that it has; None where nobody knows."""
    if limit_gib is not None:
        return limit_gib * GIB
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def check(config, stored, gradient, there, **settings):
    """Raise `Shortage` if `there` bytes are fewer than the least; it names the flags, or the smaller Qwen3,
    with which they are enough."""
    need = least(config, stored, gradient, **settings)
    if there is None or need <= there:
        return
    text = f"weights, moments and gradients alone take {need / GIB:.1f} GiB, and {there / GIB:.1f} are there"
    smallest = least(config, stored, gradient, **settings | SMALLER)
    if smallest <= there:
        flags = [name for name, value in SMALLER.items() if settings[name] != value]
        values = ["" if SMALLER[name] is True else f" {SMALLER[name]}" for name in flags]
        words = " ".join(f"--{name.replace('_', '-')}{value}" for name, value in zip(flags, values))
        raise Shortage(f"{text}; {smallest / GIB:.1f} with {words}")
    a_weight = smallest / sum(matrices(config))
    fits = [name for name, size in SIZES.items() if size * 1e9 * a_weight <= there]
    advice = f"Qwen3-{fits[-1]} would fit" if fits else "no Qwen3 would fit"
    raise Shortage(f"{text} ({smallest / GIB:.1f} with the smallest kinds); {advice}")
