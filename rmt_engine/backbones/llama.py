"""Llama: pre-norm (RMS), rotary positions, grouped keys and values, SwiGLU. Names are LlamaForCausalLM's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from rmt_kernels import linear_residual, lm_head, memory, norm_linear, segment_attention
from rmt_kernels.memory import Embeddings
from rmt_kernels.per_slot import Count, Rows
from rmt_kernels.segment_attention import AttentionSpec, KVCache
from rmt_kernels.weights import Linear, Norm
from torch import Tensor

from rmt_engine.backbones.common import Shapes, Weights, pad_table, require

TIED = {"lm_head.weight": "model.embed_tokens.weight"}
IGNORED = (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)


def _head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _kv_heads(config: Mapping[str, Any]) -> int:
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def parameter_shapes(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of a LlamaForCausalLM's parameters; a tied head is left out."""
    width, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q, kv = config["num_attention_heads"] * _head_dim(config), _kv_heads(config) * _head_dim(config)
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    linears = [(f"self_attn.{n}_proj", rows, width, "attention_bias") for n, rows in (("q", q), ("k", kv), ("v", kv))]
    linears += [
        ("self_attn.o_proj", width, q, "attention_bias"),
        ("mlp.gate_proj", inner, width, "mlp_bias"),
        ("mlp.up_proj", inner, width, "mlp_bias"),
        ("mlp.down_proj", width, inner, "mlp_bias"),
    ]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{n}.weight": (width,) for n in ("input_layernorm", "post_attention_layernorm")}
        for name, rows, columns, bias in linears:
            shapes[f"{layer}{name}.weight"] = (rows, columns)
            if config.get(bias, False):
                shapes[f"{layer}{name}.bias"] = (rows,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocab, width)
    return shapes


def inverse_frequencies(config: Mapping[str, Any]) -> Tensor:
    """Rotary frequencies [D / 2] in fp32, with Llama 3's or the linear scaling where the config asks for it."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    rope.setdefault("rope_type", rope.get("type", "default"))
    kind = require(rope, "rope_type", "default", "linear", "llama3")
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    frequencies = 1.0 / theta ** (torch.arange(0, _head_dim(config), 2, dtype=torch.int64).float() / _head_dim(config))
    if kind == "linear":
        return frequencies / rope["factor"]
    return _llama3_scaling(frequencies, rope) if kind == "llama3" else frequencies


def _llama3_scaling(frequencies: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Long waves are stretched by `factor`, short ones kept, those between are blended."""
    original = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    wavelengths = 2 * math.pi / frequencies
    stretched = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
    blend = (original / wavelengths - low) / (high - low)
    blended = (1 - blend) * stretched / factor + blend * stretched
    between = (wavelengths >= original / high) & (wavelengths <= original / low)
    return torch.where(between, blended, stretched)


def rope_table(config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """cos and sin [P, D] in fp32 of every position."""
    angles = torch.outer(torch.arange(config["max_position_embeddings"]).float(), inverse_frequencies(config))
    angles = pad_table(torch.cat([angles, angles], dim=-1))
    return angles.cos(), angles.sin()


def _linear(weights: Weights, name: str) -> Linear:
    return Linear(weights[f"{name}.weight"], weights.get(f"{name}.bias"))


class LlamaBlock:
    """hidden + attention(norm(hidden)), then + SwiGLU(norm(hidden))."""

    def __init__(
        self, config: Mapping[str, Any], weights: Weights, index: int, rope: tuple[Tensor, Tensor], backend: str
    ):
        name, eps = f"model.layers.{index}.", config["rms_norm_eps"]
        q, k, v, o = (_linear(weights, f"{name}self_attn.{part}_proj") for part in "qkvo")
        gate, up, down = (_linear(weights, f"{name}mlp.{part}_proj") for part in ("gate", "up", "down"))
        attention_norm = Norm("rms", weights[f"{name}input_layernorm.weight"], None, eps)
        mlp_norm = Norm("rms", weights[f"{name}post_attention_layernorm.weight"], None, eps)
        head_dim = _head_dim(config)
        spec = AttentionSpec(
            config["num_attention_heads"], _kv_heads(config), head_dim, causal=True, scale=head_dim**-0.5, rope=rope
        )
        last = index == config["num_hidden_layers"] - 1
        self.qkv = norm_linear.plan_qkv(q, k, v, attention_norm, queries_apart=last, backend=backend)
        self.attention = segment_attention.plan(spec, backend=backend)
        self.attention_out = linear_residual.plan(o, backend=backend)
        self.mlp_in = norm_linear.plan(norm_linear.stack(gate, up), mlp_norm, "swiglu", backend=backend)
        self.mlp_out = linear_residual.plan(down, backend=backend)

    def __call__(self, hidden: Tensor, length: Count, rows: Rows, cache: KVCache | None) -> Tensor:
        q, k, v = self.qkv(hidden, rows)
        attended = self.attention(q, k, v, length=length, start=rows.start, cache=cache)
        hidden = self.attention_out(attended, hidden, rows)
        return self.mlp_out(self.mlp_in(hidden), hidden)


class Llama:
    """A LlamaForCausalLM over assembled segments."""

    def __init__(self, config: Mapping[str, Any], weights: Weights, backend: str):
        require(config, "hidden_act", "silu", default="silu")
        self.kv_heads, self.head_dim = _kv_heads(config), _head_dim(config)
        tokens = weights["model.embed_tokens.weight"]
        final_norm = Norm("rms", weights["model.norm.weight"], None, config["rms_norm_eps"])
        rope = tuple(table.to(tokens.device) for table in rope_table(config))
        self.read_memory = memory.plan_read(Embeddings(tokens), backend=backend)
        self.embed = memory.plan_embed(Embeddings(tokens), backend=backend)
        self.blocks = [
            LlamaBlock(config, weights, i, (rope[0], rope[1]), backend) for i in range(config["num_hidden_layers"])
        ]
        self.write_memory = memory.plan_write(final_norm, backend=backend)
        head = Linear(weights.get("lm_head.weight", tokens))
        self.head = lm_head.plan(head, final_norm, backend=backend)
        self.log_probabilities = lm_head.plan_nll(head, final_norm, backend=backend)


build = Llama
