"""The parts of bench_gpu.py, each in a process of its own: a row of results is written as soon as it is there."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import baselines
import micro_gpu
import numpy as np
import torch
from micro_gpu import Timing, timed
from rmt_kernels.cost_model import Card, Model, segment_step
from torch import Tensor

from rmt_engine.bench.card import measured_card
from rmt_engine.bench.setup import BACKBONES, named_config, random_weights
from rmt_engine.checkpoint import tokenizer_folder
from rmt_engine.config import RMTConfig
from rmt_engine.engine import EMBEDDED, Engine
from rmt_engine.evaluation.noise import noise_text
from rmt_engine.executors import EagerExecutor
from rmt_engine.graph_executor import GraphExecutor
from rmt_engine.graph_plan import STREAM_SEGMENTS, GraphKey
from rmt_engine.run import Summary
from rmt_engine.tokens import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]
Rows = Iterator[Row]

SHAPES = ("gpt2", "bert-base", "gpt2-medium", "llama-3.2-1b")
SLOTS = (1, 8, 32)
CHECKED_SEGMENTS = 3
WORST_ERROR = 2.0  # of ours against fp32, divided by that of eager torch in the same dtype
ROUNDS, REPEATS = 5, 4  # what is compared takes turns
MEMORY_BOUND = 1 << 20  # bytes that a longer stream may take more
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
GPU_TESTS = {"test_graph_small.py": 0.4, "test_graph_gpu.py": 0.6, "test_triton_gpu.py": 1.0}  # shares of the time left
KERNELS = "test_lm_head or test_memory or test_attention_through_a_cache"  # under compute-sanitizer

TINY_GPT2 = {**BACKBONES["gpt2"], "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 2}


@dataclass(frozen=True)
class Place:
    """Where a part runs, and until when."""

    device: torch.device
    dtype: torch.dtype
    dry_run: bool
    deadline: float

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def shapes(self) -> tuple[str, ...]:
        return ("tiny",) if self.dry_run else SHAPES

    @property
    def slots(self) -> tuple[int, ...]:
        return (1, 2) if self.dry_run else SLOTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    device, dtype = (torch.device("cpu"), torch.float32) if options.dry_run else (torch.device("cuda"), torch.bfloat16)
    place = Place(device, dtype, options.dry_run, time.monotonic() + options.seconds)
    with open(options.rows, "a", encoding="utf-8", buffering=1) as file:
        for row in PARTS[options.part](place):
            print(json.dumps(row), file=file)


# tests


def tests(place: Place) -> Rows:
    """Every test that needs a GPU, file by file; in a dry run they are collected alone."""
    if place.dry_run:
        files = [f"tests/{file}" for file in GPU_TESTS]
        yield _pytest("gpu tests", [*PYTEST, "-m", "gpu", "--collect-only", *files], place)
        return
    for file, share in GPU_TESTS.items():
        yield _pytest(file, [*PYTEST, "-m", "gpu", "-x", f"tests/{file}"], place, share)


def sanitizer(place: Place) -> Rows:
    """Captured graphs with the C++ runner, and kernels, on small shapes under compute-sanitizer."""
    if place.dry_run or shutil.which("compute-sanitizer") is None:
        missing = "compute-sanitizer is not on the PATH; it comes with the CUDA toolkit"
        yield {"name": "compute-sanitizer", "skipped": "a dry run" if place.dry_run else missing}
        return
    words = ["compute-sanitizer", "--error-exitcode", "9", *PYTEST, "-x"]
    yield _pytest("compute-sanitizer, graphs", [*words, "-m", "gpu", "tests/test_graph_small.py"], place, share=0.5)
    # Bounds of its own for every tensor, which a capture does not allow.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    yield _pytest("compute-sanitizer, kernels", [*words, "tests/triton_ops.py", "-k", KERNELS], place, **alone)


def _pytest(name: str, words: list[str], place: Place, share: float = 1.0, **environment: str) -> Row:
    """share: of the time that is left."""
    start, seconds = time.monotonic(), max(share * place.seconds_left - 3, 1)
    code, said = _ended(words, seconds, {**os.environ, **environment})
    if code is None:
        return {"name": name, "failed": "the time of this part ended before the tests did"}
    last = re.sub(r"\x1b\[\d+m", "", said.strip().rpartition("\n")[2])
    row: Row = {"name": name, "result": last, "seconds": round(time.monotonic() - start, 1)}
    return row if code == 0 else row | {"failed": said[-1500:]}


def _ended(words: list[str], seconds: float, environment: Mapping[str, str]) -> tuple[int | None, str]:
    """Exit code and output of a command. None: its time ended, and so did it with all that it had started, which would
    share the card with the next measurement."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(words, cwd=ROOT, env=environment, start_new_session=True, **pipes) as process:
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, ""
    return process.returncode, said


# steps


@dataclass(frozen=True)
class Step:
    """A call that computes `segments` segment steps of all slots."""

    call: Callable[[], object]
    segments: int = 1


@dataclass
class Case:
    """One backbone with a number of slots: the engine, and what it is compared with."""

    name: str
    config: RMTConfig
    weights: Mapping[str, Tensor]
    slots: int
    place: Place
    engine: Engine

    @property
    def ids(self) -> Tensor:
        """int64 [segments, B, S] of the vocabulary."""
        generator = torch.Generator().manual_seed(1)
        shape, vocabulary = (CHECKED_SEGMENTS, self.slots, self.config.segment_size), self.config.backbone["vocab_size"]
        return torch.randint(1000, int(vocabulary), shape, generator=generator).to(self.place.device)

    def baseline(self, name: str, dtype: torch.dtype) -> Any:
        return baselines.build(name, self.config, self.weights, dtype=dtype, device=self.place.device)

    def cost_floor(self, card: Card) -> float:
        rows = self.config.segment_size + self.config.overhead
        cost = segment_step(
            Model.of(self.config.backbone),
            rows,
            slots=self.slots,
            last_rows=self.config.num_mem_tokens,
            element_bytes=self.place.dtype.itemsize,
        )
        return card.floor(cost)


def steps(place: Place) -> Rows:
    """The segment step, beside eager Hugging Face as the authors run it and without waste; then beside max-autotune."""
    card = measured_card(place.device, place.dtype)
    yield {"name": "card", "what": card.name, "TFLOP/s": card.flops / 1e12, "GB/s": card.bandwidth / 1e9}
    for case in _cases(place):
        yield from _step_rows(case, card)
    for case in _cases(place):  # compiling takes longest, so it comes last
        yield _compiled_row(case, card)


def _cases(place: Place) -> Iterator[Case]:
    for name in place.shapes:
        config = _config(name)
        weights = random_weights(config)
        engine = Engine.from_weights(config, weights, device=str(place.device), dtype=place.dtype_name)
        for slots in place.slots:
            if place.seconds_left > 5:
                yield Case(name, config, weights, slots, place, engine)
        del engine
        _free(place)


def _config(name: str) -> RMTConfig:
    return RMTConfig("decoder", TINY_GPT2, 4, 40) if name == "tiny" else named_config(name)


def _free(place: Place) -> None:
    if place.device.type == "cuda":
        torch.cuda.empty_cache()


def _step_rows(case: Case, card: Card) -> Rows:
    row: Row = {"name": case.name, "slots": case.slots}
    try:
        ratio = _error_ratio(case)
        row |= {"error": ratio}
        if not ratio <= WORST_ERROR:
            yield row | {"failed": f"against fp32 it errs {ratio:.2f} times as much as eager torch, over {WORST_ERROR}"}
            return
        if not _same_bits(case):
            yield row | {"failed": "the graph and the eager executor gave different bits"}
            return
        works = {"graph": graph_step(case), "eager": eager_step(case)}
        works |= {name: baseline_step(case.baseline(name, case.place.dtype), case) for name in ("hf", "fair")}
        yield row | _compared(works, case, card)
    except torch.OutOfMemoryError as error:
        yield row | {"failed": f"out of memory: {str(error)[:200]}"}
    finally:
        _free(case.place)


def _compiled_row(case: Case, card: Card) -> Row:
    row: Row = {"name": case.name, "slots": case.slots, "against": "max-autotune"}
    try:
        started = time.monotonic()
        loop = case.baseline("fair", case.place.dtype)
        mode = "default" if case.place.dry_run else "max-autotune"
        loop.body = loop.body if case.place.dry_run else baselines.compiled(loop.body, mode)
        work = baseline_step(loop, case)
        work.call()
        row |= {"compiling s": time.monotonic() - started}
        return row | _compared({"graph": graph_step(case), "max-autotune": work}, case, card)
    except torch.OutOfMemoryError as error:
        return row | {"failed": f"out of memory: {str(error)[:200]}"}
    finally:
        _free(case.place)


def _compared(works: Mapping[str, Step], case: Case, card: Card) -> Row:
    """Milliseconds of a segment step of all slots, taking turns; the floor; how many times faster than each we are."""
    seconds: dict[str, list[Timing]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            seconds[name].append(timed(work.call, case.place.device, REPEATS, work.segments))
    medians = {name: float(np.median([timing.median for timing in timings])) for name, timings in seconds.items()}
    spread = {name: [1e3 * timing.median for timing in timings] for name, timings in seconds.items()}
    floor, ours = case.cost_floor(card), medians["graph"]
    row: Row = {f"{name} ms": 1e3 * median for name, median in medians.items()}
    row |= {"floor ms": 1e3 * floor, "share of the floor": floor / ours}
    row |= {f"times faster than {name}": medians[name] / ours for name in works if name not in ("graph", "eager")}
    return row | {"text tokens/s": case.slots * case.config.segment_size / ours, "rounds ms": spread}


def _error_ratio(case: Case) -> float:
    """Of the memory state after a few segments: ours against fp32 on Hugging Face, divided by its own in our dtype."""
    ids, executor = case.ids, case.engine.executor
    ours = executor.initial_memory(case.slots)
    for segment in ids:
        ours = executor.fold(segment, ours)
    whole = torch.cat(list(ids), dim=1)
    truth = case.baseline("fair", torch.float32)(whole).memory_state.double()
    if case.place.dtype == torch.float32:
        error = float((ours.double() - truth).abs().max())
        return 0.0 if error < 1e-4 else math.inf
    theirs = case.baseline("fair", case.place.dtype)(whole).memory_state.double()
    return float((ours.double() - truth).norm() / (theirs - truth).norm())


def _same_bits(case: Case) -> bool:
    segment, memory = case.ids[0], case.engine.initial_memory(case.slots)
    eager = _eager_twin(case.engine)
    return torch.equal(case.engine.executor.fold(segment, memory), eager.fold(segment, memory))


def _eager_twin(engine: Engine) -> EagerExecutor:
    """The eager executor over the same planned ops."""
    executor = engine.executor
    return executor.eager if isinstance(executor, GraphExecutor) else executor


def graph_step(case: Case) -> Step:
    """What is replayed: a launch of several segments where the slots are one stream."""
    executor = case.engine.executor
    if not isinstance(executor, GraphExecutor):  # a dry run
        return eager_step(case)
    if case.slots > 1:
        key = GraphKey("fold", case.slots)
        return Step(executor.recorded(key).recordings[key].replay)
    segments = max(STREAM_SEGMENTS)
    recorded = executor.stream_graphs(scored=False)
    replay, counter = recorded.recordings[GraphKey("stream", 1, segments)].replay, recorded.buffers["counter"]

    def launch() -> None:
        counter.zero_()
        replay()

    return Step(launch, segments)


def eager_step(case: Case) -> Step:
    eager, segment, memory = _eager_twin(case.engine), case.ids[0], case.engine.initial_memory(case.slots)
    return Step(lambda: eager.fold(segment, memory))


def baseline_step(loop: Any, case: Case) -> Step:
    """One segment after another, the memory state fed back."""
    segment, state = case.ids[0], [loop.memory.expand(case.slots, *loop.memory.shape)]

    def step() -> None:
        state[0] = loop.segment(segment, state[0])[1]

    return Step(step)


# streams


def streams(place: Place) -> Rows:
    """Streams of millions of tokens, end to end: from a token file, and from text. Memory is the same at any length."""
    name = "tiny" if place.dry_run else "gpt2"
    config, short = _config(name), 2_000 if place.dry_run else 10_000
    tokenizer = Tokenizer.from_folder(tokenizer_folder(EMBEDDED, None) or EMBEDDED)
    weights, device = random_weights(config), str(place.device)
    engine = Engine.from_weights(config, weights, tokenizer, device=device, dtype=place.dtype_name)
    with tempfile.TemporaryDirectory() as folder:
        path = _token_file(Path(folder), config, short)
        first, warm = _read(engine, path), _peak(place)
        row: Row = {"name": f"{name}, token file", "tokens": short}
        if not _same_as_steps(engine, path, first):
            yield row | {"failed": "the streamed memory state is not that of single steps"}
            return
        yield row | {"peak bytes": warm}
        for tokens in (3_000, 5_000) if place.dry_run else (2_000_000, 10_000_000):
            path = _token_file(Path(folder), config, tokens)
            yield _stream_row(f"{name}, token file", _read(engine, path), warm, place)
        text = _text_file(Path(folder), 20_000 if place.dry_run else 8_000_000)
        yield _stream_row(f"{name}, text", _read(engine, text), warm, place)


def _token_file(folder: Path, config: RMTConfig, tokens: int) -> Path:
    path = folder / f"{tokens}.npy"
    ids = np.random.default_rng(0).integers(1000, int(config.backbone["vocab_size"]), tokens)
    np.save(path, ids.astype(np.uint16))
    return path


def _text_file(folder: Path, characters: int) -> Path:
    path, noise = folder / "input.txt", noise_text()
    path.write_text((noise * (characters // len(noise) + 1))[:characters], encoding="utf-8")
    return path


def _read(engine: Engine, path: Path) -> Summary:
    summary: Any = None
    for event in engine.run(path):  # not collected: a list of them would be the growth that is measured
        summary = event
    assert isinstance(summary, Summary)
    return summary


def _same_as_steps(engine: Engine, path: Path, summary: Summary) -> bool:
    ids = torch.from_numpy(np.load(path).astype(np.int64))
    eager, memory = _eager_twin(engine), engine.initial_memory()
    for segment in ids.split(engine.config.segment_size)[:-1]:
        memory = eager.fold(segment[None].to(engine.device), memory)
    return torch.equal(memory[0], summary.stream.memory)


def _peak(place: Place) -> int:
    """Bytes that torch has ever held on the device."""
    return torch.cuda.max_memory_reserved(place.device) if place.device.type == "cuda" else 0


def _stream_row(name: str, summary: Summary, warm: int, place: Place) -> Row:
    grown = _peak(place) - warm
    row: Row = {"name": name, "tokens": summary.tokens, "peak bytes": _peak(place), "grown bytes": grown}
    if grown > MEMORY_BOUND:
        return row | {"failed": f"memory grew by {grown:,} bytes"}
    return row | {
        "seconds": summary.seconds,
        "tokens/s": summary.tokens_per_second,
        "ms early": summary.ms_early,
        "ms late": summary.ms_late,
    }


# micro


def micro(place: Place) -> Rows:
    """What decides the next design: launch gaps, a grid barrier, cuBLAS beside our GEMM."""
    if place.device.type == "cuda":
        yield from micro_gpu.launch_gap_rows(place.device)
        yield from micro_gpu.grid_barrier_rows(place.device)
        yield from micro_gpu.gemm_rows(place.device, "triton", place.dtype)
    else:
        yield from micro_gpu.gemm_rows(place.device, "cpu", place.dtype, rows=(16,))


PARTS: dict[str, Callable[[Place], Rows]] = {
    "tests": tests,
    "steps": steps,
    "streams": streams,
    "micro": micro,
    "sanitizer": sanitizer,
}

if __name__ == "__main__":
    main()
