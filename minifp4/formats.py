"""The layouts in which programs keep an NVFP4 weight. The bytes are the same everywhere, the names are not.

    layout              codes              block scales      global scale
    compressed-tensors  X.weight_packed    X.weight_scale    X.weight_global_scale  F32 [1], reciprocal
    ModelOpt            X.weight           X.weight_scale    X.weight_scale_2       F32 []
    .dat (F# trainer)   X.weight.qdata     X.weight.scale    none: 1

with codes U8 [out, in/2] and block scales F8_E4M3 [out, in/16]. Inside minifp4 scales multiply; that
compressed-tensors stores the reciprocal of the global one (`value = e2m1 * scale / weight_global_scale`) is
known to this module only. Our global scales are powers of two, so that the reciprocal is exact.
"""

from typing import NamedTuple

import torch

from .nvfp4 import BLOCK, NVFP4, dequantize, quantize

# Scales for quantized activations: W4A16 has none, so they are read by nobody.
ACTIVATION_SCALES = (".input_global_scale", ".input_scale")


class Packed(NamedTuple):
    """Where the parts of one NVFP4 weight are: names in a file."""

    qdata: str
    scale: str
    global_scale: str | None
    reciprocal: bool = False


def find_packed(entries):
    """{parameter name: Packed} for all NVFP4 weights among `entries` {name: (dtype, shape)}."""
    found = {}
    for name, (dtype, _) in entries.items():
        if name.endswith(".weight_packed"):
            weight = name.removesuffix("_packed")
            found[weight] = Packed(name, f"{weight}_scale", f"{weight}_global_scale", reciprocal=True)
        elif name.endswith(".weight") and dtype == torch.uint8:
            found[name] = Packed(name, f"{name}_scale", f"{name}_scale_2")
        elif name.endswith(".weight.qdata"):
            weight = name.removesuffix(".qdata")
            found[weight] = Packed(name, f"{weight}.scale", None)
    return found


def read_packed(file, parts):
    """The `NVFP4` whose `parts` are in `file`. ValueError names what is missing or has a wrong shape or
    type."""
    missing = [name for name in parts[:3] if name is not None and name not in file.entries]
    if missing:
        raise ValueError(f"{file.path}: {parts.qdata!r} lacks its {', '.join(map(repr, missing))}")
    qdata, scale = file[parts.qdata], file[parts.scale]
    if qdata.dim() != 2 or scale.shape != (qdata.shape[0], qdata.shape[1] * 2 // BLOCK) or qdata.shape[1] % 8:
        raise ValueError(
            f"{file.path}: {parts.qdata!r} {[*qdata.shape]} and {parts.scale!r} {[*scale.shape]} do not fit"
        )
    if scale.dtype not in (torch.float8_e4m3fn, torch.float16):  # old .dat files keep E4M3 numbers as fp16
        raise ValueError(f"{file.path}: {parts.scale!r} has the type {scale.dtype}, expected float8_e4m3fn")
    if parts.global_scale is None:
        return NVFP4(qdata, scale, torch.ones(()))
    global_scale = file[parts.global_scale].float()
    if global_scale.numel() != 1 or not (global_scale > 0).all():
        raise ValueError(f"{file.path}: {parts.global_scale!r} must be one positive number")
    global_scale = global_scale.reshape(())
    return NVFP4(qdata, scale, 1 / global_scale if parts.reciprocal else global_scale)


def hf_tensors(model, quantize_head=False):
    """{name: tensor} of `model` as compressed-tensors keeps it: projections as NVFP4, all else as bf16."""
    if quantize_head and model.config.tie_word_embeddings:
        raise ValueError(
            "the head is tied to the embedding, and no program reads an NVFP4 embedding: "
            "export without --quantize-head, or train with --untie"
        )
    tensors = {}
    for name, p in model.named_parameters():
        if p.dim() == 1 or is_embedding(name) or is_head(name) and not quantize_head:
            tensors[name] = plain_value(model, name)
        else:
            q = module_of(model, name).codes()
            tensors[f"{name}_packed"], tensors[f"{name}_scale"] = q.qdata, q.scale
            tensors[f"{name}_global_scale"] = 1 / q.global_scale.reshape(1)
    return tensors


def plain_tensors(model):
    """{name: tensor} of `model` in bf16, the values that the forward pass reads."""
    return {name: plain_value(model, name) for name, _ in model.named_parameters()}


def plain_value(model, name):
    module = module_of(model, name)
    return (
        module.weight.detach().to(torch.bfloat16)
        if module.weight.dim() == 1
        else module.value(torch.bfloat16)
    )


def quantization_config(quantize_head=False):
    """What config.json has to say about `hf_tensors`; readers fail, some of them silently, if a key is
    missing."""
    weights = {
        "num_bits": 4, "type": "float", "symmetric": True, "group_size": BLOCK, "strategy": "tensor_group",
        "dynamic": False,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear", "lm_head"] if quantize_head else ["Linear"],
                "weights": weights,
                "input_activations": None,
            }
        },
        "ignore": [] if quantize_head else ["lm_head"],
    }


def dat_tensors(model):
    """{name: tensor} of `model` as the F# trainer keeps it: raw fp16, and NVFP4 for the projections and the
    head.

    It has an entry for the head even if that is tied. There is no global scale, so the stored weights are
    quantized once more, each block with a scale of its own.
    """
    tensors = {}
    names = dict.fromkeys([*(name for name, _ in model.named_parameters()), "lm_head.weight"])
    for name in names:
        weight = module_of(model, name).weight.detach()
        if weight.dim() == 1 or is_embedding(name):
            tensors[name] = weight.to(torch.float16)
        else:
            q = quantize(weight, global_scale=1.0)
            tensors[f"{name}.qdata"], tensors[f"{name}.scale"] = q.qdata, q.scale
    return tensors


def dat_value(model, name):
    """What the parameter `name` is worth after a way through `dat_tensors`."""
    weight = module_of(model, name).weight.detach()
    if weight.dim() == 1 or is_embedding(name):
        return weight.to(torch.float16)
    return dequantize(quantize(weight, global_scale=1.0))


def module_of(model, name):
    return model.get_submodule(name.removesuffix(".weight"))


def is_head(name):
    return name == "lm_head.weight"


def is_embedding(name):
    return name == "model.embed_tokens.weight"


def kind_of(key):
    """For counting: which kind of tensor a name in a file stands for."""
    if key.endswith(("_scale", ".scale")):
        return "scales"
    for kind in ("lm_head", "embed_tokens", "norm"):
        if kind in key.rsplit(".", 2)[-2] or key.startswith(kind):
            return "norms" if kind == "norm" else kind
    return "projections"


def read_dense(file, name, parts=None):
    """A parameter of `file` as an ordinary tensor: as it is, or decoded to bf16 (exact for power-of-two
    scales)."""
    return file[name] if parts is None else dequantize(read_packed(file, parts), torch.bfloat16)
