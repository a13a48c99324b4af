"""The layouts in which programs keep an NVFP4 weight. The bytes are the same everywhere, the names are not.

    layout              codes             block scales      global scale
    compressed-tensors  X.weight_packed   X.weight_scale    X.weight_global_scale  F32 [1], the reciprocal
    ModelOpt            X.weight          X.weight_scale    X.weight_scale_2       F32 []
    MLX                 X.weight (U32)    X.scales (U8)     none: 1
    .dat (F# trainer)   X.weight.qdata    X.weight.scale    none: 1

with codes U8 [out, in/2] and block scales F8_E4M3 [out, in/16], viewed as other types by MLX. Inside minifp4
scales multiply; that compressed-tensors stores the reciprocal of the global one (`value = e2m1 * scale /
weight_global_scale`) is known to this module only. Our global scales are powers of two, so it is exact; of
others the number that was read is kept beside the model (`divisors`), for its reciprocal's reciprocal may
be another.

Without a global scale small weights live in E4M3's subnormals: such files are quantized once more, from the
stored weights, and a little coarser.
"""

from typing import NamedTuple

import torch

from .. import __version__
from ..nvfp4 import (
    BLOCK, E2M1_MAX, NVFP4, block_scale, decode, dequantize, encode, quantize, row_chunks,
    weight_global_scale,
)  # fmt: skip
from ..packed import Packed, stored_values

# Scales for quantized activations, the cache of keys and values among them: W4A16 has none, so nobody reads
# them.
ACTIVATION_SCALES = (".input_global_scale", ".input_scale", ".k_scale", ".v_scale")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class Parts(NamedTuple):
    """The names, in a file, of the parts of one NVFP4 weight."""

    qdata: str
    scale: str
    global_scale: str | None
    reciprocal: bool = False

    @property
    def more(self):
        """In checkpoints of train.py: the further bits of a weight that is stored as nvfp4x2."""
        return f"{self.scale}_more"

    @property
    def divisor(self):
        """The global scale that divides, or its name in checkpoints of train.py, if they have it."""
        return self.global_scale if self.reciprocal else f"{self.qdata}_global_scale"


def parts_of(weight, layout):
    """The `Parts` of the parameter `weight` ("X.weight")."""
    if layout == "hf":
        return Parts(f"{weight}_packed", f"{weight}_scale", f"{weight}_global_scale", reciprocal=True)
    if layout == "modelopt":
        return Parts(weight, f"{weight}_scale", f"{weight}_scale_2")
    if layout == "mlx":
        return Parts(weight, weight.removesuffix("weight") + "scales", None)
    return Parts(f"{weight}.qdata", f"{weight}.scale", None)  # .dat


def find_packed(entries):
    """{parameter name: Parts} for all NVFP4 weights among `entries` {name: (dtype, shape)}."""
    found = {}
    for name, (dtype, _) in entries.items():
        if name.endswith(".weight_packed"):
            weight, layout = name.removesuffix("_packed"), "hf"
        elif name.endswith(".weight") and dtype == torch.uint8:
            weight, layout = name, "modelopt"
        elif name.endswith(".weight") and dtype == torch.uint32:
            weight, layout = name, "mlx"
        elif name.endswith(".weight.qdata"):
            weight, layout = name.removesuffix(".qdata"), "dat"
        else:
            continue
        found[weight] = parts_of(weight, layout)
    return found


def read_nvfp4(file, parts):
    """The `NVFP4` whose `parts` are in `file`; ValueError names what is missing or of a wrong shape or
    type."""
    missing = [name for name in parts[:3] if name is not None and name not in file.entries]
    if missing:
        raise ValueError(f"{file.path}: {parts.qdata!r} lacks its {', '.join(map(repr, missing))}")
    qdata, scale = file[parts.qdata].view(torch.uint8), file[parts.scale]
    rows, half = qdata.shape if qdata.dim() == 2 else (0, 0)
    if not half or half % (BLOCK // 2) or scale.shape != (rows, half // (BLOCK // 2)):
        shapes = f"{parts.qdata!r} {[*qdata.shape]} and {parts.scale!r} {[*scale.shape]}"
        raise ValueError(f"{file.path}: {shapes} are not the codes and scales of one matrix")
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e4m3fn)
    if scale.dtype not in (torch.float8_e4m3fn, torch.float16):  # old .dat files keep E4M3 numbers as fp16
        raise ValueError(f"{file.path}: {parts.scale!r} has the type {scale.dtype}, expected float8_e4m3fn")
    if parts.global_scale is None:
        return NVFP4(qdata, scale, torch.ones(()))
    global_scale = file[parts.global_scale].float()
    if global_scale.numel() != 1 or not (global_scale > 0).all() or not global_scale.isfinite().all():
        raise ValueError(f"{file.path}: {parts.global_scale!r} must be one positive number")
    global_scale = global_scale.reshape(())
    return NVFP4(qdata, scale, 1 / global_scale if parts.reciprocal else global_scale)


def read_weight(file, name, parts, device):
    """A parameter of `file`, copied to `device`: a `Packed` one with the very codes of the file, or as it
    is."""
    if parts is None:
        return file[name].to(device, copy=True)
    q = read_nvfp4(file, parts)
    e4m3 = q.scale.to(torch.float8_e4m3fn)
    if q.scale.dtype == torch.float16 and not torch.equal(e4m3.to(torch.float16), q.scale):
        return dequantize(q).to(device)  # scales that only fp16 can hold
    more = file[parts.more].to(device, copy=True) if parts.more in file.entries else None
    return Packed(NVFP4(*(part.to(device, copy=True) for part in (q.qdata, e4m3, q.global_scale))), more)


def read_divisor(file, parts):
    """The global scale that divides, of a weight of `file` with these `parts`, if its reciprocal's reciprocal
    is another number; else None."""
    if parts is None or file.entries.get(parts.divisor, (None, None))[1] not in ((), (1,)):
        return None
    divisor = file[parts.divisor].float().reshape(())
    return None if 1 / (1 / divisor) == divisor else divisor.item()


def stored_tensors(model, name, p):
    """{name: tensor} of a parameter as a checkpoint of train.py keeps it: bit for bit as it is in memory."""
    if not isinstance(p, Packed):
        return {name: p.detach()}
    parts = parts_of(name, "modelopt")  # with the global scale itself
    tensors = write_nvfp4(name, p.nvfp4(), "modelopt")
    if p.more is not None:
        tensors[parts.more] = p.more
    if name in model.divisors:
        tensors[parts.divisor] = torch.tensor([model.divisors[name]])
    return tensors


def reciprocal(global_scale, divisor=None):
    """What compressed-tensors keeps of a global scale, fp32 [1]: the number that was read from it, if it is
    still that one or has grown from it by powers of two; else 1 / global_scale."""
    if divisor is not None:
        divisor = torch.tensor([divisor])
        grown = (1 / divisor) / global_scale.cpu()
        if torch.frexp(grown).mantissa == 0.5:
            return divisor * grown
    return 1 / global_scale.reshape(1)


def write_nvfp4(name, q, layout, divisor=None):
    """{name in the file: tensor} for the parameter `name` with the codes `q`; divisor: see `reciprocal`."""
    parts, qdata, scale = parts_of(name, layout), q.qdata, q.scale
    if layout == "mlx":
        qdata, scale = qdata.contiguous().view(torch.uint32), scale.view(torch.uint8)
    tensors = {parts.qdata: qdata, parts.scale: scale}
    if parts.global_scale is not None:
        scale = q.global_scale
        tensors[parts.global_scale] = reciprocal(scale, divisor) if parts.reciprocal else scale
    return tensors


def tensors_of(model, layout, quantize_head=False):
    """{name: tensor} of `model` in a layout: projections as NVFP4, embedding, norms and (by default) head
    as bf16.

    layout: "hf" (compressed-tensors), "modelopt", "mlx", or "bf16" for no NVFP4 at all.
    """
    tied = model.config.tie_word_embeddings
    if quantize_head and tied and layout != "mlx":
        raise ValueError(
            "the head is tied to the embedding, and no program reads an NVFP4 embedding in --format "
            f"{layout}: export without --quantize-head, or train with --untie"
        )
    head = EMBEDDING if tied else HEAD
    for layer in model.linears() if layout in ("hf", "modelopt") else ():
        if not layer.group.agrees():
            raise ValueError(
                "weights that servers fuse (q/k/v or gate/up) have different global scales, of which they "
                "would keep one: export with --dequantize, or train all layers, which gives them one"
            )
    tensors = {}
    for name, p in model.named_parameters():
        wide = p.dim() == 1 or name in (EMBEDDING, HEAD) and not (quantize_head and name == head)
        if layout == "bf16" or wide:
            tensors[name] = plain_value(model, name)
        elif layout == "mlx":
            tensors |= write_nvfp4(name, single_level(p), layout)
        else:
            tensors |= write_nvfp4(name, module_of(model, name).codes(), layout, model.divisors.get(name))
    return tensors


def plain_value(model, name):
    """The parameter `name` in bf16, as the forward pass reads it."""
    module = module_of(model, name)
    if module.weight.dim() == 1:
        return module.weight.detach().to(torch.bfloat16)
    return module.value(torch.bfloat16)


def single_level(weight):
    """A weight's `NVFP4` with global scale 1: the codes that it has, if it is packed like that, or new
    ones."""
    if isinstance(weight, Packed) and weight.global_scale == 1:
        return weight.nvfp4()
    return quantize(stored_values(weight), global_scale=1.0)


def expected_nvfp4(model, name, layout):
    """The `NVFP4` that a reader of the parameter `name` must get after a way through `layout`."""
    module = module_of(model, name)
    if layout in ("dat", "mlx"):
        return single_level(module.weight)
    codes = module.codes()
    if layout == "hf":  # the file has the reciprocal
        divided = 1 / reciprocal(codes.global_scale, model.divisors.get(name)).reshape(())
        return codes._replace(global_scale=divided)
    return codes


def expected_value(model, name, layout):
    """The same of a parameter that is not in NVFP4 there."""
    weight = module_of(model, name).weight
    if layout == "dat":
        return stored_values(weight)
    return plain_value(model, name)


def dat_tensors(model):
    """{name: tensor} of `model` as the F# trainer keeps it: raw fp16, and NVFP4 for projections and head.

    It has an entry for the head even if that is tied.
    """
    tensors = {}
    for name in dict.fromkeys([*(name for name, _ in model.named_parameters()), HEAD]):
        weight = module_of(model, name).weight
        if weight.dim() == 1 or name == EMBEDDING:
            tensors[name] = stored_values(weight).to(torch.float16)
        else:
            tensors |= write_nvfp4(name, single_level(weight), "dat")
    return tensors


def dat_replacements(model, trained, entries):
    """{name: tensor} for all entries of a `.dat` that the parameters `trained` stand behind, in their own
    types."""
    fresh, found = dat_tensors(model), {}
    names = set(trained) | ({HEAD} if model.config.tie_word_embeddings and EMBEDDING in trained else set())
    for name in names:
        for key in (name, *parts_of(name, "dat")[:2]):
            if key in fresh and key in entries:
                found[key] = fresh[key].to(entries[key][0])
        if not found.keys() & {name, f"{name}.qdata"}:
            raise ValueError(f"the trained weight {name!r} has no entry in the input .dat")
    return found


def config_keys(layout, quantize_head=False):
    """What config.json has to say about `tensors_of`; readers fail, some of them silently, if a key is
    missing."""
    keys = {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    if layout == "hf":
        weights = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": BLOCK}
        weights |= {"strategy": "tensor_group", "dynamic": False}
        targets = ["lm_head", "Linear"] if quantize_head else ["Linear"]
        group = {"targets": targets, "weights": weights, "input_activations": None}
        keys["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": [] if quantize_head else ["lm_head"],
        }
    elif layout == "modelopt":
        nested = modelopt_keys(quantize_head)
        weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
        keys["quantization_config"] = {  # the same, flat, as ModelOpt writes it there
            "quant_method": "modelopt",
            "quant_algo": nested["quantization"]["quant_algo"],
            "group_size": BLOCK,
            "ignore": nested["quantization"]["exclude_modules"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "producer": nested["producer"],
        }
    elif layout == "mlx":
        keys["quantization"] = {"group_size": BLOCK, "bits": 4, "mode": "nvfp4"}
    return keys


def modelopt_keys(quantize_head=False):
    """The content of ModelOpt's hf_quant_config.json."""
    return {
        "producer": {"name": "minifp4", "version": __version__},
        "quantization": {
            "quant_algo": "W4A16_NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": BLOCK,
            "exclude_modules": [] if quantize_head else ["lm_head"],
        },
    }


def module_of(model, name):
    return model.get_submodule(name.removesuffix(".weight"))


def count(names):
    """How many of the `names` in a file stand for which kind of tensor."""
    counts = {}
    for name in names:
        counts[_kind(name)] = counts.get(_kind(name), 0) + 1
    return counts


def _kind(name):
    if name.endswith(("_scale", "_scale_2", ".scale", ".scales")):
        return "scales"
    for kind in ("lm_head", "embed_tokens"):
        if kind in name:
            return kind
    return "norms" if "norm." in name else "projections"


def pack_exactly(weight):
    """A dense matrix whose numbers all lie on an NVFP4 grid as `Packed`, unchanged; any other as it is.

    An export keeps the head, or everything, in bf16: values of codes. Quantizing such a block anew finds
    its scale if its largest number is 6 times it; if the scale was kept, it may also be 4 or 3.
    """
    global_scale, parts = weight_global_scale(weight), []
    for rows in row_chunks(weight):  # the first rows tell most other matrices apart
        codes, scale, right = _codes_of_values(weight[rows].float(), global_scale)
        if not right:
            return weight
        parts.append((codes, scale))
    qdata, scale = (torch.cat(some) for some in zip(*parts))
    return Packed(NVFP4(qdata, scale, global_scale))


def _codes_of_values(x, global_scale):
    """(codes, scales, whether they are `x` exactly)"""
    blocks, encode_scale = x.unflatten(-1, (-1, BLOCK)), 1 / global_scale
    amax, scale, right = blocks.abs().amax(-1), None, None
    for top in (E2M1_MAX, 4.0, 3.0):
        tried = block_scale(amax * (E2M1_MAX / top), encode_scale)
        scale = tried if scale is None else torch.where(right, scale, tried)
        codes, _ = encode(x, encode_scale, scale=scale)
        values = decode(codes, scale, global_scale)
        right = (values.unflatten(-1, (-1, BLOCK)) == blocks).all(-1)
    return codes, scale, bool(right.all())
