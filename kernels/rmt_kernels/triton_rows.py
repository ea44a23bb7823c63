"""Norms of rows on Triton: one program holds one row. Also the helpers that every Triton op launches with."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmt_kernels.configs import WIDEST_ROW, row_warps
from rmt_kernels.per_slot import Count, PerSlot, Rows
from rmt_kernels.weights import Norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Said at every launch: a default that changes between Triton versions would change bits.
NUMERICS = {"enable_fp_fusion": True}
# Numbers that change from call to call: where one became 1 or a multiple of 16, Triton would compile anew.
COUNTS = ["rows", "slot_rows", "query_rows", "text", "ids_slot", "position", "length", "start", "past", "room", "parts"]


def on(device: torch.device) -> AbstractContextManager[object]:
    """Launches go to the current device: make it the tensors' own."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def as_slots(x: Tensor) -> Tensor:
    """x [..., K] as [B, T, K] with K contiguous, a view where one exists. Without T each row is a slot of its own."""
    slots = x.unsqueeze(-2) if x.dim() == 2 else x
    slots = slots if slots.dim() == 3 else slots.reshape(-1, *slots.shape[-2:])
    return slots if slots.stride(-1) == 1 or slots.shape[-1] == 1 else slots.contiguous()


def parts_of(count: Count) -> tuple[Tensor | None, int]:
    """What a kernel adds up: numbers of the slots [B], or None, and a number."""
    return (count.slots, count.plus) if isinstance(count, PerSlot) else (None, count)


def check_dtype(op: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{op}: expected float32, bfloat16 or float16, got {tensor.dtype}")


@triton.jit
def normalize(x, m_e, p_weight, p_bias, o_e, eps, E: tl.constexpr, NORM: tl.constexpr):
    """LayerNorm or RMSNorm of one row x [BE] in fp32; lanes outside of m_e are zero before and anything after."""
    if NORM != "none":
        if NORM == "layer":
            x = tl.where(m_e, x - tl.sum(x, 0) / E, 0.0)
        x = x * tl.rsqrt(tl.sum(x * x, 0) / E + eps)
        x = x * tl.load(p_weight + o_e, mask=m_e, other=0.0).to(tl.float32)
        if p_bias is not None:
            x += tl.load(p_bias + o_e, mask=m_e, other=0.0).to(tl.float32)
    return x


@triton.jit(do_not_specialize=COUNTS)
def norm_rows_kernel(
    p_x,  # [B, T, E]
    p_weight,  # [E]
    p_bias,  # [E]
    p_out,  # [B·T, E]
    p_starts,  # [B] int32: first row of each slot's window, or None
    slot_rows,  # T, or those of the window
    x_slot,
    x_row,
    eps,
    E: tl.constexpr,
    NORM: tl.constexpr,
    BE: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64)
    o_e = tl.arange(0, BE)
    m_e = o_e < E
    i_b = i_r // slot_rows
    i_t = i_r % slot_rows
    if p_starts is not None:
        i_t += tl.load(p_starts + i_b)
    p_row = p_x + i_b * x_slot + i_t * x_row
    x = tl.load(p_row + o_e, mask=m_e, other=0.0).to(tl.float32)
    x = normalize(x, m_e, p_weight, p_bias, o_e, eps, E, NORM)
    tl.store(p_out + i_r * E + o_e, x.to(p_out.dtype.element_ty), mask=m_e)


class RowNorm:
    """What a kernel needs to know of a norm, or of none: arguments that every kernel with `normalize` takes."""

    def __init__(self, norm: Norm | None, width: int):
        if width > WIDEST_ROW:
            raise ValueError(f"backend 'triton' normalizes rows of at most {WIDEST_ROW} elements; got {width}")
        self.kind = "none" if norm is None else norm.kind
        self.eps = 0.0 if norm is None else norm.eps
        self.weight = None if norm is None else norm.weight.contiguous()
        self.bias = None if norm is None or norm.bias is None else norm.bias.contiguous()
        self.block = triton.next_power_of_2(width)
        self.options = {"num_warps": row_warps(width), **NUMERICS}


class NormRows:
    """f(x [..., E], rows=None, out=None) -> [..., E], contiguous: the norm of every row, or of a window of them."""

    def __init__(self, norm: Norm):
        self.width = norm.weight.shape[0]
        self.plan = RowNorm(norm, self.width)

    def __call__(self, hidden: Tensor, rows: Rows | None = None, out: Tensor | None = None) -> Tensor:
        x = hidden
        check_dtype("norm", x)
        plan, shape = self.plan, x.shape if rows is None else (x.shape[0], rows.count, self.width)
        narrowed, starts = (x, None) if rows is None else rows.narrowed(x)
        slots = as_slots(narrowed)
        slot_rows = slots.shape[1] if rows is None else rows.count
        out = torch.empty(shape, dtype=x.dtype, device=x.device) if out is None else checked_out(out, shape, x.dtype)
        with on(x.device):
            norm_rows_kernel[(slots.shape[0] * slot_rows,)](
                slots,
                plan.weight,
                plan.bias,
                out,
                starts,
                slot_rows,
                slots.stride(0),
                slots.stride(1),
                plan.eps,
                E=self.width,
                NORM=plan.kind,
                BE=plan.block,
                **plan.options,
            )
        return out


def checked_out(out: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`out` itself, which a kernel fills row by row."""
    if tuple(out.shape) != tuple(shape) or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous {list(shape)} in {dtype}, got {list(out.shape)} in {out.dtype}")
    return out


def plan_norm(norm: Norm) -> NormRows:
    return NormRows(norm)
