"""What a measurement will cost, told before it begins: tokens, and seconds from a measured step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rmt_engine.engine import Engine
from rmt_engine.evaluation.reading import fold

TIMED_STEPS = 3


@dataclass(frozen=True)
class Load:
    """segments steps of `slots` texts side by side, `tokens` in all."""

    slots: int
    segments: int
    tokens: int


@dataclass(frozen=True)
class Cost:
    """tokens to read, and the seconds it will take on this machine as it is now."""

    tokens: int
    seconds: float


def estimate(engine: Engine, loads: Sequence[Load]) -> Cost:
    """Times a step with the most slots and with one; one between them costs in proportion. Answers are not counted."""
    tokens = sum(load.tokens for load in loads)
    if not loads:
        return Cost(0, 0.0)
    most = max(load.slots for load in loads)
    one = step_seconds(engine, 1)
    per_slot = (step_seconds(engine, most) - one) / (most - 1) if most > 1 else 0.0
    return Cost(tokens, sum(load.segments * (one + max(per_slot, 0.0) * (load.slots - 1)) for load in loads))


def step_seconds(engine: Engine, slots: int) -> float:
    """Median seconds of a full segment step of random ids."""
    ids = torch.randint(
        engine.vocab_size, (slots, engine.config.segment_size), generator=torch.Generator().manual_seed(0)
    )
    ids, memory = ids.to(engine.device), engine.initial_memory(slots)
    times = []
    for _ in range(1 + TIMED_STEPS):  # the first one warms up
        start = time.perf_counter()
        fold(engine, ids, memory).sum().item()  # waits for the device
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
