"""Many documents side by side: N slots, each refilled by the next document as soon as one ends.

All that a slot holds is a place in a stream. The full segments of all slots are folded in batches of one fixed size,
whatever is filled; a shorter segment (a document's last one, or one of an alignment that makes its own) runs alone, as
in a stream. So the bits of a document depend on nothing but itself and the size of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rmt_engine.documents import AnyDocument, OpenDocument, Reading, as_document
from rmt_engine.errors import RMTError
from rmt_engine.memory import MemoryState
from rmt_engine.stream import Stream, after_segment

if TYPE_CHECKING:
    from rmt_engine.engine import Engine

CPU_BATCH = 8  # slots of a batch on a CPU: more gain nothing there, and the last documents run in a batch of this size
WAITING = 1024  # results that may wait for an earlier document when they are given in input order
BROKEN = (RMTError, ValueError, OSError)  # what is one document's fault; anything else ends the run


@dataclass(frozen=True)
class DocumentResult:
    """What became of one document.

    index: its number in the input, from 0; id: its own name, or that number. tokens, segments: of content, the last
    segment included. stream: at its end, the last segment not folded yet: to ask, fork, save or feed on. answers: to
    the questions, in their order. labels: a classifier's, best first. error: why it could not be read, or None; then
    there is nothing else.
    """

    index: int
    id: str
    tokens: int = 0
    segments: int = 0
    answers: tuple[str, ...] = ()
    labels: tuple[tuple[str, float], ...] = ()
    stream: Stream | None = field(default=None, repr=False)
    error: Exception | None = None


class SegmentBatch:
    """Folds the next segment of many streams, `size` rows at a time."""

    def __init__(self, engine: Engine, size: int) -> None:
        self.engine, self.size = engine, size

    def fold(self, places: Sequence[MemoryState], segments: Sequence[np.ndarray]) -> list[MemoryState | RMTError]:
        """The places after one segment each; an error in the place of a stream whose memory is no longer finite."""
        done: list[MemoryState | RMTError | None] = [None] * len(places)
        side_by_side = [i for i, place in enumerate(places) if self._is_whole(place, segments[i])]
        for start in range(0, len(side_by_side), self.size):
            members = side_by_side[start : start + self.size]
            outputs = self._run([places[i] for i in members], [segments[i] for i in members], self.size)
            for row, i in enumerate(members):
                done[i] = self._after(places[i], segments[i], [output[row : row + 1] for output in outputs])
        for i, before in enumerate(done):
            if before is None:
                done[i] = self._after(places[i], segments[i], self._run([places[i]], [segments[i]], 1))
        return [place for place in done if place is not None]

    def _is_whole(self, place: MemoryState, ids: np.ndarray) -> bool:
        """Whether a segment is of the kind that runs in the batch: this must depend on nothing but itself."""
        begins = place.scores is not None and place.scores.row is None  # its first token has no row before it
        return len(ids) == self.engine.config.segment_size and not begins

    def _run(self, places: list[MemoryState], segments: list[np.ndarray], rows: int) -> tuple[Tensor, ...]:
        """One call of the executor with `rows` rows of one length, of which the first hold something."""
        executor, initial = self.engine.executor, self.engine.executor.initial
        ids = np.zeros((rows, len(segments[0])), dtype=np.int64)
        ids[: len(segments)] = segments
        tensor = torch.from_numpy(ids).to(self.engine.device)
        empty = rows - len(places)
        memory = torch.cat([*[place.memory for place in places], *[initial[None]] * empty])
        if places[0].scores is None:
            return (executor.fold(tensor, memory),)
        rows_before = [place.scores.row for place in places if place.scores is not None]
        known = [row for row in rows_before if row is not None]
        blank = [initial.new_zeros(1, initial.shape[1])] * empty
        return executor.fold_with_scores(tensor, memory, torch.cat([*known, *blank]) if known else None)

    def _after(self, place: MemoryState, ids: np.ndarray, outputs: Sequence[Tensor]) -> MemoryState | RMTError:
        try:
            return after_segment(place, len(ids), *outputs)
        except RMTError as error:
            return error


def run_many(
    engine: Engine,
    documents: Iterable[AnyDocument],
    *,
    ask: str | Sequence[str] = (),
    max_new_tokens: int = 16,
    slots: int = 8,
    order: str = "input",
    batch_invariant: bool = False,
    errors: str = "strict",
    token_dtype: str | None = None,
    alignment: str | None = None,
    score: bool = False,
    on_step: Callable[[int], None] = lambda tokens: None,
) -> Generator[DocumentResult, None, None]:
    """Reads many documents, `slots` of them side by side, and yields a DocumentResult for each.

    documents: texts, UTF-8 bytes, token ids, Paths or `Document`s; they are taken as slots become free. order: "input",
    or "completed" as they end. A document that cannot be read gives a result with its `error`, and the rest goes on.
    batch_invariant: the bits are those of a stream alone, whatever `slots` is. on_step is told the tokens of each step.
    Raises ValueError.
    """
    if slots < 1:
        raise ValueError(f"slots must be at least 1; got {slots}")
    if order not in ("input", "completed"):
        raise ValueError(f"order must be input or completed; got {order!r}")
    questions = (ask,) if isinstance(ask, str) else tuple(ask)
    size = 1 if batch_invariant else min(slots, CPU_BATCH) if engine.device.type == "cpu" else slots
    reading = Reading(errors, token_dtype, alignment, score)
    reader = _Reader(engine, documents, slots, SegmentBatch(engine, size), reading, on_step)

    results = _answered(reader.results(), questions, max_new_tokens)
    return _in_order(results, reader) if order == "input" else results


def _answered(
    results: Generator[DocumentResult, None, None], questions: Sequence[str], max_new_tokens: int
) -> Generator[DocumentResult, None, None]:
    with closing(results):
        for result in results:
            yield result if result.stream is None else _asked(result, result.stream, questions, max_new_tokens)


def _asked(result: DocumentResult, stream: Stream, questions: Sequence[str], max_new_tokens: int) -> DocumentResult:
    try:
        answers = tuple(stream.ask(question, max_new_tokens) for question in questions)
        labels = tuple(stream.classify()) if stream.engine.config.family == "encoder_classifier" else ()
    except BROKEN as error:
        return DocumentResult(result.index, result.id, error=error)
    return replace(result, answers=answers, labels=labels)


def _in_order(results: Generator[DocumentResult, None, None], reader: _Reader) -> Generator[DocumentResult, None, None]:
    waiting: dict[int, DocumentResult] = {}
    reader.given = 0
    with closing(results):
        for result in results:
            waiting[result.index] = result
            while reader.given in waiting:
                yield waiting.pop(reader.given)
                reader.given += 1


def encode(engine: Engine, documents: Iterable[AnyDocument], *, pooling: str = "none", **options: Any) -> Tensor:
    """The memory states of documents after their last token, in input order: features of whole documents.

    pooling: "none" -> [N, M, E]; "mean" of the memory tokens, the "first" or the "last" of them -> [N, E]; "flat", all
    of them one after the other -> [N, M·E]. options: those of `run_many`. Raises what the first document that cannot be
    read raises, and ValueError.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}; got {pooling!r}")
    states = []
    for result in run_many(engine, documents, **options):
        if result.error is not None:
            result.error.args = (f"document {result.id}: {result.error}",)
            raise result.error
        assert result.stream is not None
        result.stream.finish()
        states.append(POOLINGS[pooling](result.stream.memory))
    if not states:
        raise ValueError("expected at least one document: there is nothing to encode")
    return torch.stack(states)


POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda memory: memory,
    "mean": lambda memory: memory.float().mean(0).to(memory.dtype),
    "first": lambda memory: memory[0],
    "last": lambda memory: memory[-1],
    "flat": lambda memory: memory.flatten(),
}


def _ended(document: OpenDocument) -> DocumentResult:
    stream = document.stream
    stream.place = replace(stream.place, memory=stream.place.memory.clone())  # not a view that keeps a batch alive
    return DocumentResult(document.index, document.id, stream.position, stream.segments + 1, stream=stream)


class _Reader:
    """The loop: fill the free slots, take a segment of each, fold them, give out what ended."""

    def __init__(
        self,
        engine: Engine,
        documents: Iterable[AnyDocument],
        slots: int,
        batch: SegmentBatch,
        reading: Reading,
        on_step: Callable[[int], None],
    ) -> None:
        self.engine, self.slots, self.batch, self.reading, self.on_step = engine, slots, batch, reading, on_step
        self.documents = enumerate(documents)
        self.open: list[OpenDocument] = []
        self.taken = 0
        self.given: int | None = None  # in input order: results that were given out; the rest wait

    def results(self) -> Generator[DocumentResult, None, None]:
        try:
            while True:
                yield from self._refill()
                if not self.open:
                    return
                yield from self._step()
        finally:
            for document in self.open:
                document.close()

    def _refill(self) -> Generator[DocumentResult, None, None]:
        while len(self.open) < self.slots:
            if self.given is not None and self.taken - self.given >= WAITING:
                return
            index, document = next(self.documents, (-1, None))
            self.taken = index + 1
            if document is None:
                return
            known = as_document(document)
            try:
                self.open.append(OpenDocument(self.engine, index, known, self.reading))
            except BROKEN as error:
                yield DocumentResult(index, known.id if known.id is not None else str(index), error=error)

    def _step(self) -> Generator[DocumentResult, None, None]:
        segments: list[np.ndarray] = []
        reading: list[OpenDocument] = []
        for document in self.open:
            try:
                segment = document.next_segment()
            except BROKEN as error:
                yield self._failed(document, error)
                continue
            if segment is None:
                yield _ended(document)
            else:
                segments.append(segment)
                reading.append(document)
        self.open = reading
        places = self.batch.fold([document.stream.place for document in reading], segments)
        self.open = []
        for document, place in zip(reading, places, strict=True):
            if isinstance(place, RMTError):
                yield self._failed(document, place)
            else:
                document.stream.place = place
                self.open.append(document)
        self.on_step(sum(map(len, segments)))

    def _failed(self, document: OpenDocument, error: Exception) -> DocumentResult:
        document.close()
        return DocumentResult(document.index, document.id, error=error)
