"""linear_residual on Triton: bias and residual in the GEMM's epilogue.

Where one slot's tiles do not fill the card, programs share the inputs of a tile (split-K); their parts are then added
in a fixed order by the kernel that also does BERT's LayerNorm.
"""

from __future__ import annotations

from rmt_kernels.linear_residual import LinearResidual
from rmt_kernels.triton_linear import TritonLinear
from rmt_kernels.triton_rows import RowNorm
from rmt_kernels.weights import Linear, Norm


def plan(layer: Linear, post_norm: Norm | None) -> LinearResidual:
    linear, post = TritonLinear(layer), RowNorm(post_norm, layer.weight.shape[0])
    return lambda x, residual, rows=None: linear.add(x, residual, post, rows)
