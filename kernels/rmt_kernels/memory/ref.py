"""The fp32 statement of read_memory and write_memory."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from rmt_kernels.memory import Embed, Embeddings, Frame, ReadMemory, WriteMemory
from rmt_kernels.norm_linear.ref import normalize
from rmt_kernels.per_slot import Count, PerSlot, Rows, column
from rmt_kernels.weights import Norm


def _finish(hidden: Tensor, embeddings: Embeddings, position: Count) -> Tensor:
    if embeddings.positions is not None:
        places = column(position, hidden.device) + torch.arange(hidden.shape[1], device=hidden.device)
        hidden = hidden + embeddings.positions[places].float()
    if embeddings.token_type is not None:
        hidden = hidden + embeddings.token_type.float()
    return normalize(hidden, embeddings.norm).to(embeddings.tokens.dtype)


def entries(ids: Tensor, frame: Frame, rows: int, lengths: Tensor | None) -> Tensor:
    """What stands in each row [B, rows]: a token id, or ~m for row m of the memory state; 0 behind the segment."""
    text, first, count = ids.shape[1], len(frame.before), len(frame.before) + len(frame.after)
    place = torch.arange(rows, device=ids.device) - first  # in the text
    length = column(text if lengths is None else PerSlot(lengths), ids.device)
    written = ids.gather(1, place.clamp(0, text - 1).expand(len(ids), -1))
    around = torch.where(place < 0, place + first, first + place - length)
    inside = (place < 0) | ((place >= length) & (place < length + len(frame.after)))
    framed = table_of(frame, ids.device)[torch.where(inside, around, count)]
    return torch.where((place >= 0) & (place < length), written, framed)


@cache  # never dropped: captured graphs hold its address
def table_of(frame: Frame, device: torch.device) -> Tensor:
    """The frame's entries and a 0 behind them, int64 on the device: made once, as a captured graph may not."""
    return torch.tensor((*frame.before, *frame.after, 0), dtype=torch.int64, device=device)


def gathered(entry: Tensor, memory: Tensor, tokens: Tensor) -> Tensor:
    """entries [B, T] -> rows [B, T, E] of the token embeddings and of the memory state."""
    of_memory = (~entry).clamp(min=0)[..., None].expand(-1, -1, memory.shape[2])
    return torch.where((entry < 0)[..., None], memory.gather(1, of_memory), F.embedding(entry.clamp(min=0), tokens))


def plan_read(embeddings: Embeddings) -> ReadMemory:
    def read(ids: Tensor, memory: Tensor, frame: Frame, rows: int, lengths: Tensor | None = None) -> Tensor:
        frame.check(ids, memory, rows, lengths)
        hidden = gathered(entries(ids, frame, rows, lengths), memory, embeddings.tokens)
        return _finish(hidden.float(), embeddings, 0)

    return read


def plan_embed(embeddings: Embeddings) -> Embed:
    return lambda ids, position: _finish(F.embedding(ids, embeddings.tokens).float(), embeddings, position)


def plan_write(norm: Norm | None) -> WriteMemory:
    def write(hidden: Tensor, rows: Rows | None = None, out: Tensor | None = None) -> Tensor:
        chosen = hidden if rows is None else rows.of(hidden)
        state = normalize(chosen, norm).to(hidden.dtype, copy=True)  # never a view of the rows
        return state if out is None else out.copy_(state)

    return write
