"""The graph executor and the C++ runner on a card. `make test-gpu` runs it; on a CPU every test is skipped."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rmt_engine.bench.setup import named_config, random_weights
from rmt_engine.engine import Engine
from rmt_engine.executors import EagerExecutor
from rmt_engine.graph_executor import GraphExecutor
from rmt_engine.run import Summary

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this torch sees no CUDA device"),
]
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
LAYERS = 2  # of the shapes whose bits are compared: as wide as the real ones
MEMORY_BOUND = 1 << 20


def engine_of(name: str, dtype: str, layers: int | None = None) -> tuple[Engine, dict[str, Tensor]]:
    config = named_config(name)
    key = "n_layer" if "n_layer" in config.backbone else "num_hidden_layers"
    if layers is not None:
        config = replace(config, backbone={**config.backbone, key: layers})
    weights = random_weights(config)
    engine = Engine.from_weights(config, weights, device="cuda", dtype=dtype, backend="triton", executor="graph")
    return engine, weights


@pytest.fixture(scope="module", params=["gpt2", "llama-3.2-1b"])
def decoder(request: pytest.FixtureRequest) -> Iterator[Engine]:
    yield engine_of(request.param, "bfloat16", LAYERS)[0]
    torch.cuda.empty_cache()


def eager_of(engine: Engine) -> EagerExecutor:
    assert isinstance(engine.executor, GraphExecutor)
    return engine.executor.eager


def ids_of(engine: Engine, slots: int, text: int) -> Tensor:
    generator = torch.Generator().manual_seed(slots * 1000 + text)
    return torch.randint(1000, engine.vocab_size, (slots, text), generator=generator).cuda()


@pytest.mark.parametrize("name", ["gpt2", "bert-base", "gpt2-medium", "llama-3.2-1b"])
def test_parity_with_hugging_face_on_real_shapes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32: the same within rounding. bf16: at most twice the error that torch itself makes in bf16."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import baselines

    error = {}
    for dtype in ("float32", "bfloat16"):
        engine, weights = engine_of(name, dtype)
        size = engine.config.segment_size
        ids = ids_of(engine, 2, 3 * size)
        truth = baselines.build("fair", engine.config, weights, device="cuda")(ids).memory_state.double()
        memory = engine.initial_memory(2)
        for segment in ids.split(size, dim=1):
            memory = engine.executor.fold(segment, memory)
        error[dtype] = float((memory.double() - truth).norm() / truth.norm())
        theirs = baselines.build("fair", engine.config, weights, dtype=torch.bfloat16, device="cuda")(ids)
        error["torch"] = float((theirs.memory_state.double() - truth).norm() / truth.norm())
        del engine
        torch.cuda.empty_cache()
    assert error["float32"] < 1e-4
    assert error["bfloat16"] <= 2 * error["torch"]


STEPS: list[Callable[[EagerExecutor, Tensor, Tensor], Any]] = [
    lambda e, ids, memory: (e.fold(ids, memory),),
    lambda e, ids, memory: e.fold_with_logits(ids, memory),
    lambda e, ids, memory: e.fold_with_scores(ids, memory, None),
    lambda e, ids, memory: e.fold_with_scores(ids, memory, memory[:, 0].contiguous()),
    lambda e, ids, memory: decoded(e, ids, memory),
]


def decoded(executor: EagerExecutor, ids: Tensor, memory: Tensor) -> list[Tensor]:
    logits, caches = executor.prefill(ids, memory, 4)
    rows = [logits]
    for _ in range(3):
        rows.append(executor.decode(rows[-1].argmax(-1)[:, None], caches))
    return rows


@pytest.mark.parametrize("step", STEPS)
def test_graph_and_eager_have_the_same_bits(step: Callable[..., Any], decoder: Engine) -> None:
    eager = eager_of(decoder)
    for slots, text in ((1, decoder.config.segment_size), (3, 100), (8, 17), (1, 1)):
        ids, memory = ids_of(decoder, slots, text), decoder.initial_memory(slots)
        for one, other in zip(step(decoder.executor, ids, memory), step(eager, ids, memory), strict=True):
            assert torch.equal(one, other)


def test_bits_do_not_depend_on_the_neighbours(decoder: Engine) -> None:
    for slots in (2, 5, 8):
        ids, memory = ids_of(decoder, slots, decoder.config.segment_size), decoder.initial_memory(slots)
        together = decoder.executor.fold(ids, memory)
        for slot in range(slots):
            alone = decoder.executor.fold(ids[slot : slot + 1], memory[slot : slot + 1])
            assert torch.equal(together[slot], alone[0])


def token_file(folder: Path, engine: Engine, tokens: int) -> Path:
    path = folder / f"{tokens}.npy"
    np.save(path, np.random.default_rng(0).integers(1000, min(engine.vocab_size, 65536), tokens).astype(np.uint16))
    return path


def read(engine: Engine, path: Path, **options: Any) -> Summary:
    summary: Any = None
    for event in engine.run(path, **options):
        summary = event
    assert isinstance(summary, Summary)
    return summary


@pytest.mark.parametrize("score", [False, True])
def test_the_runner_gives_the_bits_of_single_steps(score: bool, decoder: Engine, tmp_path: Path) -> None:
    size = decoder.config.segment_size
    path = token_file(tmp_path, decoder, 150 * size + 7)
    summary = read(decoder, path, score=score)
    plain = Engine(decoder.config, eager_of(decoder), None, "triton").stream(score=score)
    plain.feed(np.load(path).astype(np.int64))
    assert torch.equal(summary.stream.memory, plain.memory)
    assert summary.stream.rest.tolist() == plain.rest.tolist()
    if score:
        assert summary.total == plain.scores().total


def test_memory_is_the_same_at_ten_thousand_and_at_ten_million_tokens(tmp_path: Path) -> None:
    engine, _ = engine_of("gpt2", "bfloat16")
    read(engine, token_file(tmp_path, engine, 10_000))
    torch.cuda.synchronize()
    before, free = torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()[0]
    read(engine, token_file(tmp_path, engine, 10_000_000))
    assert abs(torch.cuda.max_memory_reserved() - before) <= MEMORY_BOUND
    assert abs(torch.cuda.mem_get_info()[0] - free) <= MEMORY_BOUND


def test_out_of_memory_is_exit_code_4(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Mary went to the garden. " * 100)
    code = (
        "import sys, torch; torch.cuda.set_per_process_memory_fraction(1e-4); from rmt_engine.cli import main; "
        f"sys.exit(main(['run', '--input', {str(text)!r}, '--device', 'cuda']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, "out of memory" in done.stderr) == (4, True), done.stderr[-2000:]
