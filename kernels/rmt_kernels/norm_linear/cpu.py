"""norm_linear on a CPU: weights packed once; norm, bias and activation done where the product is."""

from __future__ import annotations

from torch import Tensor

from rmt_kernels.cpu_linear import plan_linear, plan_norm
from rmt_kernels.norm_linear import NormLinear
from rmt_kernels.per_slot import Rows
from rmt_kernels.weights import Activation, Linear, Norm


def _halves(layer: Linear) -> tuple[Linear, Linear]:
    """The gate and the up projection of a stacked pair."""
    (gate, up), biases = layer.weight.chunk(2), (None, None) if layer.bias is None else layer.bias.chunk(2)
    return Linear(gate, biases[0]), Linear(up, biases[1])


def plan(layer: Linear, norm: Norm | None, activation: Activation) -> NormLinear:
    if activation != "swiglu":
        linear = plan_linear(layer, activation, norm)
        return lambda x, rows=None: linear(x if rows is None else rows.of(x))
    gate_layer, up_layer = _halves(layer)
    normalize, gate, up = plan_norm(norm), plan_linear(gate_layer, "silu"), plan_linear(up_layer)

    def swiglu(x: Tensor, rows: Rows | None = None) -> Tensor:
        x = normalize(x if rows is None else rows.of(x))
        return up.multiply(x, gate(x))

    return swiglu
