"""Which weights train, that the others stay bit for bit, and what `load` refuses."""

import json
import shutil

import pytest
import torch
from conftest import small_directory, small_model, train

import minifp4
from minifp4 import checkpoint, safetensors


def weights(path):
    file = safetensors.SafeFile(checkpoint.model_directory(path) / "model.safetensors")
    return {name: file[name].clone() for name in file.entries}


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


def break_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    config = {key: value for key, value in (config | changes).items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))


def break_weights(path, change):
    tensors = weights(path)
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
