"""Attention inside one segment: causal or bidirectional, grouped heads, rotary positions, a window of query rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rmt_kernels.checks import dims
from rmt_kernels.dispatch import implementation
from rmt_kernels.per_slot import Count, PerSlot, added, column


@dataclass(frozen=True)
class AttentionSpec:
    """heads H, kv_heads H_kv, head_dim D; scale multiplies q·k; rope: (cos, sin) [P, D] of every position, or None."""

    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    scale: float
    rope: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        if self.rope is not None:
            bound = dims("rope cos", self.rope[0], "P D", D=self.head_dim)
            dims("rope sin", self.rope[1], "P D", **bound)


@dataclass
class KVCache:
    """Keys and values of one layer inside one segment. keys, values [B, H_kv, P, D]; `length` rows are filled.

    A length of numbers on the device stays that tensor, with what was appended since in its `plus`: a captured decode
    step adds to the tensor, and is replayed.
    """

    keys: Tensor
    values: Tensor
    length: Count = 0

    def append(self, k: Tensor, v: Tensor, length: Count) -> None:
        """Puts the first `length` rows of k, v [B, H_kv, R, D] behind what is there."""
        if isinstance(self.length, PerSlot) or isinstance(length, PerSlot):
            self._append_per_slot(k, v, length)
        else:
            end = self.length + length
            self.keys[:, :, self.length : end] = k[:, :, :length]
            self.values[:, :, self.length : end] = v[:, :, :length]
        self.grow(length)

    def _append_per_slot(self, k: Tensor, v: Tensor, length: Count) -> None:
        place = torch.arange(self.keys.shape[2], device=k.device) - column(self.length, k.device)  # in k and v
        new = ((place >= 0) & (place < column(length, k.device)))[:, None, :, None]
        index = place.clamp(0, k.shape[2] - 1).long()[:, None, :, None].expand(*self.keys.shape)
        for table, rows in ((self.keys, k), (self.values, v)):
            table.copy_(torch.where(new, rows.gather(2, index).to(table.dtype), table))

    def grow(self, length: Count) -> None:
        """What a backend says that put the rows there itself."""
        self.length = added(self.length, length)


class SegmentAttention(Protocol):
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, length: Count, start: Count = 0, cache: KVCache | None = None
    ) -> Tensor:
        """q [B, R, H·D] of the rows start … start+R-1; k, v [B, T, H_kv·D] of all rows -> [B, R, H·D].

        Only the first `length` rows of k and v are real. With a cache the rows stand behind the `cache.length` rows
        already in it, and the real keys and values are appended to it. Each of the three is one number, or one for
        each slot (`PerSlot`): 1 ≤ length ≤ T then is the caller's word, and so is room in the cache.
        """


def plan(spec: AttentionSpec, *, backend: str) -> SegmentAttention:
    """-> f(q, k, v, length=…, start=0, cache=None); see `SegmentAttention`."""
    return implementation("segment_attention", backend).plan(spec)
