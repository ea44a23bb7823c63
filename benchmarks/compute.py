"""Compute per token over the length of the text: a recurrent memory against full attention of the same backbone.

    python benchmarks/compute.py --output benchmarks/results/compute_cpu.json

FLOPs are those of the matrix products (`rmt_kernels.cost_model`), the LM head left out on both sides. Seconds are
measured: the engine at every length, full attention (the Hugging Face modules with a KV cache, `baselines.py`) as long
as the next length would stay below `--limit` seconds. Beyond, its seconds are what the cost model makes of the last
measured length, marked `"seconds_by": "model"`. The engine's are the median block of 16 segments times their number, a
block of each length in turn; those of full attention the best of `--repeats`. Before anything is timed, memory state
and logits are compared with those of the Hugging Face modules. On a machine that others use, `--threads 1 --clock cpu`
counts the time that this process had a core.

FLOPs and seconds per token are flat where the largest is within 5 % of the smallest; else the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from baselines import build, causal_lm, with_positions
from common import about, count
from rmt_kernels.cost_model import Model, segment_step
from torch import Tensor

from rmt_engine import Engine, checkpoint
from rmt_engine.cli import counts
from rmt_engine.config import RMTConfig
from rmt_engine.engine import EMBEDDED

BLOCK = 16  # segments that are timed together
FLAT = 0.05  # of seconds and FLOPs per token, from the shortest to the longest text
TOLERANCE = 1e-3
Weights = dict[str, Tensor]
Clock = Callable[[], float]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Row:
    """One length. seconds of the whole text; by: `measured` or `model`; memory: bytes that its context takes."""

    tokens: int
    flops: int
    seconds: float
    by: str
    memory: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "flops_per_token": self.flops / self.tokens,
            "seconds_per_token": self.seconds / self.tokens,
            "seconds_by": self.by,
            "context_bytes": self.memory,
        }


# -------------------------------------------------------------------------------------------------------------- FLOPs


def recurrent_flops(config: RMTConfig, segments: int) -> int:
    """Of folding so many full segments."""
    rows = config.segment_size + config.overhead
    return segments * segment_step(Model.of(config.backbone), rows, last_rows=config.num_mem_tokens).flops


def full_flops(config: RMTConfig, tokens: int) -> int:
    """Of every layer over a whole text in which each token sees all before it."""
    return segment_step(Model.of(config.backbone), tokens).flops


# ------------------------------------------------------------------------------------------------------------- timing


def seconds_of(work: Callable[[], object], device: torch.device, clock: Clock) -> float:
    start = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


class Reader:
    """One length, read block by block; a text that is at its end begins again."""

    def __init__(self, engine: Engine, ids: Tensor, segments: int, clock: Clock):
        self.engine, self.ids, self.segments, self.clock = engine, ids, segments, clock
        self.position = 0
        self.memory = engine.initial_memory()
        self.times: list[float] = []  # seconds of a segment, one for each block

    def read_block(self) -> None:
        if self.position == self.segments:
            self.position, self.memory = 0, self.engine.initial_memory()
        count = min(BLOCK, self.segments - self.position)
        self.times.append(seconds_of(partial(self._fold, count), self.engine.device, self.clock) / count)
        self.position += count

    def _fold(self, count: int) -> None:
        for _ in range(count):  # one segment again and again: what it says changes nothing in the time
            self.memory = self.engine.executor.fold(self.ids, self.memory)


def time_recurrent(engine: Engine, lengths: list[int], clock: Clock) -> dict[int, float]:
    """Seconds of each number of segments: as many times the median block of them.

    A block of each length in turn, until the longest is read: whatever else the machine does, it does to all of them.
    """
    ids = random_ids(engine, engine.config.segment_size)
    readers = [Reader(engine, ids, segments, clock) for segments in lengths]
    Reader(engine, ids, BLOCK, clock).read_block()  # warms up
    for _ in range(-(-max(lengths) // BLOCK)):
        for reader in readers:
            reader.read_block()
    return {reader.segments: statistics.median(reader.times) * reader.segments for reader in readers}


def time_full(
    engine: Engine, weights: Weights, lengths: list[int], limit: float, repeats: int, clock: Clock
) -> dict[int, float]:
    """Best seconds of each length that is expected to take at most `limit` seconds; always of the shortest."""
    config, size = engine.config, engine.config.segment_size
    best: dict[int, float] = {}
    for segments in lengths:
        tokens = segments * size
        if best:
            last = max(best)
            growth = full_flops(config, tokens) / full_flops(config, last * size)
            if best[last] * growth > limit:
                break
        model = build("full-attention", config, weights, dtype=engine.dtype, device=engine.device, longest=tokens)
        read = partial(model, random_ids(engine, tokens))
        best[segments] = min(seconds_of(read, engine.device, clock) for _ in range(repeats))
    return best


def random_ids(engine: Engine, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(engine.vocab_size, (1, tokens), generator=generator).to(engine.device)


# ------------------------------------------------------------------------------------------------------------- result


def check(engine: Engine, weights: Weights) -> None:
    """Nothing is timed whose result is wrong: both sides against plain Hugging Face modules."""
    size = engine.config.segment_size
    ids = random_ids(engine, 4 * size)
    lean = build("fair", engine.config, weights, dtype=engine.dtype, device=engine.device)
    ours = engine.forward(ids, output="none").memory_state
    apart = float((ours - lean(ids).memory_state).abs().max())
    longer, table = with_positions(engine.config, weights, 4 * size)
    whole = causal_lm(longer, dict(table), engine.dtype).to(engine.device)
    full = build("full-attention", engine.config, weights, dtype=engine.dtype, device=engine.device, longest=4 * size)
    with torch.inference_mode():
        expected = whole(ids).logits[:, -size:]
    apart = max(apart, float((full(ids) - expected).abs().max()))
    if engine.dtype == torch.float32 and apart > TOLERANCE:
        raise SystemExit(f"results differ by {apart:.2g}: nothing is timed")


def measure(
    engine: Engine, weights: Weights, lengths: list[int], limit: float, repeats: int, clock: Clock = time.perf_counter
) -> dict[str, list[Row]]:
    config, size = engine.config, engine.config.segment_size
    model, item = Model.of(config.backbone), engine.executor.initial.element_size()
    state = engine.executor.initial.numel() * 4
    recurrent = [
        Row(n * size, recurrent_flops(config, n), seconds, "measured", state)
        for n, seconds in time_recurrent(engine, lengths, clock).items()
    ]
    timed = time_full(engine, weights, lengths, limit, repeats, clock)
    longest = max(timed)
    full = []
    for n in lengths:
        cache = 2 * model.layers * model.kv_heads * model.head_dim * n * size * item
        flops = full_flops(config, n * size)
        guess = timed[longest] * flops / full_flops(config, longest * size)
        full.append(Row(n * size, flops, timed.get(n, guess), "measured" if n in timed else "model", cache))
    return {"recurrent": recurrent, "full_attention": full}


def spread(values: list[float]) -> float:
    """How far the largest lies above the smallest."""
    return max(values) / min(values) - 1


def per_token(row: Row) -> str:
    return f"{row.flops / row.tokens / 1e6:>10.3f} MFLOP/token {row.seconds / row.tokens * 1e6:>11.2f} µs"


def show(rows: dict[str, list[Row]]) -> None:
    print(f"{'tokens':>10}  {'recurrent':>36}   {'full attention':>36}  {'KV cache':>13}")
    for ours, full in zip(rows["recurrent"], rows["full_attention"], strict=True):
        mark = "*" if full.by == "model" else " "
        print(f"{ours.tokens:>10,}  {per_token(ours)}   {per_token(full)}{mark} {full.memory / 2**20:>9.1f} MiB")
    print("* by the cost model, from the longest text that was measured")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="converted folder (default: the embedded one)")
    parser.add_argument("--segments", type=counts, default=[16, 64, 256, 1024, 4096], metavar="N,…")
    parser.add_argument(
        "--limit", type=float, default=60.0, metavar="S", help="seconds a length of full attention may take"
    )
    parser.add_argument("--repeats", type=count, default=3, metavar="N")
    parser.add_argument("--threads", type=count, default=1, metavar="N")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: the time of all threads together")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, metavar="FILE")
    options = parser.parse_args()
    made_by = about()
    torch.set_num_threads(options.threads)
    path = options.model or EMBEDDED
    engine = Engine.from_pretrained(path, device=options.device, dtype=options.dtype)
    if engine.config.family != "decoder":
        raise SystemExit("full attention with a KV cache needs a decoder")
    weights = dict(checkpoint.load(path)[1])
    check(engine, weights)
    lengths = sorted(set(options.segments))
    rows = measure(engine, weights, lengths, options.limit, options.repeats, CLOCKS[options.clock])
    show(rows)
    ours = [row.to_dict() for row in rows["recurrent"]]
    flat = {key: spread([row[key] for row in ours]) for key in ("flops_per_token", "seconds_per_token")}
    for key, value in flat.items():
        print(f"recurrent, {key.replace('_', ' ')}: {100 * value:.1f} % from the smallest to the largest")
    if options.output:
        result = {
            **made_by,
            "threads": options.threads,
            "clock": options.clock,
            "dtype": str(engine.dtype),
            "device": str(engine.device),
        }
        tables = {name: [row.to_dict() for row in table] for name, table in rows.items()}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({**result, "spread": flat, **tables}, indent=1) + "\n", encoding="utf-8")
    return 1 if max(flat.values()) > FLAT else 0


if __name__ == "__main__":
    sys.exit(main())
