"""The fp32 statement of segment_attention: softmax(q kᵀ · scale + mask) v, every step written out."""

from __future__ import annotations

import torch
from torch import Tensor

from rmt_kernels.per_slot import Count, PerSlot, added, column
from rmt_kernels.segment_attention import AttentionSpec, KVCache, SegmentAttention


def heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, T, H·D] -> [B, H, T, D], a view."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor] | None, start: Count) -> Tensor:
    """Rotary positions start, start+1, … of x [B, H, T, D] (the half-split form of Hugging Face's Llama)."""
    if rope is None:
        return x
    if isinstance(start, PerSlot):
        places = column(start, x.device) + torch.arange(x.shape[2], device=x.device)
        cos, sin = (table[places][:, None].to(x.dtype) for table in rope)
    else:
        cos, sin = (table[start : start + x.shape[2]].to(x.dtype) for table in rope)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def plan(spec: AttentionSpec) -> SegmentAttention:
    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, length: Count, start: Count = 0, cache: KVCache | None = None
    ) -> Tensor:
        past: Count = 0 if cache is None else cache.length
        first = added(past, start)
        queries = rotate(heads(q, spec.head_dim).float(), spec.rope, first)
        keys, values = rotate(heads(k, spec.head_dim).float(), spec.rope, past), heads(v, spec.head_dim).float()
        if cache is not None:
            cache.append(keys, values, length)
            keys, values, length = cache.keys.float(), cache.values.float(), cache.length
        if not isinstance(length, PerSlot):
            keys, values = keys[:, :, :length], values[:, :, :length]
        keys, values = (part.repeat_interleave(spec.heads // spec.kv_heads, dim=1) for part in (keys, values))
        unseen = _unseen(spec.causal, first, length, q.shape[1], keys)
        scores = queries @ keys.transpose(-1, -2) * spec.scale  # [B, H, R, keys]
        absent = unseen.all(-2)[..., None]  # what stands there may be anything
        out = scores.masked_fill(unseen, float("-inf")).softmax(-1) @ values.masked_fill(absent, 0.0)
        return out.transpose(1, 2).flatten(2).to(q.dtype)

    return attend


def _unseen(causal: bool, first: Count, length: Count, rows: int, keys: Tensor) -> Tensor:
    """[B or 1, 1, R, keys]: the keys that a query row does not see."""
    places = torch.arange(keys.shape[2], device=keys.device)
    unseen = (places >= column(length, keys.device))[:, None, None].expand(-1, -1, rows, -1)
    if causal:
        positions = column(first, keys.device) + torch.arange(rows, device=keys.device)  # [B or 1, R]
        unseen = unseen | (places > positions[:, None, :, None])
    return unseen
