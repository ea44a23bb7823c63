"""read_memory and write_memory on a CPU; the same sums as ref.py, in the model's dtype."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from rmt_kernels.cpu_linear import plan_norm
from rmt_kernels.memory import Embed, Embeddings, Frame, ReadMemory, WriteMemory
from rmt_kernels.memory.ref import entries, gathered
from rmt_kernels.per_slot import Count, PerSlot, Rows, column
from rmt_kernels.weights import Norm


def _plan_finish(embeddings: Embeddings) -> Callable[[Tensor, Count], Tensor]:
    positions, normalize = embeddings.positions, plan_norm(embeddings.norm)
    if embeddings.token_type is not None:  # the same for every row: folded into the positions once
        assert positions is not None
        positions = positions + embeddings.token_type

    def finish(hidden: Tensor, position: Count) -> Tensor:
        if positions is None:
            return normalize(hidden)
        if isinstance(position, PerSlot):
            hidden += positions[column(position, hidden.device) + torch.arange(hidden.shape[1])]
        else:
            hidden += positions[position : position + hidden.shape[1]]
        return normalize(hidden)

    return finish


def _whole(ids: Tensor, memory: Tensor, tokens: Tensor, frame: Frame, rows: int) -> Tensor:
    """Slots of one length: rows are copied side by side, which is faster than one by one."""
    batch, text = ids.shape
    row_ids = ids.new_zeros(batch, rows)
    row_ids[:, len(frame.before) : len(frame.before) + text] = ids
    around = ((frame.before, 0), (frame.after, len(frame.before) + text))
    for part, start in around:
        for place, entry in _ids(part):
            row_ids[:, start + place] = entry
    hidden = F.embedding(row_ids, tokens)
    for part, start in around:
        for place, first, count in _runs(part):
            hidden[:, start + place : start + place + count] = memory[:, first : first + count]
    return hidden


@lru_cache
def _ids(part: tuple[int, ...]) -> list[tuple[int, int]]:
    """Token ids: (place, id)."""
    return [(place, entry) for place, entry in enumerate(part) if entry >= 0]


@lru_cache
def _runs(part: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Rows of memory that stand together: (place, first row of the memory, how many)."""
    runs: list[tuple[int, int, int]] = []
    for place, entry in enumerate(part):
        if entry >= 0:
            continue
        if runs and (sum(runs[-1][::2]), sum(runs[-1][1:])) == (place, ~entry):
            at, first, count = runs.pop()
            runs.append((at, first, count + 1))
        else:
            runs.append((place, ~entry, 1))
    return runs


def plan_read(embeddings: Embeddings) -> ReadMemory:
    finish = _plan_finish(embeddings)

    def read(ids: Tensor, memory: Tensor, frame: Frame, rows: int, lengths: Tensor | None = None) -> Tensor:
        frame.check(ids, memory, rows, lengths)
        if lengths is None:
            return finish(_whole(ids, memory, embeddings.tokens, frame, rows), 0)
        return finish(gathered(entries(ids, frame, rows, lengths), memory, embeddings.tokens), 0)

    return read


def plan_embed(embeddings: Embeddings) -> Embed:
    finish = _plan_finish(embeddings)
    return lambda ids, position: finish(F.embedding(ids, embeddings.tokens), position)


def plan_write(norm: Norm | None) -> WriteMemory:
    normalize = plan_norm(norm)

    def write(hidden: Tensor, rows: Rows | None = None, out: Tensor | None = None) -> Tensor:
        chosen = hidden if rows is None else rows.of(hidden)
        # without a norm the rows are a view of the hidden states: the state must outlive them
        state = normalize(chosen) if norm is not None else chosen
        return out.copy_(state) if out is not None else state if norm is not None else state.clone()

    return write
