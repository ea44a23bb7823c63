"""linear_residual on a CPU: the residual is added where the product is."""

from __future__ import annotations

from torch import Tensor

from rmt_kernels.cpu_linear import plan_linear, plan_norm
from rmt_kernels.linear_residual import LinearResidual
from rmt_kernels.per_slot import Rows
from rmt_kernels.weights import Linear, Norm


def plan(layer: Linear, post_norm: Norm | None) -> LinearResidual:
    product, normalize = plan_linear(layer), plan_norm(post_norm)

    def linear_residual(x: Tensor, residual: Tensor, rows: Rows | None = None) -> Tensor:
        return normalize(product.add(x, residual if rows is None else rows.of(residual)))

    return linear_residual
