"""A linear layer packed for oneDNN, the floor under every CPU op that multiplies by weights."""

from __future__ import annotations

import torch
from torch import Tensor

from rmt_kernels.weights import Linear

# activation -> oneDNN's name and algorithm. In the GEMM's epilogue an element's bits do not depend on where it stands;
# torch's own silu and tanh take another path for the last few elements of a tensor.
FUSED = {
    "none": ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
    "tanh": ("tanh", ""),
}
ROW_MULTIPLE = 16  # fewer rows would take another GEMM path and give other bits


def _pack(weight: Tensor) -> Tensor:
    # torch before 2.12 packs an opaque oneDNN tensor, later versions a plain one.
    plain = torch._C._dispatch_has_kernel_for_dispatch_key("mkldnn::_reorder_linear_weight", "CPU")
    return torch.ops.mkldnn._reorder_linear_weight(weight if plain else weight.to_mkldnn())


class PackedLinear:
    """f(x [..., K]) = act(x Wᵀ + b) [..., N]; without an activation also x Wᵀ + b + other, and (x Wᵀ + b) · other."""

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

    def add(self, x: Tensor, other: Tensor) -> Tensor:
        return self._binary(x, other, "add")

    def multiply(self, x: Tensor, other: Tensor) -> Tensor:
        return self._binary(x, other, "mul")

    def _binary(self, x: Tensor, other: Tensor, operation: str) -> Tensor:
        rows, count = padded_rows(x)
        others, _ = padded_rows(other)
        y = torch.ops.mkldnn._linear_pointwise.binary(rows, others, self.weight, self.bias, operation)
        return y[:count].view(*x.shape[:-1], self.out_features)


def padded_rows(x: Tensor) -> tuple[Tensor, int]:
    """x [..., K] as [R, K] with R a multiple of 16, and the number of true rows."""
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    missing = -count % ROW_MULTIPLE
    return (torch.cat([rows, rows.new_zeros(missing, rows.shape[1])]) if missing else rows), count
