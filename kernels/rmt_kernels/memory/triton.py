"""read_memory and write_memory on Triton: one program gathers, sums and normalizes one row."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmt_kernels.memory import Embeddings, ReadMemory, WriteMemory
from rmt_kernels.triton_rows import RowNorm, as_slots, check_dtype, normalize, on, plan_norm
from rmt_kernels.weights import Norm

NOWHERE = 1 << 30  # a row that no segment has


@triton.jit
def read_kernel(
    p_ids,  # [B, T] int64
    p_memory,  # [B, M, E]
    p_tokens,  # [V, E]
    p_positions,  # [P, E]
    p_type,  # [E]
    p_weight,  # [E], of the norm
    p_bias,  # [E], of the norm
    p_out,  # [B, T, E]
    rows,  # T
    ids_slot,
    memory_rows,  # M
    memory_slot,
    memory_row,
    offset,
    second_offset,
    position,
    eps,
    E: tl.constexpr,
    MEMORY: tl.constexpr,
    POSITIONS: tl.constexpr,
    TYPE: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    BE: tl.constexpr,
):
    i_t = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    o_e = tl.arange(0, BE)
    m_e = o_e < E
    token = tl.load(p_ids + i_b * ids_slot + i_t)
    p_row = p_tokens + token * E
    if MEMORY:
        row = tl.where(i_t >= second_offset, i_t - second_offset, i_t - offset)
        if (row >= 0) & (row < memory_rows):
            p_row = p_memory + i_b * memory_slot + row * memory_row
    x = tl.load(p_row + o_e, mask=m_e, other=0.0).to(tl.float32)
    if POSITIONS:
        x += tl.load(p_positions + (position + i_t) * E + o_e, mask=m_e, other=0.0).to(tl.float32)
    if TYPE:
        x += tl.load(p_type + o_e, mask=m_e, other=0.0).to(tl.float32)
    x = normalize(x, m_e, p_weight, p_bias, o_e, eps, E, NORM, BIAS)
    tl.store(p_out + (i_b * rows + i_t) * E + o_e, x.to(p_out.dtype.element_ty), mask=m_e)


class Reader:
    """Launches `read_kernel` over one set of embeddings."""

    def __init__(self, embeddings: Embeddings):
        check_dtype("token embeddings", embeddings.tokens)
        self.tokens = embeddings.tokens.contiguous()
        self.positions = None if embeddings.positions is None else embeddings.positions.contiguous()
        self.token_type = None if embeddings.token_type is None else embeddings.token_type.contiguous()
        self.norm = RowNorm(embeddings.norm, self.tokens.shape[1])

    def __call__(self, ids: Tensor, position: int, memory: Tensor | None, offsets: tuple[int, ...]) -> Tensor:
        batch, rows = ids.shape
        width = self.tokens.shape[1]
        if self.positions is not None and position + rows > self.positions.shape[0]:
            raise ValueError(
                f"read_memory: expected at most {self.positions.shape[0]} positions, got {position} + {rows} rows"
            )
        if len(offsets) > 2:
            raise ValueError(f"read_memory: backend 'triton' places the memory at most twice, got offsets {offsets}")
        first, second = (*sorted(offsets), NOWHERE, NOWHERE)[:2]
        ids = ids if ids.stride(1) == 1 else ids.contiguous()
        state = None if memory is None or not offsets or not memory.shape[1] else as_slots(memory.to(self.tokens.dtype))
        out = torch.empty((batch, rows, width), dtype=self.tokens.dtype, device=ids.device)
        with on(ids.device):
            read_kernel[(rows, batch)](
                ids,
                state,
                self.tokens,
                self.positions,
                self.token_type,
                self.norm.weight,
                self.norm.bias,
                out,
                rows,
                ids.stride(0),
                0 if state is None else state.shape[1],
                0 if state is None else state.stride(0),
                0 if state is None else state.stride(1),
                first,
                second,
                position,
                self.norm.eps,
                E=width,
                MEMORY=state is not None,
                POSITIONS=self.positions is not None,
                TYPE=self.token_type is not None,
                NORM=self.norm.kind,
                BIAS=self.norm.bias is not None,
                BE=self.norm.block,
                **self.norm.options,
            )
        return out


def plan_read(embeddings: Embeddings) -> ReadMemory:
    reader = Reader(embeddings)
    return lambda row_ids, memory, offsets: reader(row_ids, 0, memory, offsets)


def plan_embed(embeddings: Embeddings) -> Callable[[Tensor, int], Tensor]:
    reader = Reader(embeddings)
    return lambda ids, position: reader(ids, position, None, ())


def plan_write(norm: Norm | None) -> WriteMemory:
    # without a norm the rows are a view of the hidden states: the state must outlive them
    return plan_norm(norm) if norm is not None else lambda hidden: hidden.clone(memory_format=torch.contiguous_format)
