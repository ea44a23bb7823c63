"""linear_residual on oneDNN: the residual is added in the GEMM's epilogue."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rmt_kernels.cpu_linear import PackedLinear
from rmt_kernels.norm_linear.cpu import plan_norm
from rmt_kernels.weights import Linear, Norm


def plan(layer: Linear, post_norm: Norm | None) -> Callable[[Tensor, Tensor], Tensor]:
    packed = PackedLinear(layer)
    if post_norm is None:
        return packed.add
    normalize = plan_norm(post_norm)
    return lambda x, residual: normalize(packed.add(x, residual))
