"""Numbers that differ from slot to slot and stay on the device: lengths of texts, first rows, positions.

Shapes depend on the number of slots and on the widest text alone, and nothing waits for the host, so a segment step
with them can be captured in a CUDA graph and replayed with other lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rmt_kernels.checks import dims


@dataclass(frozen=True, eq=False)
class PerSlot:
    """slots[b] + plus, a number for each slot. slots: int32 [B] on the device of the rows it speaks of."""

    slots: Tensor
    plus: int = 0

    def __post_init__(self) -> None:
        dims("numbers of the slots", self.slots, "B")
        if self.slots.dtype != torch.int32 or not self.slots.is_contiguous():
            raise ValueError(f"numbers of the slots: expected contiguous int32, got {self.slots.dtype}")

    def numbers(self) -> Tensor:
        """[B]"""
        return self.slots + self.plus if self.plus else self.slots


Count = int | PerSlot  # one number for every slot, or one of its own for each


def added(one: Count, other: Count) -> Count:
    """Their sum, without a kernel: so at most one of the two may be numbers of the slots."""
    if isinstance(one, PerSlot):
        if isinstance(other, PerSlot):
            raise ValueError("two numbers of each slot cannot be added on the host: make one of them a number for all")
        return PerSlot(one.slots, one.plus + other)
    return PerSlot(other.slots, other.plus + one) if isinstance(other, PerSlot) else one + other


def column(count: Count, device: torch.device) -> Tensor:
    """The number as [1, 1] or the numbers as [B, 1]."""
    if isinstance(count, PerSlot):
        return count.numbers()[:, None]
    return torch.full((1, 1), count, dtype=torch.int32, device=device)


@dataclass(frozen=True, eq=False)
class Rows:
    """`count` rows of each slot from the row `start` on: the window of rows that the last layer is finished for."""

    start: Count
    count: int

    def of(self, x: Tensor) -> Tensor:
        """Those rows of x [B, T, E], [B, count, E]: a view where all slots start at one row, else a copy."""
        if not isinstance(self.start, PerSlot):
            return x[:, self.start : self.start + self.count]
        places = self.start.numbers()[:, None] + torch.arange(self.count, dtype=torch.int32, device=x.device)
        return x.gather(1, places.long()[..., None].expand(-1, -1, x.shape[2]))

    def narrowed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """A view of x, and the row [B] of it at which each slot's window starts; None: all start at its first."""
        if not isinstance(self.start, PerSlot):
            return self.of(x), None
        return x[:, self.start.plus :], self.start.slots
