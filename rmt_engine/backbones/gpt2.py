"""GPT-2: pre-norm, learned positions, GELU. Weight names are Hugging Face's GPT2LMHeadModel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rmt_kernels import linear_residual, lm_head, memory, norm_linear, segment_attention
from rmt_kernels.memory import Embeddings
from rmt_kernels.per_slot import Count, Rows
from rmt_kernels.segment_attention import AttentionSpec, KVCache
from rmt_kernels.weights import Linear
from torch import Tensor

from rmt_engine.backbones.common import ACTIVATIONS, Shapes, Weights, layer_norm, pad_table, require

TIED = {"lm_head.weight": "transformer.wte.weight"}
IGNORED = (r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",)  # causal masks that old files carry


def parameter_shapes(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of a GPT2LMHeadModel's parameters; a tied head is left out."""
    width, vocab = config["n_embd"], config["vocab_size"]
    inner = config.get("n_inner") or 4 * width
    shapes: Shapes = {
        "transformer.wte.weight": (vocab, width),
        "transformer.wpe.weight": (config["n_positions"], width),
        "transformer.ln_f.weight": (width,),
        "transformer.ln_f.bias": (width,),
    }
    for i in range(config["n_layer"]):
        layer = f"transformer.h.{i}."
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{layer}{norm}.weight": (width,), f"{layer}{norm}.bias": (width,)}
        for name, rows, columns in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, inner),
            ("mlp.c_proj", inner, width),
        ):
            shapes |= {f"{layer}{name}.weight": (rows, columns), f"{layer}{name}.bias": (columns,)}
    if not config.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (vocab, width)
    return shapes


def _conv1d(weights: Weights, name: str) -> Linear:
    """GPT-2 stores its linears as [in, out]."""
    return Linear(weights[f"{name}.weight"].t().contiguous(), weights[f"{name}.bias"])


class GPT2Block:
    """hidden + attention(norm(hidden)), then + MLP(norm(hidden))."""

    def __init__(self, config: Mapping[str, Any], weights: Weights, index: int, backend: str):
        name, eps = f"transformer.h.{index}.", config["layer_norm_epsilon"]
        width, heads = config["n_embd"], config["n_head"]
        scale = 1 / math.sqrt(width // heads) if config.get("scale_attn_weights", True) else 1.0
        if config.get("scale_attn_by_inverse_layer_idx", False):
            scale /= index + 1
        packed = _conv1d(weights, f"{name}attn.c_attn")
        assert packed.bias is not None
        q, k, v = (Linear(w, b) for w, b in zip(packed.weight.split(width), packed.bias.split(width), strict=True))
        first_norm, last = layer_norm(weights, f"{name}ln_1", eps), index == config["n_layer"] - 1
        self.qkv = norm_linear.plan_qkv(q, k, v, first_norm, queries_apart=last, backend=backend)
        spec = AttentionSpec(heads, heads, width // heads, causal=True, scale=scale)
        self.attention = segment_attention.plan(spec, backend=backend)
        self.attention_out = linear_residual.plan(_conv1d(weights, f"{name}attn.c_proj"), backend=backend)
        self.mlp_in = norm_linear.plan(
            _conv1d(weights, f"{name}mlp.c_fc"),
            layer_norm(weights, f"{name}ln_2", eps),
            ACTIVATIONS[config["activation_function"]],
            backend=backend,
        )
        self.mlp_out = linear_residual.plan(_conv1d(weights, f"{name}mlp.c_proj"), backend=backend)

    def __call__(self, hidden: Tensor, length: Count, rows: Rows, cache: KVCache | None) -> Tensor:
        q, k, v = self.qkv(hidden, rows)
        attended = self.attention(q, k, v, length=length, start=rows.start, cache=cache)
        hidden = self.attention_out(attended, hidden, rows)
        return self.mlp_out(self.mlp_in(hidden), hidden)


class GPT2:
    """A GPT2LMHeadModel over assembled segments."""

    def __init__(self, config: Mapping[str, Any], weights: Weights, backend: str):
        require(config, "activation_function", *ACTIVATIONS)
        require(config, "add_cross_attention", False, default=False)
        self.kv_heads, self.head_dim = config["n_head"], config["n_embd"] // config["n_head"]
        tokens = weights["transformer.wte.weight"]
        embeddings = Embeddings(tokens, pad_table(weights["transformer.wpe.weight"]))
        final_norm = layer_norm(weights, "transformer.ln_f", config["layer_norm_epsilon"])
        self.read_memory = memory.plan_read(embeddings, backend=backend)
        self.embed = memory.plan_embed(embeddings, backend=backend)
        self.blocks = [GPT2Block(config, weights, i, backend) for i in range(config["n_layer"])]
        self.write_memory = memory.plan_write(final_norm, backend=backend)
        head = Linear(weights.get("lm_head.weight", tokens))
        self.head = lm_head.plan(head, final_norm, backend=backend)
        self.log_probabilities = lm_head.plan_nll(head, final_norm, backend=backend)


build = GPT2
