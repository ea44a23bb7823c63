"""Reading a whole input: text or token file -> tokens ahead of the compute -> segments -> the memory state."""

from __future__ import annotations

import os
import statistics
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from rmt_engine.errors import InputError
from rmt_engine.graph_executor import GraphExecutor
from rmt_engine.graph_stream import GraphStream, Reached, can_stream
from rmt_engine.inputs import InputPosition, Text, TokenFile, count_tokens, open_input
from rmt_engine.layouts import Cut, check_alignment
from rmt_engine.scoring import SegmentScores, Total, check_scorable
from rmt_engine.stream import Ids, Stream, as_ids
from rmt_engine.stream import resume as resume_stream

if TYPE_CHECKING:
    from rmt_engine.engine import Engine

EARLY_TOKENS = 200_000  # where the memory is looked at first
WARM_UP = 20  # segments before times are kept
SAMPLE = 1000  # segments at the start and at the end whose times are compared


@dataclass(frozen=True)
class Progress:
    """After each segment; through graphs, where nothing is scored, after many. position: tokens read; fraction: of the
    input, or None where its size is not known.

    scores: of a segment that was folded meanwhile, where they were asked for.
    """

    segments: int
    position: int
    fraction: float | None
    scores: SegmentScores | None = None


@dataclass(frozen=True)
class Summary:
    """The end of a run. tokens, segments: of the whole stream; read, seconds: tokens and wall time of this run.

    ms_early, ms_late: medians of a segment step over the first and the last 1,000 full segments. memory_early,
    memory_late: anonymous resident bytes (RssAnon) at 200,000 tokens and at the end. stream: to ask, fork or feed on.
    scores: of the last segment, which is not folded; total: of the whole stream; None unless they were asked for.
    """

    tokens: int
    segments: int
    read: int
    seconds: float
    ms_early: float | None
    ms_late: float | None
    memory_early: int | None
    memory_late: int | None
    stream: Stream = field(repr=False)
    scores: SegmentScores | None = None
    total: Total | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.read / self.seconds if self.seconds else 0.0


Event = Progress | Summary
Mark = tuple[float | None, InputPosition | None]  # of a place: how much of the input it is, where the input goes on


@dataclass
class Checkpoints:
    """Where a run saves its state: at the end, when it is interrupted or fails, and every so many tokens.

    saved_at: the position of the last state written, or None.
    """

    path: str | Path
    every: int | None = None
    saved_at: int | None = None

    def __post_init__(self) -> None:
        """Tells before anything is read what could not be saved after it. Raises ValueError."""
        path = Path(self.path).absolute()
        if path.is_dir():
            raise ValueError(f"{path} is a directory: give a file to save the state in")
        if not path.parent.is_dir():
            raise ValueError(f"there is no folder {path.parent} to save the state in: make it first")
        if not os.access(path.parent, os.W_OK):
            raise ValueError(f"the folder {path.parent} may not be written: save the state elsewhere")

    def is_due(self, position: int) -> bool:
        return self.every is not None and position - (self.saved_at or 0) >= self.every

    def save(self, stream: Stream, place: InputPosition, done: bool = False) -> None:
        stream.save(self.path, {**place.to_dict(), "done": done})
        self.saved_at = stream.position


def run(
    engine: Engine,
    source: str | Path,
    *,
    token_dtype: str | None = None,
    errors: str = "strict",
    field: str | None = None,
    alignment: str | None = None,
    max_n_segments: int | None = None,
    checkpoints: Checkpoints | None = None,
    resume: str | Path | None = None,
    allow_inexact: bool = False,
    score: bool = False,
) -> Generator[Event, None, None]:
    """Reads `source` (a text file, "-", or a token file: `.npy`, or raw with `token_dtype`) to its end.

    Yields Progress after each segment and one Summary. The last segment, full or not, is kept as the stream's rest:
    nothing is asked yet, and a question may still share it. `resume` goes on from a state file: inside its input if
    that was not read to the end, else with `source` as the text that follows. `score` keeps the log-probability of
    every token: each stands in the `scores` of one event. Raises InputError, TokenizerError, StateError,
    NumericalError, ValueError.
    """
    if max_n_segments is not None and max_n_segments < 1:
        raise ValueError(f"max_n_segments must be at least 1; got {max_n_segments}")
    limit = None if max_n_segments is None else max_n_segments * engine.config.segment_size
    options = {"token_dtype": token_dtype, "errors": errors, "field": field}
    if resume is None:
        stream, place = _new_stream(engine, source, options, alignment or engine.config.alignment, limit, score), None
    else:
        stream, place = _resumed(engine, resume, allow_inexact, score)
    clock = _Clock(stream.position)
    if not (place and _is_read(place, source)):
        if resume is not None and (place is None or place.get("done")):
            _begin_another(stream, resume)
        start = None if place is None or place.get("done") else InputPosition.from_dict(_without_done(place))
        with open_input(engine, source, **options, start=start) as opened:  # type: ignore[arg-type]
            if can_stream(engine.executor) and limit is None:
                yield from _read_through_graphs(stream, opened, clock, checkpoints)
            else:
                yield from _read(stream, opened, clock, limit, checkpoints)
    if not stream.position:
        raise InputError(f"{source} holds no tokens of content: there is nothing to read")
    yield clock.summary(stream)


def score(engine: Engine, source: str | Path | Ids, **options: Any) -> Iterator[SegmentScores]:
    """The log-probability of every token of `source`, one segment after the other, in constant memory.

    source: what `run` reads, with its options, or token ids (1-D) and perhaps an `alignment`. The `total` of the last
    one is that of the whole. Which row predicts which token: see `rmt_engine.scoring`. Raises ValueError for a
    classifier, and what `run` raises.
    """
    events: Iterator[Event]
    if isinstance(source, str | Path):
        events = run(engine, source, score=True, **options)
    else:
        events = _run_ids(engine, source, **options)
    return (event.scores for event in events if event.scores is not None)


def _run_ids(engine: Engine, ids: Ids, alignment: str | None = None) -> Iterator[Event]:
    ids = as_ids(ids)
    content = len(ids) - int(np.isin(ids, engine.config.drop_ids).sum())
    stream = Stream(engine, content, alignment, score=True)
    clock, size = _Clock(0), stream.place.size
    for start in range(0, len(ids), size):
        folded = stream.segments
        stream.feed(ids[start : start + size])
        yield _progress(stream, folded, None)
    if not stream.position:
        raise ValueError("expected at least one token id: there is nothing to score")
    yield clock.summary(stream)


def _read(
    stream: Stream, opened: TokenFile | Text, clock: _Clock, limit: int | None, checkpoints: Checkpoints | None
) -> Iterator[Progress]:
    """Folds an opened input segment by segment; whatever ends it, the state is saved where that was asked for."""
    begun = stream.position
    done = False
    room = stream.place.next_size - len(stream.rest) or stream.place.size
    try:
        with opened.segments(Cut(room, stream.place.size), stream.engine.vocab_size) as segments:
            for segment in opened.errors_of(segments):
                ids = segment.ids if limit is None else segment.ids[: max(limit - stream.position, 0)]
                folded = stream.segments
                with clock:
                    stream.take(ids)
                clock.look_at_memory(stream.position)
                if checkpoints is not None and checkpoints.is_due(stream.position):
                    checkpoints.save(stream, opened.position_at(stream.position - begun))
                yield _progress(stream, folded, opened.fraction(stream.position - begun))
                if limit is not None and stream.position >= limit:
                    return
        done = True
    finally:
        if checkpoints is not None and (done or stream.position > begun):
            checkpoints.save(stream, opened.position_at(stream.position - begun), done)


def _read_through_graphs(
    stream: Stream, opened: TokenFile | Text, clock: _Clock, checkpoints: Checkpoints | None
) -> Iterator[Progress]:
    """As `_read`, several segments a launch; a place is known, and progress told, when its piece has come back."""
    begun, done = stream.position, False

    def mark(position: int) -> Mark:
        after = position - begun
        return opened.fraction(after), None if checkpoints is None else opened.position_at(after)

    room = stream.place.next_size - len(stream.rest) or stream.place.size
    with closing(GraphStream(cast(GraphExecutor, stream.engine.executor), stream.place, mark)) as folding:
        try:
            with opened.segments(Cut(room, stream.place.size), stream.engine.vocab_size) as segments:
                for reached in opened.errors_of(folding.timed_pieces(segments, clock.add)):
                    stream.place = reached.place
                    clock.look_at_memory(stream.position)
                    if checkpoints is not None and checkpoints.is_due(stream.position):
                        _save(checkpoints, stream, reached)
                    yield from _told(reached)
            _stand(stream, folding)
            yield from _told(folding.sure)
            done = True
        finally:
            if not done and folding.runner.finite:
                _stand(stream, folding)
            if checkpoints is not None and (done or folding.sure.place.position > begun):
                _save(checkpoints, stream, folding.sure, done)


def _stand(stream: Stream, folding: GraphStream[Mark]) -> None:
    """Puts the stream where all that was queued leads. Raises NumericalError at a memory that is not finite, and then
    the stream stands before it."""
    stream.place = folding.finish().place
    if not folding.runner.finite:
        stream.place = folding.before_unfolded()
        for ids in folding.unfolded():
            stream.take(ids)  # the same bits, segment by segment: it raises at the one
        raise AssertionError("the graphs found a memory that is not finite, and single steps did not")


def _save(checkpoints: Checkpoints, stream: Stream, reached: Reached[Mark], done: bool = False) -> None:
    """Of a place that is sure, with where the input stood when it was taken."""
    at, position = stream.fork(), reached.mark[1]
    at.place = reached.place
    assert position is not None
    checkpoints.save(at, position, done)


def _told(reached: Reached[Mark]) -> Iterator[Progress]:
    """The segments behind a place: one by one where each has scores."""
    place, fraction = reached.place, reached.mark[0]
    for scores in reached.scores:
        if scores.last is not None:
            yield Progress(scores.segments, scores.last.end, fraction, scores.last)
    if not reached.scores:
        yield Progress(place.segments, place.position, fraction)


def _progress(stream: Stream, folded: int, fraction: float | None) -> Progress:
    """What the last step did; `folded` segments stood in the memory before it."""
    scores = stream.place.scores
    last = scores.last if scores is not None and stream.segments > folded else None
    return Progress(stream.segments, stream.position, fraction, last)


def _new_stream(
    engine: Engine,
    source: str | Path,
    options: dict[str, str | None],
    alignment: str,
    limit: int | None,
    score: bool,
) -> Stream:
    if score:
        check_scorable(engine.config)  # told before a first pass counts
    if check_alignment(alignment) == "left":
        return Stream(engine, alignment=alignment, score=score)
    length = count_tokens(engine, source, **options, alignment=alignment)  # type: ignore[arg-type]
    return Stream(engine, length if limit is None else min(length, limit), alignment, score)


def _resumed(
    engine: Engine, path: str | Path, allow_inexact: bool, score: bool
) -> tuple[Stream, Mapping[str, Any] | None]:
    """The stream of a state file, and the place in the input that it was reading."""
    stream, place = resume_stream(engine, path, allow_inexact)
    if score and stream.place.scores is None:
        raise ValueError(
            f"{path} was read without scores, and what is folded cannot be scored any more: leave out --score "
            "(score=True), or read the input again with it"
        )
    if not score:
        stream.place = replace(stream.place, scores=None)
    return stream, place


def _begin_another(stream: Stream, path: str | Path) -> None:
    """A text is to follow what the state has read. Raises ValueError where none can."""
    if stream.place.length is not None:
        raise ValueError(
            f"{path} was aligned for exactly {stream.place.length:,} tokens and has them: it can be asked, but no text "
            "can follow; to go on later, read with --alignment left"
        )
    stream.flush()


def _is_read(place: Mapping[str, Any], source: str | Path) -> bool:
    """Whether this very input was read to its end before: then the same command has nothing left to read."""
    path = Path(source)
    return bool(
        place.get("done") and path.is_file() and (place["name"], place["size"]) == (str(source), path.stat().st_size)
    )


def _without_done(place: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in place.items() if key != "done"}


class _Clock:
    """Times of segment steps and the process's memory, with a bounded number of samples."""

    def __init__(self, position: int) -> None:
        self.start = time.perf_counter()
        self.position = position
        self.early: list[float] = []
        self.late: deque[float] = deque(maxlen=SAMPLE)
        self.steps = 0
        self.memory_early: int | None = None

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.add(time.perf_counter() - self.began, 1)

    def add(self, seconds: float, segments: int) -> None:
        """The time of so many segments together."""
        for _ in range(segments):
            self.steps += 1
            if self.steps > WARM_UP:
                if len(self.early) < SAMPLE:
                    self.early.append(seconds / segments)
                self.late.append(seconds / segments)

    def look_at_memory(self, position: int) -> None:
        if self.memory_early is None and position >= EARLY_TOKENS:
            self.memory_early = resident_bytes()

    def summary(self, stream: Stream) -> Summary:
        early, late = (1e3 * statistics.median(times) if times else None for times in (self.early, self.late))
        seconds = time.perf_counter() - self.start
        segments = stream.segments + 1  # the rest is the last one
        read = stream.position - self.position
        memory = self.memory_early, resident_bytes()
        summary = Summary(stream.position, segments, read, seconds, early, late, *memory, stream)
        if stream.place.scores is None:
            return summary
        scores = stream.scores()
        return replace(summary, scores=scores.last, total=scores.total)


def resident_bytes() -> int | None:
    """RssAnon of this process: memory that is its own, files apart; None where the system does not tell."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        return None
