"""read_memory and write_memory on Triton: one program finds, sums and normalizes one row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmt_kernels.memory import Embed, Embeddings, Frame, ReadMemory, WriteMemory
from rmt_kernels.memory.ref import table_of
from rmt_kernels.per_slot import Count, PerSlot, Rows
from rmt_kernels.triton_rows import COUNTS, NormRows, RowNorm, as_slots, check_dtype, normalize, on, parts_of
from rmt_kernels.weights import Norm


@triton.jit(do_not_specialize=COUNTS)
def read_kernel(
    p_ids,  # [B, L] int64
    p_lengths,  # [B] int32, or None: L
    p_memory,  # [B, M, E]
    p_frame,  # [BEFORE + AFTER] int64, or None: text alone
    p_tokens,  # [V, E]
    p_positions,  # [P, E]
    p_places,  # [B] int32: first positions, or None
    p_type,  # [E]
    p_weight,  # [E], of the norm
    p_bias,  # [E], of the norm
    p_out,  # [B, T, E]
    rows,  # T
    text,  # L
    ids_slot,
    memory_slot,
    memory_row,
    before,
    after,
    position,
    eps,
    E: tl.constexpr,
    NORM: tl.constexpr,
    BE: tl.constexpr,
):
    i_t = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    o_e = tl.arange(0, BE)
    m_e = o_e < E
    if p_lengths is not None:
        text = tl.load(p_lengths + i_b)
    place = i_t - before  # in the text
    entry = tl.load(p_ids + i_b * ids_slot + place, mask=(place >= 0) & (place < text), other=0)
    p_row = p_tokens + entry * E
    if p_frame is not None:
        around = tl.where(place < 0, i_t, before + place - text)
        inside = (place < 0) | ((place >= text) & (place < text + after))
        entry = tl.load(p_frame + around, mask=inside, other=0)
        if entry > 0:
            p_row = p_tokens + entry * E
        if entry < 0:
            p_row = p_memory + i_b * memory_slot + (-1 - entry) * memory_row
    x = tl.load(p_row + o_e, mask=m_e, other=0.0).to(tl.float32)
    if p_positions is not None:
        if p_places is not None:
            position += tl.load(p_places + i_b)
        x += tl.load(p_positions + (position + i_t) * E + o_e, mask=m_e, other=0.0).to(tl.float32)
    if p_type is not None:
        x += tl.load(p_type + o_e, mask=m_e, other=0.0).to(tl.float32)
    x = normalize(x, m_e, p_weight, p_bias, o_e, eps, E, NORM)
    tl.store(p_out + (i_b * rows + i_t) * E + o_e, x.to(p_out.dtype.element_ty), mask=m_e)


class Reader:
    """Launches `read_kernel` over one set of embeddings."""

    def __init__(self, embeddings: Embeddings):
        check_dtype("token embeddings", embeddings.tokens)
        self.tokens = embeddings.tokens.contiguous()
        self.positions = None if embeddings.positions is None else embeddings.positions.contiguous()
        self.token_type = None if embeddings.token_type is None else embeddings.token_type.contiguous()
        self.norm = RowNorm(embeddings.norm, self.tokens.shape[1])

    def read(self, ids: Tensor, memory: Tensor, frame: Frame, rows: int, lengths: Tensor | None = None) -> Tensor:
        """See `ReadMemory`."""
        frame.check(ids, memory, rows, lengths)
        if not (frame.before or frame.after):
            return self._launch(ids, rows, lengths, None, None, 0, 0, 0)
        state, table = as_slots(memory.to(self.tokens.dtype)), table_of(frame, ids.device)
        return self._launch(ids, rows, lengths, state, table, len(frame.before), len(frame.after), 0)

    def embed(self, ids: Tensor, position: Count) -> Tensor:
        """See `Embed`."""
        return self._launch(ids, ids.shape[1], None, None, None, 0, 0, position)

    def _launch(
        self,
        ids: Tensor,
        rows: int,
        lengths: Tensor | None,
        state: Tensor | None,
        table: Tensor | None,
        before: int,
        after: int,
        position: Count,
    ) -> Tensor:
        batch, text = ids.shape
        width = self.tokens.shape[1]
        if self.positions is not None:
            first = 0 if isinstance(position, PerSlot) else position
            if first + rows > self.positions.shape[0]:
                raise ValueError(
                    f"read_memory: expected at most {self.positions.shape[0]} positions, got {first} + {rows} rows"
                )
        ids = ids if ids.stride(1) == 1 else ids.contiguous()
        places, position = parts_of(position)
        out = torch.empty((batch, rows, width), dtype=self.tokens.dtype, device=ids.device)
        with on(ids.device):
            read_kernel[(rows, batch)](
                ids,
                lengths,
                state,
                table,
                self.tokens,
                self.positions,
                places,
                self.token_type,
                self.norm.weight,
                self.norm.bias,
                out,
                rows,
                text,
                ids.stride(0),
                0 if state is None else state.stride(0),
                0 if state is None else state.stride(1),
                before,
                after,
                position,
                self.norm.eps,
                E=width,
                NORM=self.norm.kind,
                BE=self.norm.block,
                **self.norm.options,
            )
        return out


def plan_read(embeddings: Embeddings) -> ReadMemory:
    return Reader(embeddings).read


def plan_embed(embeddings: Embeddings) -> Embed:
    return Reader(embeddings).embed


def plan_write(norm: Norm | None) -> WriteMemory:
    if norm is not None:
        return NormRows(norm)

    def write(hidden: Tensor, rows: Rows | None = None, out: Tensor | None = None) -> Tensor:
        chosen = hidden if rows is None else rows.of(hidden)
        # a view of the hidden states: the state must outlive them
        return out.copy_(chosen) if out is not None else chosen.clone(memory_format=torch.contiguous_format)

    return write
