"""Which weights train, that the others stay bit for bit, and what `load` refuses."""

import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import CONFIG, ROOT, small_directory, small_model, train

import minifp4
from minifp4 import masters, packed
from minifp4.files import safetensors
from minifp4.model import Config, Qwen3
from minifp4.packed import stored_values


def weights(path):
    """{name: stored values} of a model directory or checkpoint."""
    return {name: stored_values(p).clone() for name, p in minifp4.load(path)[0].named_parameters()}


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name].to(after[name].dtype), after[name])}


def names(*kinds, layers=(0, 1)):
    """The parameters of a small model by kind."""
    model = small_model()
    found = {
        "projections": [name for name, p in model.named_parameters() if "_proj" in name],
        "norms": [name for name, p in model.named_parameters() if p.dim() == 1 and "layers" in name],
    }
    chosen = {n for kind in kinds for n in found.get(kind, []) if int(n.split(".")[2]) in layers}
    return chosen | {kind for kind in kinds if kind.endswith(".weight")}


HEAD, EMBED, FINAL = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({}, names("projections", "norms", FINAL)),
        ({"train_lm_head": True}, names("projections", "norms", FINAL, HEAD)),
        ({"train_embed": True}, names("projections", "norms", FINAL, EMBED)),
        ({"train_lm_head": True, "train_embed": True}, names("projections", "norms", FINAL, HEAD, EMBED)),
        ({"train_last_layers": 1}, names("projections", "norms", layers=(1,))),
        ({"train_last_layers": 1, "train_lm_head": True}, names("projections", "norms", HEAD, layers=(1,))),
    ],
    ids=["default", "head", "embed", "both", "last layer", "last layer and head"],
)
def test_exactly_the_named_weights_change(tmp_path, tsv, flags, expected, capsys):
    model = small_directory(tmp_path / "model", small_model())
    path = train(model=str(model), train_data=str(tsv), steps=2, lr=1e-2, out=str(tmp_path / "out"), **flags)
    assert changed(weights(model), weights(path)) == expected
    frozen = {name: t for name, t in weights(path).items() if name not in expected}
    assert all(t.dtype == torch.float32 for t in frozen.values())  # not even their type
    assert f"total={len(expected)} " in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["train_lm_head", "train_embed"])
def test_on_a_tied_model_either_flag_trains_the_one_tensor(tmp_path, tsv, flag, capsys):
    model = small_directory(tmp_path / "model", small_model(tie_word_embeddings=True))
    settings = dict(model=str(model), train_data=str(tsv), steps=1, lr=1e-2, out=str(tmp_path / "out"))
    path = train(**settings, **{flag: True})
    assert EMBED in changed(weights(model), weights(path))
    assert "one tensor" in capsys.readouterr().out
    frozen = train(**settings)
    assert EMBED not in changed(weights(model), weights(frozen))


def test_untie_splits_the_tensor(tmp_path, tsv):
    model = small_directory(tmp_path / "model", small_model(tie_word_embeddings=True))
    settings = dict(model=str(model), train_data=str(tsv), steps=1, lr=1e-2, out=str(tmp_path / "out"))
    before, after = weights(model), weights(train(**settings, untie=True, train_lm_head=True))
    assert torch.equal(before[EMBED], after[EMBED].to(before[EMBED].dtype)) and HEAD in after
    assert not torch.equal(after[HEAD], after[EMBED])
    loaded, _ = minifp4.load(tmp_path / "out")
    assert not loaded.config.tie_word_embeddings
    with pytest.raises(ValueError, match="--untie"):
        train(**settings | {"model": str(tmp_path / "out")}, untie=True)


def test_load_gives_what_was_saved(tmp_path):
    model = small_model()
    ids = torch.arange(10).unsqueeze(0)
    path = small_directory(tmp_path / "model", model, unknown_key={"kept": [1]})
    loaded, tokenizer = minifp4.load(path)
    assert torch.equal(loaded(ids), model(ids)) and loaded.config.source["unknown_key"] == {"kept": [1]}
    plain, _ = minifp4.load(path, quantize=False)
    assert torch.equal(plain(ids), small_model(quantize=False)(ids))
    assert minifp4.load(path, compute_dtype=torch.bfloat16)[0](ids).dtype == torch.bfloat16
    assert len(minifp4.generate(loaded, tokenizer, "你好", max_new_tokens=3)) >= 0


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_gpu_computes_in_bf16_if_it_can(has_bf16, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert masters.default_compute_dtype("cuda") == (torch.bfloat16 if has_bf16 else torch.float32)
    assert masters.default_compute_dtype("cpu") == torch.float32


def break_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    config = {key: value for key, value in (config | changes).items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))


def break_weights(path, change):
    file = safetensors.SafeFile(path / "model.safetensors")
    tensors = {name: file[name].clone() for name in file.entries}
    change(tensors)
    safetensors.write(path / "model.safetensors", tensors)


BROKEN = {
    "no such directory": (lambda p: shutil.rmtree(p), "does not exist"),
    "no config": (lambda p: (p / "config.json").unlink(), "neither a config.json nor a checkpoint"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "model.safetensors does not exist"),
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink(), "tokenizer.json does not exist"),
    "bad tokenizer": (lambda p: (p / "tokenizer.json").write_text("{}"), "not a readable tokenizer.json"),
    "bad json": (lambda p: (p / "config.json").write_text("{"), "config.json: not valid JSON"),
    "missing key": (lambda p: break_config(p, head_dim=None), 'config.json: the key "head_dim" is missing'),
    "many layers": (lambda p: break_config(p, num_hidden_layers=10**6), "1000000 layers, .* have 2"),
    "small vocabulary": (lambda p: break_config(p, vocab_size=800), "vocab_size of only 800"),
    "wrong shape": (lambda p: break_config(p, intermediate_size=192), r"gate_proj.*\[128, 64\].*\[192, 64\]"),
    "missing tensor": (lambda p: break_weights(p, lambda t: t.pop(HEAD)), r"missing 1 \(lm_head.weight\)"),
    "unexpected tensor": (
        lambda p: break_weights(p, lambda t: t.update(extra=torch.zeros(1))),
        r"unexpected 1 \(extra\)",
    ),
    "integer tensor": (lambda p: break_weights(p, lambda t: t.update({FINAL: t[FINAL].long()})), "int64"),
    "cut file": (lambda p: (p / "model.safetensors").write_bytes(b"\0" * 100), "model.safetensors"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_refused_by_name(tmp_path, name):
    path = small_directory(tmp_path / "model", small_model())
    how, message = BROKEN[name]
    how(path)
    with pytest.raises((ValueError, OSError), match=message):
        minifp4.load(path)


def test_dimensions_that_are_not_whole_blocks_are_refused(tmp_path):
    path = small_directory(tmp_path / "model", small_model(quantize=False, hidden_size=72))
    with pytest.raises(ValueError, match=r"72.*multiple of 16"):
        minifp4.load(path)
    plain, _ = minifp4.load(path, quantize=False)
    assert plain(torch.zeros(1, 2, dtype=torch.int64)).isfinite().all()


def test_a_checkpoint_of_transformers_5_trains(tmp_path, tsv):
    """Written by `save_pretrained`, in shards, with version 5's config; every tensor finds its place."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "model"
    config = transformers.Qwen3Config(**CONFIG | {"tie_word_embeddings": True, "torch_dtype": "bfloat16"})
    twin = transformers.Qwen3ForCausalLM(config).to(torch.bfloat16)
    twin.save_pretrained(path, max_shard_size="100KB")
    shutil.copy(minifp4.BASE / "tokenizer.json", path)
    assert "rope_parameters" in (path / "config.json").read_text()
    assert len(list(path.glob("*.safetensors"))) > 1
    model, _ = minifp4.load(path, quantize=False)
    theirs = twin.state_dict()
    assert all(torch.equal(p, theirs[name].to(p.dtype)) for name, p in model.named_parameters())
    train(model=str(path), train_data=str(tsv), steps=1, train_embed=True, out=str(tmp_path / "out"))


@pytest.mark.parametrize(
    "places, message",
    [
        ({HEAD: "../model.safetensors"}, "is not a file name in this directory"),
        ({HEAD: "/etc/passwd"}, "is not a file name in this directory"),
        ({HEAD: ".."}, "is not a file name in this directory"),
        ({HEAD: 3}, "must map tensor names to file names"),
        ({HEAD: "absent.safetensors"}, "absent.safetensors does not exist"),
        ([], "must map tensor names to file names"),
    ],
)
def test_an_index_cannot_reach_outside_its_directory(tmp_path, places, message):
    path = small_directory(tmp_path / "model", small_model())
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises((ValueError, OSError), match=message):
        minifp4.load(path)


def packed_model(tmp_path, change):
    """The bundled model with some of its tensors changed."""
    path = tmp_path / "model"
    shutil.copytree(minifp4.BASE, path)
    break_weights(path, change)
    return path


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(f"{Q}_scale"), "q_proj.weight_packed' lacks its 'model.*weight_scale'"),
        (
            lambda t: t.update({f"{Q}_packed": t[f"{Q}_packed"][:, :8]}),
            "not the codes and scales of one matrix",
        ),
        (lambda t: t.update({f"{Q}_scale": t[f"{Q}_scale"].float()}), "expected float8_e4m3fn"),
        (lambda t: t.update({f"{Q}_global_scale": torch.zeros(1)}), "must be one positive number"),
        (lambda t: t.update({f"{Q}_global_scale": torch.ones(2)}), "must be one positive number"),
    ],
)
def test_broken_nvfp4_weights_are_refused_by_name(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        minifp4.load(packed_model(tmp_path, change))


def test_scales_of_activations_are_not_needed(tmp_path):
    """Checkpoints for 4-bit activations (W4A4) carry them, and those for an FP8 cache of keys and values; the
    weights are read all the same."""
    attention = Q.removesuffix("q_proj.weight")
    names = "q_proj.input_global_scale", "k_proj.k_scale", "v_proj.v_scale"
    path = packed_model(tmp_path, lambda t: t.update({f"{attention}{name}": torch.ones(1) for name in names}))
    found, expected = (minifp4.load(source)[0].lm_head.weight for source in (path, minifp4.BASE))
    assert torch.equal(stored_values(found), stored_values(expected))


def test_packed_weights_are_parameters_like_others():
    model, _ = minifp4.load()
    weight = model.get_parameter(Q)
    assert (
        isinstance(weight, torch.nn.Parameter)
        and weight.shape == (512, 256)
        and weight.dtype == torch.bfloat16
    )
    assert packed.bytes_of(weight) == 512 * 256 * 0.5625 + 4
    twin = copy.deepcopy(model)
    assert twin.get_parameter(Q).qdata.data_ptr() != weight.qdata.data_ptr()
    assert torch.equal(twin.get_parameter(Q).decode(), weight.decode())
    assert torch.equal(twin.to("cpu").state_dict()[Q].decode(), weight.decode())
    twin.load_state_dict(model.state_dict())
    with pytest.raises(NotImplementedError, match="no dense values: use .decode()"):
        weight + 1


MEASURE = """
import re, sys
sys.path.insert(0, {root!r})
import minifp4

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) * 1024

minifp4.load()  # everything is imported, and torch has made its buffers
before = peak()
model, _ = minifp4.load({path!r})
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory in Linux's units")
def test_loading_takes_the_model_and_one_tensor_more(tmp_path):
    """Peak memory while loading 0.4 GB: the weights once, and little more than one tensor twice."""
    path = small_directory(tmp_path / "model", small_model())
    config = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4}
    break_config(path, **config)
    with torch.device("meta"):
        model = Qwen3(Config.from_dict(CONFIG | config))
    tensors = {name: torch.randn(p.shape, dtype=torch.bfloat16) for name, p in model.named_parameters()}
    safetensors.write(path / "model.safetensors", tensors)
    sizes = [2 * p.numel() for p in model.parameters()]
    code = MEASURE.format(root=str(ROOT), path=str(path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    arithmetic = 2**25  # pieces of one tensor, looked at for an NVFP4 grid
    assert 0.95 * sum(sizes) <= int(done.stdout) <= sum(sizes) + max(sizes) + arithmetic
