"""head_norm on Triton: one program normalizes one head of one row."""

from __future__ import annotations

from rmt_kernels.head_norm import HeadNorm, heads_of
from rmt_kernels.triton_rows import plan_norm
from rmt_kernels.weights import Norm


def plan(norm: Norm) -> HeadNorm:
    normalize = plan_norm(norm)
    return lambda x: normalize(heads_of(x, norm)).flatten(-2)
