"""Slots: documents side by side are documents alone; broken ones are told; bits do not depend on the neighbours."""

from __future__ import annotations

import random
import re
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_stream import SEGMENT, TEXT, engine_of, memory_of, random_ids
from torch import Tensor

from rmt_engine import slot_count, slots
from rmt_engine.documents import Document
from rmt_engine.engine import Engine
from rmt_engine.errors import InputError, NumericalError
from rmt_engine.memory import MemoryState
from rmt_engine.memory_plan import plan_memory
from rmt_engine.slots import DocumentResult, SegmentBatch

LENGTHS = [1, 3 * SEGMENT, 2 * SEGMENT + 7, SEGMENT - 1, SEGMENT, SEGMENT + 1, 9 * SEGMENT + 3, 5, 4 * SEGMENT, 70]


def documents(seed: int = 0) -> list[np.ndarray]:
    return [random_ids(length, seed) for length in LENGTHS]


def picture(result: DocumentResult) -> tuple[Any, ...]:
    """All that a document's bits are."""
    assert result.error is None and result.stream is not None
    place = result.stream.place
    return result.index, result.tokens, place.memory.tolist(), place.rest.tolist(), result.answers, result.labels


@pytest.mark.parametrize("count", [1, 3, 8, 40])
@pytest.mark.parametrize(
    "kind, alignment", [("gpt2", "left"), ("llama", "left"), ("gpt2", "right"), ("bert", "center")]
)
def test_documents_side_by_side_are_documents_alone(kind: str, alignment: str, count: int) -> None:
    engine = engine_of(kind, alignment)
    results = list(engine.run_many(documents(), slots=count))
    assert [result.index for result in results] == list(range(len(LENGTHS)))
    for result, ids in zip(results, documents(), strict=True):
        assert (result.tokens, result.id) == (len(ids), str(result.index)) and result.stream is not None
        assert result.segments == -(-len(ids) // SEGMENT)
        if kind == "bert":
            alone = engine.stream(length=len(ids))
            alone.feed(ids)
            assert [name for name, _ in result.labels] == [name for name, _ in alone.classify()]
        result.stream.finish()
        assert torch.allclose(result.stream.memory, memory_of(engine, ids), atol=1e-5)


@pytest.mark.parametrize("score", [False, True])
@pytest.mark.parametrize("kind, alignment", [("gpt2", "left"), ("llama", "right"), ("bert", "center")])
def test_segments_of_any_length_share_a_batch(kind: str, alignment: str, score: bool) -> None:
    """What a GPU does, on the CPU."""
    engine = engine_of(kind, alignment)
    streams = [engine.stream(length=len(ids), score=score and kind != "bert") for ids in documents()]
    segments = [ids[: stream.place.next_size] for stream, ids in zip(streams, documents(), strict=True)]
    seconds = [ids[len(first) :][: len(first)] for ids, first in zip(documents(), segments, strict=True)]
    alone, ragged = SegmentBatch(engine, 1, False), SegmentBatch(engine, 4, True)
    places = [stream.place for stream in streams]
    one, other = alone.fold(places, segments), ragged.fold(places, segments)
    for a, b in zip(one, other, strict=True):
        assert isinstance(a, MemoryState) and isinstance(b, MemoryState)
        assert torch.allclose(a.memory, b.memory, atol=1e-5) and (a.segments, a.folded) == (b.segments, b.folded)
    places = [place for place in one if isinstance(place, MemoryState)]
    more = [i for i, ids in enumerate(seconds) if len(ids)]
    pairs = [batch.fold([places[i] for i in more], [seconds[i] for i in more]) for batch in (alone, ragged)]
    for a, b in zip(*pairs, strict=True):
        assert (
            isinstance(a, MemoryState) and isinstance(b, MemoryState) and torch.allclose(a.memory, b.memory, atol=1e-5)
        )
        assert (a.scores is None) == (not score or kind == "bert")
        if a.scores is not None and b.scores is not None:
            assert a.scores.total.tokens == b.scores.total.tokens == a.folded
            assert a.scores.total.nll == pytest.approx(b.scores.total.nll, rel=1e-5)


def test_every_kind_of_source_gives_the_same(tmp_path: Path) -> None:
    engine = engine_of()
    ids = engine.tokenizer.encode(TEXT)
    (tmp_path / "a.txt").write_text(TEXT)
    np.save(tmp_path / "a.npy", ids.astype(np.uint16))
    sources = [TEXT, TEXT.encode(), ids, ids.tolist(), torch.from_numpy(ids), tmp_path / "a.txt", tmp_path / "a.npy"]
    first, *others = [picture(result)[1:] for result in engine.run_many([*sources, Document("name", TEXT)], slots=3)]
    assert others == [first] * len(sources) and first[0] == len(ids)


def test_a_long_text_in_memory_is_read_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    (whole,) = engine.run_many([TEXT * 5])
    monkeypatch.setattr("rmt_engine.documents.WHOLE_CHARS", 40)
    (pieces,) = engine.run_many([TEXT * 5])
    assert picture(whole) == picture(pieces)


def test_questions_are_answered_as_by_a_stream() -> None:
    engine = engine_of()
    questions = ["the hall?", "who?"]
    for result, ids in zip(engine.run_many(documents(), ask=questions, slots=4), documents(), strict=True):
        stream = engine.stream()
        stream.feed(ids)
        assert list(result.answers) == [stream.ask(question) for question in questions]


def test_scores_are_those_of_a_stream() -> None:
    engine = engine_of()
    for result, ids in zip(engine.run_many(documents(), score=True, slots=4), documents(), strict=True):
        stream = engine.stream(score=True)
        stream.feed(ids)
        assert result.stream is not None
        assert result.stream.scores().total.nll == pytest.approx(stream.scores().total.nll, rel=1e-5)


# -------------------------------------------------------------------------------------------- what is broken


def broken(tmp_path: Path) -> list[tuple[Any, str]]:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 50)
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    return [
        (tmp_path / "empty.txt", "^expected text, found an empty file: "),
        (tmp_path / "latin.txt", "^expected UTF-8, found 0xe9 at byte 3 "),
        (tmp_path / "nowhere.txt", "^there is no file "),
        (tmp_path / "cut.npy", "cut.npy"),
        (tmp_path, "^expected a text file, found a directory: "),
        (b"\xff", "^expected UTF-8, found 0xff at byte 0 "),
        ("a \ud800 b", "^expected text, found the lone surrogate "),
        ([1, 271], r"^token id 271 at place 1 is outside 0\.\.270 "),
        ("", "^expected a text, found no tokens of content$"),
        ([0.5], "^expected 1-D integer token ids, got float64 "),
        (InputError("line 7 is no record"), "^line 7 is no record$"),
    ]


@pytest.mark.parametrize("order", ["input", "completed"])
def test_a_broken_document_is_told_and_the_rest_goes_on(tmp_path: Path, order: str) -> None:
    engine, wrong = engine_of(), broken(tmp_path)
    good = documents()
    mixed = [Document(f"bad {i}", source) for i, (source, _) in enumerate(wrong)]
    for i, ids in enumerate(good):
        mixed.insert(2 * i, Document(f"good {i}", ids))
    results = {result.id: result for result in engine.run_many(mixed, slots=3, order=order)}
    assert len(results) == len(mixed)
    for i, (_, words) in enumerate(wrong):
        error = results[f"bad {i}"].error
        assert error is not None and re.search(words, str(error)), (words, error)
    alone = [picture(result)[2:] for result in engine.run_many(good, slots=3)]
    assert [picture(results[f"good {i}"])[2:] for i in range(len(good))] == alone


def test_a_memory_that_is_not_finite_is_one_documents_failure() -> None:
    engine = engine_of()
    real = engine.executor.fold

    class Failing:
        def __getattr__(self, name: str) -> Any:
            return getattr(engine.executor, name)

        def fold(self, ids: Tensor, memory: Tensor, lengths: Tensor | None = None) -> Tensor:
            out = real(ids, memory, lengths).clone()
            out[(ids == 96).any(1)] = float("nan")
            return out

    failing = Engine(engine.config, Failing(), engine.tokenizer, engine.backend)  # type: ignore[arg-type]
    good = [np.minimum(ids, 95) for ids in documents()]
    bad = np.concatenate([good[1], [96] * SEGMENT, good[1]])
    *results, last = failing.run_many([*good, bad], slots=4)
    assert isinstance(last.error, NumericalError) and "not finite after segment 3" in str(last.error)
    assert list(map(picture, results)) == list(map(picture, engine.run_many(good, slots=4)))


# ---------------------------------------------------------------------------------------- order and laziness


def test_results_come_in_input_order_or_as_completed() -> None:
    engine = engine_of()
    lengths = [20 * SEGMENT, 5, 3 * SEGMENT, 7, 8, 9, 2 * SEGMENT, 30 * SEGMENT]
    made = [random_ids(length) for length in lengths]
    ordered = list(engine.run_many(made, slots=2))
    completed = list(engine.run_many(made, slots=2, order="completed"))
    assert [result.index for result in ordered] == list(range(len(made)))
    assert [result.index for result in completed] == [1, 2, 3, 4, 5, 6, 0, 7]
    assert sorted(map(picture, completed)) == list(map(picture, ordered))


class Text(str):
    """A text that can be watched."""


@pytest.mark.parametrize("order", ["input", "completed"])
def test_only_the_open_documents_are_held(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "WAITING", 20)
    alive: weakref.WeakSet[Text] = weakref.WeakSet()
    most = 0

    def many() -> Iterator[Text]:
        nonlocal most
        for number in range(150):
            text = Text("the milk " * (200 if number == 5 else 1 + number % 20))
            alive.add(text)
            most = max(most, len(alive))
            yield text

    taken = 0
    for _ in engine_of().run_many(many(), slots=4, order=order):
        taken += 1
    assert taken == 150 and most <= 6


def test_a_slow_document_does_not_let_results_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "WAITING", 20)
    taken: list[int] = []

    def many() -> Iterator[np.ndarray]:
        for number in range(100):
            taken.append(number)
            yield random_ids(100 * SEGMENT if number == 0 else 5)

    results = engine_of().run_many(many(), slots=2)
    assert next(results).index == 0 and len(taken) == 20
    assert len(list(results)) == 99


def test_answers_that_wait_for_each_other_do_not_stop_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer results may wait than are answered together."""
    monkeypatch.setattr(slots, "WAITING", 3)
    results = list(engine_of().run_many([random_ids(5 + n) for n in range(20)], slots=8, ask="who?", max_new_tokens=2))
    assert [(result.index, len(result.answers)) for result in results] == [(n, 1) for n in range(20)]


def test_leaving_early_closes_what_is_open(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(TEXT * 20000)
    before = threading.active_count()
    results = engine_of().run_many([tmp_path / "long.txt", "short text", "another"], slots=3, order="completed")
    assert next(results).index == 1
    assert threading.active_count() > before
    results.close()
    assert threading.active_count() == before


@pytest.mark.parametrize(
    "options, words",
    [
        ({"slots": 0}, "slots must be at least 1; got 0"),
        ({"order": "any"}, "order must be input or completed; got 'any'"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_is_read(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}$"):
        engine_of().run_many(iter([]), **options)


# --------------------------------------------------------------------------------------------------- encode


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_encode_gives_the_memory_states(kind: str) -> None:
    engine = engine_of(kind, "left")
    states = engine.encode(documents(), slots=4)
    expected = torch.stack([memory_of(engine, ids) for ids in documents()])
    assert states.shape == expected.shape and torch.allclose(states, expected, atol=1e-5)
    count, width = expected.shape[1:]
    for pooling, value in {
        "mean": states.mean(1),
        "first": states[:, 0],
        "last": states[:, -1],
        "flat": states.reshape(-1, count * width),
    }.items():
        assert torch.equal(engine.encode(documents(), slots=4, pooling=pooling), value)


def test_what_is_finished_is_folded_whole() -> None:
    engine = engine_of()
    for result, ids in zip(engine.run_many(documents(), finish=True, slots=3, ask="who?"), documents(), strict=True):
        assert result.stream is not None and len(result.stream.rest) == 0
        assert (result.tokens, result.segments) == (len(ids), -(-len(ids) // SEGMENT))
        assert torch.allclose(result.stream.memory, memory_of(engine, ids), atol=1e-5)
        assert result.answers == (result.stream.ask("who?"),)


def test_encode_says_which_document_is_broken() -> None:
    engine = engine_of()
    with pytest.raises(InputError, match=r"^document 1: expected UTF-8, found 0xff at byte 0 "):
        engine.encode(["fine", b"\xff"])
    with pytest.raises(ValueError, match=r"^pooling must be one of none, mean, first, last, flat; got 'max'$"):
        engine.encode(["fine"], pooling="max")
    with pytest.raises(ValueError, match=r"^expected at least one document: there is nothing to encode$"):
        engine.encode([])


# ------------------------------------------------------------------------------------------------------ bits


def test_bits_do_not_depend_on_the_neighbours() -> None:
    engine, rng = engine_of(), random.Random(0)
    mine = [random_ids(length, seed=9) for length in (3 * SEGMENT, 4 * SEGMENT + 7)]
    expected = None
    for _ in range(5):
        others = [random_ids(rng.randrange(1, 8 * SEGMENT), rng.randrange(99)) for _ in range(rng.randrange(12))]
        places = sorted(rng.sample(range(len(others) + 2), 2))
        for place, ids in zip(places, mine, strict=True):
            others.insert(place, ids)
        results = list(engine.run_many(others, slots=5, ask="who?"))
        bits = [picture(results[place])[1:] for place in places]
        expected = expected or bits
        assert bits == expected


@pytest.mark.parametrize("kind, alignment", [("gpt2", "left"), ("llama", "right"), ("bert", "center")])
def test_batch_invariant_bits_are_those_of_a_stream(kind: str, alignment: str) -> None:
    """Whatever the number of slots is."""
    engine, expected = engine_of(kind, alignment), []
    options: dict[str, Any] = {} if kind == "bert" else {"ask": "who?", "score": True, "max_new_tokens": 3}
    for ids in documents():
        stream = engine.stream(length=len(ids), score=bool(options))
        stream.feed(ids)
        asked = (stream.ask("who?", 3),) if options else ()
        sums = stream.place.scores.sums() if stream.place.scores is not None else None
        expected.append((stream.memory.tolist(), asked, sums, () if options else tuple(stream.classify())))
    for count in (1, 3, 9):
        found = []
        for result in engine.run_many(documents(), slots=count, batch_invariant=True, **options):
            assert result.stream is not None
            scores = result.stream.place.scores
            sums = None if scores is None else scores.sums()
            found.append((result.stream.memory.tolist(), result.answers, sums, result.labels))
        assert found == expected


# ------------------------------------------------------------------------------------------- how many slots


def test_the_batch_is_chosen_by_the_models_sizes() -> None:
    engine = engine_of()
    rows = 32  # 20 tokens and twice 4 memory tokens, padded
    assert [slot_count.batch_size(engine, slots) for slots in (1, 5, 100)] == [1, 5, 512 // rows]


@pytest.mark.parametrize(
    "ms, expected",
    [
        ({1: 10, 2: 10, 4: 10, 8: 10, 16: 10}, 16),  # twice the slots for nothing, as long as there are any
        ({1: 10, 2: 20}, 1),  # no gain
        ({1: 10, 2: 12, 4: 23.9}, 2),
        ({1: 3000, 2: 1}, 1),  # a model so large is not measured for long
    ],
)
def test_slots_are_chosen_by_the_time_of_a_step(
    ms: dict[int, float], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot_count, "step_seconds", lambda engine, slots: ms[slots] / 1e3)
    assert slot_count.choose_slots(engine_of()) == expected


def test_slots_are_as_many_as_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    monkeypatch.setattr(slot_count, "step_seconds", lambda engine, slots: 1e-3)
    plan = plan_memory(engine.config, engine.dtype)
    one = plan.step + max(plan.score, plan.answer) + plan.state
    for free, expected in ((None, 16), (10 * one, 4), (5 * one, 2), (one // 2, 1)):
        monkeypatch.setattr(slot_count, "free_bytes", lambda device, free=free: free)
        assert slot_count.choose_slots(engine) == expected


def test_slots_are_measured_where_none_are_given() -> None:
    engine = engine_of()
    free = slot_count.free_bytes(engine.device)
    assert free is not None and free > 1 << 20
    assert slot_count.step_seconds(engine, 2) > 0
    assert [result.tokens for result in engine.run_many(documents())] == LENGTHS
