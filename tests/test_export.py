"""What export.py writes, read by programs that nobody here wrote."""

import json

import pytest
import torch
from conftest import export, small_directory, small_model, train

import minifp4
from minifp4.files import checkpoint, dat, layouts, safetensors
from minifp4.files.atomic import bits
from minifp4.model import RMSNorm
from minifp4.packed import stored_values


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
    "bf16 masters": ({"master_dtype": "bf16"}, {}, {}),
    "one nvfp4, tied": ({"master_dtype": "nvfp4"}, {"tie_word_embeddings": True}, {}),
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
            assert torch.equal(layouts.plain_value(ours, name), theirs[name]), name


def test_export_is_what_the_checkpoint_computes(trained):
    """The exported directory, read again, gives the logits of the model that trained, and the same codes."""
    out = trained()
    path = export(checkpoint=str(out), format=["hf"])["hf"]
    ids = torch.arange(3, 40).view(1, -1)
    before, after = minifp4.load(out)[0], minifp4.load(path)[0]
    for module in before.modules():
        if isinstance(module, RMSNorm):
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
            weight = stored_values(model.get_submodule(base).weight)
            assert torch.equal(
                minifp4.dequantize(q), minifp4.dequantize(minifp4.quantize(weight, global_scale=1.0))
            )
        elif not name.endswith(".scale"):
            assert file.entries[name][0] == torch.float16
            assert torch.equal(file[name], stored_values(model.get_parameter(name)).half())


@pytest.mark.parametrize("layout", ["hf", "modelopt"])
def test_a_tied_head_cannot_be_quantized_for_servers(trained, layout):
    with pytest.raises(ValueError, match=f"tied.*--format {layout}.*--untie"):
        export(checkpoint=str(trained(tie_word_embeddings=True)), format=[layout], quantize_head=True)


@pytest.mark.parametrize("tied", [True, False])
def test_mlx_takes_the_head_in_nvfp4(trained, tied):
    """A tied one too: mlx-lm quantizes whatever has scales beside it."""
    out = trained(tie_word_embeddings=tied)
    path = export(checkpoint=str(out), format=["mlx"], quantize_head=True)["mlx"]
    names = safetensors.SafeFile(path / "model.safetensors").entries
    assert ("model.embed_tokens.scales" in names) == tied and ("lm_head.scales" in names) != tied
    assert minifp4.load(path)[0](torch.arange(9).view(1, -1)).isfinite().all()


def test_a_head_that_does_not_train_stays_as_it_is(tmp_path, tsv):
    """Servers keep it in bf16, so it is read and exported as its file has it; NVFP4 only if one asks."""
    for tied in (False, True):
        model = small_model(tie_word_embeddings=tied)
        model.lm_head.weight.data = model.lm_head.weight.data.bfloat16()
        model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data.bfloat16()
        source = small_directory(tmp_path / f"model{tied}", model)
        out = tmp_path / f"out{tied}"
        train(model=str(source), train_data=str(tsv), steps=1, out=str(out), test_max_tokens=1)
        before, after = minifp4.load(source)[0], minifp4.load(out)[0]
        path = export(checkpoint=str(out), format=["hf"])["hf"]
        file = safetensors.SafeFile(path / "model.safetensors")
        head = "model.embed_tokens.weight" if tied else "lm_head.weight"
        assert torch.equal(file[head], before.lm_head.weight)
        assert torch.equal(after.lm_head.value(torch.bfloat16), before.lm_head.weight)
        assert torch.equal(minifp4.load(path)[0].lm_head.value(torch.bfloat16), before.lm_head.weight)
        if not tied:
            packed = export(checkpoint=str(out), format=["hf"], quantize_head=True)["hf"]
            assert "lm_head.weight_packed" in safetensors.SafeFile(packed / "model.safetensors").entries
    train(model=str(source), train_data=str(tsv), steps=1, out=str(out / "trained"), master_dtype="bf16",
          train_lm_head=True)  # fmt: skip
    trained = minifp4.load(out / "trained")[0].lm_head
    assert not torch.equal(trained.value(torch.bfloat16), trained.weight)


def test_a_dat_that_somebody_else_has_written_is_not_replaced(trained):
    out = trained()
    path = export(checkpoint=str(out), format=["dat"])["dat"]
    assert export(checkpoint=str(out), format=["dat"])["dat"] == path  # ours, once more
    theirs = path.read_bytes()[:-1] + b"x"
    path.write_bytes(theirs)
    with pytest.raises(ValueError, match="model.dat was not written by export.py; move it or choose"):
        export(checkpoint=str(out), format=["dat"])
    assert path.read_bytes() == theirs


def test_an_export_says_where_it_comes_from(trained, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--steps", "2", "--train-data", "my data.tsv"])
    card = (export(checkpoint=str(trained()), format=["hf"])["hf"] / "README.md").read_text()
    assert card.startswith("---\nbase_model: model\nlibrary_name: transformers\n")
    assert "python train.py --steps 2 --train-data 'my data.tsv'" in card


def test_verification_notices_a_wrong_byte(trained, monkeypatch):
    """Flip one bit of the file between writing and reading it."""
    out, write = trained(), safetensors.write
    good = (export(checkpoint=str(out), format=["hf"])["hf"] / "model.safetensors").read_bytes()

    def write_wrong(path, tensors):
        write(path, tensors)
        if path.name == "model.safetensors":
            data = bytearray(path.read_bytes())
            data[-1000] ^= 2
            path.write_bytes(data)

    monkeypatch.setattr(checkpoint.safetensors, "write", write_wrong)
    with pytest.raises(ValueError, match="would differ from the checkpoint; it was not written"):
        export(checkpoint=str(out), format=["hf"])
    assert (out / "hf" / "model.safetensors").read_bytes() == good
    export(checkpoint=str(out), format=["hf"], verify=False)


def test_modelopt_layout_through_compressed_tensors_own_converter(trained):
    """Their converter makes of our ModelOpt directory exactly our compressed-tensors directory."""
    module = "compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4"
    converter = pytest.importorskip(module).ModelOptNvfp4Converter(ignore=["lm_head"], targets=["re:.*proj$"])
    paths = export(checkpoint=str(trained()), format=["hf", "modelopt"])
    files = {name: safetensors.SafeFile(path / "model.safetensors") for name, path in paths.items()}
    tensors = {name: files["modelopt"][name] for name in files["modelopt"].entries}
    assert tensors["model.layers.0.mlp.up_proj.weight_scale_2"].shape == ()
    converted = converter.validate(tensors)
    assert converted.keys() == files["hf"].entries.keys()
    for name, tensor in converted.items():
        assert torch.equal(bits(tensor), bits(files["hf"][name])), name
    nested = json.loads((paths["modelopt"] / "hf_quant_config.json").read_text())
    flat = json.loads((paths["modelopt"] / "config.json").read_text())["quantization_config"]
    assert nested["quantization"]["quant_algo"] == flat["quant_algo"] == "W4A16_NVFP4"
    assert nested["quantization"]["exclude_modules"] == flat["ignore"] == ["lm_head"]
    assert nested["producer"] == flat["producer"] == {"name": "minifp4", "version": minifp4.__version__}


def test_mlx_decodes_its_layout_as_we_do(trained):
    """mlx's own `dequantize` of every projection, bit for bit; by hand, eight codes are in a 32-bit word."""
    mlx = pytest.importorskip("mlx.core")
    out = trained()
    path = export(checkpoint=str(out), format=["mlx"])["mlx"]
    file, model = safetensors.SafeFile(path / "model.safetensors"), minifp4.load(out)[0]
    names = [name.removesuffix(".scales") for name in file.entries if name.endswith(".scales")]
    assert len(names) == 14
    for name in names:
        words, scales = file[f"{name}.weight"], file[f"{name}.scales"]
        assert words.dtype == torch.uint32 and scales.dtype == torch.uint8
        arrays = (mlx.array(words.view(torch.int32).numpy()).view(mlx.uint32), mlx.array(scales.numpy()))
        theirs = mlx.dequantize(*arrays, group_size=16, bits=4, mode="nvfp4").astype(mlx.float32)
        ours = minifp4.dequantize(layouts.single_level(model.get_submodule(name).weight))
        assert theirs.tolist() == ours.tolist()
    codes = torch.stack([words.to(torch.int64) >> 4 * place & 15 for place in range(8)], -1).flatten(1)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    values = grid[codes].unflatten(1, (-1, 16)) * scales.view(torch.float8_e4m3fn).float().unsqueeze(-1)
    assert torch.equal(values.flatten(1), ours)
    config = json.loads((path / "config.json").read_text())
    assert config["quantization"] == {"group_size": 16, "bits": 4, "mode": "nvfp4"}


def test_shards_of_a_size(trained):
    """Several files and an index that transformers and minifp4 read as one."""
    transformers = pytest.importorskip("transformers")
    out = trained()
    path = export(checkpoint=str(out), format=["hf"], shard_gb=5e-5)["hf"]
    files = sorted(file.name for file in path.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((path / "model.safetensors.index.json").read_text())
    total = sum(
        tensor.numel() * tensor.element_size() for file in files for tensor in load_all(path / file).values()
    )
    assert index["metadata"]["total_size"] == total and sorted(set(index["weight_map"].values())) == files
    whole = export(checkpoint=str(out), format=["hf"], out=str(out / "whole"))["hf"]
    ids = torch.arange(9).view(1, -1)
    assert torch.equal(minifp4.load(path)[0](ids), minifp4.load(whole)[0](ids))
    twin, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]


def load_all(path):
    file = safetensors.SafeFile(path)
    return {name: file[name].clone() for name in file.entries}


@pytest.mark.parametrize("layout", ["hf", "modelopt", "mlx", "bf16", "dat"])
def test_minifp4_reads_what_it_wrote(trained, layout):
    """The same codes, not quantized again, and so the same text from every source of the same weights."""
    out = trained()
    how = {"format": ["hf"], "dequantize": True} if layout == "bf16" else {"format": [layout]}
    path = next(iter(export(checkpoint=str(out), **how).values()))
    if layout == "dat":
        newest = checkpoint.model_directory(out)
        for name in ("config.json", "tokenizer.json"):
            (out / name).write_bytes((newest / name).read_bytes())
    model, tokenizer = minifp4.load(path)
    one_level = layout in ("mlx", "dat")
    trained_model = minifp4.load(checkpoint.checkpoints(out)[-1])[0]
    for name, layer in model.named_modules():
        if name.endswith("_proj"):
            source = trained_model.get_submodule(name)
            q = layouts.single_level(source.weight) if one_level else source.codes()
            assert torch.equal(layer.value(torch.float32), minifp4.dequantize(q)), name
            assert torch.equal(layer.weight.qdata, q.qdata)
    if not one_level:
        ids = torch.arange(20).view(1, -1)
        expected = minifp4.load(export(checkpoint=str(out), format=["hf"])["hf"])[0](ids)
        assert torch.equal(model(ids), expected)


def f_sharp_dat(path, model, scales=torch.float8_e4m3fn, raw=torch.float16):
    """A `.dat` with the structure of Qwen3-4B-Instruct-2507-nvfp4.dat, and one entry that is no weight."""
    tensors = {}
    for name, tensor in layouts.dat_tensors(model).items():
        dtype = scales if name.endswith(".scale") else raw if tensor.dtype == torch.float16 else tensor.dtype
        tensors[name] = tensor.to(dtype)
    dat.write(path, tensors)
    return path


def test_the_f_sharp_command_line_as_typed(tmp_path, tsv, monkeypatch, capsys):
    """All weights of a synthetic .dat train, and every trained entry of the new .dat is new, in its own
    type."""
    import train as program
    from minifp4 import cli

    model = small_model(tie_word_embeddings=True)
    directory = small_directory(tmp_path / "models", model)
    (directory / "model.safetensors").unlink()
    f_sharp_dat(directory / "in.dat", model, scales=torch.float16, raw=torch.float32)
    command = (
        f"--train-data {tsv} --input-dat {directory}/in.dat --output-dat out.dat --steps 6 --loss ce "
        "--seq-len 96 --step-chunk-rows 64 --lr 0.00005 --log-every 1 --test-max-tokens 24 "
        "--sample-mode random --seed 20260226 --train-lm-head --train-embed"
    )
    monkeypatch.chdir(tmp_path)
    program.main(cli.parse(program.Settings, command.split(), ""))
    assert "replaced entries: qdata=15 scale=15 raw=10\n" in capsys.readouterr().out
    before, after = dat.DatFile(directory / "in.dat"), dat.DatFile("out.dat")
    assert before.entries == after.entries and before.places == after.places
    same = [name for name in before.entries if torch.equal(before[name], after[name])]
    assert [name for name in same if name.endswith((".qdata", "_tokens.weight"))] == []
    trained = minifp4.load("out")[0]
    (tmp_path / "config.json").write_bytes((checkpoint.model_directory("out") / "config.json").read_bytes())
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    again = minifp4.load("out.dat")[0]
    for name, p in trained.named_parameters():
        p, other = stored_values(p), stored_values(again.get_parameter(name))
        assert (other - p).norm() < 0.11 * p.norm(), name
    again_too = export(checkpoint="out", format=["dat"], input_dat=str(directory / "in.dat"), out="again")[
        "dat"
    ]
    assert again_too.read_bytes() == (tmp_path / "out.dat").read_bytes()


@pytest.mark.parametrize("last_layers", [0, 1])
def test_dat_entries_that_did_not_train_stay_byte_for_byte(tmp_path, last_layers):
    """Nothing trained: the same file, even onto itself. One layer trained: 7 pairs and 4 norms are new."""
    model = small_model()
    source = f_sharp_dat(tmp_path / "in.dat", model)
    data = source.read_bytes()
    if not last_layers:
        assert set(checkpoint.write_dat(source, model, source, []).values()) == {0}
        assert source.read_bytes() == data
        return
    trained = [name for name, _ in model.named_parameters() if name.startswith("model.layers.1.")]
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).mul_(3)
    counts = checkpoint.write_dat(source, model, source, trained)
    assert counts == {"qdata": 7, "scale": 7, "raw": 4}
    (tmp_path / "old.dat").write_bytes(data)
    old, new = dat.DatFile(tmp_path / "old.dat"), dat.DatFile(source)
    changed = {name for name in old.entries if not torch.equal(bits(old[name]), bits(new[name]))}
    inside = {name for name in old.entries if name.startswith("model.layers.1.")}
    assert {name for name in inside if not name.endswith(".qdata")} <= changed <= inside
    with pytest.raises(ValueError, match="'model.norm.weight' has no entry"):
        dat.write(source, {"x": torch.ones(1)})
        checkpoint.write_dat(source, model, source, ["model.norm.weight"])
