"""Qwen3, whole: the forward pass of Qwen3-0.6B to 32B in plain PyTorch.

    ids -> embed_tokens -> n blocks -> norm -> lm_head -> logits

    block:      x = x + attention(norm(x));   x = x + mlp(norm(x))
    attention:  q, k, v = projections of x; a norm on every head's q and k (this is what Qwen3 added to
    Qwen2);
                rotary positions (RoPE); several query heads share one key and value head (grouped queries)
    mlp:        down(silu(gate(x)) * up(x))

Modules and parameters carry the names of Hugging Face's `Qwen3ForCausalLM`, so loading a checkpoint is an
identity, and the arithmetic has its order, so that the logits are the same bit for bit in bf16. Not here:
sliding windows, attention biases, mixtures of experts and RoPE variants; `Config.from_dict` refuses them by
name.

The model computes in `compute_dtype` whatever precision its weights are stored in; norms compute in fp32.
"""

import contextlib
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import linear, loss, norm
from .linear import Embedding, Linear, refit_global_scales, share_global_scale
from .loss import IGNORE, cross_entropy
from .norm import AddNorm, HeadNorm, RMSNorm, rope_tables

DECODED_LIMIT = 2**31  # bytes of dense weights that `Qwen3.decoded` is willing to keep


@dataclass
class Config:
    """The numbers of config.json that the forward pass needs; `source` is the whole file, unknown keys
    included."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int  # not hidden_size / num_attention_heads: 128, where 2560 / 32 is 80
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool = False
    source: dict = field(default_factory=dict, repr=False)

    @classmethod
    def from_dict(cls, source):
        """Read a config.json of transformers 4 or 5. ValueError names the key that is missing or not
        supported."""
        if source.get("model_type") != "qwen3":
            raise ValueError(f'"model_type" must be "qwen3", got {source.get("model_type")!r}')
        values = {}
        for name in list(cls.__annotations__)[:8]:
            if source.get(name) is None:
                raise ValueError(f'the key "{name}" is missing')
            values[name] = _positive(name, source[name], float if name == "rms_norm_eps" else int)
        if values["num_attention_heads"] % values["num_key_value_heads"]:
            raise ValueError('"num_attention_heads" must be a multiple of "num_key_value_heads"')
        if values["head_dim"] % 2:
            raise ValueError(f'"head_dim" must be even, got {values["head_dim"]}')
        for name, expected in (
            ("hidden_act", "silu"),
            ("attention_bias", False),
            ("use_sliding_window", False),
        ):
            if source.get(name, expected) != expected:
                raise ValueError(f'"{name}": {source[name]!r} is not supported, only {expected!r}')
        tied = source.get("tie_word_embeddings", False)
        return cls(
            **values, rope_theta=_rope_theta(source), tie_word_embeddings=bool(tied), source=dict(source)
        )


def _positive(name, value, kind):
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or value <= 0:
        raise ValueError(f'"{name}" must be a positive {kind.__name__}, got {value!r}')
    return value


def _rope_theta(source):
    """transformers 5 writes `rope_parameters`, 4 `rope_theta` (and `rope_scaling` for what is not
    supported)."""
    rope = source.get("rope_parameters") or source.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f'the RoPE type "{kind}" is not supported, only "default"')
    theta = rope.get("rope_theta", source.get("rope_theta"))
    if theta is None:
        raise ValueError('the key "rope_theta" is missing (also looked for in "rope_parameters")')
    return _positive("rope_theta", theta, float)


class KVCache:
    """Keys and values of the tokens seen so far, for one model: [layers][B, kv heads, capacity, head_dim]."""

    def __init__(self, config, batch, capacity, device, dtype):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer, k, v):
        """Store the new tokens' k, v [B, kv heads, T, head_dim]; give those of all tokens, these included."""
        stop = self.length + k.shape[2]
        if stop > self.keys.shape[3]:
            raise ValueError(f"the KV cache holds {self.keys.shape[3]} tokens, {stop} are needed")
        self.keys[layer, :, :, self.length : stop] = k
        self.values[layer, :, :, self.length : stop] = v
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        queries, pairs = (
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        )
        self.q_proj = Linear(config.hidden_size, queries)
        self.k_proj = Linear(config.hidden_size, pairs)
        self.v_proj = Linear(config.hidden_size, pairs)
        self.o_proj = Linear(queries, config.hidden_size)
        self.q_norm = HeadNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = HeadNorm(config.head_dim, config.rms_norm_eps)
        share_global_scale(self.q_proj, self.k_proj, self.v_proj)

    def forward(self, for_q, for_k, for_v, cos, sin, cache=None):
        """The first three are one norm; see `norm.AddNorm`."""

        def heads(y):  # [B, T, H * head_dim] -> [B, T, H, head_dim]
            return y.unflatten(-1, (-1, self.head_dim))

        q = self.q_norm(heads(self.q_proj(for_q)), cos, sin).transpose(1, 2)
        k = self.k_norm(heads(self.k_proj(for_k)), cos, sin).transpose(1, 2)
        v = heads(self.v_proj(for_v)).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        new, seen = q.shape[2], k.shape[2]
        mask = None
        if (
            1 < new < seen
        ):  # several new tokens after cached ones: each sees the past and its own predecessors
            mask = torch.ones(new, seen, dtype=torch.bool, device=q.device).tril(seen - new)
        # Grouped queries: each key and value head serves H / kv heads query heads.
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=new == seen and new > 1, enable_gqa=True
        )
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)
        share_global_scale(self.gate_proj, self.up_proj)

    def forward(self, for_gate, for_up):
        """down(silu(gate(x)) * up(x)) of one norm x."""
        return self.down_proj(self.up_proj(for_up), gate=self.gate_proj(for_gate))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = AddNorm(config.hidden_size, config.rms_norm_eps, readers=3)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = AddNorm(config.hidden_size, config.rms_norm_eps, readers=2)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, cache=None):
        x, *normed = self.input_layernorm(x)
        x, *normed = self.post_attention_layernorm(x, self.self_attn(*normed, cos, sin, cache))
        return x + self.mlp(*normed)


class Checkpointed:
    """While a block runs (`with` it) whose activations are not kept, or runs `again` to get them back for the
    backward pass.

    The block's last product was needed for the next block alone. Its own backward pass wants its input: a
    quarter of a block's operations need not be done again.
    """

    def __init__(self, block, again):
        self.layers = [module for module in block.modules() if isinstance(module, Linear)]
        self.last, self.again = block.mlp.down_proj, again

    def __enter__(self):
        self._set(True)

    def __exit__(self, *error):
        self._set(False)

    def _set(self, running):
        for layer in self.layers:
            layer.recomputed = running
        self.last.unread = running and self.again


class Qwen3Model(nn.Module):
    """Everything below the head: ids [B, T] -> hidden states [B, T, D]."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.activation_checkpointing = False
        self.keep_activations = 0  # of the last so many layers, with activation_checkpointing
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids, cache=None):
        x = self.embed_tokens(ids, self.compute_dtype)
        start = cache.length if cache is not None else 0
        positions = torch.arange(start, start + ids.shape[1], device=ids.device).repeat(len(ids))
        cos, sin = rope_tables(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        recomputed = len(self.layers) - self.keep_activations if self.activation_checkpointing else 0
        for number, block in enumerate(self.layers):
            if number < recomputed and torch.is_grad_enabled():
                # Nothing here is random, and reading the generator would break a CUDA graph.
                x = checkpoint(
                    block, x, cos, sin, use_reentrant=False, preserve_rng_state=False,
                    context_fn=lambda block=block: (Checkpointed(block, False), Checkpointed(block, True)),
                )  # fmt: skip
            else:
                x = block(x, cos, sin, cache)
        if cache is not None:
            cache.length += ids.shape[1]
        return self.norm(x)


class Qwen3(nn.Module):
    """The language model: `logits = model(ids)`, [B, T] -> [B, T, V]; `model.loss(ids, labels)` for training.

    quantize: read projections and head through NVFP4. A tied head and embedding are one tensor, read as one
    value.
    """

    def __init__(self, config, quantize=True):
        super().__init__()
        self.config = config
        self.model = Qwen3Model(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for layer in self.linears():
            layer.quantized = quantize
        self.model.embed_tokens.quantized = quantize and config.tie_word_embeddings
        self.model.embed_tokens.reads_codes = quantize
        self.kernels = loss.EAGER

    def linears(self):
        """All projections, and the head last."""
        return [module for module in self.modules() if isinstance(module, Linear)]

    def set_compute_dtype(self, dtype):
        """Activations and gradients in `dtype`, whatever the weights are stored in (fp16 would lose small
        ones)."""
        self.model.compute_dtype = dtype
        for p in self.parameters():
            p.grad_dtype = dtype

    def compile_parts(self):
        """Make one kernel each of what is many small operations: decoding, norms, the loss (torch.compile).

        Matrix products and attention are large enough, and stay as they are.
        """
        products, norms = linear.compiled_kernels(), norm.compiled_kernels()
        self.kernels = loss.compiled_kernels()
        for module in self.modules():
            if isinstance(module, (Linear, Embedding)):
                module.kernels = products
            if isinstance(module, RMSNorm):
                module.kernels = norms

    @torch.no_grad()
    def refit(self):
        """After an optimizer step: the global scales that the weights have now."""
        refit_global_scales([*self.linears(), self.model.embed_tokens])

    def untie(self):
        """Give a tied head a weight of its own, equal to the embedding."""
        self.lm_head.weight = nn.Parameter(self.model.embed_tokens.weight.detach().clone())
        self.config.tie_word_embeddings = self.model.embed_tokens.quantized = False

    @property
    def device(self):
        return self.lm_head.weight.device

    @property
    def quantized(self):
        return self.lm_head.quantized

    def forward(self, ids, cache=None):
        return self.lm_head(self.model(ids, cache))

    def loss(self, ids, labels, kind="ce", select=True):
        """The mean loss over the tokens whose label (the token itself, not shifted) is not IGNORE, fp32 [].

        kind: "ce", cross entropy of the next token; "scalar", the mean distance |hidden - embedding of the
        next token|, which does not touch the head: a cheap signal to debug with.
        select: drop the other tokens, whose number must be read from the device, before the head; False
        computes and ignores them.
        """
        hidden, targets = self.model(ids)[:, :-1], labels[:, 1:]
        if select:
            learned = targets != IGNORE
            hidden, targets = hidden[learned], targets[learned]  # [N, D], [N]
        else:
            hidden, targets = hidden.flatten(0, 1), targets.flatten()
        if kind == "ce":
            return cross_entropy(hidden, self.lm_head, targets, self.kernels)
        learned = targets != IGNORE
        goal = self.model.embed_tokens(targets.clamp(min=0), hidden.dtype).detach()
        distance = (hidden - goal).float().abs().mean(-1)
        return (distance * learned).sum() / learned.sum()

    @contextlib.contextmanager
    def decoded(self):
        """Decode the weights once, for many forward passes without training (generation), if they are
        small."""
        if self.lm_head.decoded is not None:  # inside another `decoded`
            yield
            return
        if self.quantized and sum(layer.weight.numel() for layer in self.linears()) * 4 <= DECODED_LIMIT:
            for layer in self.linears():
                layer.decoded = layer.value(self.model.compute_dtype)
        try:
            yield
        finally:
            for layer in self.linears():
                layer.decoded = None
