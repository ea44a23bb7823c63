"""lm_head on oneDNN. The weight is the tied embedding where there is one, so it is not packed: no second copy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rmt_kernels.cpu_linear import padded_rows, plan_norm, product
from rmt_kernels.lm_head import LMHead, LogProbabilities
from rmt_kernels.lm_head.ref import asked
from rmt_kernels.weights import Linear, Norm

# `plan_nll` holds this many logits at a time: 1 MiB in fp32, and as much again for their exponentials. Every GEMM has
# this very number of rows: with AMX a bf16 row's bits depend on how many rows there are, multiples of 16 or not.
TILE_ROWS, TILE_COLUMNS = 128, 2048


def plan(layer: Linear, norm: Norm | None) -> LMHead:
    normalize = plan_norm(norm)

    def logits(hidden: Tensor) -> Tensor:
        rows, count = padded_rows(normalize(hidden))
        return product(rows, layer)[:count].view(*hidden.shape[:-1], layer.weight.shape[0])

    return logits


def plan_nll(layer: Linear, norm: Norm | None) -> LogProbabilities:
    normalize = plan_norm(norm)
    biases = [None] * layer.weight.shape[0] if layer.bias is None else layer.bias.split(TILE_COLUMNS)
    tiles = [Linear(*pair) for pair in zip(layer.weight.split(TILE_COLUMNS), biases, strict=False)]

    def log_probabilities(hidden: Tensor, targets: Tensor, lengths: Tensor | None = None) -> Tensor:
        targets = asked(targets, lengths)
        missing = -targets.numel() % TILE_ROWS
        rows = F.pad(normalize(hidden).flatten(0, 1), (0, 0, 0, missing))
        flat = F.pad(targets.flatten(), (0, missing), value=-1)
        parts = [_of_rows(tiles, *pair) for pair in zip(rows.split(TILE_ROWS), flat.split(TILE_ROWS), strict=True)]
        return torch.cat(parts)[: targets.numel()].view(targets.shape)

    return log_probabilities


def _of_rows(tiles: list[Linear], rows: Tensor, targets: Tensor) -> Tensor:
    """rows [R, E], targets [R] -> log-probabilities [R], from the log-sum-exp of each tile of the vocabulary."""
    sums, chosen = [], rows.new_zeros(len(rows), dtype=torch.float32)
    for index, tile in enumerate(tiles):
        logits = product(rows, tile)  # [R, tile]
        place = targets - index * TILE_COLUMNS
        inside = (place >= 0) & (place < logits.shape[1])
        found = logits.gather(1, place.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        chosen = torch.where(inside, found, chosen)
        sums.append(logits.logsumexp(1))
    # Side by side, not on top of each other: torch's order of a sum down columns depends on how many columns there are.
    return (chosen - torch.stack(sums, 1).logsumexp(1)).masked_fill(targets < 0, 0.0)
