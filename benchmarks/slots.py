"""16 documents side by side against one after another, on a CPU: the same engine, the same documents, in turns.

    OMP_NUM_THREADS=1 python benchmarks/slots.py --output benchmarks/results/slots_cpu.json

Before anything is timed the memory states of both ways are compared, and with `batch_invariant` their bits. Beside the
times stands the GEMM bound: the linears of all layers alone, over the rows of one slot and of a batch. A figure is the
best of the rounds, a ratio the median of the ratios within a round: both ways then met the same noise. With one thread
the processor time is taken, which others on the machine disturb less than the wall time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rmt_kernels.cost_model import Model, segment_step
from rmt_kernels.cpu_linear import plan_linear
from rmt_kernels.weights import Linear

from rmt_engine.bench.record import about
from rmt_engine.engine import Engine
from rmt_engine.layouts import padded
from rmt_engine.slot_count import batch_size

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1}  # of a memory state, side by side against alone
BATCHES = (1, 2, 4, 8, 16)
GOAL = {"float32": 1.0, "bfloat16": 1.25}


def documents(engine: Engine, count: int, segments: int) -> list[np.ndarray]:
    """Ids of texts of different lengths, `segments` segments each on average."""
    rng, size = np.random.default_rng(0), engine.config.segment_size
    lengths = rng.integers(segments * size // 2, 3 * segments * size // 2, count)
    return [rng.integers(1, engine.vocab_size, length) for length in lengths]


def one_after_another(engine: Engine, texts: list[np.ndarray]) -> list[torch.Tensor]:
    memories = []
    for ids in texts:
        stream = engine.stream()
        stream.feed(ids)
        memories.append(stream.memory)
    return memories


def side_by_side(engine: Engine, texts: list[np.ndarray], batch_invariant: bool = False) -> list[torch.Tensor]:
    results = engine.run_many(texts, slots=len(texts), batch_invariant=batch_invariant)
    return [result.stream.memory for result in results if result.stream is not None]


def check(engine: Engine, texts: list[np.ndarray], dtype: str) -> None:
    alone = one_after_another(engine, texts)
    for memory, expected in zip(side_by_side(engine, texts), alone, strict=True):
        if not torch.allclose(memory.float(), expected.float(), atol=TOLERANCE[dtype]):
            raise SystemExit("documents side by side have other memory states: nothing is timed")
    if not all(map(torch.equal, side_by_side(engine, texts, batch_invariant=True), alone)):
        raise SystemExit("batch_invariant has other bits than a stream alone: nothing is timed")


def gemm_seconds(engine: Engine, slots: int) -> Callable[[], float]:
    """-> the time of all layers' linears, over the rows of one segment in each of `slots` slots."""
    model = Model.of(engine.config.backbone)
    attended, keys = model.heads * model.head_dim, 2 * model.kv_heads * model.head_dim
    shapes = [(model.width, attended + keys), (attended, model.width)]
    shapes += [(model.width, model.inner)] * (model.mlp_linears - 1) + [(model.inner, model.width)]
    rows = slots * padded(engine.config.segment_size + engine.config.overhead)
    calls = []
    for inputs, outputs in shapes:
        linear = plan_linear(
            Linear(torch.randn(outputs, inputs).to(engine.dtype), torch.zeros(outputs, dtype=engine.dtype))
        )
        calls.append((linear, torch.randn(rows, inputs).to(engine.dtype)))

    def seconds() -> float:
        start = clock()
        with torch.inference_mode():
            for _ in range(model.layers):
                for linear, x in calls:
                    linear(x)
        return clock() - start

    return seconds


def clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def fold_seconds(engine: Engine, slots: int) -> Callable[[], float]:
    """-> the time of folding one segment in each of so many slots, whatever batches `run_many` takes."""
    ids = torch.ones(slots, engine.config.segment_size, dtype=torch.int64)
    memory = engine.initial_memory(slots)
    return lambda: timed(lambda: engine.executor.fold(ids, memory))


def timed(call: Callable[[], object]) -> float:
    start = clock()
    call()
    return clock() - start


def measure(dtype: str, count: int, segments: int, rounds: int) -> dict[str, Any]:
    engine = Engine.from_pretrained(device="cpu", dtype=dtype)
    texts = documents(engine, count, segments)
    check(engine, texts, dtype)
    batch = batch_size(engine, count)
    ways: dict[str, Callable[[], object]] = {
        "one after another": lambda: one_after_another(engine, texts),
        "side by side": lambda: side_by_side(engine, texts),
        "batch_invariant": lambda: side_by_side(engine, texts, batch_invariant=True),
    }
    bounds = {"one slot": gemm_seconds(engine, 1), "batch": gemm_seconds(engine, batch)}
    folds = {size: fold_seconds(engine, size) for size in BATCHES}
    times: dict[str, list[float]] = {name: [] for name in [*ways, *bounds]}
    best_fold = dict.fromkeys(BATCHES, float("inf"))
    for _ in range(rounds):
        for _ in range(5):
            best_fold = {size: min(best_fold[size], fold()) for size, fold in folds.items()}
        for name, way in ways.items():
            times[name].append(timed(way))
        for name, bound in bounds.items():
            times[name].append(min(bound() for _ in range(5)))
    tokens, folded = sum(map(len, texts)), sum((len(ids) - 1) // engine.config.segment_size for ids in texts)
    rows = padded(engine.config.segment_size + engine.config.overhead)
    cost = segment_step(Model.of(engine.config.backbone), rows, last_rows=engine.config.num_mem_tokens)
    return {
        "dtype": dtype,
        "documents": count,
        "tokens": tokens,
        "batch": batch,
        "seconds": {name: min(times[name]) for name in ways},
        "tokens_per_second": {name: round(tokens / min(times[name])) for name in ways},
        "ms_per_segment": {name: 1e3 * min(times[name]) / folded for name in ways},
        "gemm_ms_per_segment": {"one slot": 1e3 * min(times["one slot"]), "batch": 1e3 * min(times["batch"]) / batch},
        "fold_ms_per_segment": {size: 1e3 * seconds / size for size, seconds in best_fold.items()},
        "gflop_per_segment": cost.flops / 1e9,
        "speedup": {
            name: statistics.median(a / b for a, b in zip(times["one after another"], times[name], strict=True))
            for name in ("side by side", "batch_invariant")
        },
        "goal": GOAL[dtype],
    }


def show(row: dict[str, Any]) -> None:
    print(f"{row['dtype']}: {row['documents']} documents, {row['tokens']:,} tokens, batches of {row['batch']}")
    for name, seconds in row["seconds"].items():
        speedup = f"  {row['speedup'][name]:.2f}×" if name in row["speedup"] else ""
        print(f"  {name:<18} {seconds:7.3f} s  {row['ms_per_segment'][name]:6.3f} ms per segment{speedup}")
    alone, batched = row["gemm_ms_per_segment"].values()
    print(
        "  a fold in batches of", ", ".join(f"{size}: {ms:.3f} ms" for size, ms in row["fold_ms_per_segment"].items())
    )
    print(f"  GEMM bound         {alone:.3f} ms per segment alone, {batched:.3f} in a batch: {alone / batched:.2f}×")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["float32", "bfloat16"])
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--segments", type=int, default=20, help="of a document, on average")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for dtype in options.dtypes:
        rows.append(measure(dtype, options.documents, options.segments, options.rounds))
        show(rows[-1])
    if options.output:
        text = json.dumps({**about(), "threads": torch.get_num_threads(), "rows": rows}, indent=1) + "\n"
        options.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
