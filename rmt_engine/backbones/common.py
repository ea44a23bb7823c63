"""What backbones share: the interface that executors drive, their weights by name, tables padded like the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from rmt_kernels.lm_head import LMHead, LogProbabilities
from rmt_kernels.memory import Embed, ReadMemory, WriteMemory
from rmt_kernels.per_slot import Count, Rows
from rmt_kernels.segment_attention import KVCache
from rmt_kernels.weights import Activation, Linear, Norm
from torch import Tensor

from rmt_engine.errors import CheckpointError
from rmt_engine.layouts import ROW_MULTIPLE

Shapes = dict[str, tuple[int, ...]]
Weights = Mapping[str, Tensor]

# Activations between two linears, by the names that configs have for them.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


class Block(Protocol):
    """One layer: hidden [B, T, E], of which `length` rows of a slot are real -> hidden [B, R, E] of `rows`."""

    def __call__(self, hidden: Tensor, length: Count, rows: Rows, cache: KVCache | None) -> Tensor: ...


class Backbone(Protocol):
    """A transformer over one assembled segment. H_kv and D are those of the cache."""

    kv_heads: int
    head_dim: int
    blocks: Sequence[Block]
    read_memory: ReadMemory  # (ids [B, L], memory [B, M, E], frame, T, lengths) -> hidden [B, T, E]
    embed: Embed  # (ids [B, R], first position) -> hidden [B, R, E]
    write_memory: WriteMemory  # (hidden [B, R, E], rows, out) -> memory state [B, M, E]
    head: LMHead  # hidden [B, R, E] -> logits [B, R, V]; a classifier: hidden of [CLS] [B, E] -> logits [B, C]
    log_probabilities: LogProbabilities  # decoders: hidden [B, R, E], ids [B, R] -> log-probability of each id [B, R]


def run_blocks(
    backbone: Backbone, hidden: Tensor, length: Count, rows: Rows, caches: Sequence[KVCache] | None = None
) -> Tensor:
    """All layers over hidden [B, T, E] with `length` real rows -> hidden [B, R, E] of `rows`.

    The last layer computes queries, output projection and MLP for `rows` alone.
    """
    everything = Rows(0, hidden.shape[1])
    last = len(backbone.blocks) - 1
    for index, block in enumerate(backbone.blocks):
        cache = caches[index] if caches is not None else None
        hidden = block(hidden, length, rows if index == last else everything, cache)
    return hidden


def linear(weights: Weights, name: str) -> Linear:
    """A linear with the bias that it has, or none."""
    return Linear(weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def layer_norm(weights: Weights, name: str, eps: float) -> Norm:
    return Norm("layer", weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def pad_table(table: Tensor) -> Tensor:
    """A table of positions [P, ·] with zero rows up to a multiple of 16: padding rows look there, nobody reads them."""
    missing = -table.shape[0] % ROW_MULTIPLE
    return torch.cat([table, table.new_zeros(missing, *table.shape[1:])]) if missing else table


def require(config: Mapping[str, Any], key: str, *allowed: Any, default: Any = None) -> Any:
    """config[key], which must be one of `allowed`. Raises CheckpointError that names the key and the choices."""
    value = config.get(key, default)
    if value not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        raise CheckpointError(f"the backbone's config has {key}={value!r}; this engine runs {choices}")
    return value
