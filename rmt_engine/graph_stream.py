"""A stream folded by the C++ graph runner: one launch for several segments, and the places behind them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

from rmt_engine._C import GraphRunner, SegmentStream
from rmt_engine.executors import EagerExecutor
from rmt_engine.graph_executor import GraphExecutor, Recorded
from rmt_engine.graph_plan import PIECE_SEGMENTS, ring_width
from rmt_engine.memory import MemoryState
from rmt_engine.scoring import Scores

Mark = TypeVar("Mark")


def can_stream(executor: EagerExecutor) -> bool:
    """Whether a `GraphStream` may be made now: it has graphs, and they fold no other stream."""
    return isinstance(executor, GraphExecutor) and not executor.stream_in_use


@dataclass(frozen=True)
class Reached(Generic[Mark]):
    """A place that a stream has certainly reached. mark: what was noted when its last segment was taken.

    scores: after each segment that was folded on the way to it, in a stream that is scored.
    """

    place: MemoryState
    mark: Mark
    scores: tuple[Scores, ...] = ()


class GraphStream(Generic[Mark]):
    """Folds segments into the memory state of one stream, from `place` on, as `Stream.take` would, bit for bit.

    mark: called with the tokens taken, whenever a piece is queued. The device runs behind the host: a place is sure
    once its piece has come back. One at a time on an executor; close it.
    """

    def __init__(self, executor: GraphExecutor, place: MemoryState, mark: Callable[[int], Mark]) -> None:
        if not executor.claim_stream():
            raise RuntimeError("the graphs of this executor fold another stream; close that one first")
        try:
            self._open(executor, place, mark)
        except BaseException:
            executor.stream_in_use = False
            raise

    def _open(self, executor: GraphExecutor, place: MemoryState, mark: Callable[[int], Mark]) -> None:
        recorded = executor.stream_graphs(scored=place.scores is not None)
        self.executor, self.start, self.mark, self.buffers = executor, place, mark, recorded.buffers
        self.sure = Reached(place, mark(place.position))
        self.queued: deque[Reached[Mark]] = deque()  # places whose pieces have not come back yet
        width = ring_width(executor.sizes.segment)
        self.rows = np.empty((0, width), dtype=np.float32)  # scores that have come back, of segments since `sure`
        with executor.recorder.on_device():  # the runner works in the context that is current now
            self._begin(place)
            self.runner = self._runner(recorded)
        self.runner.begin(place.rest.tolist(), place.next_size, place.size)

    def _begin(self, place: MemoryState) -> None:
        buffers, scores = self.buffers, place.scores
        buffers["memory"].copy_(place.memory)
        buffers["good"].fill_(True)
        if scores is not None:
            buffers["begun"].fill_(scores.row is not None)
            if scores.row is not None:
                buffers["before"].copy_(scores.row)

    def _runner(self, recorded: Recorded) -> GraphRunner:
        buffers, recorder = recorded.buffers, self.executor.recorder
        handles = {key: recorder.handle(recording) for key, recording in recorded.recordings.items()}
        scores = buffers.get("scores")
        return GraphRunner(
            recorder.driver,
            [(handle, key.segments) for key, (handle, _) in handles.items()],
            segment_size=ring_width(self.executor.sizes.segment),
            piece_segments=PIECE_SEGMENTS,
            **{name: buffers[name].data_ptr() for name in ("ids", "lengths", "counter", "finite")},
            outputs=[] if scores is None else [(scores.data_ptr(), scores.stride(0) * scores.element_size())],
            stream=recorder.stream(),
            keep=(recorded, handles),
        )

    def pieces(self, segments: SegmentStream) -> Iterator[Reached[Mark]]:
        """Takes all of `segments`; gives places as they become sure, the last ones only in `finish`.

        Raises what the segments raise, and DeviceError. Ends early at a memory that is not finite: see `unfolded`.
        """
        more = True
        while more:
            more = self.runner.advance(segments, PIECE_SEGMENTS)
            self._note()
            yield from self._returned()

    def timed_pieces(self, segments: SegmentStream, add: Callable[[float, int], None]) -> Iterator[Reached[Mark]]:
        """`pieces`; `add` is told the seconds and the number of the segments that each of them brought."""
        pieces, reached, start = self.pieces(segments), 0, time.perf_counter()
        for place in pieces:
            count = place.place.segments - self.start.segments
            add(time.perf_counter() - start, count - reached)
            reached = count
            yield place
            start = time.perf_counter()

    def finish(self) -> Reached[Mark]:
        """Waits for all that is queued: the place where the stream stands, the last sure one if the device failed.

        Its scores are those of all segments since the last place that `pieces` gave.
        """
        if not self.runner.failed:
            self.runner.finish()
            if self.runner.finite:
                self._note()
        before = self.sure
        scores = [score for reached in self._returned() for score in reached.scores]
        if self.sure is not before:
            self.sure = replace(self.sure, scores=tuple(scores))
        return self.sure

    def close(self) -> None:
        """The executor may fold another stream. Idempotent."""
        self.executor.stream_in_use = False

    def unfolded(self) -> list[np.ndarray]:
        """After a memory that was not finite: the place before the launch that made it so is where the device stands;
        these are the segments after it, the one held back among them."""
        return [*self.runner.unfolded(), self.runner.held]

    def before_unfolded(self) -> MemoryState:
        """The place that `unfolded` follows."""
        place = self._place(self.runner.folded, np.empty(0, dtype=np.int64))
        if place.scores is not None:
            place = self._scored(Reached(place, self.sure.mark), self.rows).place
        return place

    def _tokens(self, segments: int) -> int:
        """Tokens of the first `segments` segments folded: all full, the first perhaps of another size."""
        return 0 if segments == 0 else self.start.next_size + (segments - 1) * self.start.size

    def _place(self, segments: int, rest: np.ndarray) -> MemoryState:
        """The place after `segments` segments; the memory as it lies on the device, in the order of its stream."""
        start, scores = self.start, self.start.scores
        if scores is not None and segments:
            scores = replace(scores, row=self.buffers["before"].clone())
        return replace(
            start,
            memory=self.buffers["memory"].clone(),
            segments=start.segments + segments,
            folded=start.folded + self._tokens(segments),
            rest=rest,
            scores=scores,
        )

    def _note(self) -> None:
        place = self._place(self.runner.segments, self.runner.held)
        self.queued.append(Reached(place, self.mark(place.position)))

    def _returned(self) -> Iterator[Reached[Mark]]:
        """Places that have become sure since the last call."""
        for output in self.runner.take_outputs():
            self.rows = np.concatenate([self.rows, output.view(np.float32).reshape(-1, self.rows.shape[1])])
        while self.queued and self.queued[0].place.segments <= self.start.segments + self.runner.folded:
            reached = self.queued.popleft()
            if reached.place.scores is not None:
                count = reached.place.segments - self.sure.place.segments
                reached, self.rows = self._scored(reached, self.rows[:count]), self.rows[count:]
            self.sure = reached
            yield reached

    def _scored(self, reached: Reached[Mark], rows: np.ndarray) -> Reached[Mark]:
        """With the scores of its segments; rows: fp32 [segments, ·], the log-probabilities of each one's tokens."""
        scores, place = self.sure.place.scores, reached.place
        assert scores is not None and place.scores is not None
        after = []
        for i, row in enumerate(rows):
            segment = self.sure.place.segments + i - self.start.segments
            size = self.start.next_size if segment == 0 else self.start.size
            scores = scores.add(row[:size].copy(), place.scores.row)  # type: ignore[arg-type]  # a row, once folded
            after.append(scores)
        return Reached(replace(place, scores=scores), reached.mark, tuple(after))
