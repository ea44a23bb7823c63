"""The fp32 statement of linear_residual."""

from __future__ import annotations

from torch import Tensor

from rmt_kernels.linear_residual import LinearResidual
from rmt_kernels.norm_linear.ref import linear, normalize
from rmt_kernels.per_slot import Rows
from rmt_kernels.weights import Linear, Norm


def plan(layer: Linear, post_norm: Norm | None) -> LinearResidual:
    def linear_residual(x: Tensor, residual: Tensor, rows: Rows | None = None) -> Tensor:
        chosen = residual if rows is None else rows.of(residual)
        return normalize(chosen.float() + linear(x.float(), layer), post_norm).to(x.dtype)

    return linear_residual
