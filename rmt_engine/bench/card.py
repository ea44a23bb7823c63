"""What this machine does at most, measured: the `Card` of the cost model. And the floor of what is read on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from rmt_kernels.cost_model import Card, Cost, Model, segment_step

from rmt_engine.config import RMTConfig

SIDES = {"cpu": (512, 2048), "cuda": (4096, 8192)}  # of square matrix products; the best one counts
BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # more than a cache holds
REPETITIONS = 10


def measured_card(device: torch.device, dtype: torch.dtype) -> Card:
    """FLOP/s of torch's best matrix product in `dtype`, bytes/s of its best pass over memory, here and now."""
    products = max(_product(side, device, dtype) for side in SIDES[device.type])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return Card(f"{name}, {str(dtype).removeprefix('torch.')}", products, _bandwidth(device))


def better(one: Card, other: Card) -> Card:
    """The most that either of two measurements of one machine found."""
    return replace(one, flops=max(one.flops, other.flops), bandwidth=max(one.bandwidth, other.bandwidth))


def _product(side: int, device: torch.device, dtype: torch.dtype) -> float:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _best(lambda: torch.mm(a, b, out=out), device)


def _bandwidth(device: torch.device) -> float:
    """The better of a copy, which reads and writes, and a sum, which reads."""
    source = torch.ones(BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    size = source.numel() * source.element_size()
    copied = 2 * size / _best(lambda: target.copy_(source), device)
    return max(copied, size / _best(lambda: source.sum(), device))


def _best(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of some calls, after one that is not counted."""
    times = []
    for _ in range(REPETITIONS + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


class Floors:
    """Seconds below which no implementation comes on a card, for what is read with one checkpoint."""

    def __init__(self, config: RMTConfig, card: Card, dtype: torch.dtype) -> None:
        self.config, self.card, self.size = config, card, dtype.itemsize
        self.model = Model.of(config.backbone)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self.card)

    def step(self, text: int, batch: int, outputs: int = 0) -> float:
        """One segment of `text` tokens in each of `batch` slots, as far as the memory state needs it."""
        return self.card.floor(self._step(text, batch, outputs))

    def stream(self, tokens: int, batch: int) -> float:
        """All segments of a text, and the logits of the last one."""
        full, rest = self._segments(tokens)
        return full * self.step(self.config.segment_size, batch) + self.step(rest, batch, rest)

    def work(self, tokens: int, batch: int) -> int:
        """FLOPs of a stream: what its time grows with."""
        full, rest = self._segments(tokens)
        return full * self._step(self.config.segment_size, batch, 0).flops + self._step(rest, batch, 0).flops

    def full_attention(self, tokens: int, batch: int) -> float:
        """The whole text in one piece, every row of every layer finished, and the logits that the last one asks for."""
        return self.card.floor(self._whole(tokens, batch))

    def full_attention_work(self, tokens: int, batch: int) -> int:
        return self._whole(tokens, batch).flops

    def _segments(self, tokens: int) -> tuple[int, int]:
        """Full segments before the last, and the tokens of the last one."""
        bounds = len(range(0, tokens, self.config.segment_size))
        return bounds - 1, tokens - (bounds - 1) * self.config.segment_size

    def _step(self, text: int, batch: int, outputs: int) -> Cost:
        """A decoder's outputs are the logits of as many rows; a classifier has one more row; its head is too small."""
        decoder = self.config.family == "decoder"
        return segment_step(
            self.model,
            text + self.config.overhead,
            slots=batch,
            last_rows=self.config.num_mem_tokens + (outputs if decoder else min(outputs, 1)),
            head_rows=outputs if decoder else 0,
            element_bytes=self.size,
        )

    def _whole(self, tokens: int, batch: int) -> Cost:
        head = self._segments(tokens)[1]
        return segment_step(self.model, tokens, slots=batch, head_rows=head, element_bytes=self.size)
