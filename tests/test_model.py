"""The forward pass equals Hugging Face's; the head's loss equals the plain one; generation equals
`generate`."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from conftest import CONFIG, small_model

import minifp4
from minifp4 import linear, loss, nvfp4
from minifp4.generate import KVCache, choose, stream
from minifp4.model import Config

SHAPES = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "one kv head": {"num_key_value_heads": 1},
    "no grouping": {"num_key_value_heads": 4},
    "odd head_dim": {"head_dim": 48, "num_attention_heads": 3, "num_key_value_heads": 1},
}


def ids_of(batch, tokens, seed=0):
    return torch.randint(
        0, CONFIG["vocab_size"], (batch, tokens), generator=torch.Generator().manual_seed(seed)
    )


def hf_twin(model, dtype=torch.float32):
    """transformers' Qwen3ForCausalLM with the same weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(**model.config.source)
    twin = transformers.Qwen3ForCausalLM(config).to(dtype)
    twin.model.rotary_emb = type(twin.model.rotary_emb)(
        config
    )  # its table stays in fp32, as from_pretrained keeps it
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return twin.eval()


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_logits_and_gradients_equal_transformers(changes):
    model = small_model(quantize=False, **changes)
    twin = hf_twin(model)
    ids, labels = ids_of(2, 20), ids_of(2, 20)
    labels[:, :7] = loss.IGNORE
    assert (model(ids) - twin(ids).logits).abs().max() < 1e-5
    model.loss(ids, labels).backward()
    twin(ids, labels=labels).loss.backward()
    theirs = dict(twin.named_parameters())
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, theirs[name].grad, rtol=1e-4, atol=1e-6), name


def test_bf16_logits_equal_transformers_bit_for_bit():
    model = small_model(quantize=False)
    twin = hf_twin(model, torch.bfloat16)
    model.set_compute_dtype(torch.bfloat16)
    ids = ids_of(2, 20)
    with torch.no_grad():
        assert torch.equal(model(ids), twin(ids).logits)


def test_padding_on_the_right_changes_nothing():
    model = small_model()
    ids = ids_of(1, 12)
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.int64)], 1)
    assert torch.allclose(model(ids), model(padded)[:, :12], atol=1e-5)


def test_the_forward_pass_reads_nvfp4():
    """Replacing every matrix by its decoded codes and running unquantized gives the same logits."""
    model, plain = small_model(), small_model(quantize=False)
    with torch.no_grad():
        for layer, other in zip(model.linears(), plain.linears()):
            other.weight.copy_(minifp4.dequantize(layer.codes()))
    ids = ids_of(2, 9)
    assert torch.equal(model(ids), plain(ids))
    assert not torch.allclose(model(ids), small_model(quantize=False)(ids), atol=1e-2)


def test_fused_projections_share_a_global_scale():
    model = small_model()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[0, 0] = 50.0
    scales = {
        name: m.codes().global_scale.item()
        for name, m in model.named_modules()
        if isinstance(m, linear.Linear)
    }
    first = "model.layers.0."
    assert (
        scales[first + "self_attn.q_proj"]
        == scales[first + "self_attn.k_proj"]
        == scales[first + "self_attn.v_proj"]
    )
    assert scales[first + "self_attn.q_proj"] > scales[first + "self_attn.o_proj"]
    assert scales[first + "mlp.gate_proj"] == scales[first + "mlp.up_proj"]


def test_straight_through_gradient():
    """The product's gradients are those of a product with the decoded weight, handed to the master as they
    are."""
    generator = torch.Generator().manual_seed(0)
    layer = linear.Linear(32, 8)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(8, 32, generator=generator))
    x = torch.randn(5, 32, generator=generator, requires_grad=True)
    w4 = layer.value(torch.float32).requires_grad_()
    dy = torch.randn(5, 8, generator=generator)
    expected = torch.autograd.grad(x @ w4.T, (x, w4), dy)
    found = torch.autograd.grad(layer(x), (x, layer.weight), dy)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected))


def test_tied_weight_is_read_as_one_value_and_collects_both_gradients():
    model = small_model(tie_word_embeddings=True)
    weight = model.model.embed_tokens.weight
    assert (
        model.lm_head.weight is weight and len(model.state_dict()) == len(dict(model.named_parameters())) + 1
    )
    assert torch.equal(model.lm_head.value(torch.float32), model.model.embed_tokens.value(torch.float32))
    model.loss(ids_of(1, 6), ids_of(1, 6)).backward()
    untied = small_model(tie_word_embeddings=True)
    untied.untie()
    untied.model.embed_tokens.tied = True  # in how it is read
    untied.loss(ids_of(1, 6), ids_of(1, 6)).backward()
    both = untied.model.embed_tokens.weight.grad + untied.lm_head.weight.grad
    assert torch.allclose(weight.grad, both, atol=1e-6)


@pytest.mark.parametrize("by_rows", [False, True], ids=["whole", "by rows"])
@pytest.mark.parametrize("words, logits", [(16384, 2**25), (300, 2**25), (300, 9000), (300, 3000), (1, 1)])
def test_cross_entropy_in_pieces(words, logits, by_rows, monkeypatch):
    """Any slicing of vocabulary and tokens gives torch's loss and gradients: one piece, 3 and 7."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 32, generator=generator, requires_grad=True)
    head = linear.Linear(32, 700 if words > 1 else 12, quantized=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
    targets = torch.randint(0, len(head.weight), (7,), generator=generator)
    monkeypatch.setattr(loss, "LOGITS", logits)
    monkeypatch.setattr(linear, "WORDS", words)
    rows = []
    if by_rows:
        head.on_gradient = lambda words, gradient: rows.append(loss.made(gradient))
    found = loss.cross_entropy(hidden, head, targets)
    expected = F.cross_entropy(hidden @ head.weight.T, targets)
    assert torch.allclose(found, expected, atol=1e-6)
    dhidden, dweight = torch.autograd.grad(found * 3, (hidden, head.weight), allow_unused=by_rows)
    dweight = torch.cat(rows) if by_rows else dweight
    for ours, theirs in zip((dhidden, dweight), torch.autograd.grad(expected * 3, (hidden, head.weight))):
        assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("wanted", ["x weight", "x", "weight"])
def test_the_loss_makes_only_gradients_that_are_wanted(wanted):
    """A frozen head has none; and an evaluation makes no gradient at all."""
    called = []
    head = linear.Linear(32, 64)
    nn.init.normal_(head.weight).requires_grad_("weight" in wanted)
    elementwise = loss.Elementwise(become_gradient=lambda *a: called.append(loss.become_gradient(*a)))
    hidden, targets = torch.randn(5, 32, requires_grad="x" in wanted), torch.arange(5)
    with torch.no_grad():
        loss.cross_entropy(hidden, head, targets, elementwise)
    assert not called
    loss.cross_entropy(hidden, head, targets, elementwise).backward()
    assert called
    for p in (hidden, head.weight):
        assert (p.grad is not None) == p.requires_grad


def test_no_token_to_learn_has_no_gradient():
    model = small_model()
    model.loss(ids_of(1, 6), torch.full((1, 6), loss.IGNORE)).backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("kept", [0, 1, 5])
def test_activation_checkpointing_gives_the_same_gradients(kept, monkeypatch):
    """A layer that is computed again does its seven products again."""
    ids, calls, model, found = ids_of(2, 9), [], small_model(), []
    product = linear.Products.multiply
    monkeypatch.setattr(linear.Products, "multiply", lambda *args: calls.append(1) or product(*args))
    model.model.keep_activations = kept
    for model.model.activation_checkpointing in (False, True):
        calls.clear()
        model.loss(ids, ids).backward()
        found.append((len(calls), [p.grad for p in model.parameters()]))
        model.zero_grad()
    (products, gradients), (more, again) = found
    assert more - products == 7 * max(0, len(model.model.layers) - kept)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again))


def test_scalar_loss_leaves_the_head_alone():
    model = small_model()
    model.loss(ids_of(1, 6), ids_of(1, 6), "scalar").backward()
    assert model.lm_head.weight.grad is None and model.model.norm.weight.grad.abs().sum() > 0


def test_cached_decoding_equals_the_full_pass():
    """Token by token, and in uneven pieces, with keys and values kept."""
    model, ids = small_model(), ids_of(2, 12)
    full = model(ids)
    for pieces in ([1] * 12, [5, 1, 4, 2]):
        cache = KVCache(model.config, 2, 12, ids.device, torch.float32)
        parts = [model(piece, cache) for piece in ids.split(pieces, 1)]
        assert torch.allclose(torch.cat(parts, 1), full, atol=1e-5)


@pytest.mark.parametrize("changes", [SHAPES["untied"], SHAPES["tied"]], ids=["untied", "tied"])
def test_greedy_text_equals_transformers_generate(changes):
    model = small_model(quantize=False, **changes)
    ids = ids_of(1, 5)
    theirs = hf_twin(model).generate(
        ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert list(stream(model, ids[0].tolist(), 20)) == theirs[0, 5:].tolist()


def test_generation_stops_at_a_stop_id_and_restores_the_layers():
    model = small_model()
    free = list(stream(model, [1, 2, 3], 10))
    assert list(stream(model, [1, 2, 3], 10, stop_ids=(free[4],))) == free[: free.index(free[4])]
    assert all(layer.decoded is None for layer in model.linears())


def test_sampling_settings_choose_among_the_likeliest():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)

    def drawn(**settings):
        return {choose(logits, generator=generator, **settings) for _ in range(300)}

    assert drawn() == {0} and drawn(temperature=1.0) == {0, 1, 2, 3}
    assert drawn(temperature=1.0, top_k=2) == {0, 1}
    assert drawn(temperature=1.0, top_p=0.79) == {0, 1} and drawn(temperature=1.0, top_p=0.81) == {0, 1, 2}
    assert drawn(temperature=1.0, top_p=0.01) == {0} and drawn(temperature=0.02) == {0}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"head_dim": None}, '"head_dim" is missing'),
        ({"rope_theta": None}, '"rope_theta" is missing'),
        ({"model_type": "llama"}, "must be \"qwen3\", got 'llama'"),
        ({"hidden_size": "64"}, '"hidden_size" must be a positive int'),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 'RoPE type "yarn"'),
        ({"attention_bias": True}, '"attention_bias": True is not supported'),
        ({"tie_word_embeddings": "false"}, "\"tie_word_embeddings\" must be true or false, got 'false'"),
        ({"rope_parameters": "x"}, "\"rope_parameters\" must be an object, got 'x'"),
        ({"rms_norm_eps": float("nan")}, '"rms_norm_eps" must be a positive float, got nan'),
        ({"rope_theta": float("inf")}, '"rope_theta" must be a positive float, got inf'),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        Config.from_dict(CONFIG | change)


def test_config_spellings_of_transformers_4_and_5():
    old = {key: value for key, value in CONFIG.items()}
    new = {key: value for key, value in CONFIG.items() if key != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e6}
    a, b = Config.from_dict(old), Config.from_dict(json.loads(json.dumps(new)))
    assert a.rope_theta == b.rope_theta == 5e6
    assert nvfp4.BLOCK == 16 and b.head_dim == 32
