"""How many slots: as many as memory holds and measured step times reward."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from rmt_kernels.cpu_linear import has_instructions

from rmt_engine.layouts import padded
from rmt_engine.memory_plan import plan_memory

if TYPE_CHECKING:
    from rmt_engine.engine import Engine

# Rows of a batch on a CPU: it gains what its calls cost beside the GEMMs, and the last document pays for all of it. In
# fp32, and in half precision where its products are taken in fp32, four segments of the embedded checkpoint gain all
# there is (benchmarks/slots.py); calls weigh more where the CPU has instructions for it, as those GEMMs are faster.
CPU_ROWS = 512
CPU_ROWS_OF_HALF = 1024
MOST_SLOTS = 64
MEMORY_SHARE = 0.5  # of what is free
GAIN = 0.97  # twice the slots must take less than this of the time per segment
SECONDS = 2.0  # for measuring


def batch_size(engine: Engine, slots: int) -> int:
    """How many of `slots` slots are folded in one batch: by sizes and dtype alone, as bits depend on it."""
    if engine.device.type != "cpu":
        return slots
    rows = padded(engine.config.segment_size + engine.config.overhead)
    fast = engine.dtype != torch.float32 and has_instructions(engine.dtype)
    return min(slots, max((CPU_ROWS_OF_HALF if fast else CPU_ROWS) // rows, 1))


def choose_slots(engine: Engine) -> int:
    """The fewest slots (a power of two) that fit half of the free memory and that doubling does not make faster."""
    most = min(batch_size(engine, MOST_SLOTS), slots_that_fit(engine))
    chosen, best, spent, slots = 1, float("inf"), 0.0, 1
    while slots <= most and spent < SECONDS:
        seconds = step_seconds(engine, slots)
        spent += 3 * seconds
        if seconds / slots > GAIN * best:
            break
        chosen, best, slots = slots, seconds / slots, 2 * slots
    return chosen


def slots_that_fit(engine: Engine) -> int:
    """At least 1."""
    free = free_bytes(engine.device)
    if free is None:
        return MOST_SLOTS
    plan = plan_memory(engine.config, engine.dtype, device=engine.device.type)
    return max(1, int(MEMORY_SHARE * free) // (plan.step + max(plan.score, plan.answer) + plan.state))


def free_bytes(device: torch.device) -> int | None:
    """Memory that may still be taken, or None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def step_seconds(engine: Engine, slots: int) -> float:
    """The time of folding one full segment in each of so many slots: the better of two, after one that warms up."""
    ids = torch.zeros(slots, engine.config.segment_size, dtype=torch.int64, device=engine.device)
    memory, times = engine.initial_memory(slots), []
    for _ in range(3):
        start = time.perf_counter()
        engine.executor.fold(ids, memory)
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
