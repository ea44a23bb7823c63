"""The fp32 statement of read_memory and write_memory."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from rmt_kernels.memory import Embeddings, ReadMemory, WriteMemory
from rmt_kernels.norm_linear.ref import normalize
from rmt_kernels.weights import Norm


def _finish(hidden: Tensor, embeddings: Embeddings, position: int) -> Tensor:
    if embeddings.positions is not None:
        hidden = hidden + embeddings.positions[position : position + hidden.shape[1]].float()
    if embeddings.token_type is not None:
        hidden = hidden + embeddings.token_type.float()
    return normalize(hidden, embeddings.norm).to(embeddings.tokens.dtype)


def plan_read(embeddings: Embeddings) -> ReadMemory:
    def read(row_ids: Tensor, memory: Tensor, offsets: tuple[int, ...]) -> Tensor:
        hidden = F.embedding(row_ids, embeddings.tokens).float()
        for offset in offsets:
            hidden[:, offset : offset + memory.shape[1]] = memory.float()
        return _finish(hidden, embeddings, 0)

    return read


def plan_embed(embeddings: Embeddings) -> Callable[[Tensor, int], Tensor]:
    return lambda ids, position: _finish(F.embedding(ids, embeddings.tokens).float(), embeddings, position)


def plan_write(norm: Norm | None) -> WriteMemory:
    return lambda hidden: normalize(hidden, norm).to(hidden.dtype, copy=True)  # never a view of the rows
