"""Write what train.py has trained as checkpoints that other programs load.

    python export.py                        the newest checkpoint under out/, as out/hf and out/model.dat
    python export.py --format hf --dequantize     a plain bf16 directory

    format   for                            what it is
    hf       transformers, vLLM, SGLang     compressed-tensors, projections in NVFP4
    dat      the F# trainer                 TorchSharp's state dict, NVFP4 of one level

Everything that is written is read again and compared with the checkpoint before it counts as done.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

import minifp4
from minifp4 import checkpoint, dat, formats
from minifp4.cli import check, option, run
from minifp4.files import replacing

FORMATS = ("hf", "dat")


@dataclass
class Settings:
    checkpoint: str = option(
        "out", "what", "a checkpoint, or a directory with some: then the newest", metavar="DIR"
    )
    format: list = option(None, "what", "repeatable; default: hf and dat", choices=FORMATS)
    dequantize: bool = option(False, "what", "hf without NVFP4: the same values in bf16, for any program")
    quantize_head: bool = option(
        False, "what", "hf with an NVFP4 head too (not if it is tied to the embedding)"
    )
    out: str = option(
        None, "output", "where to write; default: the directory of the checkpoints", metavar="DIR"
    )
    verify: bool = option(
        True, "output", "read all that was written again and compare it with the checkpoint"
    )


def main(settings):
    """Export as `settings` say; returns {format: path}."""
    check(settings)
    if settings.dequantize and settings.quantize_head:
        raise ValueError("--dequantize and --quantize-head exclude each other")
    source = find_checkpoint(settings.checkpoint)
    model, tokenizer = minifp4.load(source)
    print(f"reading {source}: {len(list(model.parameters()))} tensors, "
          f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M weights")  # fmt: skip
    out = Path(settings.out or source.parent)
    out.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name in dict.fromkeys(settings.format or FORMATS):
        export = {"hf": export_hf, "dat": export_dat}[name]
        paths[name] = export(model, tokenizer, out, settings)
    if "hf" in paths:
        print(f"next    vllm serve {paths['hf']}    (or any program that reads a Hugging Face directory)")
    return paths


def find_checkpoint(path):
    try:
        return checkpoint.model_directory(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}: train first (python train.py), or name one with --checkpoint DIR"
        ) from None


def export_hf(model, tokenizer, out, settings):
    tensors = (
        formats.plain_tensors(model)
        if settings.dequantize
        else formats.hf_tensors(model, settings.quantize_head)
    )
    path = out / ("bf16" if settings.dequantize else "hf")
    extra = {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    if not settings.dequantize:
        extra["quantization_config"] = formats.quantization_config(settings.quantize_head)
    with replacing(path) as aside:
        aside.mkdir()
        checkpoint.write_model(aside, model.config, tokenizer, tensors, extra)
    if settings.verify:
        for file in checkpoint.open_weights(path):
            verify(file, model, formats.plain_value)
    report("hf", path, tensors, settings)
    return path


def export_dat(model, tokenizer, out, settings):
    path, tensors = out / "model.dat", formats.dat_tensors(model)
    dat.write(path, tensors)
    if settings.verify:
        verify(dat.DatFile(path), model, formats.dat_value)
    report("dat", path, tensors, settings)
    return path


def verify(file, model, expected):
    """Compare every parameter in `file`, decoded, with what `expected` makes of the checkpoint's: bit for
    bit."""
    packed = formats.find_packed(file.entries)
    parts = {part for one in packed.values() for part in one[:3]}
    for name in [*packed, *(file.entries.keys() - parts)]:
        value = formats.read_dense(file, name, packed.get(name))
        if not torch.equal(value, expected(model, name).to(value.dtype)):
            raise ValueError(f"{file.path}: {name!r} differs from the checkpoint; the file must not be used")


def report(name, path, tensors, settings):
    kinds = {}
    for key in tensors:
        kind = formats.kind_of(key)
        kinds[kind] = kinds.get(kind, 0) + 1
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    done = "read again, all equal to the checkpoint" if settings.verify else "not verified"
    counts = " ".join(f"{kind}={count}" for kind, count in kinds.items())
    print(f"{name:7} {path}: {counts}, {size / 2**20:.2f} MiB; {done}")


if __name__ == "__main__":
    run(main, Settings, __doc__)
