"""Llama: pre-norm (RMS), rotary positions, grouped keys and values, SwiGLU. Names are LlamaForCausalLM's.

Mistral, Qwen2 and Qwen3 are this with other biases, and in Qwen3 a norm of every head's queries and keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rmt_kernels import head_norm, linear_residual, lm_head, memory, norm_linear, segment_attention
from rmt_kernels.head_norm import HeadNorm
from rmt_kernels.memory import Embeddings
from rmt_kernels.per_slot import Count, Rows
from rmt_kernels.segment_attention import AttentionSpec, KVCache
from rmt_kernels.weights import Linear, Norm
from torch import Tensor

from rmt_engine.backbones.common import Shapes, Weights, linear, require
from rmt_engine.backbones.rotary import rope_table

TIED = {"lm_head.weight": "model.embed_tokens.weight"}
IGNORED = (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)


def _head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _kv_heads(config: Mapping[str, Any]) -> int:
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def parameter_shapes(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of a LlamaForCausalLM's parameters; a tied head is left out."""
    attention, mlp = config.get("attention_bias", False), config.get("mlp_bias", False)
    return llama_shapes(config, qkv_bias=attention, out_bias=attention, mlp_bias=mlp)


def llama_shapes(
    config: Mapping[str, Any],
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    head_norms: bool = False,
) -> Shapes:
    """The same for the models that Llama's layers serve: which linears have biases, whether heads have norms."""
    width, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q, kv = config["num_attention_heads"] * _head_dim(config), _kv_heads(config) * _head_dim(config)
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    linears = [(f"self_attn.{n}_proj", rows, width, qkv_bias) for n, rows in (("q", q), ("k", kv), ("v", kv))]
    linears += [
        ("self_attn.o_proj", width, q, out_bias),
        ("mlp.gate_proj", inner, width, mlp_bias),
        ("mlp.up_proj", inner, width, mlp_bias),
        ("mlp.down_proj", width, inner, mlp_bias),
    ]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{n}.weight": (width,) for n in ("input_layernorm", "post_attention_layernorm")}
        for name, rows, columns, bias in linears:
            shapes[f"{layer}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{layer}{name}.bias"] = (rows,)
        if head_norms:
            shapes |= {f"{layer}self_attn.{n}_norm.weight": (_head_dim(config),) for n in "qk"}
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocab, width)
    return shapes


def _head_norm(weights: Weights, name: str, eps: float, backend: str) -> HeadNorm | None:
    weight = weights.get(f"{name}.weight")
    return None if weight is None else head_norm.plan(Norm("rms", weight, None, eps), backend=backend)


class LlamaBlock:
    """hidden + attention(norm(hidden)), then + SwiGLU(norm(hidden))."""

    def __init__(
        self, config: Mapping[str, Any], weights: Weights, index: int, rope: tuple[Tensor, Tensor], backend: str
    ):
        name, eps = f"model.layers.{index}.", config["rms_norm_eps"]
        q, k, v, o = (linear(weights, f"{name}self_attn.{part}_proj") for part in "qkvo")
        gate, up, down = (linear(weights, f"{name}mlp.{part}_proj") for part in ("gate", "up", "down"))
        attention_norm = Norm("rms", weights[f"{name}input_layernorm.weight"], None, eps)
        mlp_norm = Norm("rms", weights[f"{name}post_attention_layernorm.weight"], None, eps)
        head_dim = _head_dim(config)
        spec = AttentionSpec(
            config["num_attention_heads"], _kv_heads(config), head_dim, causal=True, scale=head_dim**-0.5, rope=rope
        )
        last = index == config["num_hidden_layers"] - 1
        self.qkv = norm_linear.plan_qkv(q, k, v, attention_norm, queries_apart=last, backend=backend)
        self.q_norm, self.k_norm = (_head_norm(weights, f"{name}self_attn.{n}_norm", eps, backend) for n in "qk")
        self.attention = segment_attention.plan(spec, backend=backend)
        self.attention_out = linear_residual.plan(o, backend=backend)
        self.mlp_in = norm_linear.plan(norm_linear.stack(gate, up), mlp_norm, "swiglu", backend=backend)
        self.mlp_out = linear_residual.plan(down, backend=backend)

    def __call__(self, hidden: Tensor, length: Count, rows: Rows, cache: KVCache | None) -> Tensor:
        q, k, v = self.qkv(hidden, rows)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
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
        cos, sin = (table.to(tokens.device) for table in rope_table(config, self.head_dim))
        self.read_memory = memory.plan_read(Embeddings(tokens), backend=backend)
        self.embed = memory.plan_embed(Embeddings(tokens), backend=backend)
        self.blocks = [LlamaBlock(config, weights, i, (cos, sin), backend) for i in range(config["num_hidden_layers"])]
        self.write_memory = memory.plan_write(final_norm, backend=backend)
        head = Linear(weights.get("lm_head.weight", tokens))
        self.head = lm_head.plan(head, final_norm, backend=backend)
        self.log_probabilities = lm_head.plan_nll(head, final_norm, backend=backend)


build = Llama
