"""Measurements on a card that decide what is built next: launch gaps, a grid barrier, cuBLAS beside our GEMM.

`bench_gpu.py` runs them. Each one's result is checked before it is timed. `gemm_rows` runs on a CPU too, in dry runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rmt_kernels import norm_linear
from rmt_kernels.weights import Linear
from torch import Tensor

REPEATS, WARM_UP = 20, 3
LAUNCHES = 256  # in a chain of dependent kernels
ROUNDS = 256  # of the grid barrier
GEMM_SHAPES = {  # outputs, inputs: the four linears of a GPT-2 small block
    "qkv": (2304, 768),
    "attention out": (768, 768),
    "mlp in": (3072, 768),
    "mlp out": (768, 3072),
}
GEMM_ROWS = (512, 1024, 4096, 16384)
SLOT_ROWS = 512


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, least and greatest of the repetitions."""

    median: float
    least: float
    greatest: float
    repeats: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def timed(work: Callable[[], object], device: torch.device, repeats: int = REPEATS, inner: int = 1) -> Timing:
    """Times `work`, which does the thing measured `inner` times: by events on a card, by the clock on a CPU."""
    for _ in range(WARM_UP):
        work()
    if device.type != "cuda":
        return Timing.of([_clocked(work) / inner for _ in range(repeats)])
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in pairs:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize(device)
    return Timing.of([start.elapsed_time(end) / 1e3 / inner for start, end in pairs])


def _clocked(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def captured(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`work` as a CUDA graph; itself on a CPU."""
    if device.type != "cuda":
        return work
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        work()  # compiles and allocates what is only made once
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def launch_gap_rows(device: torch.device) -> Iterator[dict[str, Any]]:
    """Time from one kernel to the next in a graph of dependent ones, with and without programmatic dependent launch."""
    from micro_kernels import add_one_kernel

    programs = torch.cuda.get_device_properties(device).multi_processor_count
    dependent = torch.cuda.get_device_capability(device) >= (9, 0)
    for early in (False, True):
        name = "launch gap, dependent launch" if early else "launch gap"
        if early and not dependent:
            yield {"name": name, "skipped": "programmatic dependent launch needs compute capability 9.0"}
            continue
        values = torch.zeros(programs * 128, device=device)

        def chain(early: bool = early, values: Tensor = values) -> None:
            for _ in range(LAUNCHES):
                options = {"launch_pdl": True} if early else {}
                add_one_kernel[(programs,)](values, BLOCK=128, EARLY=early, num_warps=4, **options)

        replay = captured(chain, device)
        values.zero_()
        replay()
        if not bool((values == LAUNCHES).all()):
            yield {"name": name, "failed": "the kernels of the chain did not follow one another"}
            continue
        timing = timed(replay, device, inner=LAUNCHES)
        yield {"name": name, "launches": LAUNCHES, "programs": programs, "microseconds": timing.median * 1e6}


def grid_barrier_rows(device: torch.device) -> Iterator[dict[str, Any]]:
    """One barrier of all programs of a cooperative kernel: what a persistent kernel pays between two layers."""
    from micro_kernels import barrier_kernel

    programs = torch.cuda.get_device_properties(device).multi_processor_count
    arrived = torch.zeros(1, dtype=torch.int32, device=device)

    def rounds(count: int) -> Callable[[], None]:
        def run() -> None:
            arrived.zero_()
            barrier_kernel[(programs,)](arrived, programs, count, num_warps=4, launch_cooperative_grid=True)

        return run

    rounds(ROUNDS)()
    if int(arrived) != ROUNDS * programs:
        yield {"name": "grid barrier", "failed": "not every program arrived in every round"}
        return
    none, many = timed(rounds(0), device), timed(rounds(ROUNDS), device)
    seconds = (many.median - none.median) / ROUNDS
    yield {"name": "grid barrier", "rounds": ROUNDS, "programs": programs, "microseconds": seconds * 1e6}


def gemm_rows(
    device: torch.device, backend: str, dtype: torch.dtype, rows: tuple[int, ...] = GEMM_ROWS
) -> Iterator[dict[str, Any]]:
    """torch's linear (cuBLAS on a card) beside ours, on the linears of a block, as [rows / 512, 512, inputs]."""
    generator = torch.Generator().manual_seed(0)
    for name, (outputs, inputs) in GEMM_SHAPES.items():
        weight = (torch.randn(outputs, inputs, generator=generator) / inputs**0.5).to(device, dtype)
        bias = torch.randn(outputs, generator=generator).to(device, dtype)
        ours = norm_linear.plan(Linear(weight, bias), backend=backend)
        for count in rows:
            x = torch.randn(max(count // SLOT_ROWS, 1), min(count, SLOT_ROWS), inputs, generator=generator)
            yield _gemm_row(name, x.to(device, dtype), weight, bias, ours)


def _gemm_row(name: str, x: Tensor, weight: Tensor, bias: Tensor, ours: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    rows, flops = x.shape[0] * x.shape[1], 2 * x.shape[0] * x.shape[1] * weight.numel()
    row: dict[str, Any] = {"name": f"linear, {name}", "rows": rows, "shape": list(weight.shape), "dtype": str(x.dtype)}
    truth = F.linear(x.double(), weight.double(), bias.double())
    theirs = float((F.linear(x, weight, bias).double() - truth).norm() / truth.norm())
    error = float((ours(x).double() - truth).norm() / truth.norm())
    row |= {"error": error, "error of torch": theirs}
    if not error <= 2 * theirs + 1e-6:
        return row | {"failed": "its error is over twice that of torch"}
    for label, work in (("torch", lambda: F.linear(x, weight, bias)), ("ours", lambda: ours(x))):
        timing = timed(captured(work, x.device), x.device)
        row |= {f"{label} microseconds": timing.median * 1e6, f"{label} TFLOP/s": flops / timing.median / 1e12}
    return row
