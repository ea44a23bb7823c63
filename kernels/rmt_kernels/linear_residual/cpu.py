"""linear_residual on oneDNN: the residual is added in the GEMM's epilogue."""

from __future__ import annotations

from torch import Tensor

from rmt_kernels.cpu_linear import PackedLinear
from rmt_kernels.linear_residual import LinearResidual
from rmt_kernels.norm_linear.cpu import plan_norm
from rmt_kernels.per_slot import Rows
from rmt_kernels.weights import Linear, Norm


def plan(layer: Linear, post_norm: Norm | None) -> LinearResidual:
    packed, normalize = PackedLinear(layer), plan_norm(post_norm)

    def linear_residual(x: Tensor, residual: Tensor, rows: Rows | None = None) -> Tensor:
        return normalize(packed.add(x, residual if rows is None else rows.of(residual)))

    return linear_residual
