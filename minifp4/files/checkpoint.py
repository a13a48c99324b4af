"""From files to a model, and back.

`load` takes a Hugging Face directory of a Qwen3 (bf16, fp16 or fp32; one file or several), an NVFP4 one, the
F# trainer's `.dat`, or a checkpoint of train.py, and these are nearly one thing: config.json, tokenizer.json,
and tensors with Hugging Face's names. A checkpoint's weights are in the precision in which they train, and
beside them are

    optimizer.safetensors   the moments, as they are stored
    train.json              the step, and the settings of the run

A directory appears under its name when everything in it is on the disk, so whatever is there can be loaded.
"""

import json
from pathlib import Path

import torch

from .. import parallel
from ..chat import SPECIAL_TOKENS, Tokenizer
from ..masters import default_compute_dtype, read_ends, set_weight
from ..model import Config, Qwen3
from ..nvfp4 import BLOCK, E2M1_MAX, row_chunks
from ..packed import PLACES, Packed
from ..progress import watched
from ..storage import FLOATS
from ..template import Template
from ..vocabulary import CHAT_TEMPLATE
from . import dat, layouts, safetensors
from .atomic import replacing
from .layouts import (
    ACTIVATION_SCALES, EMBEDDING, HEAD, find_packed, module_of, read_divisor, read_weight, stored_tensors,
)  # fmt: skip

BASE = Path(__file__).parents[1] / "assets" / "base"  # the bundled model
BEST = "best"  # the directory beside step-* of the checkpoint with the least held-out loss
WEIGHTS, INDEX, OPTIMIZER = "model.safetensors", "model.safetensors.index.json", "optimizer.safetensors"
LARGEST = 1.8125 * 2.0**127  # 3.08e38, magnitude of a weight; bf16 and fp32 end at 3.4e38
FORMAT = 2  # of checkpoints: `_from_format_1` says what was different
SHARD_BYTES = 5 * 10**9  # of one file of an export
# What else a model directory may hold that a server wants; copied as it is.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja", "generation_config.json", "LICENSE", "NOTICE",
)  # fmt: skip
SPOKEN = "generation_config.json", "tokenizer_config.json"  # those that say where an answer ends


def load(path=BASE, *, input_dat=None, quantize=True, device="cpu", compute_dtype=None):
    """The (model, tokenizer) in the directory `path`, or in the newest checkpoint below it.

    input_dat: take the weights from this TorchSharp `.dat`, config and tokenizer from `path`; a `path` that
    ends in .dat means the file and its directory.
    quantize: read the weights through NVFP4; False gives the plain forward pass.
    compute_dtype: of the activations; bf16 on CUDA and fp32 elsewhere if None. Matrices stay as they are in
    the file (NVFP4: the same codes, a `Packed` parameter), vectors become fp32. Raises OSError or
    ValueError naming the file, the key or the tensor that is wrong.
    """
    path = Path(path)
    if path.suffix == ".dat":
        path, input_dat = path.parent, path
    directory = model_directory(path)
    config, tokenizer = read_config(directory), read_tokenizer(directory)
    check_vocabulary(directory, config, tokenizer)
    files = [dat.DatFile(existing(Path(input_dat)))] if input_dat else open_weights(directory)
    check_layers(directory, config, files)
    with torch.device("meta"):
        model = Qwen3(config, quantize)
    read_weights(model, files, device)
    model.set_compute_dtype(compute_dtype or default_compute_dtype(device))
    return model, tokenizer


def read_tokenizer(directory):
    """The tokenizer of a model directory, with its companions in memory: the directory may be gone when they
    are written again."""
    tokenizer = Tokenizer(existing(directory / "tokenizer.json"))
    for name in COMPANIONS:
        if (directory / name).is_file():
            tokenizer.companions[name] = (directory / name).read_bytes()
    for name in SPOKEN:  # says now if it is damaged, not when the work of hours is to be saved
        record = read_json(directory / name) if name in tokenizer.companions else {}
        stops = as_list(record.get("eos_token_id"))
        if not all(stop is None or type(stop) is int for stop in stops):
            raise ValueError(f'{directory / name}: "eos_token_id" must be a number or some, got {stops}')
    tokenizer.template = Template(chat_template(tokenizer.companions))
    return tokenizer


def chat_template(companions):
    """The Jinja of a model's chat template, or None: a file of its own, or in tokenizer_config.json as a text
    or as several with names."""
    if "chat_template.jinja" in companions:
        return companions["chat_template.jinja"].decode(errors="replace")
    found = json.loads(companions.get("tokenizer_config.json", b"{}")).get("chat_template")
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def check_vocabulary(directory, config, tokenizer):
    """Raise ValueError unless the model has a row for every token."""
    if tokenizer.largest >= config.vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer has the token {tokenizer.largest}, config.json a vocab_size of only "
            f"{config.vocab_size}; these files do not belong together"
        )


def check_layers(directory, config, files):
    """Raise ValueError if config.json promises more layers than there are, before they take memory."""
    names = [name.split(".") for file in files for name in file.entries]
    layers = {name[2] for name in names if name[:2] == ["model", "layers"] and len(name) > 2}
    if layers and len(layers) < config.num_hidden_layers:
        raise ValueError(
            f"{directory}: config.json says {config.num_hidden_layers} layers, the weights have {len(layers)}"
        )


def model_directory(path):
    """`path` if it holds a config.json, or else the checkpoint in it whose step is the largest."""
    path = Path(path)
    if not path.exists():
        hub = len(path.parts) == 2 and not path.parent.exists()
        advice = f"; if it is on the hub: hf download {path} --local-dir {path.name}" if hub else ""
        raise FileNotFoundError(f"{path} does not exist{advice}")
    if (path / "config.json").is_file():
        return path
    found = checkpoints(path)
    if not found:
        raise FileNotFoundError(f"{path} holds neither a config.json nor a checkpoint of train.py (step-*)")
    return found[-1]


def checkpoints(out):
    """The complete checkpoints in the directory `out`, in the order of their steps: a copy keeps no times."""
    found = [entry.parent for entry in Path(out).glob("step-*/train.json")]
    numbered = {int(entry.name[5:]): entry for entry in found if entry.name[5:].isdigit()}
    return [numbered[step] for step in sorted(numbered)]


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
        if not (directory / WEIGHTS).is_file() and list(directory.glob("*.bin")):
            raise ValueError(f"{directory}: only safetensors are read, no .bin files, which can run code")
        return [safetensors.SafeFile(existing(directory / WEIGHTS))]
    places = read_json(directory / INDEX).get("weight_map")
    names = list(places.values()) if isinstance(places, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{directory / INDEX}: weight_map must map tensor names to file names")
    for name in names:
        if Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"{directory / INDEX}: {name!r} is not a file name in this directory")
    files = [safetensors.SafeFile(existing(directory / name)) for name in sorted(set(names))]
    if (directory / WEIGHTS).is_file() and WEIGHTS not in names:
        raise ValueError(f"{directory} holds {INDEX} and also {WEIGHTS}: remove that which is out of date")
    return files


def read_weights(model, files, device):
    """Fill `model` (on the meta device) from `files`, tensor by tensor; every tensor must have its place."""
    # A checkpoint of train.py says itself what is NVFP4; dense masters that lie on its grid stay dense.
    path = files[0].path.parent / "train.json"
    ours = path.is_file()
    record = read_json(path) if ours else {}
    older = ours and _is_older(record, path)
    found = find_weights(model, files)
    for name, meta in watched(list(model.named_parameters()), "loading"):
        file, parts = found[name]
        value = read_weight(file, name, parts, device)
        if older and isinstance(value, Packed) and value.more is not None:
            value.qdata, value.more = _from_format_1(value.qdata, value.more)
        if value.shape != meta.shape or value.dtype not in FLOATS.values():
            raise ValueError(
                f"{file.path}: {name!r} is {value.dtype} {[*value.shape]}, "
                f"config.json asks for {[*meta.shape]} in fp32, bf16 or fp16"
            )
        if model.quantized and value.dim() == 2 and value.shape[1] % BLOCK:
            raise ValueError(
                f"{file.path}: {name!r} {[*value.shape]}: NVFP4 needs rows of a multiple of {BLOCK}"
            )
        _check_finite(file, name, value)
        if value.dim() == 1:
            value = value.float()
        elif parts is None and not ours and _reads_nvfp4(module_of(model, name)):
            value = layouts.pack_exactly(value)
        set_weight(model, name, value)
        if isinstance(value, Packed) and (divisor := read_divisor(file, parts)):
            model.divisors[name] = divisor
    read_ends(model, trained_names(record, path) if ours else None)


def find_weights(model, files):
    """{parameter name: (file, its `Parts` there or None)}; ValueError if something is missing or too much."""
    wanted, found, known = {name for name, _ in model.named_parameters()}, {}, set()
    for file in files:
        packed = find_packed(file.entries)
        known |= {part for parts in packed.values() for part in (*parts[:3], parts.more, parts.divisor)}
        for name in [*packed, *(file.entries.keys() - known)]:
            if name in found:
                raise ValueError(f"{file.path}: {name!r} is also in {found[name][0].path}")
            found[name] = (file, packed.get(name))
    if model.config.tie_word_embeddings and HEAD in found:
        _check_tied(found)
        del found[HEAD]  # some files, and every .dat, keep it beside the embedding that it is tied to
    unexpected = sorted(name for name in found if name not in wanted and not name.endswith(ACTIVATION_SCALES))
    missing = sorted(wanted - found.keys())
    if missing or unexpected:
        where = files[0].path if len(files) == 1 else files[0].path.parent
        what = f"missing {_some(missing)}; unexpected {_some(unexpected)}"
        raise ValueError(f"{where}: {_advice(model, found)}{what}")
    return found


def _advice(model, found):
    """What to do about weights that do not fit, where that is known."""
    method = (model.config.source.get("quantization_config") or {}).get("quant_method")
    if method not in (None, "compressed-tensors", "modelopt"):
        return f"quantized by {method!r}, which is not read here; take the bf16 original. "
    if any(name.endswith((".absmax", "_scale_inv", ".qzeros", ".biases")) for name in found):
        return "quantized in a way that is not read here; take the bf16 original. "
    if any(name.startswith("layers.") for name in found):
        return 'an embedding model or a part of one (no "model." before the names). '
    return "the weights do not fit config.json: "


def _check_tied(found):
    """Raise ValueError if a head beside the embedding that config.json ties it to is another matrix."""
    (head, *parts), (embedding, *others) = found[HEAD], found.get(EMBEDDING, (None, None))
    if embedding and parts == others == [None] and not torch.equal(head[HEAD], embedding[EMBEDDING]):
        raise ValueError(
            f"{head.path}: {HEAD!r} and {EMBEDDING!r} differ, but config.json has tie_word_embeddings true; "
            "make that false if the head was trained apart, or remove it"
        )


def _check_finite(file, name, value):
    """Raise ValueError for a weight that holds NaN or an infinity, for every step would be skipped, or so
    large a number that rounding makes it one."""
    if isinstance(value, Packed):
        value = value.scale.float() * (value.global_scale * E2M1_MAX)
    for rows in row_chunks(value) if value.dim() == 2 else [slice(None)]:
        if not all(abs(end.item()) <= LARGEST for end in value[rows].aminmax()):
            [row, *_] = (value[rows].float().abs() <= LARGEST).logical_not().nonzero()[0].tolist()
            what = f"holds NaN, an infinity or a number beyond {LARGEST:.2g}"
            raise ValueError(f"{file.path}: {name!r} {what}, in row {(rows.start or 0) + row}")


def _reads_nvfp4(layer):
    """Whether a dense weight there is read through NVFP4: a look-up alone is not."""
    return layer.quantized and getattr(layer, "tied", True)


def _some(names):
    return f"{len(names)} ({', '.join(names[:6])}{', ...' if len(names) > 6 else ''})" if names else "none"


def name_of(step):
    """Of the directory of a checkpoint."""
    return f"step-{step:06d}"


def save(out, model, tokenizer, optimizer, record, name=None):
    """Write the checkpoint `out`/step-NNNNNN (record["step"]), or `out`/`name`; returns its path; it appears
    whole or not at all.

    record: what train.json says beside the optimizer's steps: "step", "trained" (names), "settings".
    """
    directory = Path(out) / (name or name_of(record["step"]))
    if parallel.rank():
        _write_moments(parallel.from_first(None), optimizer)
        parallel.largest(0)
        return directory
    tensors = {}
    for name, p in model.named_parameters():
        tensors |= stored_tensors(model, name, p)
    with replacing(directory, mark="train.json") as aside:
        aside.mkdir(parents=True)
        write_model(aside, model.config, tokenizer, tensors)
        write_json(aside / "train.json", {"format": FORMAT, "optimizer_steps": optimizer.steps, **record})
        pieces = {piece.name: piece for piece in optimizer.pieces()}
        entries = {name: (p.tensor.dtype, (p.rows, *p.tensor.shape[1:])) for name, p in pieces.items()}
        safetensors.lay_out(aside / OPTIMIZER, entries)
        _write_moments(parallel.from_first(aside), optimizer)
        parallel.largest(0)  # all have written theirs
    return directory


def _write_moments(directory, optimizer):
    """Each process writes its rows into one file."""
    pieces = [(piece.name, piece.first, piece.tensor) for piece in optimizer.pieces()]
    safetensors.write_rows(directory / OPTIMIZER, pieces, OPTIMIZER)


def read_moments(directory, optimizer):
    """Continue `optimizer` from the checkpoint `directory`; returns its train.json.

    Every moment must be there, in the precision of this run. sqrt(v) in 4 bits had 8 codes in format 1, which
    are the upper 8 of the 16 that it has now.
    """
    path = directory / "train.json"
    record = read_json(path)
    older = _is_older(record, path)
    file, wanted = safetensors.SafeFile(existing(directory / OPTIMIZER)), list(optimizer.pieces())
    differing = sorted(file.entries.keys() ^ {piece.name for piece in wanted})
    if differing:
        raise ValueError(f"{file.path}: other moments than this run's: {_some(differing)}")
    for name, tensor, first, rows in wanted:
        if file.entries[name] != (tensor.dtype, (rows, *tensor.shape[1:])):
            raise ValueError(f"{file.path}: {name!r} is {file.entries[name]}, this run needs {tensor.dtype}")
        tensor.copy_(file[name][first : first + len(tensor)])
        if older and name.endswith("sqrt_exp_avg_sq.qdata") and tensor.dtype == torch.uint8:
            tensor |= 0x88
    optimizer.steps = number_in(record, "optimizer_steps", path)
    return record


def _is_older(record, path):
    """Whether the checkpoint of a train.json is of format 1; ValueError if it is of none that is known."""
    found = number_in({"format": 1} | record, "format", path)
    if not 1 <= found <= FORMAT:
        newer = "was it made by a newer version?"
        raise ValueError(f"{path}: format {found}; this version reads 1 to {FORMAT}: {newer}")
    return found == 1


def _from_format_1(qdata, more):
    """Codes and further bits of `nvfp4x2` as they are now. The place in the middle between two codes was read
    as the higher one everywhere; now it is so in even columns only."""
    place = (qdata >> 4 & 7) * PLACES + (more >> 4) - 1  # of odd columns, and with its new offset
    qdata = qdata & 0x8F | place // PLACES << 4
    return qdata, more & 0x0F | place % PLACES << 4


def trained_names(record, path):
    """The names of the weights that trained, of a train.json."""
    names = record.get("trained", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{path}: "trained" must be a list of names')
    return names


def number_in(record, key, path):
    """The whole number `key` of a record of `path`."""
    if type(record.get(key)) is not int or not 0 <= record[key] < 2**31:
        raise ValueError(f"{path}: {key!r} must be a whole number, got {record.get(key)!r}")
    return record[key]


def write_model(directory, config, tokenizer, tensors, extra=None, shard_bytes=SHARD_BYTES):
    """A model directory: `tensors`, the tokenizer's files, and config.json with the source's unknown keys,
    the spellings of transformers 4 and 5, and the keys of `extra`."""
    source = {key: value for key, value in config.source.items() if not key.startswith("quantization")}
    source |= {
        "architectures": ["Qwen3ForCausalLM"],
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        **(extra or {}),
    }
    if tokenizer.end not in as_list(source.get("eos_token_id")):  # a base model stops at <|endoftext|>
        source["eos_token_id"] = tokenizer.end
    write_shards(directory, tensors, shard_bytes)
    write_json(directory / "config.json", source)
    write_companions(directory, tokenizer)


def as_list(value):
    return value if isinstance(value, list) else [value]


def write_companions(directory, tokenizer):
    """The files beside a tokenizer.json, which also say that an answer ends with <|im_end|>, and in what
    template it was learned if there is none."""
    for name, data in tokenizer.companions.items():
        (directory / name).write_bytes(data)
    generation, config = (json.loads(tokenizer.companions.get(name, b"{}")) for name in SPOKEN)
    stops = [stop for stop in as_list(generation.get("eos_token_id")) if stop is not None]
    generation["eos_token_id"] = list(dict.fromkeys([*stops, *tokenizer.stop_ids]))
    generation.setdefault("pad_token_id", tokenizer.end_of_text)
    config["eos_token"] = SPECIAL_TOKENS[2]
    if "chat_template" not in config and "chat_template.jinja" not in tokenizer.companions:
        config["chat_template"] = CHAT_TEMPLATE
    for name, value in zip(SPOKEN, (generation, config)):
        write_json(directory / name, value)


def write_shards(directory, tensors, shard_bytes):
    """One file, or several of at most `shard_bytes` (or one tensor) and the index that says what is where."""
    shards, room = [], 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if not shards or size > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= size
    if len(shards) == 1:
        safetensors.write(directory / WEIGHTS, tensors)
        return
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        safetensors.write(directory / file, shard)
        places |= dict.fromkeys(shard, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_json(directory / INDEX, index)


def write_dat(path, model, input_dat=None, trained=()):
    """Write `model` as a `.dat`; returns counts by kind.

    With `input_dat`, that file with the entries of the parameters `trained` replaced, each in its own type,
    and all other bytes as they are; read again and compared before it takes its place. `path` may be
    `input_dat` itself.
    """
    if not input_dat:
        tensors = layouts.dat_tensors(model)
        dat.write(path, tensors)
        return layouts.count(tensors)
    source = dat.DatFile(existing(Path(input_dat)))
    replacements = layouts.dat_replacements(model, trained, source.entries)
    dat.rewrite(source, path, replacements)
    counts = dict.fromkeys(("qdata", "scale", "raw"), 0)
    for name in replacements:
        counts[name.rsplit(".", 1)[1] if name.endswith((".qdata", ".scale")) else "raw"] += 1
    print("replaced entries: " + " ".join(f"{kind}={number}" for kind, number in counts.items()))
    return counts


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
