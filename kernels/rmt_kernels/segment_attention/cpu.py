"""segment_attention in C++ (csrc/cpu): causal tiles are skipped, q, k and v are read where the projection left them."""

from __future__ import annotations

import torch
from torch import Tensor

import rmt_kernels._cpu as _cpu
from rmt_kernels.checks import dims
from rmt_kernels.per_slot import Count, PerSlot
from rmt_kernels.segment_attention import AttentionSpec, KVCache, SegmentAttention

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}  # all computed in fp32


def plan(spec: AttentionSpec, instruction_set: str = "auto") -> SegmentAttention:
    return NativeAttention(spec, instruction_set)


class NativeAttention:
    """See `SegmentAttention`. A row's bits depend neither on other rows or slots nor on the number of threads."""

    def __init__(self, spec: AttentionSpec, instruction_set: str = "auto"):
        self.spec = spec
        cos, sin = (None, None) if spec.rope is None else (table.float().contiguous() for table in spec.rope)
        self.positions = None if spec.rope is None else len(spec.rope[0])
        self.kernel = _cpu.Attention(
            spec.heads,
            spec.kv_heads,
            spec.head_dim,
            spec.causal,
            spec.scale,
            cos,
            sin,
            instruction_set,
        )

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, length: Count, start: Count = 0, cache: KVCache | None = None
    ) -> Tensor:
        past: Count = 0 if cache is None else cache.length
        self._check(q, k, v, length, start, past, cache)
        batch, rows, _ = q.shape
        dtype, threads, width = DTYPES[q.dtype], torch.get_num_threads(), self.spec.head_dim
        keys, values = _heads(k, width), _heads(v, width)
        if cache is not None:
            new = keys, values
            keys, values = _table(cache.keys), _table(cache.values)
            self.kernel.append(dtype, batch, *new, keys, values, _native(past), _native(length), threads)
            cache.grow(length)
        out = torch.empty(q.shape, dtype=q.dtype)
        self.kernel(
            dtype,
            batch,
            rows,
            _heads(q, width),
            keys,
            values,
            cache is not None,
            _native(past),
            _native(start),
            _native(length),
            out.data_ptr(),
            threads,
        )
        return out

    def _check(
        self, q: Tensor, k: Tensor, v: Tensor, length: Count, start: Count, past: Count, cache: KVCache | None
    ) -> None:
        """Everything that the kernel takes at its word, but for numbers of the slots, which are the caller's."""
        spec = self.spec
        for x in (q, k, v):
            if x.stride(-1) != 1:
                raise ValueError(f"attention: expected elements of a row side by side, got strides {x.stride()}")
        bound = dims("q", q, "B R E", E=spec.heads * spec.head_dim)
        bound = dims("k", k, "B T E", B=bound["B"], E=spec.kv_heads * spec.head_dim)
        dims("v", v, "B T E", **bound)
        tensors = (q, k, v) if cache is None else (q, k, v, cache.keys, cache.values)
        for x in tensors:
            if x.dtype != q.dtype or x.dtype not in DTYPES or not x.is_cpu:
                found = ", ".join(f"{x.dtype} on {x.device}" for x in tensors)
                raise ValueError(f"attention: expected one of {', '.join(DTYPES.values())} on the CPU, got {found}")
        if isinstance(length, int) and not 1 <= length <= bound["T"]:
            raise ValueError(f"length: expected 1..{bound['T']}, got {length}")
        if cache is not None:
            self._check_cache(cache, bound["B"], past, length)
        if self.positions is not None and isinstance(past, int) and isinstance(start, int):
            end = past + max(start + q.shape[1], length if isinstance(length, int) else 0)
            if end > self.positions:
                raise ValueError(f"rope has {self.positions} positions; row {end - 1} is behind them")

    def _check_cache(self, cache: KVCache, batch: int, past: Count, length: Count) -> None:
        for table in (cache.keys, cache.values):
            room = dims("cache", table, "B H P D", B=batch, H=self.spec.kv_heads, D=self.spec.head_dim)["P"]
            if table.stride(3) != 1:
                raise ValueError(f"cache: expected its elements side by side, got strides {table.stride()}")
            if isinstance(length, int) and isinstance(past, int) and past + length > room:
                raise ValueError(f"the cache has room for {room} rows; {past} + {length} are too many")


def _heads(x: Tensor, head_dim: int) -> _cpu.Heads:
    """x [B, R, H·D]: where its heads lie."""
    batch, row, _ = x.stride()
    return x.data_ptr(), batch, head_dim, row


def _table(x: Tensor) -> _cpu.Heads:
    """x [B, H_kv, P, D] of a cache."""
    batch, head, row, _ = x.stride()
    return x.data_ptr(), batch, head, row


def _native(count: Count) -> _cpu.Count:
    return (count.slots.data_ptr(), count.plus) if isinstance(count, PerSlot) else count
