"""Which weights train, and in what each is stored: between loading a model and training it.

Everything that is not chosen stays as it is, bit for bit, in the precision of its file.
"""

import torch
from torch import nn

from .model import Qwen3
from .packed import Packed, pack, stored_values
from .storage import FLOATS


def initialize(config, seed, *, quantize=True, device="cpu"):
    """A new model with random weights: normal, standard deviation .02, norms 1."""
    with torch.device("meta"):
        model = Qwen3(config, quantize)
    generator = torch.Generator().manual_seed(seed)
    for name, p in list(model.named_parameters()):
        if p.dim() == 1:
            set_weight(model, name, torch.ones(p.shape, device=device))
        else:
            value = torch.randn(p.shape, generator=generator) * 0.02
            set_weight(model, name, value.to(device))
    model.set_compute_dtype(default_compute_dtype(device))
    return model


def default_compute_dtype(device):
    """bf16 on GPUs that compute in it (from compute capability 8.0 on), else fp32."""
    if torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def set_weight(model, name, value):
    """Make `value` the parameter `name`; a tied head follows."""
    module = model.get_submodule(name.removesuffix(".weight"))
    module.weight = nn.Parameter(value)
    if hasattr(module, "group"):
        module.group.kept_scale = None
    if module is model.model.embed_tokens and module.tied:
        model.lm_head.weight = module.weight


def choose_trained(model, *, lm_head, embed, last_layers=0):
    """Let exactly the named parameters train, and count them by kind.

    Projections and norms of all layers and the final norm, or only those inside the last `last_layers`
    layers; the head and the embedding if asked for. If they are tied, either flag trains the one tensor
    that both are.
    """
    layers = model.config.num_hidden_layers
    if not 0 <= last_layers <= layers:
        raise ValueError(f"--train-last-layers must be from 0 (all) to {layers}, got {last_layers}")
    first = layers - last_layers if last_layers else 0
    counts = dict.fromkeys(("projections", "norms", "lm_head", "embed_tokens"), 0)
    for name, p in model.named_parameters():
        if name in ("lm_head.weight", "model.embed_tokens.weight"):
            kind = name.split(".")[-2]
            tied = model.config.tie_word_embeddings
            p.requires_grad = (lm_head or embed) if tied else (lm_head if kind == "lm_head" else embed)
        else:
            kind = "norms" if p.dim() == 1 else "projections"
            inside = name.startswith("model.layers.")
            p.requires_grad = int(name.split(".")[2]) >= first if inside else not last_layers
        counts[kind] += p.requires_grad
    read_ends(model, [name for name, p in model.named_parameters() if p.requires_grad])
    return counts


def read_ends(model, names=None):
    """Let head and embedding be read through NVFP4 if they train (are among `names`) or are packed; else as
    they are stored, for servers keep them like that, and 4 bits would save nothing.

    names: None where nobody has said what trains: then they are, unless the projections are packed and they
    are not.
    """
    tied = model.config.tie_word_embeddings
    packed = any(isinstance(layer.weight, Packed) for layer in model.linears()[:-1])
    head, embedding = ("model.embed_tokens.weight" if tied else "lm_head.weight"), "model.embed_tokens.weight"
    for name, layer in ((head, model.lm_head), (embedding, model.model.embed_tokens)):
        trains = not packed if names is None else name in names
        layer.quantized = model.quantized and (trains or isinstance(layer.weight, Packed))


@torch.no_grad()
def set_masters(model, kind, device=None, finer_ends=False):
    """Store the matrices that train as `kind` (of `storage.MASTERS`); frozen ones stay as they are, all bits.

    finer_ends: of `nvfp4`, store head, embedding and the last layer as `nvfp4x2`: there rounding noise costs
    most, and they are a fifth of Qwen3-4B.
    device: move everything there, of the dense matrices only one group at a time, so that a model whose
    packed form fits on a GPU need never be there as a whole.
    """
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    left = dict(model.named_parameters())
    for layer in [*model.linears(), model.model.embed_tokens]:
        group = [names[other] for other in layer.group.layers if names[other] in left]
        for name in group:
            _replace(model, name, left.pop(name).to(device))
        scale = layer.group.measure() if group and kind not in FLOATS else None
        agrees = layer.group.agrees()
        for name in group:
            p = model.get_parameter(name)
            if not p.requires_grad:
                continue
            at_an_end = name.startswith(ends(model.config.num_hidden_layers))
            finer = kind == "nvfp4x2" or finer_ends and at_an_end
            if not agrees:  # packed by another program, which kept a global scale for each
                p = stored_values(p)
            value = stored_values(p).to(FLOATS[kind]) if kind in FLOATS else pack(p, scale, finer)
            _replace(model, name, value)
    for name, p in left.items():  # norms
        _replace(model, name, p.to(device))
    read_ends(model, [name for name, p in model.named_parameters() if p.requires_grad])
    model.set_compute_dtype(model.model.compute_dtype)


def ends(layers):
    """How the names of head, embedding and the last of so many layers begin."""
    return "lm_head.", "model.embed_tokens.", f"model.layers.{layers - 1}."


def _replace(model, name, value):
    """`set_weight` that leaves it trained, or frozen, as it was."""
    trained = model.get_parameter(name).requires_grad
    set_weight(model, name, value.detach())
    model.get_parameter(name).requires_grad_(trained)
