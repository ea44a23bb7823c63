"""Whole inputs through the C++ graph runner on a CPU, functions in place of graphs: the bits of the plain loop."""

from __future__ import annotations

import _thread
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints_for_tests import TinyCheckpoint, tiny_encoder

import rmt_engine.engine
from rmt_engine.engine import EMBEDDED, Engine
from rmt_engine.errors import InputError, NumericalError
from rmt_engine.executors import EagerExecutor
from rmt_engine.graph_executor import GraphExecutor
from rmt_engine.graph_stream import GraphStream, can_stream
from rmt_engine.recording import HostRecorder
from rmt_engine.run import Checkpoints, Progress, Summary

SEGMENT = 11  # odd


def engines(made: Engine) -> tuple[Engine, Engine]:
    """One that replays recordings, and one that computes the same shapes step by step."""
    config, backbone, memory = made.config, made.executor.backbone, made.executor.initial
    pair = []
    for executor in (
        GraphExecutor(config, backbone, memory, HostRecorder()),
        EagerExecutor(config, backbone, memory, fixed=True),
    ):
        engine = Engine(config, executor, made._tokenizer, made.backend)
        engine._weights = made._weights
        pair.append(engine)
    return pair[0], pair[1]


@pytest.fixture(scope="module")
def decoder(tiny_gpt2: TinyCheckpoint) -> tuple[Engine, Engine]:
    return engines(Engine.from_weights(tiny_gpt2.rmt_config(SEGMENT), tiny_gpt2.weights(), device="cpu"))


def token_file(path: Path, count: int, vocab: int = 90) -> Path:
    np.save(path, np.random.default_rng(count).integers(5, vocab, count).astype(np.uint16))
    return path


def read(engine: Engine, path: Path, **options: Any) -> tuple[list[Progress], Summary]:
    *events, summary = engine.run(path, **options)
    assert isinstance(summary, Summary)
    return [event for event in events if isinstance(event, Progress)], summary


def check_same(found: Summary, wanted: Summary) -> None:
    assert torch.equal(found.stream.memory, wanted.stream.memory)
    assert found.stream.rest.tolist() == wanted.stream.rest.tolist()
    assert (found.tokens, found.segments) == (wanted.tokens, wanted.segments)
    assert found.stream.place.folded == wanted.stream.place.folded
    assert found.total == wanted.total


# Around a launch of eight segments, a piece of 64 and the ring of two.
COUNTS = [1, SEGMENT, SEGMENT + 1, 8 * SEGMENT, 9 * SEGMENT + 4, 64 * SEGMENT, 65 * SEGMENT + 1, 135 * SEGMENT + 3]


@pytest.mark.parametrize("count, score", [*((count, False) for count in COUNTS), (5, True), (140 * SEGMENT + 3, True)])
def test_a_token_file(count: int, score: bool, decoder: tuple[Engine, Engine], tmp_path: Path) -> None:
    path = token_file(tmp_path / "ids.npy", count)
    (told, found), (plainly, wanted) = (read(engine, path, score=score) for engine in decoder)
    check_same(found, wanted)
    if score:
        ours, theirs = ([event.scores for event in events if event.scores] for events in (told, plainly))
        assert [s.to_dict() for s in ours] == [s.to_dict() for s in theirs]
        assert found.scores is not None and wanted.scores is not None
        assert np.array_equal(found.scores.log_probabilities, wanted.scores.log_probabilities)
    assert [event.position for event in told] == sorted(event.position for event in told)
    assert told[-1].fraction == 1.0


@pytest.mark.parametrize("alignment", ["right", "center"])
def test_alignments_with_short_segments(alignment: str, decoder: tuple[Engine, Engine], tmp_path: Path) -> None:
    path = token_file(tmp_path / "ids.npy", 20 * SEGMENT + 4)
    check_same(*(read(engine, path, alignment=alignment)[1] for engine in decoder))


def test_a_classifier(tmp_path: Path) -> None:
    tiny = tiny_encoder("bert", seed=3, noise="all", layers=2)
    pair = engines(Engine.from_weights(tiny.rmt_config(SEGMENT), tiny.weights(), device="cpu"))
    path = token_file(tmp_path / "ids.npy", 17 * SEGMENT + 4)
    found, wanted = (read(engine, path, alignment="right")[1] for engine in pair)
    check_same(found, wanted)
    assert found.stream.classify() == wanted.stream.classify()


def test_the_embedded_checkpoint_reads_a_text_and_answers(tmp_path: Path) -> None:
    pair = engines(Engine.from_pretrained(EMBEDDED, device="cpu"))
    path = tmp_path / "text.txt"
    path.write_text("Mary went to the garden. " + "The quick brown fox jumps over the lazy dog. " * 300)
    found, wanted = (read(engine, path)[1] for engine in pair)
    assert found.segments > 20
    check_same(found, wanted)
    question = "Where is Mary?"
    assert found.stream.ask(question, 4) == wanted.stream.ask(question, 4)


def test_saved_on_the_way_and_resumed(decoder: tuple[Engine, Engine], tmp_path: Path) -> None:
    graph, plain = decoder
    path, state = token_file(tmp_path / "ids.npy", 260 * SEGMENT + 5), tmp_path / "s.state"
    checkpoints = Checkpoints(state, every=SEGMENT * 64)
    saved = []
    for event in graph.run(path, checkpoints=checkpoints):
        if checkpoints.saved_at is not None and isinstance(event, Progress) and checkpoints.saved_at not in saved:
            saved.append(checkpoints.saved_at)
            check_same_as_prefix(plain, graph.resume(state), path, checkpoints.saved_at)
            if len(saved) == 2:
                break  # the generator is closed: the state is saved once more
    check_same(read(graph, path, resume=state)[1], read(plain, path)[1])
    assert not graph.executor.stream_in_use  # type: ignore[attr-defined]


def check_same_as_prefix(engine: Engine, stream: Any, path: Path, count: int) -> None:
    plain = engine.stream()
    plain.feed(np.load(path)[:count])
    assert torch.equal(stream.memory, plain.memory) and stream.rest.tolist() == plain.rest.tolist()


def watched(executor: GraphExecutor, before: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls `before` with a count at every launch of the stream's graphs."""
    launches = iter(range(1 << 30))
    for recording in executor.stream_graphs(scored=False).recordings.values():
        work = recording.work  # type: ignore[attr-defined]

        def wrapped(work: Callable[[], Any] = work) -> Any:
            before(next(launches))
            return work()

        monkeypatch.setattr(recording, "work", wrapped)


def graph_executor(engine: Engine) -> GraphExecutor:
    assert isinstance(engine.executor, GraphExecutor)
    return engine.executor


def test_an_interrupted_run_is_saved_and_goes_on(
    decoder: tuple[Engine, Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, plain = decoder
    path, state = token_file(tmp_path / "ids.npy", 250 * SEGMENT), tmp_path / "s.state"
    with monkeypatch.context() as patch:
        watched(graph_executor(graph), lambda launch: _thread.interrupt_main() if launch == 20 else None, patch)
        with pytest.raises(KeyboardInterrupt):
            read(graph, path, checkpoints=Checkpoints(state))
    assert can_stream(graph.executor)
    stream = graph.resume(state)
    assert 0 < stream.position < 250 * SEGMENT
    check_same_as_prefix(plain, stream, path, stream.position)
    check_same(read(graph, path, resume=state)[1], read(plain, path)[1])


def test_a_device_that_fails_leaves_the_last_place_that_was_sure(
    decoder: tuple[Engine, Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, plain = decoder

    def fail(launch: int) -> None:
        if launch == 20:
            raise torch.OutOfMemoryError("no room for a launch")

    path, state = token_file(tmp_path / "ids.npy", 250 * SEGMENT), tmp_path / "s.state"
    with monkeypatch.context() as patch:
        watched(graph_executor(graph), fail, patch)
        with pytest.raises(torch.OutOfMemoryError, match="no room for a launch"):
            read(graph, path, checkpoints=Checkpoints(state))
    stream = graph.resume(state)
    assert stream.segments in (64, 128)  # pieces that had come back
    check_same_as_prefix(plain, stream, path, stream.position)
    check_same(read(graph, path, resume=state)[1], read(plain, path)[1])


def test_a_memory_that_is_not_finite_is_told_at_its_segment(tiny_gpt2: TinyCheckpoint, tmp_path: Path) -> None:
    weights = dict(tiny_gpt2.weights())
    table = weights["transformer.wte.weight"].clone()
    table[89] = torch.nan
    config = replace(tiny_gpt2.rmt_config(SEGMENT))
    pair = engines(Engine.from_weights(config, {**weights, "transformer.wte.weight": table}, device="cpu"))
    ids = np.random.default_rng(0).integers(5, 80, 130 * SEGMENT)
    ids[101 * SEGMENT + 3] = 89
    np.save(tmp_path / "ids.npy", ids)
    places = []
    for engine in pair:
        events = engine.run(tmp_path / "ids.npy", checkpoints=Checkpoints(tmp_path / "s.state"))
        with pytest.raises(NumericalError, match=r"not finite after segment 101 \(tokens 1111 to 1121\)"):
            list(events)
        places.append(engine.resume(tmp_path / "s.state"))
    assert places[1].segments == 101 and 64 <= places[0].segments <= 101
    check_same_as_prefix(pair[1], places[0], tmp_path / "ids.npy", places[0].position)


def test_errors_of_the_input(decoder: tuple[Engine, Engine], tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(5, 80, 90 * SEGMENT)
    ids[85 * SEGMENT] = 271
    np.save(tmp_path / "ids.npy", ids)
    saved = []
    for engine in decoder:
        with pytest.raises(InputError, match=r"token 271 at position 935 is outside the vocabulary"):
            read(engine, tmp_path / "ids.npy", checkpoints=Checkpoints(tmp_path / "s.state"))
        saved.append(engine.resume(tmp_path / "s.state"))
    assert torch.equal(saved[0].memory, saved[1].memory) and saved[0].position == saved[1].position


def test_two_streams_of_one_engine_take_turns(decoder: tuple[Engine, Engine], tmp_path: Path) -> None:
    """The second one finds the stream's graphs in use, and folds segment by segment."""
    graph, plain = decoder
    paths = [token_file(tmp_path / f"{n}.npy", n * SEGMENT) for n in (140, 70)]
    first = graph.run(paths[0])
    next(first)
    check_same(read(graph, paths[1])[1], read(plain, paths[1])[1])
    *_, summary = first
    assert isinstance(summary, Summary)
    check_same(summary, read(plain, paths[0])[1])


class PlacedRecorder(HostRecorder):
    """Knows whether its device is current."""

    here = False

    @contextmanager
    def on_device(self) -> Iterator[None]:
        self.here = True
        yield
        self.here = False

    def stream(self) -> int:
        assert self.here
        return super().stream()


def test_the_runner_is_made_where_its_device_is_current(decoder: tuple[Engine, Engine]) -> None:
    """Its context is the one that is current then: with several cards, not always that of the graphs."""
    engine = decoder[1]
    executor = GraphExecutor(engine.config, engine.executor.backbone, engine.executor.initial, PlacedRecorder())
    GraphStream(executor, engine.stream().place, lambda position: position).close()


def test_documents_side_by_side_record_nothing_once_they_have_begun(decoder: tuple[Engine, Engine]) -> None:
    made = decoder[0]
    executor = GraphExecutor(made.config, made.executor.backbone, made.executor.initial, HostRecorder())
    engine = Engine(made.config, executor, made._tokenizer, made.backend)
    ids = np.random.default_rng(0).integers(5, 80, 9 * SEGMENT)
    results = engine.run_many([ids[: n * SEGMENT + 3] for n in (2, 5, 8)], slots=3, score=True)
    begun = executor.plan.keys
    found = list(results)
    assert executor.plan.keys == begun
    plain = list(decoder[1].run_many([ids[: n * SEGMENT + 3] for n in (2, 5, 8)], slots=3, score=True))
    for one, other in zip(found, plain, strict=True):
        assert one.stream is not None and other.stream is not None
        assert torch.equal(one.stream.memory, other.stream.memory)
        assert one.stream.scores().total == other.stream.scores().total


def test_an_engine_is_built_for_slots(tiny_gpt2: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rmt_engine.engine, "why_no_graphs", lambda device: None)
    monkeypatch.setattr(rmt_engine.engine, "CudaRecorder", lambda device: HostRecorder())
    config, weights = tiny_gpt2.rmt_config(SEGMENT), tiny_gpt2.weights()
    engine = Engine.from_weights(config, weights, device="cpu", executor="graph", slots=3)
    assert {key.slots for key in graph_executor(engine).plan.keys} == {1, 2, 4}
    for executor in ("eager", "graph"):
        with pytest.raises(ValueError, match="slots must be at least 1; got 0"):
            Engine.from_weights(config, weights, device="cpu", executor=executor, slots=0)


def test_one_stream_at_a_time(decoder: tuple[Engine, Engine]) -> None:
    executor, place = graph_executor(decoder[0]), decoder[0].stream().place
    folding = GraphStream(executor, place, lambda position: position)
    with pytest.raises(RuntimeError, match="fold another stream; close that one first"):
        GraphStream(executor, place, lambda position: position)
    folding.close()
    with pytest.raises(ZeroDivisionError):
        GraphStream(executor, place, lambda position: 1 // position)  # what fails while it opens gives them back
    GraphStream(executor, place, lambda position: position).close()
