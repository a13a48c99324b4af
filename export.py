"""Write what train.py has trained as checkpoints that other programs load.

    python export.py                               the newest checkpoint under out/: out/hf, out/model.dat
    python export.py --format hf --dequantize      a plain bf16 directory
    python export.py --format dat --input-dat A    A, with the trained entries replaced and all else unchanged

    format      for                            what it is
    hf          transformers, vLLM, SGLang     compressed-tensors, projections in NVFP4
    modelopt    TensorRT-LLM, vLLM             the same bytes under ModelOpt's names
    mlx         mlx-lm on Apple silicon        NVFP4 of one level, 32 bits at a time
    dat         the F# trainer                 TorchSharp's state dict, NVFP4 of one level

Everything that is written is read again and compared with the checkpoint before it counts as done.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

import minifp4
from minifp4.cli import check, groups, run
from minifp4.files import card, checkpoint, dat, layouts
from minifp4.files.atomic import bits, replacing

MARK = "minifp4.json"  # in every directory that is written here
FORMATS = ("hf", "modelopt", "mlx", "dat")


what, output = groups("what", "output")


@dataclass
class Settings:
    checkpoint: str = what("out", "a checkpoint, or a directory of some: then the newest", "DIR")
    best: bool = what(False, "that with the least held-out loss instead of the newest")
    format: list = what(None, "repeatable; default: hf and dat", choices=FORMATS)
    dequantize: bool = what(False, "hf without NVFP4: the same values in bf16, for any program")
    quantize_head: bool = what(False, "the head in NVFP4 too (hf, modelopt, mlx; a tied one only in mlx)")
    input_dat: str = what(None, "dat: rewrite the trained entries of this file", "FILE")
    out: str = output(None, "where to write; default: the directory of the checkpoints", "DIR")
    shard_gb: float = output(5.0, "largest file of a directory, in 10**9 bytes", least=1e-6)
    verify: bool = output(True, "read all that was written again and compare it with the checkpoint")


def main(settings):
    """Export as `settings` say; returns {format: path}."""
    check(settings)
    chosen = list(dict.fromkeys(settings.format or (["dat"] if settings.input_dat else ["hf", "dat"])))
    if settings.dequantize and (settings.quantize_head or "hf" not in chosen):
        raise ValueError("--dequantize is for --format hf alone, without --quantize-head")
    if settings.quantize_head and chosen == ["dat"]:
        raise ValueError("--quantize-head is for --format hf, modelopt and mlx: a .dat always has it so")
    if settings.input_dat and "dat" not in chosen:
        raise ValueError("--input-dat is for --format dat")
    source = find_checkpoint(settings.checkpoint, settings.best)
    model, tokenizer = minifp4.load(source)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"reading {source}: {len(list(model.parameters()))} tensors, {size:.2f} M weights")
    out = Path(settings.out or source.parent)
    out.mkdir(parents=True, exist_ok=True)
    paths, record = {}, {}
    if (source / "train.json").is_file():
        record = checkpoint.read_json(source / "train.json")
    for name in chosen:
        if name == "dat":
            paths[name] = export_dat(model, record, out / "model.dat", settings.input_dat, settings.verify)
        else:
            layout = "bf16" if settings.dequantize else name
            paths[name] = export_directory(model, tokenizer, record, layout, out / layout, settings)
    if "hf" in paths:
        print(f"next    vllm serve {paths['hf']}    (or any program that reads a Hugging Face directory)")
    return paths


def find_checkpoint(path, best):
    if best:
        if not (Path(path) / checkpoint.BEST / "train.json").is_file():
            raise FileNotFoundError(f"{path} holds no {checkpoint.BEST}: train with --eval-data")
        return best_of(Path(path))
    try:
        return checkpoint.model_directory(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}: train first (python train.py), or name one with --checkpoint DIR"
        ) from None


def best_of(out):
    """The best checkpoint in `out`, if it is of the run that wrote the newest."""
    best, newest = out / checkpoint.BEST, checkpoint.model_directory(out)
    runs = [checkpoint.read_json(place / "train.json").get("run") for place in (best, newest)]
    if runs[0] != runs[1]:
        raise ValueError(f"{best} is of an earlier run than {newest}, which held nothing out")
    return best


def export_directory(model, tokenizer, record, layout, path, settings):
    """Write the directory `path`; returns it. record: the checkpoint's train.json."""
    head = settings.quantize_head
    tensors, keys = layouts.tensors_of(model, layout, head), layouts.config_keys(layout, head)
    with replacing(path, MARK) as aside:
        aside.mkdir()
        checkpoint.write_model(aside, model.config, tokenizer, tensors, keys, int(settings.shard_gb * 1e9))
        if layout == "modelopt":
            checkpoint.write_json(aside / "hf_quant_config.json", layouts.modelopt_keys(head))
        card.write(aside / "README.md", layout, record, tokenizer)
        checkpoint.write_json(aside / MARK, {"version": minifp4.__version__, "layout": layout})
        if settings.verify:  # before it takes the place of an earlier one
            for file in checkpoint.open_weights(aside):
                verify(file, model, layout, path)
    report(layout, path, layouts.count(tensors), settings.verify)
    return path


def export_dat(model, record, path, input_dat, verified):
    """Write a new .dat, or `input_dat` with the trained entries replaced; returns its path.

    A .dat has no room for a mark, so a file beside it has the digest of what was written; any other .dat
    under this name, such as the F# trainer's own, is refused.
    """
    mark = path.with_name(f".{path.name}.minifp4")
    ours = mark.read_text().split() if mark.is_file() else []
    if path.is_file() and digest(path) not in ours:
        raise ValueError(f"{path} was not written by export.py; move it or choose another --out")
    with replacing(path) as aside:
        counts = checkpoint.write_dat(aside, model, input_dat, record.get("trained", ()))
        if verified and not input_dat:  # else `write_dat` has compared with the checkpoint and `input_dat`
            verify(dat.DatFile(aside), model, "dat", path)
        mark.write_text("\n".join([*ours[-1:], digest(aside), ""]))  # should this end now, either is there
    report("dat", path, counts, verified)
    return path


def digest(path):
    found = hashlib.blake2b()
    with open(path, "rb") as file:
        while piece := file.read(2**24):
            found.update(piece)
    return found.hexdigest()


def verify(file, model, layout, path):
    """Compare every parameter in `file`, which is to become `path`, with the checkpoint's after a way through
    `layout`: NVFP4 by codes and scales, all else by value, all bits."""
    packed = layouts.find_packed(file.entries)
    parts = {part for one in packed.values() for part in one[:3]}
    for name in [*packed, *(file.entries.keys() - parts)]:
        if name in packed:
            expected = layouts.expected_nvfp4(model, name, layout)
            found = layouts.read_nvfp4(file, packed[name])
            same = all(torch.equal(bits(a), bits(b)) for a, b in zip(found, expected))
        else:
            same = torch.equal(file[name], layouts.expected_value(model, name, layout).to(file[name].dtype))
        if not same:
            raise ValueError(f"{path}: {name!r} would differ from the checkpoint; it was not written")


def report(name, path, counts, verified):
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    size = sum(file.stat().st_size for file in files) / 2**20
    done = "read again, all equal to the checkpoint" if verified else "not verified"
    print(f"{name:7} {path}: {' '.join(f'{k}={n}' for k, n in counts.items())}, {size:.2f} MiB; {done}")


if __name__ == "__main__":
    run(main, Settings, __doc__)
