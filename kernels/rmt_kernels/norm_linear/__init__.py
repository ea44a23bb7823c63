"""act(norm(x) Wᵀ + b): the QKV projection and the first half of an MLP."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rmt_kernels.dispatch import implementation
from rmt_kernels.weights import Activation, Linear, Norm

NormLinear = Callable[[Tensor], Tensor]
# f(hidden [B, T, E], (start, end)) -> q of those rows [B, end-start, ·], k and v of all rows [B, T, ·]
QKV = Callable[[Tensor, tuple[int, int]], tuple[Tensor, Tensor, Tensor]]


def plan(linear: Linear, norm: Norm | None = None, activation: Activation = "none", *, backend: str) -> NormLinear:
    """-> f(x [..., K]) = act(norm(x) Wᵀ + b) [..., N]; `swiglu` gives silu(gate)·up [..., N / 2]. Same dtype out."""
    return implementation("norm_linear", backend).plan(linear, norm, activation)


def stack(*layers: Linear) -> Linear:
    """Several linears of one input as one, their outputs side by side."""
    biases = [layer.bias for layer in layers]
    bias = torch.cat([b for b in biases if b is not None]) if biases[0] is not None else None
    return Linear(torch.cat([layer.weight for layer in layers]), bias)


def plan_qkv(q: Linear, k: Linear, v: Linear, norm: Norm | None, *, queries_apart: bool, backend: str) -> QKV:
    """The three projections in one GEMM, or, with `queries_apart`, queries only for the rows that are asked for."""
    widths = [layer.weight.shape[0] for layer in (q, k, v)]
    if queries_apart:
        query = plan(q, norm, backend=backend)
        key_value = plan(stack(k, v), norm, backend=backend)

        def project_apart(hidden: Tensor, rows: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
            keys, values = key_value(hidden).split(widths[1:], dim=-1)
            return query(hidden[:, rows[0] : rows[1]]), keys, values

        return project_apart

    together = plan(stack(q, k, v), norm, backend=backend)

    def project(hidden: Tensor, rows: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, values = together(hidden).split(widths, dim=-1)
        return queries[:, rows[0] : rows[1]], keys, values

    return project
