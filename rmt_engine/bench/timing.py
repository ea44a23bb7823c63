"""Repetitions that take turns, and what their times say."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

OnStep = Callable[[], None]  # called after each segment step
Run = Callable[[OnStep], Tensor | None]  # reads everything once; what it gives must be the same each time
STEPS = 1000  # steps at each end of a stream whose median is its speed there


@dataclass(frozen=True)
class Once:
    """One run. seconds, cpu_seconds: wall and processor time; steps: when each step ended; output: what it gave."""

    seconds: float
    cpu_seconds: float
    steps: Sequence[float]
    output: Tensor | None


@dataclass
class Timing:
    """One entry a repetition; start_ms and end_ms have none where there were no steps. same: all gave the same bits.

    cpu_seconds: processor time of all threads, which a busy machine does not change.
    """

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    start_ms: list[float] = field(default_factory=list)
    end_ms: list[float] = field(default_factory=list)
    finite: bool = True
    same: bool = True
    first: Tensor | None = field(default=None, repr=False)

    def add(self, once: Once) -> None:
        self.seconds.append(once.seconds)
        self.cpu_seconds.append(once.cpu_seconds)
        ends, output = ms_at_ends(once.steps), once.output
        if ends is not None:
            self.start_ms.append(ends[0])
            self.end_ms.append(ends[1])
        if output is not None:
            self.finite = self.finite and bool(output.isfinite().all())
            self.same = self.same and (self.first is None or torch.equal(self.first, output))
            self.first = output if self.first is None else self.first


def interleaved(runs: Mapping[str, Run], repetitions: int, device: torch.device) -> dict[str, Timing]:
    """Every run once in each repetition, another one first each time."""
    timings = {name: Timing() for name in runs}
    names = list(runs)
    for repetition in range(repetitions):
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            timings[name].add(timed(runs[name], device))
    return timings


def timed(run: Run, device: torch.device) -> Once:
    steps: list[float] = []
    _wait(device)
    start, cpu_start = time.perf_counter(), time.process_time()
    output = run(lambda: steps.append(time.perf_counter()))
    _wait(device)
    return Once(time.perf_counter() - start, time.process_time() - cpu_start, steps, output)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ms_at_ends(steps: Sequence[float]) -> tuple[float, float] | None:
    """Medians over the first and the last quarter of the steps, of at most `STEPS`; None below eight steps.

    steps: when each ended, in seconds. The first is left out: opening the input is a part of it.
    """
    if len(steps) < 9:
        return None
    durations = [1e3 * (after - before) for before, after in itertools.pairwise(steps)]
    count = min(len(durations) // 4, STEPS)
    return statistics.median(durations[:count]), statistics.median(durations[-count:])


@dataclass(frozen=True)
class Plan:
    """repetitions of the runs that are kept; left_out: name -> seconds that one repetition would take."""

    repetitions: int
    kept: tuple[str, ...]
    left_out: Mapping[str, float]


def plan(estimates: Mapping[str, float], budget: float, repetitions: int, more: int = 0) -> Plan:
    """As many repetitions as the budget holds, one at least; until then the slowest run is left out.

    estimates: seconds of one repetition, the engine's first. more: rounds beyond the repetitions, for the memory. The
    engine is the last to be left out.
    """
    kept, left_out = dict(estimates), dict[str, float]()
    engine = next(iter(estimates))
    while kept and (1 + more) * sum(kept.values()) > budget:
        others = [name for name in kept if name != engine] or [engine]
        slowest = max(others, key=lambda name: kept[name])
        left_out[slowest] = kept.pop(slowest)
    if not kept:
        return Plan(0, (), left_out)
    fits = int(budget / max(sum(kept.values()), 1e-9)) - more
    return Plan(max(1, min(repetitions, fits)), tuple(kept), left_out)
