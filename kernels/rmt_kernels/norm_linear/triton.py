"""norm_linear on Triton: one GEMM; the norm is folded into its weights, bias and activation into its epilogue."""

from __future__ import annotations

from rmt_kernels.norm_linear import NormLinear
from rmt_kernels.triton_linear import TritonLinear
from rmt_kernels.weights import Activation, Linear, Norm


def plan(layer: Linear, norm: Norm | None, activation: Activation) -> NormLinear:
    return TritonLinear(layer, norm, activation)
