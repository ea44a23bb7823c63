"""The fp32 statement of lm_head."""

from __future__ import annotations

from rmt_kernels.lm_head import LMHead
from rmt_kernels.norm_linear.ref import linear, normalize
from rmt_kernels.weights import Linear, Norm


def plan(layer: Linear, norm: Norm | None) -> LMHead:
    return lambda hidden: linear(normalize(hidden, norm), layer)
