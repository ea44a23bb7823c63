"""residual + x Wᵀ + b, and BERT's LayerNorm after it: the attention's output projection and the MLP's second half."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from rmt_kernels.dispatch import implementation
from rmt_kernels.per_slot import Rows
from rmt_kernels.weights import Linear, Norm


class LinearResidual(Protocol):
    def __call__(self, x: Tensor, residual: Tensor, rows: Rows | None = None) -> Tensor:
        """norm(residual + x Wᵀ + b): x [..., K], residual [..., N] -> [..., N].

        With rows, x [B, R, K] is added to that window of the residual [B, T, N] -> [B, R, N].
        """


def plan(linear: Linear, post_norm: Norm | None = None, *, backend: str) -> LinearResidual:
    """-> f(x, residual, rows=None); see `LinearResidual`. Same dtype out."""
    return implementation("linear_residual", backend).plan(linear, post_norm)
