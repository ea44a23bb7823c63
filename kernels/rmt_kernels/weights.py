"""The weights an op is planned with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rmt_kernels.checks import dims

Activation = Literal["none", "gelu", "gelu_tanh", "relu", "silu", "tanh", "swiglu"]


@dataclass(frozen=True)
class Linear:
    """y = x Wᵀ + b. weight [N, K], bias [N] or None. For `swiglu` the rows are gate then up, N = 2·F."""

    weight: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        bound = dims("weight", self.weight, "N K")
        if self.bias is not None:
            dims("bias", self.bias, "N", N=bound["N"])


@dataclass(frozen=True)
class Norm:
    """LayerNorm (bias may be None) or RMSNorm over the last dimension. weight [E]."""

    kind: Literal["layer", "rms"]
    weight: Tensor
    bias: Tensor | None
    eps: float

    def __post_init__(self) -> None:
        bound = dims("norm weight", self.weight, "E")
        if self.bias is not None:
            dims("norm bias", self.bias, "E", E=bound["E"])
