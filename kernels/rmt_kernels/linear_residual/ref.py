"""The fp32 statement of linear_residual."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rmt_kernels.norm_linear.ref import linear, normalize
from rmt_kernels.weights import Linear, Norm


def plan(layer: Linear, post_norm: Norm | None) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, residual: normalize(residual.float() + linear(x.float(), layer), post_norm).to(x.dtype)
