"""BERT with a classifier: post-norm, learned positions, bidirectional. Names are BertForSequenceClassification's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rmt_kernels import linear_residual, memory, norm_linear, segment_attention
from rmt_kernels.memory import Embeddings
from rmt_kernels.per_slot import Count, Rows
from rmt_kernels.segment_attention import AttentionSpec, KVCache
from rmt_kernels.weights import Linear, Norm
from torch import Tensor

from rmt_engine.backbones.common import Shapes, Weights, pad_table, require

TIED: dict[str, str] = {}
IGNORED = (r"bert\.embeddings\.(position_ids|token_type_ids)",)
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


def _num_labels(config: Mapping[str, Any]) -> int:
    return len(config.get("id2label") or {}) or 2


def parameter_shapes(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of a BertForSequenceClassification's parameters, memory rows not among the embeddings."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes: Shapes = {
        "bert.embeddings.word_embeddings.weight": (config["vocab_size"], width),
        "bert.embeddings.position_embeddings.weight": (config["max_position_embeddings"], width),
        "bert.embeddings.token_type_embeddings.weight": (config["type_vocab_size"], width),
    }
    norms = ["bert.embeddings.LayerNorm"]
    linears = [("bert.pooler.dense", width, width), ("classifier", _num_labels(config), width)]
    for i in range(config["num_hidden_layers"]):
        layer = f"bert.encoder.layer.{i}."
        norms += [f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"]
        linears += [(f"{layer}attention.self.{part}", width, width) for part in ("query", "key", "value")]
        linears += [
            (f"{layer}attention.output.dense", width, width),
            (f"{layer}intermediate.dense", inner, width),
            (f"{layer}output.dense", width, inner),
        ]
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for name, rows, columns in linears:
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    return shapes


def _linear(weights: Weights, name: str) -> Linear:
    return Linear(weights[f"{name}.weight"], weights[f"{name}.bias"])


def _norm(config: Mapping[str, Any], weights: Weights, name: str) -> Norm:
    return Norm("layer", weights[f"{name}.weight"], weights[f"{name}.bias"], config["layer_norm_eps"])


class BertBlock:
    """norm(hidden + attention(hidden)), then norm(hidden + MLP(hidden))."""

    def __init__(self, config: Mapping[str, Any], weights: Weights, index: int, backend: str):
        name = f"bert.encoder.layer.{index}."
        heads = config["num_attention_heads"]
        head_dim = config["hidden_size"] // heads
        q, k, v = (_linear(weights, f"{name}attention.self.{part}") for part in ("query", "key", "value"))
        last = index == config["num_hidden_layers"] - 1
        self.qkv = norm_linear.plan_qkv(q, k, v, None, queries_apart=last, backend=backend)
        spec = AttentionSpec(heads, heads, head_dim, causal=False, scale=head_dim**-0.5)
        self.attention = segment_attention.plan(spec, backend=backend)
        self.attention_out = linear_residual.plan(
            _linear(weights, f"{name}attention.output.dense"),
            _norm(config, weights, f"{name}attention.output.LayerNorm"),
            backend=backend,
        )
        self.mlp_in = norm_linear.plan(
            _linear(weights, f"{name}intermediate.dense"),
            activation=ACTIVATIONS[config["hidden_act"]],  # type: ignore[arg-type]
            backend=backend,
        )
        self.mlp_out = linear_residual.plan(
            _linear(weights, f"{name}output.dense"), _norm(config, weights, f"{name}output.LayerNorm"), backend=backend
        )

    def __call__(self, hidden: Tensor, length: Count, rows: Rows, cache: KVCache | None) -> Tensor:
        q, k, v = self.qkv(hidden, rows)
        attended = self.attention(q, k, v, length=length, start=rows.start, cache=cache)
        hidden = self.attention_out(attended, hidden, rows)
        return self.mlp_out(self.mlp_in(hidden), hidden)


class Bert:
    """A BertForSequenceClassification over assembled segments."""

    def __init__(self, config: Mapping[str, Any], weights: Weights, backend: str):
        require(config, "hidden_act", *ACTIVATIONS)
        require(config, "position_embedding_type", "absolute", None, default="absolute")
        require(config, "is_decoder", False, default=False)
        self.kv_heads = config["num_attention_heads"]
        self.head_dim = config["hidden_size"] // self.kv_heads
        embeddings = Embeddings(
            weights["bert.embeddings.word_embeddings.weight"],
            pad_table(weights["bert.embeddings.position_embeddings.weight"]),
            weights["bert.embeddings.token_type_embeddings.weight"][0],
            _norm(config, weights, "bert.embeddings.LayerNorm"),
        )
        self.read_memory = memory.plan_read(embeddings, backend=backend)
        self.embed = memory.plan_embed(embeddings, backend=backend)
        self.blocks = [BertBlock(config, weights, i, backend) for i in range(config["num_hidden_layers"])]
        self.write_memory = memory.plan_write(None, backend=backend)
        self.pooler = norm_linear.plan(_linear(weights, "bert.pooler.dense"), activation="tanh", backend=backend)
        self.classifier = norm_linear.plan(_linear(weights, "classifier"), backend=backend)

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden state of [CLS] [B, E] -> label logits [B, C] in fp32."""
        return self.classifier(self.pooler(hidden)).float()


build = Bert
