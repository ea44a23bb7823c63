"""The graph executor and the C++ runner on tiny checkpoints, every step against the eager executor, bit for bit.

On a CPU functions stand in place of graphs; on a card graphs are captured and replayed, so little that
compute-sanitizer can look at it: `make test-gpu-sanitize`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints_for_tests import TinyCheckpoint, tiny_decoder, tiny_encoder
from torch import Tensor

from rmt_engine.engine import Engine
from rmt_engine.errors import NumericalError
from rmt_engine.executors import EagerExecutor
from rmt_engine.graph_executor import GraphExecutor
from rmt_engine.graph_plan import PIECE_SEGMENTS
from rmt_engine.recording import HostRecorder
from rmt_engine.run import Summary

SEGMENT, SLOTS = 11, 2
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on a CPU, the Triton kernels one element after another
NO_CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="this torch sees no CUDA device")
PLACES = ["host", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CARD])]


def engines(tiny: TinyCheckpoint, place: str, **changed: Tensor) -> tuple[Engine, Engine]:
    """One that replays, and one that calls the same planned ops one after another."""
    config, weights = tiny.rmt_config(SEGMENT), {**tiny.weights(), **changed}
    if place == "cuda":
        choices = {"device": "cuda", "dtype": "float32", "backend": "triton"}
        graph = Engine.from_weights(config, weights, executor="graph", slots=SLOTS, **choices)
    else:
        made = Engine.from_weights(config, weights, device="cpu", backend="triton" if INTERPRETED else "auto")
        replays = GraphExecutor(config, made.executor.backbone, made.executor.initial, HostRecorder(), SLOTS)
        graph = Engine(config, replays, None, made.backend)
    executor = graph.executor
    eager = EagerExecutor(config, executor.backbone, executor.initial, fixed=True)
    return graph, Engine(config, eager, None, graph.backend)


@pytest.fixture(scope="module", params=PLACES)
def decoder(request: pytest.FixtureRequest) -> tuple[Engine, Engine]:
    return engines(tiny_decoder("gpt2", seed=5, noise="all", layers=1), request.param)


@pytest.fixture(scope="module", params=PLACES)
def encoder(request: pytest.FixtureRequest) -> tuple[Engine, Engine]:
    return engines(tiny_encoder("bert", seed=3, noise="all", layers=1), request.param)


def decoded(executor: EagerExecutor, ids: Tensor, memory: Tensor) -> Sequence[Tensor]:
    logits, caches = executor.prefill(ids, memory, 3)
    rows = [logits]
    for _ in range(2):
        rows.append(executor.decode(rows[-1].argmax(-1)[:, None], caches))
    return rows


STEPS: dict[str, Callable[[EagerExecutor, Tensor, Tensor], Sequence[Tensor]]] = {
    "fold": lambda e, ids, memory: [e.fold(ids, memory)],
    "logits": lambda e, ids, memory: e.fold_with_logits(ids, memory),
    "scores at the start": lambda e, ids, memory: e.fold_with_scores(ids, memory, None),
    "scores": lambda e, ids, memory: e.fold_with_scores(ids, memory, memory[:, 0].contiguous()),
    "answer": decoded,
}


def check_step(step: Callable[..., Sequence[Tensor]], pair: tuple[Engine, Engine]) -> None:
    for slots, text in ((SLOTS, SEGMENT), (1, 4), (SLOTS, 1), (1, SEGMENT)):
        ids = torch.randint(5, 90, (slots, text), generator=torch.Generator().manual_seed(text)).to(pair[0].device)
        found, wanted = (step(engine.executor, ids, engine.initial_memory(slots)) for engine in pair)
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other) and bool(one.isfinite().all())


@pytest.mark.parametrize("step", STEPS)
def test_steps_of_a_decoder(step: str, decoder: tuple[Engine, Engine]) -> None:
    check_step(STEPS[step], decoder)


@pytest.mark.parametrize("step", ["fold", "logits", "label"])
def test_steps_of_a_classifier(step: str, encoder: tuple[Engine, Engine]) -> None:
    check_step(STEPS.get(step, lambda e, ids, memory: [e.logits(ids, memory)]), encoder)


def read(engine: Engine, path: Path, **options: Any) -> Summary:
    summary: Any = None
    for event in engine.run(path, **options):
        summary = event
    assert isinstance(summary, Summary)
    return summary


@pytest.mark.parametrize("score", [False, True])
def test_a_stream_over_more_than_one_piece(score: bool, decoder: tuple[Engine, Engine], tmp_path: Path) -> None:
    """Launches of eight segments and of one, a second piece, a rest."""
    count = (PIECE_SEGMENTS + 11) * SEGMENT + 4
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(5, 90, count).astype(np.uint16))
    found, wanted = (read(engine, tmp_path / "ids.npy", score=score) for engine in decoder)
    assert torch.equal(found.stream.memory, wanted.stream.memory)
    assert found.stream.rest.tolist() == wanted.stream.rest.tolist()
    assert found.total == wanted.total and (found.total is not None) is score


def test_single_steps_while_another_thread_reads_a_stream(decoder: tuple[Engine, Engine], tmp_path: Path) -> None:
    """The runner launches at any time, also between a replay and the copy of its result."""
    graph, eager = decoder
    np.save(tmp_path / "ids.npy", np.random.default_rng(1).integers(5, 90, 100 * SEGMENT).astype(np.uint16))
    ids = torch.arange(5, 5 + SEGMENT, device=graph.device)[None]
    wanted = eager.executor.fold(ids, eager.initial_memory())
    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(read, graph, tmp_path / "ids.npy")
        while not reading.done():
            assert torch.equal(graph.executor.fold(ids, graph.initial_memory()), wanted)
    assert torch.equal(reading.result().stream.memory, read(eager, tmp_path / "ids.npy").stream.memory)


def test_documents_side_by_side(decoder: tuple[Engine, Engine]) -> None:
    ids = np.random.default_rng(0).integers(5, 90, 5 * SEGMENT)
    documents = [ids[: n * SEGMENT + 3] for n in (1, 4, 2)]
    pairs = zip(*(engine.run_many(documents, slots=SLOTS, finish=True) for engine in decoder), strict=True)
    for one, other in pairs:
        assert one.stream is not None and other.stream is not None
        assert torch.equal(one.stream.memory, other.stream.memory)


@pytest.mark.parametrize("place", PLACES)
def test_a_memory_that_is_not_finite(place: str, tmp_path: Path) -> None:
    """The graphs themselves keep the memory from before that launch."""
    tiny = tiny_decoder("gpt2", seed=5, noise="all", layers=1)
    table = tiny.weights()["transformer.wte.weight"].clone()
    table[89] = torch.nan
    graph, _ = engines(tiny, place, **{"transformer.wte.weight": table})
    ids = np.random.default_rng(0).integers(5, 80, 20 * SEGMENT)
    ids[13 * SEGMENT + 3] = 89
    np.save(tmp_path / "ids.npy", ids)
    with pytest.raises(NumericalError, match="not finite after segment 13"):
        read(graph, tmp_path / "ids.npy")
