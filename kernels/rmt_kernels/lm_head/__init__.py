"""Logits of the rows that somebody asked for, and log-probabilities of given tokens without holding the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from rmt_kernels.dispatch import implementation
from rmt_kernels.weights import Linear, Norm

LMHead = Callable[[Tensor], Tensor]


class LogProbabilities(Protocol):
    def __call__(self, hidden: Tensor, targets: Tensor, lengths: Tensor | None = None) -> Tensor:
        """hidden [B, R, E], targets int64 [B, R] -> log-probability of each target, fp32 [B, R].

        A target of -1 asks for nothing and gives 0, and so does one behind its slot's length (int32 [B]; None: R).
        """


def plan(linear: Linear, norm: Norm | None, *, backend: str) -> LMHead:
    """-> f(hidden [B, R, E]) -> logits [B, R, V] in fp32: the backbone's final norm, then the head."""
    return implementation("lm_head", backend).plan(linear, norm)


def plan_nll(linear: Linear, norm: Norm | None, *, backend: str) -> LogProbabilities:
    """-> f(hidden, targets, lengths=None), minus the NLL; see `LogProbabilities`.

    `ref` holds the logits [B, R, V], `cpu` a tile of them, `triton` none.
    """
    return implementation("lm_head", backend).plan_nll(linear, norm)
