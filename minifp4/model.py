"""Qwen3, whole: the forward pass of Qwen3-0.6B to 32B in plain PyTorch.

    ids -> embed_tokens -> n blocks -> norm -> lm_head -> logits

    block:      x = x + attention(norm(x));   x = x + mlp(norm(x))
    norm:       x / sqrt(mean(x**2) + eps) * weight                     (RMSNorm, Zhang & Sennrich 2019)
    attention:  q, k, v = projections of x; a norm on every head's q and k, which Qwen3 added to Qwen2;
                rotary positions (RoPE); several query heads share one key and value head (grouped queries)
    mlp:        down(silu(gate(x)) * up(x))                             (SwiGLU, Shazeer 2020)

Modules and parameters carry the names of Hugging Face's `Qwen3ForCausalLM`, so loading a checkpoint is an
identity, and the arithmetic has its order, so that the logits are the same bit for bit in bf16. Not here:
sliding windows, attention biases, mixtures of experts and RoPE variants; `Config.from_dict` refuses them by
name.

The model computes in `compute_dtype` whatever precision its weights are stored in; norms compute in fp32.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .linear import Embedding, Group, Linear
from .loss import IGNORE, cross_entropy
from .packed import Packed


@dataclass
class Config:
    """The numbers of config.json that the forward pass needs; `source` is the whole file."""

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
        """Read a config.json of transformers 4 or 5; ValueError names a key that is missing or refused."""
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
        only = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}
        for name, expected in only.items():
            if source.get(name, expected) != expected:
                raise ValueError(f'"{name}": {source[name]!r} is not supported, only {expected!r}')
        tied = source.get("tie_word_embeddings", False)
        if not isinstance(tied, bool):
            raise ValueError(f'"tie_word_embeddings" must be true or false, got {tied!r}')
        theta = _rope_theta(source)
        return cls(**values, rope_theta=theta, tie_word_embeddings=tied, source=dict(source))


def _positive(name, value, kind):
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < math.inf:
        raise ValueError(f'"{name}" must be a positive {kind.__name__}, got {value!r}')
    return value


def _rope_theta(source):
    """transformers 5 writes `rope_parameters`, 4 `rope_theta` (and `rope_scaling` for other types)."""
    rope = source.get("rope_parameters") or source.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f'"rope_parameters" must be an object, got {rope!r}')
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f'the RoPE type "{kind}" is not supported, only "default"')
    theta = rope.get("rope_theta", source.get("rope_theta"))
    if theta is None:
        raise ValueError('the key "rope_theta" is missing (also looked for in "rope_parameters")')
    return _positive("rope_theta", theta, float)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x**2) + eps) * weight`, the quotient in fp32."""

    def __init__(self, features, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * normed.to(x.dtype)


def rope_tables(positions, head_dim, theta, dtype):
    """cos and sin [..., head_dim] of the angles `position / theta**(2i / head_dim)`, i counting pairs of
    dimensions; the sine of a pair's first half is negative, as `rotated` wants it."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device).float()
    angles = positions.float().unsqueeze(-1) * (1.0 / theta ** (exponent / head_dim))
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotated(x, cos, sin):
    """Each pair (a, b) = (x[i], x[i + head_dim/2]) of [B, T, H, head_dim] turned by its position's angle:
    (a cos - b sin, b cos + a sin); cos and sin [B, T, head_dim] as of `rope_tables`."""
    swapped = x.roll(x.shape[-1] // 2, -1)  # (b, a)
    return x * cos.unsqueeze(2) + swapped * sin.unsqueeze(2)


class Attention(nn.Module):
    def __init__(self, config, layer, quantize):
        super().__init__()
        self.layer, self.head_dim, hidden = layer, config.head_dim, config.hidden_size
        queries = config.num_attention_heads * config.head_dim
        pairs = config.num_key_value_heads * config.head_dim
        together = Group()  # servers fuse the three
        self.q_proj = Linear(hidden, queries, quantize, together)
        self.k_proj = Linear(hidden, pairs, quantize, together)
        self.v_proj = Linear(hidden, pairs, quantize, together)
        self.o_proj = Linear(queries, hidden, quantize)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x, cos, sin, cache=None, spans=None):
        q = rotated(self.q_norm(self.heads(self.q_proj(x))), cos, sin)
        k = rotated(self.k_norm(self.heads(self.k_proj(x))), cos, sin)
        return self.attend(q, k, self.heads(self.v_proj(x)), cache, spans)

    def heads(self, y):
        """[B, T, H * head_dim] -> [B, T, H, head_dim]"""
        return y.unflatten(-1, (-1, self.head_dim))

    def attend(self, q, k, v, cache, spans):
        """What the queries [B, T, heads, head_dim] find among keys and values [B, T, kv heads, head_dim], and
        those of the cache, or in a packed row of their own span, through the last projection."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, T, head_dim]
        if spans is not None:
            return self.o_proj(spans.attend(q, k, v).transpose(1, 2).flatten(2))
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        new, seen, mask = q.shape[2], k.shape[2], None
        if 1 < new < seen:  # several new tokens after cached ones: each sees the past and those before it
            mask = torch.ones(new, seen, dtype=torch.bool, device=q.device).tril(seen - new)
        # Grouped queries: each key and value head serves H / kv heads query heads.
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=new == seen and new > 1, enable_gqa=True
        )
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config, quantize):
        super().__init__()
        hidden, wide, together = config.hidden_size, config.intermediate_size, Group()
        self.gate_proj = Linear(hidden, wide, quantize, together)
        self.up_proj = Linear(hidden, wide, quantize, together)
        self.down_proj = Linear(wide, hidden, quantize)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, layer, quantize):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer, quantize)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, quantize)

    def forward(self, x, cos, sin, cache=None, spans=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, spans)
        return x + self.mlp(self.post_attention_layernorm(x))

    def recomputed(self, *inputs):
        """The same, but only the inputs are kept: the backward pass computes the rest again."""
        # Nothing here is random, and a recorded step cannot read the generator's state.
        return checkpoint(self, *inputs, use_reentrant=False, preserve_rng_state=False)


class Qwen3Model(nn.Module):
    """Everything below the head: ids [B, T] -> hidden states [B, T, D]."""

    def __init__(self, config, quantize):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.activation_checkpointing = False
        self.keep_activations = 0  # of the last so many layers, with activation_checkpointing
        tied = config.tie_word_embeddings
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, quantize, tied)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(Block(config, layer, quantize) for layer in layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids, cache=None, spans=None):
        x = self.embed_tokens(ids, self.compute_dtype)
        start = cache.length if cache is not None else 0
        positions = torch.arange(start, start + ids.shape[1], device=ids.device).expand(ids.shape)
        positions = spans.positions(ids.shape[1]) if spans is not None else positions
        cos, sin = rope_tables(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        recomputed = len(self.layers) - self.keep_activations if self.activation_checkpointing else 0
        for number, block in enumerate(self.layers):
            if number < recomputed and torch.is_grad_enabled():
                x = block.recomputed(x, cos, sin, None, spans)
            else:
                x = block(x, cos, sin, cache, spans)
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
        self.config, self.quantized = config, quantize
        self.model = Qwen3Model(config, quantize)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, quantize)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.cross_entropy = cross_entropy
        self.divisors = {}  # {name: global scale} of NVFP4 weights whose file divides by it (`files.layouts`)

    def linears(self):
        """All projections, and the head last."""
        return [module for module in self.modules() if isinstance(module, Linear)]

    def set_compute_dtype(self, dtype):
        """Activations and gradients in `dtype`, whatever weights are stored in (fp16 loses small ones)."""
        self.model.compute_dtype = dtype
        for p in self.parameters():
            p.grad_dtype = dtype

    @torch.no_grad()
    def refit(self):
        """After an optimizer step: the global scales that the weights have now."""
        layers, embedding = self.linears(), self.model.embed_tokens
        if embedding.tied or isinstance(embedding.weight, Packed):
            layers.append(embedding)
        for group in dict.fromkeys(layer.group for layer in layers):
            group.refit()

    def untie(self):
        """Give a tied head a weight of its own, equal to the embedding."""
        self.lm_head.weight = nn.Parameter(self.model.embed_tokens.weight.detach().clone())
        self.config.tie_word_embeddings = self.model.embed_tokens.tied = False

    @property
    def device(self):
        return self.lm_head.weight.device

    def forward(self, ids, cache=None):
        return self.lm_head(self.model(ids, cache))

    def loss(self, ids, labels, kind="ce", select=True, spans=None):
        """The mean loss over the tokens whose label (the token itself, not shifted) is not IGNORE, fp32 [].

        spans: of a packed row (`rows.Spans`).
        kind: "ce", cross entropy of the next token; "scalar", the mean distance |hidden - embedding of the
        next token|, which does not touch the head: a cheap signal to debug with.
        select: drop the other tokens, whose number must be read from the device, before the head; False
        computes and ignores them.
        """
        hidden, targets = self.model(ids, spans=spans)[:, :-1], labels[:, 1:]
        if select:
            learned = targets != IGNORE
            hidden, targets = hidden[learned], targets[learned]  # [N, D], [N]
        else:
            hidden, targets = hidden.flatten(0, 1), targets.flatten()
        if kind == "ce":
            return self.cross_entropy(hidden, self.lm_head, targets)
        learned = targets != IGNORE
        goal = self.model.embed_tokens(targets.clamp(min=0), hidden.dtype).detach()
        distance = (hidden - goal).float().abs().mean(-1)
        return (distance * learned).sum() / learned.sum()
