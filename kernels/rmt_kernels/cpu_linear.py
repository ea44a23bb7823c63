"""A linear layer packed for oneDNN, the floor under every CPU op that multiplies by weights."""

from __future__ import annotations

import torch
from torch import Tensor

from rmt_kernels.weights import Linear

FUSED = {"none": ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}
ROW_MULTIPLE = 16  # fewer rows would take another GEMM path and give other bits


def _pack(weight: Tensor) -> Tensor:
    # torch before 2.12 packs an opaque oneDNN tensor, later versions a plain one.
    plain = torch._C._dispatch_has_kernel_for_dispatch_key("mkldnn::_reorder_linear_weight", "CPU")
    return torch.ops.mkldnn._reorder_linear_weight(weight if plain else weight.to_mkldnn())


class PackedLinear:
    """f(x [..., K]) = act(x Wᵀ + b) [..., N], or x Wᵀ + b + residual."""

    def __init__(self, layer: Linear, activation: str = "none"):
        self.out_features = layer.weight.shape[0]
        self.bias = layer.bias
        self.attr, self.algorithm = FUSED[activation]
        with torch.no_grad():  # packed tensors cannot be made in inference mode
            self.weight = _pack(layer.weight.detach().contiguous())

    def __call__(self, x: Tensor) -> Tensor:
        rows, count = padded_rows(x)
        y = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, self.attr, [], self.algorithm)
        return y[:count].view(*x.shape[:-1], self.out_features)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        rows, count = padded_rows(x)
        other, _ = padded_rows(residual)
        y = torch.ops.mkldnn._linear_pointwise.binary(rows, other, self.weight, self.bias, "add")
        return y[:count].view(*x.shape[:-1], self.out_features)


def padded_rows(x: Tensor) -> tuple[Tensor, int]:
    """x [..., K] as [R, K] with R a multiple of 16, and the number of true rows."""
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    missing = -count % ROW_MULTIPLE
    return (torch.cat([rows, rows.new_zeros(missing, rows.shape[1])]) if missing else rows), count
