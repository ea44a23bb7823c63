"""Logits of the rows that somebody asked for."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rmt_kernels.dispatch import implementation
from rmt_kernels.weights import Linear, Norm

LMHead = Callable[[Tensor], Tensor]


def plan(linear: Linear, norm: Norm | None, *, backend: str) -> LMHead:
    """-> f(hidden [B, R, E]) -> logits [B, R, V] in fp32: the backbone's final norm, then the head."""
    return implementation("lm_head", backend).plan(linear, norm)
