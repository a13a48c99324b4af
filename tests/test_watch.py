"""What a run says of itself: the time of a step is the GPU's, and shares are what their names say."""

import time
from types import SimpleNamespace

import pytest
import torch
from conftest import read_lines, small_model

from minifp4 import watch


class Late:
    """A number that a GPU is still computing."""

    def item(self):
        time.sleep(0.2)
        return 1.0


def test_a_step_takes_until_its_loss_is_there(tmp_path, capsys):
    """A recorded step returns at once; without waiting, a line would tell of 400,000 tokens a second."""
    settings = SimpleNamespace(log_every=1, steps=3, out=tmp_path, tensorboard=False)
    optimizer = SimpleNamespace(lr=1e-3, moved=lambda: 1.0, reset_moved=lambda: None, floored=lambda: 0.0)
    step = SimpleNamespace(optimizer=optimizer, skipped=torch.tensor(0), model=None)
    watching = watch.Watch(settings, step, SimpleNamespace(peak=lambda: 0), 0, None)
    for number in (1, 2, 3):
        watching.after(number, (Late(), Late()), 100, 0.1)
    for record in read_lines(tmp_path / watch.METRICS):
        assert record["tokens_per_second"] <= 100 / 0.4


CARDS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA GeForce RTX 4090": 165e12,
         "Something New": None}  # fmt: skip


@pytest.mark.parametrize("card, rate", CARDS.items())
def test_nominal_rates(card, rate, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    assert watch.nominal_rate(torch.device("cuda")) == rate
    assert watch.nominal_rate(torch.device("cpu")) is None


def test_shares_of_what_a_card_can_do(monkeypatch):
    """Of 4 layers 3 are computed again: 6 operations a weight once, 2 more in those layers."""
    model = small_model(num_hidden_layers=4)
    model.model.activation_checkpointing, model.model.keep_activations = True, 1
    head = model.lm_head.weight.numel()
    layers = sum(layer.weight.numel() for layer in model.linears()) - head
    once, again = 6 * (layers + head), 2 * layers * 3 / 4
    monkeypatch.setattr(watch, "nominal_rate", lambda device: 2e12)
    assert watch.shares(100.0, model, None) == {}
    found = watch.shares(100.0, model, 1e12)
    expected = {"matrix_share": (once + again) / 1e10, "matrix_share_once": once / 1e10,
                "nominal_share": (once + again) / 2e10, "mfu": once / 2e10}  # fmt: skip
    assert found == pytest.approx(expected)
