"""segment_attention on torch's fused CPU attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rmt_kernels.per_slot import Count, PerSlot
from rmt_kernels.segment_attention import AttentionSpec, KVCache, SegmentAttention
from rmt_kernels.segment_attention.ref import heads, rotate

MASKS_KEPT = 64  # tails and answers vary in length: the table must not grow with the stream


class CausalMasks:
    """Additive masks [R, keys] of queries that start at a position; made once a shape."""

    def __init__(self) -> None:
        self.table: dict[tuple[int, int, int, torch.dtype], Tensor] = {}

    def __call__(self, start: int, rows: int, keys: int, dtype: torch.dtype) -> Tensor:
        key = (start, rows, keys, dtype)
        mask = self.table.get(key)
        if mask is None:
            if len(self.table) >= MASKS_KEPT:
                self.table.clear()
            mask = self.table[key] = torch.full((rows, keys), float("-inf"), dtype=dtype).triu_(start + 1)
        return mask  # not looked up again: another thread may have cleared the table


def one_by_one(
    attend: SegmentAttention, q: Tensor, k: Tensor, v: Tensor, length: Count, start: Count, cache: KVCache | None
) -> Tensor:
    """Slots with numbers of their own: each as it would be attended alone."""
    batch = len(q)
    lengths, starts = numbers(length, batch), numbers(start, batch)
    pasts = numbers(0 if cache is None else cache.length, batch)
    out = torch.empty_like(q)
    for b in range(batch):
        slot = slice(b, b + 1)
        own = None if cache is None else KVCache(cache.keys[slot], cache.values[slot], pasts[b])
        out[slot] = attend(q[slot], k[slot], v[slot], length=lengths[b], start=starts[b], cache=own)
    if cache is not None:
        cache.grow(length)
    return out


def numbers(count: Count, batch: int) -> list[int]:
    """The number of each slot."""
    return count.numbers().tolist() if isinstance(count, PerSlot) else [count] * batch


def plan(spec: AttentionSpec) -> SegmentAttention:
    groups, mask_of = spec.heads // spec.kv_heads, CausalMasks()

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, length: Count, start: Count = 0, cache: KVCache | None = None
    ) -> Tensor:
        past: Count = 0 if cache is None else cache.length
        if isinstance(length, PerSlot) or isinstance(start, PerSlot) or isinstance(past, PerSlot):
            return one_by_one(attend, q, k, v, length, start, cache)
        queries = rotate(heads(q, spec.head_dim), spec.rope, past + start)
        keys = rotate(heads(k, spec.head_dim), spec.rope, past)[:, :, :length]
        values = heads(v, spec.head_dim)[:, :, :length]
        if cache is not None:
            cache.append(keys, values, length)
            keys, values = cache.keys[:, :, : past + length], cache.values[:, :, : past + length]
        from_first = spec.causal and past + start == 0 and queries.shape[2] >= keys.shape[2]
        mask = None
        if spec.causal and not from_first:
            mask = mask_of(past + start, queries.shape[2], keys.shape[2], q.dtype)
        if groups > 1:
            keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=from_first, scale=spec.scale
        )
        return out.transpose(1, 2).flatten(2)

    return attend
