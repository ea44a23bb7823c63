"""read_memory (embed a segment with the memory state in its rows) and write_memory (take the new state out)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from rmt_kernels.checks import dims
from rmt_kernels.dispatch import implementation
from rmt_kernels.per_slot import Count, Rows
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


@dataclass(frozen=True)
class Frame:
    """The rows around a slot's text, in order: a token id, or ~m (negative) for row m of the memory state."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @cached_property
    def memory_rows(self) -> int:
        """How many rows the memory state must have."""
        return max((~entry + 1 for entry in self.before + self.after if entry < 0), default=0)

    def check(self, ids: Tensor, memory: Tensor, rows: int, lengths: Tensor | None) -> None:
        """Raises ValueError where text, memory, rows and lengths do not fit each other."""
        bound = dims("ids", ids, "B L")
        dims("memory", memory, "B M E", B=bound["B"], M=self.memory_rows)
        if lengths is not None:
            dims("lengths", lengths, "B", B=bound["B"])
        needed = len(self.before) + bound["L"] + len(self.after)
        if rows < needed:
            raise ValueError(f"read_memory: {needed} rows of a segment do not fit rows={rows}")


class ReadMemory(Protocol):
    def __call__(self, ids: Tensor, memory: Tensor, frame: Frame, rows: int, lengths: Tensor | None = None) -> Tensor:
        """ids [B, L], memory [B, M, E] -> hidden [B, rows, E] of the assembled segment.

        Slot b's rows are frame.before, its text ids[b, :lengths[b]], frame.after; those behind hold the embedding of
        id 0. lengths: int32 [B] on the device, each in 0..L and not checked; None: L for all.
        """


class Embed(Protocol):
    def __call__(self, ids: Tensor, position: Count) -> Tensor:
        """ids [B, R] at positions position, position+1, … of each slot -> hidden [B, R, E], without memory."""


class WriteMemory(Protocol):
    def __call__(self, hidden: Tensor, rows: Rows | None = None, out: Tensor | None = None) -> Tensor:
        """hidden [B, R, E] -> memory state [B, M, E] from those of its rows; None: from all of them.

        With out [B, M, E] (contiguous) it is written in place and `out` comes back; without, it is a new tensor.
        """


def plan_read(embeddings: Embeddings, *, backend: str) -> ReadMemory:
    """-> f(ids, memory, frame, rows, lengths=None); see `ReadMemory`.

    Positions 0..rows-1, the token type and the norm are applied to all rows alike.
    """
    return implementation("memory", backend).plan_read(embeddings)


def plan_embed(embeddings: Embeddings, *, backend: str) -> Embed:
    """-> f(ids, position); see `Embed`."""
    return implementation("memory", backend).plan_embed(embeddings)


def plan_write(norm: Norm | None, *, backend: str) -> WriteMemory:
    """-> f(hidden, rows=None, out=None): the backbone's final norm of the write rows; see `WriteMemory`."""
    return implementation("memory", backend).plan_write(norm)
