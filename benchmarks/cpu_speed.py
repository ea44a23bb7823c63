"""The engine on a CPU beside the recurrence on Hugging Face modules: one process, the same weights and ids, in turns.

    python benchmarks/cpu_speed.py                            both models, two threads, every dtype this CPU computes in
    python benchmarks/cpu_speed.py --models embedded --stream 2M

`authors` does what the authors' forward does, `lean` is the same modules without its waste (`baselines.py`). The engine
runs twice: for the last segment's logits, and for all of them, as the authors' loop. Before anything is timed its
memory state and logits are compared with the authors' loop in fp32. A round times each of them once; a speed-up is the
median over the rounds of the two times of one round, so that a machine that is busy for a while slows both. Where it is
busy all the while, `--threads 1 --clock cpu` counts the time that the process had a core.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import baselines
import numpy as np
import torch
from common import about, count
from rmt_kernels.cpu_linear import has_instructions
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from rmt_engine import Engine, Summary, checkpoint
from rmt_engine.config import RMTConfig
from rmt_engine.engine import EMBEDDED

SEGMENTS = {"gpt2": 8, "embedded": 64}
# (model, dtype, authors' dtype) -> the speed-up that output="last" must reach, and the one aimed at
BARS = {
    ("gpt2", "float32", "float32"): (1.8, 2.4),
    ("gpt2", "bfloat16", "float32"): (4.0, 5.5),
    ("gpt2", "bfloat16", "bfloat16"): (1.5, 1.5),
    ("embedded", "float32", "float32"): (3.0, 5.0),
}
CHECKED = 4  # segments: over many, a trained recurrence lets any two orders of summation drift apart
FP32 = 1e-5  # of the greatest value
REFERENCE = "authors float32"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Contender:
    """run(ids) -> (logits [B, N, V] or [B, L, V] of the last segment, memory_state [B, M, E])."""

    name: str
    run: Callable[[Tensor], tuple[Tensor, Tensor]]
    seconds: list[float] = field(default_factory=list)
    errors: tuple[float, float] = (0.0, 0.0)  # of logits and memory state, against the authors' loop in fp32


def model_of(name: str) -> tuple[RMTConfig, dict[str, Tensor]]:
    """The embedded checkpoint, or GPT-2 small's shape with 16 memory tokens and random weights."""
    if name == "embedded":
        return checkpoint.load(EMBEDDED)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config())
    weights = {key: tensor.detach() for key, tensor in model.state_dict().items() if key != "lm_head.weight"}
    config = RMTConfig("decoder", model.config.to_dict(), 16, 512, "left")
    return config, {**weights, "memory": torch.randn(16, 768) * 0.02}


def dtypes() -> list[str]:
    """fp32, and bf16 where the CPU has instructions for it: elsewhere the loops on Hugging Face modules crawl."""
    return ["float32", "bfloat16"] if has_instructions(torch.bfloat16) else ["float32"]


def contenders(name: str) -> tuple[RMTConfig, list[Contender]]:
    config, weights = model_of(name)
    found = []
    for dtype in dtypes():
        for label, kind in (("authors", "hf"), ("lean", "fair")):
            loop = baselines.build(kind, config, weights, dtype=getattr(torch, dtype))
            found.append(Contender(f"{label} {dtype}", _of_loop(loop)))
        engine = Engine.from_weights(config, weights, device="cpu", dtype=dtype)
        found += [Contender(f"engine {dtype}, {output}", _of_engine(engine, output)) for output in ("last", "all")]
    return config, found


def _of_loop(loop: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def run(ids: Tensor) -> tuple[Tensor, Tensor]:
        out = loop(ids)
        return out.logits, out.memory_state

    return run


def _of_engine(engine: Engine, output: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def run(ids: Tensor) -> tuple[Tensor, Tensor]:
        out = engine.forward(ids, output=output)
        assert isinstance(out.logits, Tensor)
        return out.logits, out.memory_state

    return run


def check(found: list[Contender], ids: Tensor) -> None:
    """Every result against the authors' loop in fp32; in bf16 the engine may be twice as far off as the authors' is.

    Raises SystemExit where one is not: nothing is timed then.
    """
    logits, memory = next(c for c in found if c.name == REFERENCE).run(ids)
    for contender in found:
        ours = contender.run(ids)
        contender.errors = (_error(ours[0], logits[:, -ours[0].shape[1] :]), _error(ours[1], memory))
    allowed = {c.name.split()[1]: 2 * max(c.errors) for c in found if c.name.startswith("authors")}
    for contender in found:
        dtype = contender.name.split()[1].rstrip(",")
        bound = FP32 if dtype == "float32" else allowed[dtype]
        if not max(contender.errors) <= bound:
            raise SystemExit(
                f"{contender.name}: off by {max(contender.errors):.2g}, allowed {bound:.2g}; nothing is timed"
            )


def _error(ours: Tensor, truth: Tensor) -> float:
    return float((ours.float() - truth.float()).abs().max() / truth.float().abs().max())


def race(found: list[Contender], ids: Tensor, rounds: int, clock: Callable[[], float]) -> None:
    gc.collect()
    for _ in range(rounds):
        for contender in found:
            start = clock()
            contender.run(ids)
            contender.seconds.append(clock() - start)


def speedup(contender: Contender, reference: Contender) -> float:
    pairs = zip(reference.seconds, contender.seconds, strict=True)
    return statistics.median(theirs / ours for theirs, ours in pairs)


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One model: checked, timed in turns, printed."""
    config, found = contenders(name)
    segments = options.segments or SEGMENTS[name]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(config.backbone["vocab_size"], (1, segments * config.segment_size), generator=generator)
    check(found, ids[:, : CHECKED * config.segment_size])
    race(found, ids, options.rounds, CLOCKS[options.clock])
    reference = next(c for c in found if c.name == REFERENCE)
    how = f"{options.threads} threads, {options.rounds} rounds, {options.clock} clock"
    print(f"\n{name}: {segments} segments of {config.segment_size}, {how}")
    print(f"{'':24}{'ms a segment':>14}{'fastest':>10}{'speed-up':>10}{'off by':>10}")
    rows = []
    for contender in found:
        times = [1e3 * seconds / segments for seconds in contender.seconds]
        row = {
            "name": contender.name,
            "segment_ms": statistics.median(times),
            "segment_ms_fastest": min(times),
            "speedup": speedup(contender, reference),
            "error": max(contender.errors),
        }
        rows.append(row)
        print("{name:24}{segment_ms:14.3f}{segment_ms_fastest:10.3f}{speedup:9.2f}x{error:10.1g}".format(**row))
    return {"model": name, "segments": segments, "segment_size": config.segment_size, "rows": rows} | {
        "bars": _bars(name, found)
    }


def _bars(name: str, found: list[Contender]) -> list[dict[str, Any]]:
    by_name = {contender.name: contender for contender in found}
    rows = []
    for (model, ours, theirs), (bar, aim) in BARS.items():
        if model != name:
            continue
        engine, authors = by_name.get(f"engine {ours}, last"), by_name.get(f"authors {theirs}")
        got = None if engine is None or authors is None else speedup(engine, authors)
        shown = "this CPU does not compute in it" if got is None else f"{got:.2f}x"
        print(f"  {ours} against the authors' {theirs}: asked {bar}x, aim {aim}x: {shown}")
        rows.append({"ours": ours, "authors": theirs, "bar": bar, "aim": aim, "speedup": got})
    return rows


def stream(tokens: int) -> dict[str, Any]:
    """The embedded checkpoint over a token file, as `rmt-engine run` reads it."""
    engine = Engine.from_pretrained()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ids.npy"
        np.save(path, np.random.default_rng(0).integers(1, engine.vocab_size, tokens, dtype=np.uint16))
        summary = deque(engine.run(path), maxlen=1).pop()
    assert isinstance(summary, Summary)
    print(f"\n{tokens:,} tokens: {summary.seconds:.1f} s, {summary.tokens_per_second:,.0f} tokens/s")
    return {"tokens": tokens, "seconds": summary.seconds, "segment_ms": summary.ms_late}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(SEGMENTS), default=list(SEGMENTS))
    parser.add_argument("--segments", type=count, metavar="N", help=f"of one text (default: {SEGMENTS})")
    parser.add_argument("--rounds", type=count, default=7, metavar="N")
    parser.add_argument("--threads", type=count, default=2, metavar="N")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: the time of all threads together")
    parser.add_argument("--stream", type=count, metavar="N", help="also read N tokens with the embedded checkpoint")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result here, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = {**about(), "threads": options.threads, "clock": options.clock, "rounds": options.rounds}
    result["models"] = [compare(name, options) for name in options.models]
    if options.stream:
        result["stream"] = stream(options.stream)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
