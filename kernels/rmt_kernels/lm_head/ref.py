"""The fp32 statement of lm_head."""

from __future__ import annotations

import torch
from torch import Tensor

from rmt_kernels.lm_head import LMHead, LogProbabilities
from rmt_kernels.norm_linear.ref import linear, normalize
from rmt_kernels.weights import Linear, Norm


def plan(layer: Linear, norm: Norm | None) -> LMHead:
    return lambda hidden: linear(normalize(hidden, norm), layer)


def plan_nll(layer: Linear, norm: Norm | None) -> LogProbabilities:
    logits_of = plan(layer, norm)

    def log_probabilities(hidden: Tensor, targets: Tensor, lengths: Tensor | None = None) -> Tensor:
        targets = asked(targets, lengths)
        every = logits_of(hidden).log_softmax(-1)
        chosen = every.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        return chosen.masked_fill(targets < 0, 0.0)

    return log_probabilities


def asked(targets: Tensor, lengths: Tensor | None) -> Tensor:
    """targets [B, R] with -1 behind each slot's length."""
    if lengths is None:
        return targets
    return targets.masked_fill(torch.arange(targets.shape[1], device=targets.device) >= lengths[:, None], -1)
