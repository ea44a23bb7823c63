"""read_memory (embed a segment with the memory state in its rows) and write_memory (take the new state out)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rmt_kernels.checks import dims
from rmt_kernels.dispatch import implementation
from rmt_kernels.weights import Norm


@dataclass(frozen=True)
class Embeddings:
    """tokens [V, E]; positions [P, E], token_type [E] (added to every row) and the norm after the sum, or None."""

    tokens: Tensor
    positions: Tensor | None = None
    token_type: Tensor | None = None
    norm: Norm | None = None

    def __post_init__(self) -> None:
        bound = dims("token embeddings", self.tokens, "V E")
        if self.positions is not None:
            dims("position embeddings", self.positions, "P E", E=bound["E"])
        if self.token_type is not None:
            dims("token type embedding", self.token_type, "E", E=bound["E"])


# f(row_ids [B, T], memory [B, M, E], offsets) -> hidden [B, T, E]
ReadMemory = Callable[[Tensor, Tensor, tuple[int, ...]], Tensor]
# f(hidden [B, M, E]) -> memory state [B, M, E]
WriteMemory = Callable[[Tensor], Tensor]


def plan_read(embeddings: Embeddings, *, backend: str) -> ReadMemory:
    """-> f(row_ids [B, T], memory [B, M, E], offsets) -> hidden [B, T, E].

    Rows offset … offset+M-1 hold the memory in place of token embeddings, for every offset; positions 0..T-1, the
    token type and the norm are applied to all rows alike.
    """
    return implementation("memory", backend).plan_read(embeddings)


def plan_embed(embeddings: Embeddings, *, backend: str) -> Callable[[Tensor, int], Tensor]:
    """-> f(ids [B, R], position) -> hidden [B, R, E]: rows without memory, at positions position, position+1, …"""
    return implementation("memory", backend).plan_embed(embeddings)


def plan_write(norm: Norm | None, *, backend: str) -> WriteMemory:
    """-> f(hidden [B, M, E]) -> memory state [B, M, E]: the backbone's final norm of the write rows."""
    return implementation("memory", backend).plan_write(norm)
