"""head_norm on a CPU: torch's norm over the last dimension."""

from __future__ import annotations

from rmt_kernels.cpu_linear import plan_norm
from rmt_kernels.head_norm import HeadNorm, heads_of
from rmt_kernels.weights import Norm


def plan(norm: Norm) -> HeadNorm:
    normalize = plan_norm(norm)
    return lambda x: normalize(heads_of(x, norm)).flatten(-2)
