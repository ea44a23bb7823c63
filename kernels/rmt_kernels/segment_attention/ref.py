"""The fp32 statement of segment_attention: softmax(q kᵀ · scale + mask) v, every step written out."""

from __future__ import annotations

import torch
from torch import Tensor

from rmt_kernels.segment_attention import AttentionSpec, KVCache, SegmentAttention


def heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, T, H·D] -> [B, H, T, D], a view."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor] | None, start: int) -> Tensor:
    """Rotary positions start, start+1, … of x [B, H, T, D] (the half-split form of Hugging Face's Llama)."""
    if rope is None:
        return x
    cos, sin = (table[start : start + x.shape[2]].to(x.dtype) for table in rope)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def plan(spec: AttentionSpec) -> SegmentAttention:
    def attend(q: Tensor, k: Tensor, v: Tensor, *, length: int, start: int = 0, cache: KVCache | None = None) -> Tensor:
        past = 0 if cache is None else cache.length
        queries = rotate(heads(q, spec.head_dim).float(), spec.rope, past + start)
        keys = rotate(heads(k, spec.head_dim).float(), spec.rope, past)[:, :, :length]
        values = heads(v, spec.head_dim).float()[:, :, :length]
        if cache is not None:
            keys, values = (part.float() for part in cache.append(keys, values))
        keys, values = (part.repeat_interleave(spec.heads // spec.kv_heads, dim=1) for part in (keys, values))
        scores = queries @ keys.transpose(-1, -2) * spec.scale  # [B, H, R, past + length]
        if spec.causal:
            positions = past + start + torch.arange(q.shape[1], device=q.device)
            after = torch.arange(keys.shape[2], device=q.device) > positions[:, None]
            scores = scores.masked_fill(after, float("-inf"))
        out = scores.softmax(-1) @ values
        return out.transpose(1, 2).flatten(2).to(q.dtype)

    return attend
