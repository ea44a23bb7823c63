"""residual + x Wᵀ + b, and BERT's LayerNorm after it: the attention's output projection and the MLP's second half."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rmt_kernels.dispatch import implementation
from rmt_kernels.weights import Linear, Norm

LinearResidual = Callable[[Tensor, Tensor], Tensor]


def plan(linear: Linear, post_norm: Norm | None = None, *, backend: str) -> LinearResidual:
    """-> f(x [..., K], residual [..., N]) = norm(residual + x Wᵀ + b) [..., N]. Same dtype out."""
    return implementation("linear_residual", backend).plan(linear, post_norm)
