"""What export.py writes, read by programs that nobody here wrote."""

import json

import pytest
import torch
from conftest import export, small_directory, small_model, train

import minifp4
from minifp4 import checkpoint, dat, formats, safetensors


@pytest.fixture
def trained(tmp_path, tsv):
    """A function that trains a small model for two steps and returns the output directory."""

    def make(flags=None, **changes):
        model = small_directory(tmp_path / "model", small_model(**changes), unknown_key="kept")
        settings = dict(model=str(model), train_data=str(tsv), steps=2, lr=1e-2, out=str(tmp_path / "out"))
        train(**settings, train_embed=True, train_lm_head=True, **(flags or {}))
        return tmp_path / "out"

    return make


CASES = {
    "untied": ({}, {}, {}),
    "tied": ({}, {"tie_word_embeddings": True}, {}),
    "untied by --untie": ({"untie": True}, {"tie_word_embeddings": True}, {}),
    "head in NVFP4": ({}, {}, {"quantize_head": True}),
    "bf16": ({}, {}, {"dequantize": True}),
    "fp32 masters": ({"master_dtype": "fp32"}, {}, {}),
}


@pytest.mark.parametrize("flags, changes, how", CASES.values(), ids=CASES.keys())
def test_transformers_loads_the_directory_bit_for_bit(trained, flags, changes, how):
    """Nothing missing, nothing unexpected, and in bf16 the weights and logits are ours."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    path = export(checkpoint=str(trained(flags, **changes)), format=["hf"], **how)["hf"]
    twin, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours, _ = minifp4.load(path, compute_dtype=torch.bfloat16)
    assert ours.config.source["unknown_key"] == "kept"
    ids = torch.arange(3, 40).view(1, -1)
    with torch.no_grad():
        assert torch.equal(ours(ids), twin(ids).logits)  # decompresses theirs, too
    theirs = dict(twin.named_parameters())
    for name, _ in ours.named_parameters():
        if name in theirs and theirs[name].dtype == torch.bfloat16:
            assert torch.equal(formats.plain_value(ours, name), theirs[name]), name


def test_export_is_what_the_checkpoint_computes(trained):
    """The exported directory, read again, gives the logits of the model that trained, and the same codes."""
    out = trained()
    path = export(checkpoint=str(out), format=["hf"])["hf"]
    ids = torch.arange(3, 40).view(1, -1)
    before, after = minifp4.load(out)[0], minifp4.load(path)[0]
    before.model.embed_tokens.weight.data = before.model.embed_tokens.weight.bfloat16().float()
    for module in before.modules():
        if module.__class__.__name__ == "RMSNorm":
            module.weight.data = module.weight.bfloat16().float()  # an export keeps norms in bf16
    assert torch.equal(before(ids), after(ids))
    for a, b in zip(before.linears(), after.linears()):
        assert torch.equal(a.codes().qdata, b.codes().qdata)


def test_layout_of_compressed_tensors(trained):
    """The rules of servers: shapes, types, a [1] reciprocal scale that q/k/v share, and gate/up."""
    path = export(checkpoint=str(trained()), format=["hf"])["hf"]
    file = safetensors.SafeFile(path / "model.safetensors")
    layer = "model.layers.1."
    assert file.entries[layer + "self_attn.q_proj.weight_packed"] == (torch.uint8, (128, 32))
    assert file.entries[layer + "self_attn.q_proj.weight_scale"] == (torch.float8_e4m3fn, (128, 4))
    assert file.entries[layer + "self_attn.q_proj.weight_global_scale"] == (torch.float32, (1,))
    assert layer + "self_attn.q_proj.weight" not in file.entries
    for names in (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    ):
        scales = {file[f"{layer}{name}.weight_global_scale"].item() for name in names}
        assert len(scales) == 1 and all(scale.hex().startswith("0x1.0000") for scale in scales)
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert file.entries[name][0] == torch.bfloat16
    config = json.loads((path / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e6
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert (path / "tokenizer.json").read_bytes() == (minifp4.BASE / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("tied", [False, True])
def test_layout_of_dat(trained, tied):
    """Pairs next to each other, E4M3 scales alone (a large share of them subnormal), raw tensors in fp16."""
    out = trained(tie_word_embeddings=tied)
    file = dat.DatFile(export(checkpoint=str(out), format=["dat"])["dat"])
    names, model = list(file.entries), minifp4.load(out)[0]
    assert len(names) == 2 * 15 + 10  # 14 projections and the head in pairs; the embedding and 9 norms
    for name in names:
        if name.endswith(".qdata"):
            base = name.removesuffix(".weight.qdata")
            assert names[names.index(name) + 1] == f"{base}.weight.scale"
            q = minifp4.NVFP4(file[name], file[f"{base}.weight.scale"], torch.tensor(1.0))
            weight = model.get_submodule(base).weight
            assert torch.equal(
                minifp4.dequantize(q), minifp4.dequantize(minifp4.quantize(weight, global_scale=1.0))
            )
        elif not name.endswith(".scale"):
            assert file.entries[name][0] == torch.float16
            assert torch.equal(file[name], model.get_parameter(name).half())


def test_a_tied_head_cannot_be_quantized(trained):
    with pytest.raises(ValueError, match="tied.*--untie"):
        export(checkpoint=str(trained(tie_word_embeddings=True)), format=["hf"], quantize_head=True)


def test_verification_notices_a_wrong_byte(trained, monkeypatch):
    """Flip one bit of the file between writing and reading it."""
    out, write = trained(), safetensors.write

    def write_wrong(path, tensors):
        write(path, tensors)
        if path.name == "model.safetensors":
            data = bytearray(path.read_bytes())
            data[-1000] ^= 2
            path.write_bytes(data)

    monkeypatch.setattr(checkpoint.safetensors, "write", write_wrong)
    with pytest.raises(ValueError, match="differs from the checkpoint"):
        export(checkpoint=str(out), format=["hf"])
    export(checkpoint=str(out), format=["hf"], verify=False)
