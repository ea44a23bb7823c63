"""What a segment step costs at least: multiplications, bytes that must move, and the floor they set on a card.

FLOPs are those of the matrix products (a multiplication and an addition are two), attention among them; norms,
activations and softmax are left out. No torch in here: a model is a handful of numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GATED = ("llama", "mistral", "qwen2", "qwen3")  # a gate beside the first linear of the MLP
ENCODERS = ("bert", "roberta")
PLAIN = ("gpt_neox", *ENCODERS)


@dataclass(frozen=True)
class Model:
    """A backbone's sizes. mlp_linears: 2, or 3 with a gate. Embeddings and head are counted apart from the layers."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    mlp_linears: int
    vocabulary: int
    causal: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Model:
        """From the complete config.json of a backbone. Raises ValueError for a model_type that is not known."""
        kind = config["model_type"]
        if kind == "gpt2":
            width, heads = config["n_embd"], config["n_head"]
            inner = config.get("n_inner") or 4 * width
            return cls(config["n_layer"], width, heads, heads, width // heads, inner, 2, config["vocab_size"], True)
        if kind not in (*GATED, *PLAIN):
            raise ValueError(f"model_type={kind!r}: the cost model knows gpt2, {', '.join((*GATED, *PLAIN))}")
        width, heads = config["hidden_size"], config["num_attention_heads"]
        head_dim = config.get("head_dim") or width // heads
        kv_heads = config.get("num_key_value_heads") or heads
        layers, inner, vocabulary = config["num_hidden_layers"], config["intermediate_size"], config["vocab_size"]
        causal = kind not in ENCODERS
        return cls(layers, width, heads, kv_heads, head_dim, inner, 2 + (kind in GATED), vocabulary, causal)

    @property
    def per_row(self) -> int:
        """Weights that every row of a layer meets but for keys and values: queries, output projection, MLP."""
        return self.width * (2 * self.heads * self.head_dim + self.mlp_linears * self.inner)

    @property
    def key_value(self) -> int:
        return 2 * self.width * self.kv_heads * self.head_dim

    @property
    def layer_weights(self) -> int:
        """Weights of all layers' matrices, not of the embeddings or the head."""
        return self.layers * (self.per_row + self.key_value)


@dataclass(frozen=True)
class Cost:
    """flops; weight_bytes, read once whatever the number of slots; activation_bytes, read and written between ops.

    The activations of a step may stay in a card's cache; they are no part of its floor.
    """

    flops: int
    weight_bytes: int
    activation_bytes: int


@dataclass(frozen=True)
class Card:
    """Dense FLOP/s in the model's dtype and bytes/s of the memory, as measured or as published: the name says which.

    Any machine is one, a CPU with its best matrix product too: `rmt_engine.bench` measures the one it runs on.
    """

    name: str
    flops: float
    bandwidth: float

    def floor(self, cost: Cost) -> float:
        """Seconds below which no implementation comes: arithmetic and weights at their full rates, side by side."""
        return max(cost.flops / self.flops, cost.weight_bytes / self.bandwidth)


H200 = Card("H200, bf16, measured", flops=790e12, bandwidth=4.3e12)
# From the vendor's data sheets, SXM, without sparsity: no kernel reaches them, so shares of their floors look small.
H100 = Card("H100, bf16, published", flops=989e12, bandwidth=3.35e12)
A100 = Card("A100, bf16, published", flops=312e12, bandwidth=2.039e12)
CARDS = {"h200": H200, "h100": H100, "a100": A100}


def _visible(model: Model, rows: int, keys: int) -> int:
    """Pairs of a query and a key it may see, the `rows` queries being the last of `keys`."""
    return rows * keys - rows * (rows - 1) // 2 if model.causal else rows * keys


def segment_step(
    model: Model, rows: int, *, slots: int = 1, last_rows: int | None = None, head_rows: int = 0, element_bytes: int = 2
) -> Cost:
    """All layers over a segment of `rows` rows per slot.

    last_rows: rows, the last of the segment, for which the last layer is finished (the write memory's); None for all,
    0 for none. head_rows: rows whose logits are computed.
    """
    return _cost(model, rows, rows, slots, rows if last_rows is None else last_rows, head_rows, element_bytes)


def decode_step(model: Model, keys: int, *, slots: int = 1, element_bytes: int = 2) -> Cost:
    """One more row per slot, the last of `keys`, and its logits; the KV cache counts among what must be read."""
    cost = _cost(model, 1, keys, slots, 1, 1, element_bytes)
    cache = 2 * slots * keys * model.layers * model.kv_heads * model.head_dim * element_bytes
    return Cost(cost.flops, cost.weight_bytes + cache, cost.activation_bytes)


def _cost(model: Model, rows: int, keys: int, slots: int, last_rows: int, head_rows: int, element_bytes: int) -> Cost:
    full, attended = model.layers - 1, model.heads * model.head_dim
    pairs = full * _visible(model, rows, keys) + _visible(model, last_rows, keys)
    finished = full * rows + last_rows
    flops = 2 * (
        finished * model.per_row + model.layers * rows * model.key_value + head_rows * model.width * model.vocabulary
    )
    flops += 4 * attended * pairs
    weights = model.layer_weights + (model.width * model.vocabulary if head_rows else 0)
    # per finished row: hidden in, queries out and in, attended out and in, residual, sum out and in, inner out and in,
    # residual, sum out; per row: hidden in, keys and values out and in
    moved = finished * (6 * model.width + 4 * attended + 2 * model.inner)
    moved += model.layers * rows * (model.width + 4 * model.kv_heads * model.head_dim)
    moved += head_rows * (model.width + 2 * model.vocabulary)  # logits in fp32 count twice where elements have 2 bytes
    return Cost(slots * flops, weights * element_bytes, slots * moved * element_bytes)
