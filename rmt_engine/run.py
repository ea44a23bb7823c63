"""Reading a whole input: text or token file -> tokens ahead of the compute -> segments -> the memory state."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rmt_engine.errors import InputError
from rmt_engine.inputs import count_tokens, open_input
from rmt_engine.stream import Stream

if TYPE_CHECKING:
    from rmt_engine.engine import Engine

EARLY_TOKENS = 200_000  # where the memory is looked at first
WARM_UP = 20  # segments before times are kept
SAMPLE = 1000  # segments at the start and at the end whose times are compared


@dataclass(frozen=True)
class Progress:
    """After each segment. position: tokens read; fraction: of the input, or None where its size is not known."""

    segments: int
    position: int
    fraction: float | None


@dataclass(frozen=True)
class Summary:
    """The end of a run. seconds: wall time of reading. ms_early, ms_late: medians of a segment step over the first and
    the last 1,000 full segments. memory_early, memory_late: anonymous resident bytes (RssAnon) at 200,000 tokens and at
    the end. stream: to ask, fork or feed on."""

    tokens: int
    segments: int
    seconds: float
    ms_early: float | None
    ms_late: float | None
    memory_early: int | None
    memory_late: int | None
    stream: Stream = field(repr=False)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


Event = Progress | Summary


def run(
    engine: Engine,
    source: str | Path,
    *,
    token_dtype: str | None = None,
    errors: str = "strict",
    alignment: str | None = None,
    max_n_segments: int | None = None,
) -> Iterator[Event]:
    """Reads `source` (a text file, "-", or a token file: `.npy`, or raw with `token_dtype`) to its end.

    Yields Progress after each segment and one Summary. The last segment, full or not, is kept as the stream's rest:
    nothing is asked yet, and a question may still share it. Raises InputError, TokenizerError, ValueError.
    """
    alignment = alignment or engine.config.alignment
    limit = None if max_n_segments is None else max_n_segments * engine.config.segment_size
    if limit is not None and limit < 1:
        raise ValueError(f"max_n_segments must be at least 1; got {max_n_segments}")
    length = None
    if alignment != "left":
        length = count_tokens(engine, source, token_dtype=token_dtype, errors=errors, alignment=alignment)
        length = length if limit is None else min(length, limit)
    stream = Stream(engine, length, alignment)
    clock = _Clock()
    with (
        open_input(engine, source, token_dtype=token_dtype, errors=errors) as feed,
        feed.segments(stream.cut, engine.vocab_size) as segments,
    ):
        for segment in feed.errors_of(segments):
            end = segment.position + len(segment)
            if segment.last or (limit is not None and end >= limit):
                stream.rest = np.array(segment.ids)
                break
            with clock:
                stream.fold(segment.ids)
            clock.look_at_memory(end)
            yield Progress(stream.segments, end, feed.fraction(end))
    if not stream.position:
        raise InputError(f"{source} holds no tokens of content: there is nothing to read")
    yield clock.summary(stream)


class _Clock:
    """Times of segment steps and the process's memory, with a bounded number of samples."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.early: list[float] = []
        self.late: deque[float] = deque(maxlen=SAMPLE)
        self.steps = 0
        self.memory_early: int | None = None

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        seconds = time.perf_counter() - self.began
        self.steps += 1
        if self.steps > WARM_UP:
            if len(self.early) < SAMPLE:
                self.early.append(seconds)
            self.late.append(seconds)

    def look_at_memory(self, position: int) -> None:
        if self.memory_early is None and position >= EARLY_TOKENS:
            self.memory_early = resident_bytes()

    def summary(self, stream: Stream) -> Summary:
        early, late = (1e3 * statistics.median(times) if times else None for times in (self.early, self.late))
        seconds = time.perf_counter() - self.start
        segments = stream.segments + 1  # the rest is the last one
        return Summary(stream.position, segments, seconds, early, late, self.memory_early, resident_bytes(), stream)


def resident_bytes() -> int | None:
    """RssAnon of this process: memory that is its own, files apart; None where the system does not tell."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        return None
