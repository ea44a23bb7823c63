"""The norm of every head's queries or keys (Qwen3), before rotary positions."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rmt_kernels.dispatch import implementation
from rmt_kernels.weights import Norm

HeadNorm = Callable[[Tensor], Tensor]


def plan(norm: Norm, *, backend: str) -> HeadNorm:
    """-> f(x [B, R, H·D]) = norm of each head's D elements [B, R, H·D]; D is the norm's width. Same dtype out."""
    return implementation("head_norm", backend).plan(norm)


def heads_of(x: Tensor, norm: Norm) -> Tensor:
    """x [B, R, H·D] as [B, R, H, D], a view. Raises ValueError when the rows are no whole number of heads."""
    width = norm.weight.shape[0]
    if x.dim() != 3 or x.shape[-1] % width:
        raise ValueError(f"head_norm: expected [B, R, H·{width}], got {list(x.shape)}")
    return x.unflatten(-1, (-1, width))
