"""BERT with a classifier: post-norm, learned positions, bidirectional. Names are BertForSequenceClassification's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rmt_kernels import linear_residual, memory, norm_linear, segment_attention
from rmt_kernels.memory import Embeddings
from rmt_kernels.per_slot import Count, Rows
from rmt_kernels.segment_attention import AttentionSpec, KVCache
from torch import Tensor

from rmt_engine.backbones.common import ACTIVATIONS, Shapes, Weights, layer_norm, linear, pad_table, require

TIED: dict[str, str] = {}
IGNORED = (r"bert\.embeddings\.(position_ids|token_type_ids)",)


def num_labels(config: Mapping[str, Any]) -> int:
    return len(config.get("id2label") or {}) or 2


def parameter_shapes(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of a BertForSequenceClassification's parameters, memory rows not among the embeddings."""
    width = config["hidden_size"]
    shapes = encoder_shapes(config, "bert.")
    for name, rows in (("bert.pooler.dense", width), ("classifier", num_labels(config))):
        shapes |= {f"{name}.weight": (rows, width), f"{name}.bias": (rows,)}
    return shapes


def encoder_shapes(config: Mapping[str, Any], prefix: str) -> Shapes:
    """Those of the embeddings and the layers, under `prefix`."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes: Shapes = {
        f"{prefix}embeddings.word_embeddings.weight": (config["vocab_size"], width),
        f"{prefix}embeddings.position_embeddings.weight": (config["max_position_embeddings"], width),
        f"{prefix}embeddings.token_type_embeddings.weight": (config["type_vocab_size"], width),
    }
    norms, linears = [f"{prefix}embeddings.LayerNorm"], []
    for i in range(config["num_hidden_layers"]):
        layer = f"{prefix}encoder.layer.{i}."
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


class BertBlock:
    """norm(hidden + attention(hidden)), then norm(hidden + MLP(hidden))."""

    def __init__(self, config: Mapping[str, Any], weights: Weights, name: str, *, last: bool, backend: str):
        heads, eps = config["num_attention_heads"], config["layer_norm_eps"]
        head_dim = config["hidden_size"] // heads
        q, k, v = (linear(weights, f"{name}attention.self.{part}") for part in ("query", "key", "value"))
        self.qkv = norm_linear.plan_qkv(q, k, v, None, queries_apart=last, backend=backend)
        spec = AttentionSpec(heads, heads, head_dim, causal=False, scale=head_dim**-0.5)
        self.attention = segment_attention.plan(spec, backend=backend)
        self.attention_out = linear_residual.plan(
            linear(weights, f"{name}attention.output.dense"),
            layer_norm(weights, f"{name}attention.output.LayerNorm", eps),
            backend=backend,
        )
        self.mlp_in = norm_linear.plan(
            linear(weights, f"{name}intermediate.dense"),
            activation=ACTIVATIONS[config["hidden_act"]],
            backend=backend,
        )
        self.mlp_out = linear_residual.plan(
            linear(weights, f"{name}output.dense"), layer_norm(weights, f"{name}output.LayerNorm", eps), backend=backend
        )

    def __call__(self, hidden: Tensor, length: Count, rows: Rows, cache: KVCache | None) -> Tensor:
        q, k, v = self.qkv(hidden, rows)
        attended = self.attention(q, k, v, length=length, start=rows.start, cache=cache)
        hidden = self.attention_out(attended, hidden, rows)
        return self.mlp_out(self.mlp_in(hidden), hidden)


class BertEncoder:
    """Embeddings and layers over assembled segments, and a classifier of [CLS]: two linears with tanh between.

    prefix: of the weights' names. first_position: the row of the position table that the first row of a segment takes.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Weights,
        backend: str,
        *,
        prefix: str,
        head: tuple[str, str],
        first_position: int = 0,
    ):
        require(config, "hidden_act", *ACTIVATIONS)
        require(config, "position_embedding_type", "absolute", None, default="absolute")
        require(config, "is_decoder", False, default=False)
        self.kv_heads = config["num_attention_heads"]
        self.head_dim = config["hidden_size"] // self.kv_heads
        embeddings = Embeddings(
            weights[f"{prefix}embeddings.word_embeddings.weight"],
            pad_table(weights[f"{prefix}embeddings.position_embeddings.weight"][first_position:]),
            weights[f"{prefix}embeddings.token_type_embeddings.weight"][0],
            layer_norm(weights, f"{prefix}embeddings.LayerNorm", config["layer_norm_eps"]),
        )
        self.read_memory = memory.plan_read(embeddings, backend=backend)
        self.embed = memory.plan_embed(embeddings, backend=backend)
        count = config["num_hidden_layers"]
        self.blocks = [
            BertBlock(config, weights, f"{prefix}encoder.layer.{i}.", last=i == count - 1, backend=backend)
            for i in range(count)
        ]
        self.write_memory = memory.plan_write(None, backend=backend)
        self.pooler = norm_linear.plan(linear(weights, head[0]), activation="tanh", backend=backend)
        self.classifier = norm_linear.plan(linear(weights, head[1]), backend=backend)

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden state of [CLS] [B, E] -> label logits [B, C] in fp32."""
        return self.classifier(self.pooler(hidden)).float()


class Bert(BertEncoder):
    """A BertForSequenceClassification."""

    def __init__(self, config: Mapping[str, Any], weights: Weights, backend: str):
        super().__init__(config, weights, backend, prefix="bert.", head=("bert.pooler.dense", "classifier"))


build = Bert
