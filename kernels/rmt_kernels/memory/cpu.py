"""read_memory and write_memory on a CPU; the same sums as ref.py, in the model's dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from rmt_kernels.memory import Embeddings, ReadMemory, WriteMemory
from rmt_kernels.norm_linear.cpu import plan_norm
from rmt_kernels.weights import Norm


def _plan_finish(embeddings: Embeddings) -> Callable[[Tensor, int], Tensor]:
    positions, normalize = embeddings.positions, plan_norm(embeddings.norm)
    if embeddings.token_type is not None:  # the same for every row: folded into the positions once
        assert positions is not None
        positions = positions + embeddings.token_type

    def finish(hidden: Tensor, position: int) -> Tensor:
        if positions is not None:
            hidden += positions[position : position + hidden.shape[1]]
        return normalize(hidden)

    return finish


def plan_read(embeddings: Embeddings) -> ReadMemory:
    finish = _plan_finish(embeddings)

    def read(row_ids: Tensor, memory: Tensor, offsets: tuple[int, ...]) -> Tensor:
        hidden = F.embedding(row_ids, embeddings.tokens)
        for offset in offsets:
            hidden[:, offset : offset + memory.shape[1]] = memory
        return finish(hidden, 0)

    return read


def plan_embed(embeddings: Embeddings) -> Callable[[Tensor, int], Tensor]:
    finish = _plan_finish(embeddings)
    return lambda ids, position: finish(F.embedding(ids, embeddings.tokens), position)


def plan_write(norm: Norm | None) -> WriteMemory:
    normalize = plan_norm(norm)
    # without a norm the rows are a view of the hidden states: the state must outlive them
    return (lambda hidden: hidden.clone()) if norm is None else normalize
