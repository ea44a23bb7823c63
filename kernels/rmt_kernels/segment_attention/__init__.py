"""Attention inside one segment: causal or bidirectional, grouped heads, rotary positions, a window of query rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rmt_kernels.checks import dims
from rmt_kernels.dispatch import implementation


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
    """Keys and values of one layer inside one segment. keys, values [B, H_kv, P, D]; `length` rows are filled."""

    keys: Tensor
    values: Tensor
    length: int = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Puts k, v [B, H_kv, R, D] behind what is there; returns all filled rows."""
        end = self.length + k.shape[2]
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class SegmentAttention(Protocol):
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, length: int, start: int = 0, cache: KVCache | None = None
    ) -> Tensor:
        """q [B, R, H·D] of the rows start … start+R-1; k, v [B, T, H_kv·D] of all rows -> [B, R, H·D].

        Only the first `length` rows of k and v are real. With a cache the rows stand behind the `cache.length` rows
        already in it, and the real keys and values are appended to it.
        """


def plan(spec: AttentionSpec, *, backend: str) -> SegmentAttention:
    """-> f(q, k, v, length=…, start=0, cache=None); see `SegmentAttention`."""
    return implementation("segment_attention", backend).plan(spec)
