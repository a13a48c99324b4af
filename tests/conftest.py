"""Small models for the tests, and the two programs as functions."""

import json
import sys
from pathlib import Path

import pytest
import torch

import minifp4
from minifp4 import masters
from minifp4.files import checkpoint
from minifp4.model import Config

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="compile a whole run; more kills, more random files")


@pytest.fixture
def long(request):
    """Whether to take one's time: to compile a whole run, and to repeat what depends on chance."""
    return request.config.getoption("--long")


CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 896,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "attention_bias": False,
}


def small_model(quantize=True, seed=0, **changes):
    """A Qwen3 with random weights, large enough to matter: norms are not all ones, logits not all alike."""
    model = masters.initialize(Config.from_dict(CONFIG | changes), seed, quantize=quantize)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


def small_directory(path, model, **extra):
    """`model` as a Hugging Face directory with the bundled tokenizer."""
    tokenizer = minifp4.load()[1]
    path.mkdir(parents=True)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    checkpoint.write_model(path, model.config, tokenizer, tensors, extra)
    return path


def train(**settings):
    import train

    return train.main(train.Settings(**settings))


def export(**settings):
    import export

    return export.main(export.Settings(**settings))


@pytest.fixture
def tsv(tmp_path):
    """A data file with three short conversations."""
    path = tmp_path / "data.tsv"
    path.write_text("你是誰\t我是 F# 之神\nHello\tHi there!\n談談UFO\t不知道\n", encoding="utf-8")
    return path


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
