"""act(norm(x) Wᵀ + b): the QKV projection and the first half of an MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from rmt_kernels.dispatch import implementation
from rmt_kernels.per_slot import Rows
from rmt_kernels.weights import Activation, Linear, Norm

# f(hidden [B, T, E], rows) -> q of those rows [B, R, ·], k and v of all rows [B, T, ·]
QKV = Callable[[Tensor, Rows], tuple[Tensor, Tensor, Tensor]]


class NormLinear(Protocol):
    def __call__(self, x: Tensor, rows: Rows | None = None) -> Tensor:
        """act(norm(x) Wᵀ + b): x [..., K] -> [..., N]. With rows, of that window of x [B, T, K] -> [B, R, N]."""


def plan(linear: Linear, norm: Norm | None = None, activation: Activation = "none", *, backend: str) -> NormLinear:
    """-> f(x, rows=None); see `NormLinear`. `swiglu` gives silu(gate)·up [..., N / 2]. Same dtype out."""
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

        def project_apart(hidden: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
            keys, values = key_value(hidden).split(widths[1:], dim=-1)
            return query(hidden, rows), keys, values

        return project_apart

    together = plan(stack(q, k, v), norm, backend=backend)

    def project(hidden: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, values = together(hidden).split(widths, dim=-1)
        return rows.of(queries), keys, values

    return project
