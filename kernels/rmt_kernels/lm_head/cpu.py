"""lm_head on oneDNN. The weight is the tied embedding where there is one, so it is not packed: no second copy."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rmt_kernels.cpu_linear import padded_rows
from rmt_kernels.lm_head import LMHead
from rmt_kernels.norm_linear.cpu import plan_norm
from rmt_kernels.weights import Linear, Norm


def plan(layer: Linear, norm: Norm | None) -> LMHead:
    normalize = plan_norm(norm)

    def logits(hidden: Tensor) -> Tensor:
        rows, count = padded_rows(normalize(hidden))
        y = F.linear(rows, layer.weight, layer.bias)[:count].float()
        return y.view(*hidden.shape[:-1], layer.weight.shape[0])

    return logits
