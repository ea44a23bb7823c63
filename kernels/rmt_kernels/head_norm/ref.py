"""The fp32 statement of head_norm."""

from __future__ import annotations

from rmt_kernels.head_norm import HeadNorm, heads_of
from rmt_kernels.norm_linear.ref import normalize
from rmt_kernels.weights import Norm


def plan(norm: Norm) -> HeadNorm:
    return lambda x: normalize(heads_of(x, norm), norm).flatten(-2).to(x.dtype)
