"""segment_attention on Triton: softmax in one pass over the keys, the scores never leave the multiprocessor.

A program holds a block of packed query rows: the heads that share keys stand side by side, so that a decoded row of
grouped heads is one matrix product. Tiles above the diagonal are never visited. A few query rows over many keys share
them among programs, KEYS_APART each, and the parts are joined in their order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmt_kernels.checks import dims
from rmt_kernels.configs import KEYS_APART, AttentionConfig, arch_of, attention_config, few
from rmt_kernels.per_slot import Count, added
from rmt_kernels.segment_attention import AttentionSpec, KVCache, SegmentAttention
from rmt_kernels.triton_rows import COUNTS, NUMERICS, as_slots, check_dtype, on, parts_of

# what is rotated inside the attention kernel
NOTHING, QUERIES, QUERIES_AND_KEYS = 0, 1, 2


@triton.jit
def load_tile(p_tile, m_0, m_1, MASK_0: tl.constexpr, MASK_1: tl.constexpr):
    if MASK_0 and MASK_1:
        tile = tl.load(p_tile, mask=m_0 & m_1, other=0.0)
    elif MASK_0:
        tile = tl.load(p_tile, mask=m_0, other=0.0)
    elif MASK_1:
        tile = tl.load(p_tile, mask=m_1, other=0.0)
    else:
        tile = tl.load(p_tile)
    return tile


@triton.jit
def attend_tile(
    acc,  # [BQ, BD] fp32
    maximum,  # [BQ] of the scaled scores so far
    weight,  # [BQ] sum of the exponentials so far
    q,  # [BQ, BD], or its first half with rotary positions
    q_second,
    p_k,
    p_v,
    p_cos,
    p_sin,
    key,  # first key of the tile
    end,  # first key that does not exist
    o_position,  # [BQ] of the query rows
    k_row,
    v_row,
    table_row,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    BKV: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROTATED: tl.constexpr,
    APART: tl.constexpr,
    MASKED: tl.constexpr,
):
    o_k = key + tl.arange(0, BKV)
    m_k = o_k < end
    if ROTATED == 0:
        o_d = tl.arange(0, BD)
        p_tile = p_k + o_d[:, None] + (o_k * k_row)[None, :]
        k = load_tile(p_tile, m_k[None, :], (o_d < D)[:, None], MASKED, D != BD)
        scores = tl.dot(q, k, input_precision="ieee")
    else:
        HALF: tl.constexpr = D // 2
        PAD: tl.constexpr = HALF != BD // 2
        o_d = tl.arange(0, BD // 2)
        m_d = (o_d < HALF)[:, None]
        p_tile = p_k + o_d[:, None] + (o_k * k_row)[None, :]
        k = load_tile(p_tile, m_k[None, :], m_d, MASKED, PAD)
        k_second = load_tile(p_tile + HALF, m_k[None, :], m_d, MASKED, PAD)
        if ROTATED == 2:
            o_table = o_d[:, None] + (o_k * table_row)[None, :]
            cos = load_tile(p_cos + o_table, m_k[None, :], m_d, MASKED, PAD)
            sin = load_tile(p_sin + o_table, m_k[None, :], m_d, MASKED, PAD)
            first = k * cos - k_second * sin
            k_second = (k_second * cos + k * sin).to(q.dtype)
            k = first.to(q.dtype)
        scores = tl.dot(q, k, input_precision="ieee")
        scores = tl.dot(q_second, k_second, scores, input_precision="ieee")
    scores = scores * scale
    if MASKED:
        if CAUSAL:
            scores = tl.where(m_k[None, :] & (o_k[None, :] <= o_position[:, None]), scores, float("-inf"))
        else:
            scores = tl.where(m_k[None, :], scores, float("-inf"))
    higher = tl.maximum(maximum, tl.max(scores, 1))
    # apart, the keys of this program may all lie behind a row
    base = tl.where(higher == float("-inf"), 0.0, higher) if APART else higher
    p = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(maximum - base)
    weight = weight * shrink + tl.sum(p, 1)
    o_d = tl.arange(0, BD)
    v = load_tile(p_v + (o_k * v_row)[:, None] + o_d[None, :], m_k[:, None], (o_d < D)[None, :], MASKED, D != BD)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, higher, weight


@triton.jit(do_not_specialize=COUNTS)
def attention_kernel(
    p_q,  # [B, R, H·D]
    p_k,  # rows of D at slot, row and head strides
    p_v,
    p_cos,  # [P, D] fp32, its halves alike
    p_sin,
    p_out,  # [B, R, H·D]; apart: [parts, B, R, H, D] fp32
    p_maximum,  # apart: [parts, B, R, H] fp32
    p_weight,
    p_lengths,  # [B] int32, or None: added to `length`
    p_starts,  # [B] int32, or None: added to `start`
    query_rows,  # R
    length,  # keys
    start,  # position of the first query row
    q_slot,
    q_row,
    k_slot,
    k_row,
    k_head,
    v_slot,
    v_row,
    v_head,
    table_row,
    scale,  # times log2(e)
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROTATED: tl.constexpr,
    APART: tl.constexpr,  # keys of one part, or 0
    BQ: tl.constexpr,
    BKV: tl.constexpr,
):
    HEADS: tl.constexpr = KV_HEADS * GROUPS
    i_q = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    i_b = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    i_head = tl.program_id(1) % KV_HEADS
    i_part = tl.program_id(2)

    o_packed = i_q * BQ + tl.arange(0, BQ)
    o_r = o_packed // GROUPS
    o_head = i_head * GROUPS + o_packed % GROUPS
    m_r = o_r < query_rows
    if p_lengths is not None:
        length += tl.load(p_lengths + i_b)
    if p_starts is not None:
        start += tl.load(p_starts + i_b)
    o_position = start + o_r
    p_rows = p_q + i_b * q_slot + (o_r * q_row + o_head * D)[:, None]
    p_k += i_b * k_slot + i_head * k_head
    p_v += i_b * v_slot + i_head * v_head
    if ROTATED == 0:
        o_d = tl.arange(0, BD)
        q = load_tile(p_rows + o_d[None, :], m_r[:, None], (o_d < D)[None, :], True, D != BD)
        q_second = q
    else:
        HALF: tl.constexpr = D // 2
        PAD: tl.constexpr = HALF != BD // 2
        o_d = tl.arange(0, BD // 2)
        m_d = (o_d < HALF)[None, :]
        first = load_tile(p_rows + o_d[None, :], m_r[:, None], m_d, True, PAD)
        second = load_tile(p_rows + HALF + o_d[None, :], m_r[:, None], m_d, True, PAD)
        o_table = (o_position * table_row)[:, None] + o_d[None, :]
        cos = load_tile(p_cos + o_table, m_r[:, None], m_d, True, PAD)
        sin = load_tile(p_sin + o_table, m_r[:, None], m_d, True, PAD)
        q = (first * cos - second * sin).to(first.dtype)
        q_second = (second * cos + first * sin).to(first.dtype)

    key, end, clear = 0, length, length
    if CAUSAL:
        end = tl.minimum(length, start + (i_q * BQ + BQ - 1) // GROUPS + 1)
        clear = tl.minimum(length, start + i_q * BQ // GROUPS + 1)
    if APART:
        key = i_part * APART
        end = tl.minimum(end, key + APART)
        clear = tl.maximum(tl.minimum(clear, end), key)
    clear = clear // BKV * BKV  # below, every row of the block sees every key

    acc = tl.zeros([BQ, BD], dtype=tl.float32)
    maximum = tl.full([BQ], float("-inf"), dtype=tl.float32)
    weight = tl.zeros([BQ], dtype=tl.float32)
    for i in range(key, clear, BKV):
        acc, maximum, weight = attend_tile(
            acc, maximum, weight, q, q_second, p_k, p_v, p_cos, p_sin, i, length, o_position, k_row, v_row, table_row,
            scale, D, BD, BKV, CAUSAL, ROTATED, APART, False,
        )  # fmt: skip
    for i in range(clear, end, BKV):
        acc, maximum, weight = attend_tile(
            acc, maximum, weight, q, q_second, p_k, p_v, p_cos, p_sin, i, length, o_position, k_row, v_row, table_row,
            scale, D, BD, BKV, CAUSAL, ROTATED, APART, True,
        )  # fmt: skip

    o_d = tl.arange(0, BD)
    o_out = (i_b * query_rows + o_r) * HEADS + o_head
    if APART:
        o_out += i_part.to(tl.int64) * (tl.num_programs(1) // KV_HEADS) * query_rows * HEADS
        tl.store(p_maximum + o_out, maximum, mask=m_r)
        tl.store(p_weight + o_out, weight, mask=m_r)
    else:
        acc = acc / weight[:, None]
    p_tile = p_out + (o_out * D)[:, None] + o_d[None, :]
    tl.store(p_tile, acc.to(p_out.dtype.element_ty), mask=m_r[:, None] & (o_d < D)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def join_kernel(
    p_parts,  # [parts, rows, D] fp32
    p_maximum,  # [parts, rows] fp32
    p_weight,
    p_out,  # [rows, D]
    parts,
    rows,  # B·R·H
    D: tl.constexpr,
    BD: tl.constexpr,
):
    """One head of one query row from the parts that saw its keys, in their order."""
    i_r = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    maximum = tl.load(p_maximum + i_r)
    for i in range(1, parts):
        maximum = tl.maximum(maximum, tl.load(p_maximum + i * rows + i_r))
    acc = tl.zeros([BD], dtype=tl.float32)
    weight = 0.0
    for i in range(parts):
        share = tl.exp2(tl.load(p_maximum + i * rows + i_r) - maximum)
        weight += share * tl.load(p_weight + i * rows + i_r)
        acc += share * tl.load(p_parts + (i * rows + i_r) * D + o_d, mask=o_d < D, other=0.0)
    tl.store(p_out + i_r * D + o_d, (acc / weight).to(p_out.dtype.element_ty), mask=o_d < D)


@triton.jit(do_not_specialize=COUNTS)
def append_kernel(
    p_k,  # [B, R, H_kv·D]
    p_v,
    p_cos,  # [P, D] fp32
    p_sin,
    p_keys,  # [B, H_kv, P, D]
    p_values,
    p_lengths,  # [B] int32, or None: added to `rows`
    p_pasts,  # [B] int32, or None: added to `past`
    rows,  # how many are real
    past,
    room,  # P
    k_slot,
    k_row,
    v_slot,
    v_row,
    cache_slot,
    cache_head,
    table_row,
    D: tl.constexpr,
    BD: tl.constexpr,
    ROTATED: tl.constexpr,
    BR: tl.constexpr,
):
    """Rows of keys, rotated, and of values to their places in a cache."""
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    i_head = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    o_d = tl.arange(0, BD)
    if p_lengths is not None:
        rows += tl.load(p_lengths + i_b)
    if p_pasts is not None:
        past += tl.load(p_pasts + i_b)
    m_tile = ((o_r < rows) & (past + o_r < room))[:, None] & (o_d < D)[None, :]
    p_row = p_k + i_b * k_slot + (o_r * k_row + i_head * D)[:, None]
    k = tl.load(p_row + o_d[None, :], mask=m_tile, other=0.0)
    if ROTATED:
        HALF: tl.constexpr = D // 2
        m_first = o_d < HALF
        o_other = tl.where(m_first, o_d + HALF, o_d - HALF)
        other = tl.load(p_row + o_other[None, :], mask=m_tile, other=0.0)
        o_table = ((past + o_r) * table_row)[:, None] + o_d[None, :]
        cos = tl.load(p_cos + o_table, mask=m_tile, other=0.0)
        sin = tl.load(p_sin + o_table, mask=m_tile, other=0.0)
        k = (k * cos + tl.where(m_first[None, :], -other, other) * sin).to(k.dtype)
    v = tl.load(p_v + i_b * v_slot + (o_r * v_row + i_head * D)[:, None] + o_d[None, :], mask=m_tile, other=0.0)
    o_cache = i_b * cache_slot + i_head * cache_head + ((past + o_r) * D)[:, None] + o_d[None, :]
    tl.store(p_keys + o_cache, k, mask=m_tile)
    tl.store(p_values + o_cache, v, mask=m_tile)


APPEND_ROWS = 16


class TritonAttention:
    """See `SegmentAttention`."""

    def __init__(self, spec: AttentionSpec):
        if spec.rope is not None and spec.head_dim % 2:
            raise ValueError(f"head_dim={spec.head_dim} is odd: rotary positions turn pairs of elements")
        self.spec = spec
        self.groups = spec.heads // spec.kv_heads
        self.block_d = max(triton.next_power_of_2(spec.head_dim), 16 if spec.rope is None else 32)
        self.cos: Tensor | None = None if spec.rope is None else spec.rope[0].float()
        self.sin: Tensor | None = None if spec.rope is None else spec.rope[1].float()
        self.table_row = 0 if self.cos is None else self.cos.stride(0)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, length: Count, start: Count = 0, cache: KVCache | None = None
    ) -> Tensor:
        spec = self.spec
        check_dtype("attention", q)
        q, k, v = (as_slots(part) for part in (q, k, v))
        bound = dims("q", q, "B R E", E=spec.heads * spec.head_dim)
        bound = dims("k", k, "B T K", B=bound["B"], K=spec.kv_heads * spec.head_dim)
        dims("v", v, "B T K", **bound)
        past: Count = 0 if cache is None else cache.length
        self._check(q.shape[1], k.shape[1], length, start, past)
        first = added(past, start)
        with on(q.device):
            if cache is None:
                rotated = NOTHING if spec.rope is None else QUERIES_AND_KEYS
                k_strides = k.stride(0), k.stride(1), spec.head_dim
                v_strides = v.stride(0), v.stride(1), spec.head_dim
                return self._attend(q, k, v, k_strides, v_strides, k.shape[1], length, first, rotated)
            self._append(k, v, length, cache)
            strides = cache.keys.stride(0), cache.keys.stride(2), cache.keys.stride(1)
            rotated = NOTHING if spec.rope is None else QUERIES
            keys, values = cache.keys, cache.values
            return self._attend(q, keys, values, strides, strides, keys.shape[2], cache.length, first, rotated)

    def _check(self, query_rows: int, key_rows: int, length: Count, start: Count, past: Count) -> None:
        """What can be checked without waiting for the device."""
        if isinstance(length, int) and not 1 <= length <= key_rows:
            raise ValueError(f"attention: length={length}: expected 1..{key_rows}, the rows of k")
        if self.cos is None or not (isinstance(length, int) and isinstance(start, int) and isinstance(past, int)):
            return
        last = past + max(start + query_rows, length)
        if last > self.cos.shape[0]:
            raise ValueError(f"attention: row {last - 1} has no rotary position; there are {self.cos.shape[0]}")

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_strides: tuple[int, int, int],
        v_strides: tuple[int, int, int],
        key_rows: int,
        length: Count,
        start: Count,
        rotated: int,
    ) -> Tensor:
        spec = self.spec
        batch, rows, _ = q.shape
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        packed = rows * self.groups
        config = attention_config(arch_of(q.device), q.dtype, packed, self.block_d, spec.causal)
        keys = length if isinstance(length, int) else key_rows  # more than a slot has are parts without a weight
        apart = KEYS_APART if few(packed) and keys > KEYS_APART else 0
        parts = triton.cdiv(keys, apart) if apart else 1
        lengths, length = parts_of(length)
        starts, start = parts_of(start)
        target, maximum, weight = out, None, None
        if apart:
            target = q.new_empty((parts, *q.shape), dtype=torch.float32)
            maximum = q.new_empty((parts, batch, rows, spec.heads), dtype=torch.float32)
            weight = torch.empty_like(maximum)
        attention_kernel[(triton.cdiv(packed, config.block_q), batch * spec.kv_heads, parts)](
            q,
            k,
            v,
            self.cos,
            self.sin,
            target,
            maximum,
            weight,
            lengths,
            starts,
            rows,
            length,
            start,
            q.stride(0),
            q.stride(1),
            *k_strides,
            *v_strides,
            self.table_row,
            spec.scale * math.log2(math.e),
            KV_HEADS=spec.kv_heads,
            GROUPS=self.groups,
            D=spec.head_dim,
            BD=self.block_d,
            CAUSAL=spec.causal,
            ROTATED=rotated,
            APART=apart,
            **options(config),
        )
        if apart:
            count = batch * rows * spec.heads
            join_kernel[(count,)](
                target, maximum, weight, out, parts, count, D=spec.head_dim, BD=self.block_d, num_warps=1, **NUMERICS
            )
        return out

    def _append(self, k: Tensor, v: Tensor, length: Count, cache: KVCache) -> None:
        batch = k.shape[0]
        shape = dims("cache keys", cache.keys, "B H P D", B=batch, H=self.spec.kv_heads, D=self.spec.head_dim)
        dims("cache values", cache.values, "B H P D", **shape)
        if isinstance(length, int) and isinstance(cache.length, int) and cache.length + length > shape["P"]:
            raise ValueError(f"the KV cache has room for {shape['P']} rows; got {cache.length} + {length}")
        assert cache.keys.is_contiguous() and cache.values.is_contiguous()
        most = length if isinstance(length, int) else k.shape[1]
        lengths, rows = parts_of(length)
        pasts, past = parts_of(cache.length)
        append_kernel[(triton.cdiv(most, APPEND_ROWS), self.spec.kv_heads, batch)](
            k,
            v,
            self.cos,
            self.sin,
            cache.keys,
            cache.values,
            lengths,
            pasts,
            rows,
            past,
            shape["P"],
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            cache.keys.stride(0),
            cache.keys.stride(1),
            self.table_row,
            D=self.spec.head_dim,
            BD=self.block_d,
            ROTATED=self.spec.rope is not None,
            BR=APPEND_ROWS,
            num_warps=4,
            **NUMERICS,
        )
        cache.grow(length)


def options(config: AttentionConfig) -> dict[str, Any]:
    return {
        "BQ": config.block_q,
        "BKV": config.block_kv,
        "num_warps": config.warps,
        "num_stages": config.stages,
        **NUMERICS,
    }


def plan(spec: AttentionSpec) -> SegmentAttention:
    return TritonAttention(spec)
