"""The fp32 statement of norm_linear."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rmt_kernels.norm_linear import NormLinear
from rmt_kernels.per_slot import Rows
from rmt_kernels.weights import Activation, Linear, Norm


def normalize(x: Tensor, norm: Norm | None) -> Tensor:
    """LayerNorm or RMSNorm of x [..., E] in fp32; x itself without one."""
    x = x.float()
    if norm is None:
        return x
    if norm.kind == "layer":
        bias = None if norm.bias is None else norm.bias.float()
        return F.layer_norm(x, x.shape[-1:], norm.weight.float(), bias, norm.eps)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.float()


def activate(x: Tensor, activation: Activation) -> Tensor:
    if activation == "swiglu":
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "none": lambda y: y,
        "gelu": F.gelu,
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
        "relu": F.relu,
        "silu": F.silu,
        "tanh": torch.tanh,
    }
    return functions[activation](x)


def linear(x: Tensor, layer: Linear) -> Tensor:
    return F.linear(x, layer.weight.float(), None if layer.bias is None else layer.bias.float())


def plan(layer: Linear, norm: Norm | None, activation: Activation) -> NormLinear:
    def norm_linear(x: Tensor, rows: Rows | None = None) -> Tensor:
        chosen = x if rows is None else rows.of(x)
        return activate(linear(normalize(chosen, norm), layer), activation).to(x.dtype)

    return norm_linear
