"""What a model takes is known before it is loaded."""

import pytest
import torch
from conftest import CONFIG, small_directory, small_model, train

import minifp4
from minifp4 import masters, needs
from minifp4.memory import GIB, Shortage
from minifp4.model import Config
from minifp4.packed import bytes_of

QWEN3 = {  # hidden, intermediate, layers, heads, kv heads, tied, billions
    "0.6B": (1024, 3072, 28, 16, 8, True), "1.7B": (2048, 6144, 28, 16, 8, True),
    "4B": (2560, 9728, 36, 32, 8, True), "8B": (4096, 12288, 36, 32, 8, False),
    "14B": (5120, 17408, 40, 40, 8, False), "32B": (5120, 25600, 64, 64, 8, False),
}  # fmt: skip
ALL = {"train_last_layers": 0, "train_embed": True, "train_lm_head": True}
SMALL = ALL | {"master_dtype": "nvfp4", "optimizer_state": "nvfp4", "step_in_backward": True}
LARGE = ALL | {"master_dtype": "bf16", "optimizer_state": "fp32", "step_in_backward": False}


def config_of(name):
    hidden, wide, layers, heads, pairs, tied = QWEN3[name]
    return Config(151936, hidden, wide, layers, heads, pairs, 128, 1e-6, 1e6, tied)


@pytest.mark.parametrize("name", QWEN3)
def test_the_sizes_are_those_of_the_released_models(name):
    assert sum(needs.matrices(config_of(name))) / 1e9 == pytest.approx(needs.SIZES[name], rel=5e-3)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("how", [SMALL, LARGE, SMALL | {"train_last_layers": 1, "train_embed": False}])
def test_the_least_is_what_a_real_run_has(how, tied):
    """Beside the tensors themselves."""
    model = small_model(tie_word_embeddings=tied)
    masters.choose_trained(model, lm_head=how["train_lm_head"], embed=how["train_embed"],
                           last_layers=how["train_last_layers"])  # fmt: skip
    masters.set_masters(model, how["master_dtype"])
    optimizer = minifp4.AdamW(model.named_parameters(), state=how["optimizer_state"])
    found = sum(bytes_of(p) for p in model.parameters() if p.dim() == 2)
    moments = {name: tensor for name, tensor in optimizer.tensors().items() if "norm" not in name}
    found += sum(tensor.nbytes for name, tensor in moments.items() if "row_scale" not in name)
    if not how["step_in_backward"]:
        found += 2 * sum(p.numel() for p in model.parameters() if p.dim() == 2 and p.requires_grad)
    least = needs.least(Config.from_dict(CONFIG | {"tie_word_embeddings": tied}), 4, 2, **how)
    assert 0 <= found - least <= 4 * len(dict(model.named_parameters()))  # global scales


def test_all_of_4b_fits_into_8_gib_and_32b_into_80():
    for name, gib in (("4B", 7.5), ("32B", 54)):
        assert needs.least(config_of(name), 2, 2, **SMALL) < gib * GIB
        needs.check(config_of(name), 2, 2, gib * GIB, **SMALL)


def test_it_says_what_would_help():
    flags = "--step-in-backward --master-dtype nvfp4 --optimizer-state nvfp4"
    with pytest.raises(Shortage, match=f"take 45.0 GiB, and 8.0 are there; 6.3 with {flags}"):
        needs.check(config_of("4B"), 2, 2, 8 * GIB, **LARGE)
    words = r"and 24.0 are there \(51.5 with the smallest kinds\); Qwen3-14B would fit"
    with pytest.raises(Shortage, match=words):
        needs.check(config_of("32B"), 2, 2, 24 * GIB, **SMALL)
    with pytest.raises(Shortage, match="no Qwen3 would fit"):
        needs.check(config_of("32B"), 2, 2, GIB / 2, **SMALL)


def test_train_says_it_before_it_loads(tmp_path, tsv, monkeypatch, capsys):
    model = small_directory(tmp_path / "model", small_model())
    monkeypatch.setattr(needs, "available", lambda device, limit: 10**5)
    with pytest.raises(Shortage, match=r"alone take 0.0 GiB, and 0.0 are there"):
        train(model=str(model), train_data=str(tsv), out=str(tmp_path / "out"))
    assert "model " not in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_what_is_there_is_asked_of_the_machine():
    cpu = torch.device("cpu")
    assert needs.available(cpu, 2.0) == 2 * GIB and needs.available(cpu, None) > GIB / 4
