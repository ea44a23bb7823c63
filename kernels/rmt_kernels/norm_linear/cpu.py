"""norm_linear on oneDNN: weights packed once, bias and activation in the GEMM's epilogue."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rmt_kernels.cpu_linear import FUSED, PackedLinear
from rmt_kernels.weights import Activation, Linear, Norm


def plan_norm(norm: Norm | None) -> Callable[[Tensor], Tensor]:
    if norm is None:
        return lambda x: x
    shape, weight, bias, eps = norm.weight.shape, norm.weight, norm.bias, norm.eps
    if norm.kind == "layer":
        return lambda x: F.layer_norm(x, shape, weight, bias, eps)
    return lambda x: F.rms_norm(x, shape, weight, eps)


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def plan(layer: Linear, norm: Norm | None, activation: Activation) -> Callable[[Tensor], Tensor]:
    normalize = plan_norm(norm)
    if activation in FUSED:
        packed = PackedLinear(layer, activation)
        return lambda x: packed(normalize(x))
    packed = PackedLinear(layer, "none")
    functions: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": _swiglu, "silu": F.silu, "tanh": torch.tanh}
    apply = functions[activation]
    return lambda x: apply(packed(normalize(x)))
