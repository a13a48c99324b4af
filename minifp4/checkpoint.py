"""From files to a model, and back.

`load` takes a Hugging Face directory of a Qwen3 (bf16, fp16 or fp32; one file or several), an NVFP4 export
of it, or a checkpoint of train.py, and these are nearly one thing: config.json, tokenizer.json, and tensors
with Hugging Face's names. A checkpoint of train.py is such a directory too, its weights in the precision in
which they train, plus

    optimizer.safetensors   the moments, as they are stored
    train.json              the step, and the settings of the run

A directory appears under its name when everything in it is on the disk, so whatever is there can be loaded.
"""

import json
import shutil
from pathlib import Path

import torch
from torch import nn

from . import safetensors
from .chat import Tokenizer
from .files import replacing
from .formats import ACTIVATION_SCALES, find_packed, read_dense
from .model import Config, Qwen3
from .nvfp4 import BLOCK

BASE = Path(__file__).parent / "assets" / "base"  # the bundled model
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What else a model directory may hold that a server wants; copied as it is.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def load(path=BASE, *, quantize=True, device="cpu", compute_dtype=None):
    """The (model, tokenizer) in the directory `path`, or in the newest checkpoint below it.

    quantize: read the weights through NVFP4; False gives the plain forward pass.
    compute_dtype: of the activations; bf16 on CUDA and fp32 elsewhere if None.
    Matrices keep the type that they have in the file (NVFP4 becomes bf16, without loss), vectors become fp32.
    Raises OSError or ValueError naming the file, the key or the tensor that is wrong.
    """
    directory = model_directory(path)
    config, tokenizer = read_config(directory), Tokenizer(existing(directory / "tokenizer.json"))
    if tokenizer.largest >= config.vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer has the token {tokenizer.largest}, config.json a vocab_size of only "
            f"{config.vocab_size}; these files do not belong together"
        )
    with torch.device("meta"):
        model = Qwen3(config, quantize)
    read_weights(model, open_weights(directory), device)
    model.set_compute_dtype(compute_dtype or default_compute_dtype(device))
    return model, tokenizer


def default_compute_dtype(device):
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def model_directory(path):
    """`path` if it holds a config.json, or else the newest checkpoint in it."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if (path / "config.json").is_file():
        return path
    found = checkpoints(path)
    if not found:
        raise FileNotFoundError(f"{path} holds neither a config.json nor a checkpoint of train.py (step-*)")
    return found[-1]


def checkpoints(out):
    """The complete checkpoints in the directory `out`, oldest first."""
    found = [entry.parent for entry in Path(out).glob("step-*/train.json")]
    return sorted(found, key=lambda entry: ((entry / "train.json").stat().st_mtime_ns, entry.name))


def existing(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    return path


def read_json(path):
    try:
        value = json.loads(existing(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value


def read_config(directory):
    path = directory / "config.json"
    try:
        return Config.from_dict(read_json(path))
    except ValueError as error:
        raise ValueError(error if str(path) in str(error) else f"{path}: {error}") from None


def open_weights(directory):
    """The opened safetensors files of a model directory: one, or those that the index names."""
    if not (directory / INDEX).is_file():
        return [safetensors.SafeFile(existing(directory / WEIGHTS))]
    places = read_json(directory / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{directory / INDEX}: weight_map must map tensor names to file names")
    for name in places.values():
        if Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"{directory / INDEX}: {name!r} is not a file name in this directory")
    return [safetensors.SafeFile(existing(directory / name)) for name in sorted(set(places.values()))]


def read_weights(model, files, device):
    """Fill `model` (on the meta device) from `files`, tensor by tensor; every tensor must have its place."""
    wanted, found, known = dict(model.named_parameters()), {}, set()
    for file in files:
        packed = find_packed(file.entries)
        known |= {part for parts in packed.values() for part in parts[:3]}
        for name in [*packed, *(file.entries.keys() - known)]:
            if name in found:
                raise ValueError(f"{file.path}: {name!r} is also in {found[name][0].path}")
            found[name] = (file, packed.get(name))
    unexpected = sorted(name for name in found if name not in wanted and not name.endswith(ACTIVATION_SCALES))
    missing = sorted(wanted.keys() - found.keys())
    if missing or unexpected:
        raise ValueError(
            f"{files[0].path.parent}: the weights do not fit config.json: "
            f"missing {_some(missing)}; unexpected {_some(unexpected)}"
        )
    for name, meta in wanted.items():
        file, parts = found[name]
        value = read_dense(file, name, parts)
        if value.shape != meta.shape or not value.is_floating_point():
            raise ValueError(
                f"{file.path}: {name!r} is {value.dtype} {[*value.shape]}, "
                f"config.json asks for {[*meta.shape]}"
            )
        if model.quantized and value.dim() == 2 and value.shape[1] % BLOCK:
            raise ValueError(
                f"{file.path}: {name!r} {[*value.shape]}: NVFP4 needs rows of a multiple of {BLOCK}"
            )
        dtype = torch.float32 if value.dim() == 1 else value.dtype
        set_weight(model, name, value.to(device, dtype, copy=True))


def _some(names):
    return f"{len(names)} ({', '.join(names[:6])}{', ...' if len(names) > 6 else ''})" if names else "none"


def set_weight(model, name, value):
    """Make `value` the parameter `name`; a tied head follows."""
    module = model.get_submodule(name.removesuffix(".weight"))
    tied = module is model.model.embed_tokens and model.config.tie_word_embeddings
    module.weight = nn.Parameter(value)
    if tied:
        model.lm_head.weight = module.weight


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
    return counts


def set_masters(model, dtype):
    """Store the matrices that train in `dtype`; frozen ones stay as they are, bit for bit."""
    for name, p in list(model.named_parameters()):
        if p.requires_grad and p.dim() == 2 and p.dtype != dtype:
            set_weight(model, name, p.detach().to(dtype))
    model.set_compute_dtype(model.model.compute_dtype)


def save(out, step, model, tokenizer, optimizer, settings):
    """Write the checkpoint `out`/step-NNNNNN and return its path; it appears whole or not at all."""
    directory = Path(out) / f"step-{step:06d}"
    with replacing(directory) as aside:
        aside.mkdir(parents=True)
        write_model(
            aside, model.config, tokenizer, {name: p.detach() for name, p in model.named_parameters()}
        )
        safetensors.write(aside / "optimizer.safetensors", optimizer.tensors())
        write_json(
            aside / "train.json", {"step": step, "optimizer_steps": optimizer.steps, "settings": settings}
        )
    return directory


def write_model(directory, config, tokenizer, tensors, extra=None):
    """A model directory: `tensors`, the tokenizer's files, and config.json with the source's unknown keys,
    the spellings of transformers 4 and 5, and the keys of `extra`."""
    source = {key: value for key, value in config.source.items() if key != "quantization_config"}
    source |= {
        "architectures": ["Qwen3ForCausalLM"],
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        **(extra or {}),
    }
    safetensors.write(directory / WEIGHTS, tensors)
    write_json(directory / "config.json", source)
    for name in COMPANIONS:
        if (tokenizer.path.parent / name).is_file():
            shutil.copyfile(tokenizer.path.parent / name, directory / name)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
