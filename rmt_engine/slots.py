"""Many documents side by side: N slots, each refilled by the next document as soon as one ends.

All that a slot holds is a place in a stream. The segments of all slots are folded in batches of one fixed size,
whatever is filled, so that the bits of a document depend on nothing but itself and the size of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rmt_engine.asking import answer, check_fits, check_question, decoding_of, question_ids
from rmt_engine.documents import AnyDocument, OpenDocument, Reading, as_document
from rmt_engine.errors import RMTError
from rmt_engine.graph_plan import LEAST_ROOM
from rmt_engine.memory import MemoryState
from rmt_engine.sampling import DECODE_ROWS
from rmt_engine.slot_count import batch_size, choose_slots
from rmt_engine.stream import Stream, after_segment

if TYPE_CHECKING:
    from rmt_engine.engine import Engine

WAITING = 1024  # results that may wait for an earlier document when they are given in input order
BROKEN = (RMTError, ValueError, OSError)  # what is one document's fault; anything else ends the run


@dataclass(frozen=True)
class DocumentResult:
    """What became of one document.

    index: its number in the input, from 0; id: its own name, or that number. tokens, segments: of content, the last
    segment included. stream: at its end, to ask, fork, save or feed on; its last segment is not folded yet, but with
    finish=True. answers: to the questions, in their order. labels: a classifier's, best first. error: why it could not
    be read, or None; then there is nothing else.
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
    """Folds the next segment of many streams, `size` rows at a time, whatever is filled.

    ragged: segments of any length share a batch, as wide as a full one: what a GPU wants. Without, a segment that is
    not full runs alone, as in a stream: rows cost a CPU more than calls.
    """

    def __init__(self, engine: Engine, size: int, ragged: bool) -> None:
        self.engine, self.size, self.ragged = engine, size, ragged

    def fold(self, places: Sequence[MemoryState], segments: Sequence[np.ndarray]) -> list[MemoryState | RMTError]:
        """The places after one segment each; an error in the place of a stream whose memory is no longer finite."""
        done: list[MemoryState | RMTError | None] = [None] * len(places)
        side_by_side = [i for i, place in enumerate(places) if self._joins(place, segments[i])]
        for start in range(0, len(side_by_side), self.size):
            members = side_by_side[start : start + self.size]
            outputs = self._run([places[i] for i in members], [segments[i] for i in members])
            finite = outputs[0].isfinite().flatten(1).all(1).tolist()  # the host waits for all slots together
            for row, i in enumerate(members):
                own = [output[row : row + 1] for output in outputs]
                done[i] = _after(places[i], segments[i], own, finite[row])
        for i, before in enumerate(done):
            if before is None:
                done[i] = _after(places[i], segments[i], self._run_alone(places[i], segments[i]))
        return [place for place in done if place is not None]

    def _joins(self, place: MemoryState, ids: np.ndarray) -> bool:
        """Whether a segment runs in the batch: this must depend on nothing but itself."""
        begins = place.scores is not None and place.scores.row is None  # its first token has no row before it
        return self.size > 1 and not begins and (self.ragged or len(ids) == self.engine.config.segment_size)

    def _run_alone(self, place: MemoryState, segment: np.ndarray) -> tuple[Tensor, ...]:
        executor, ids = self.engine.executor, torch.from_numpy(segment).to(self.engine.device)[None]
        if place.scores is None:
            return (executor.fold(ids, place.memory),)
        return executor.fold_with_scores(ids, place.memory, place.scores.row)

    def _run(self, places: Sequence[MemoryState], segments: Sequence[np.ndarray]) -> tuple[Tensor, ...]:
        """One call of the executor; the first rows hold something. Log-probabilities come to the host together."""
        executor, device, empty = self.engine.executor, self.engine.device, self.size - len(places)
        ids = np.zeros((self.size, self.engine.config.segment_size), dtype=np.int64)
        for row, segment in enumerate(segments):
            ids[row, : len(segment)] = segment
        memory = torch.cat([*[place.memory for place in places], *[executor.initial[None]] * empty])
        lengths = None
        if self.ragged:
            lengths = torch.tensor([*map(len, segments), *[1] * empty], dtype=torch.int32, device=device)
        tensor = torch.from_numpy(ids).to(device)
        rows = [place.scores.row for place in places if place.scores is not None and place.scores.row is not None]
        if not rows:
            return (executor.fold(tensor, memory, lengths),)
        blank = executor.initial.new_zeros(empty, executor.initial.shape[1])
        state, scores, last = executor.fold_with_scores(tensor, memory, torch.cat([*rows, blank]), lengths)
        return state, scores.cpu(), last


def _after(
    place: MemoryState, ids: np.ndarray, outputs: Sequence[Tensor], finite: bool | None = None
) -> MemoryState | RMTError:
    memory, *scored = outputs
    try:
        if not scored:
            return after_segment(place, len(ids), memory, finite=finite)
        return after_segment(place, len(ids), memory, scored[0][:, : len(ids)], scored[1], finite)
    except RMTError as error:
        return error


def run_many(
    engine: Engine,
    documents: Iterable[AnyDocument],
    *,
    ask: str | Sequence[str] = (),
    slots: int | None = None,
    order: str = "input",
    batch_invariant: bool = False,
    errors: str = "strict",
    token_dtype: str | None = None,
    alignment: str | None = None,
    score: bool = False,
    finish: bool = False,
    on_step: Callable[[int], None] = lambda tokens: None,
    max_new_tokens: int | None = 16,
    **how: Any,
) -> Generator[DocumentResult, None, None]:
    """Reads many documents, `slots` of them side by side, and yields a DocumentResult for each.

    documents: texts, UTF-8 bytes, token ids, Paths or `Document`s, taken as slots become free. ask: questions to each,
    with the options of `Stream.ask` (max_new_tokens, temperature, stop, …); answers are decoded side by side too.
    slots: None chooses by memory and measured step time (`slot_count.choose_slots`). order: "input", or "completed" as
    they end. A document that cannot be read gives a result with its `error`, and the rest goes on. batch_invariant: the
    bits are those of a stream alone, whatever `slots` is. errors, token_dtype: of files. finish: fold the last
    segment too. on_step is told the tokens of each step. Raises ValueError before anything is read.
    """
    if order not in ("input", "completed"):
        raise ValueError(f"order must be input or completed; got {order!r}")
    count = choose_slots(engine) if slots is None else slots
    if count < 1:
        raise ValueError(f"slots must be at least 1; got {slots}")
    questions = Questions(engine, (ask,) if isinstance(ask, str) else tuple(ask), max_new_tokens, how)
    size = 1 if batch_invariant else batch_size(engine, count)
    answers = min(count * len(questions.ids), DECODE_ROWS)  # that may be decoded together
    engine.executor.prepare(max(size, answers), questions.new_tokens)
    batch = SegmentBatch(engine, size, ragged=engine.device.type != "cpu")
    reader = _Reader(engine, documents, count, batch, Reading(errors, token_dtype, alignment, score, finish), on_step)
    results = questions.answered(reader.results(), min(count, DECODE_ROWS))
    return _in_order(results, reader) if order == "input" else results


class Questions:
    """What is asked of every document. Raises ValueError for what no document can answer."""

    def __init__(self, engine: Engine, texts: Sequence[str], most: int | None, options: Mapping[str, Any]) -> None:
        self.engine, self.classifies = engine, engine.config.family == "encoder_classifier"
        if not texts and options:
            raise ValueError(f"{', '.join(options)}: options of questions, and there is no question (ask=)")
        if texts:
            self.how = decoding_of(engine, most, **options)
            for text in texts:
                check_question(engine, text, self.how)
        self.ids = [question_ids(engine, text) for text in texts]

    @property
    def new_tokens(self) -> int:
        """What an answer needs room for behind a full segment."""
        if not self.ids or self.how.roll or self.how.max_new_tokens is None:
            return LEAST_ROOM
        return self.how.max_new_tokens

    def answered(
        self, results: Generator[DocumentResult | None, None, None], documents: int
    ) -> Generator[DocumentResult, None, None]:
        """The results with answers or labels. So many documents are answered together; None does not let them wait."""
        ended: list[DocumentResult] = []
        with closing(results):
            for result in results:
                if result is not None and (result.error is not None or not self.ids):
                    yield self._labelled(result) if self.classifies else result
                elif result is not None:
                    ended.append(result)
                if result is None or len(ended) == documents:
                    yield from self._answer(ended)
                    ended = []
            yield from self._answer(ended)

    def _answer(self, results: Sequence[DocumentResult]) -> list[DocumentResult]:
        if not results:
            return []
        done, prompts = list(results), []
        for i, result in enumerate(results):
            assert result.stream is not None
            try:
                own = result.stream.prompts(self.ids)
                for prompt in own:
                    check_fits(self.engine, len(prompt.ids), self.how)
                prompts.append((i, own))
            except BROKEN as error:
                done[i] = DocumentResult(result.index, result.id, error=error)
        texts = iter(answer(self.engine, [prompt for _, own in prompts for prompt in own], self.how))
        for i, own in prompts:
            done[i] = replace(done[i], answers=tuple(next(texts) for _ in own))
        return done

    def _labelled(self, result: DocumentResult) -> DocumentResult:
        """With a classifier's labels, if its last segment still stands there."""
        if result.stream is None or not len(result.stream.rest):
            return result
        return replace(result, labels=tuple(result.stream.classify()))


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
    for result in run_many(engine, documents, order="input", finish=True, **options):
        if result.error is not None:
            result.error.args = (f"document {result.id}: {result.error}",)
            raise result.error
        assert result.stream is not None
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
    segments = stream.segments + (len(stream.rest) > 0)
    return DocumentResult(document.index, document.id, stream.position, segments, stream=stream)


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

    def results(self) -> Generator[DocumentResult | None, None, None]:
        """Documents as they end or fail; None where the next cannot be opened before what has ended is given out."""
        try:
            while True:
                yield from self._refill()
                if self.open:
                    yield from self._step()
                elif self._may_open():
                    return
                else:
                    yield None
        finally:
            for document in self.open:
                document.close()

    def _refill(self) -> Generator[DocumentResult, None, None]:
        while len(self.open) < self.slots:
            if not self._may_open():
                return
            index, document = next(self.documents, (-1, None))
            if document is None:
                return
            self.taken = index + 1
            known = as_document(document)
            try:
                self.open.append(OpenDocument(self.engine, index, known, self.reading))
            except BROKEN as error:
                yield DocumentResult(index, known.id if known.id is not None else str(index), error=error)

    def _may_open(self) -> bool:
        return self.given is None or self.taken - self.given < WAITING

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
        failed: list[DocumentResult] = []
        for document, place in zip(reading, places, strict=True):
            if isinstance(place, RMTError):
                failed.append(self._failed(document, place))
            else:
                document.stream.place = place
        gone = {result.index for result in failed}
        self.open = [document for document in reading if document.index not in gone]
        self.on_step(sum(map(len, segments)))
        yield from failed

    def _failed(self, document: OpenDocument, error: Exception) -> DocumentResult:
        document.close()
        return DocumentResult(document.index, document.id, error=error)
