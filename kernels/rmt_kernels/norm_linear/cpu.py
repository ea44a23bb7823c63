"""norm_linear on oneDNN: weights packed once, bias and activation in the GEMM's epilogue."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from rmt_kernels.cpu_linear import PackedLinear
from rmt_kernels.norm_linear import NormLinear
from rmt_kernels.per_slot import Rows
from rmt_kernels.weights import Activation, Linear, Norm


def plan_norm(norm: Norm | None) -> Callable[[Tensor], Tensor]:
    if norm is None:
        return lambda x: x
    shape, weight, bias, eps = norm.weight.shape, norm.weight, norm.bias, norm.eps
    if norm.kind == "layer":
        return lambda x: F.layer_norm(x, shape, weight, bias, eps)
    return lambda x: F.rms_norm(x, shape, weight, eps)


def _halves(layer: Linear) -> tuple[Linear, Linear]:
    """The gate and the up projection of a stacked pair."""
    (gate, up), biases = layer.weight.chunk(2), (None, None) if layer.bias is None else layer.bias.chunk(2)
    return Linear(gate, biases[0]), Linear(up, biases[1])


def plan(layer: Linear, norm: Norm | None, activation: Activation) -> NormLinear:
    normalize = plan_norm(norm)
    if activation != "swiglu":
        packed = PackedLinear(layer, activation)
        return lambda x, rows=None: packed(normalize(x if rows is None else rows.of(x)))
    gate_layer, up_layer = _halves(layer)
    gate, up = PackedLinear(gate_layer, "silu"), PackedLinear(up_layer)

    def swiglu(x: Tensor, rows: Rows | None = None) -> Tensor:
        x = normalize(x if rows is None else rows.of(x))
        return up.multiply(x, gate(x))

    return swiglu
