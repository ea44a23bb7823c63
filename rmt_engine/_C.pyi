"""Token files and pushed tokens, cut into segments ahead of the compute, and captured graphs that fold them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from rmt_engine.errors import RMTError

class StreamStopped(RMTError):
    """The stream was stopped while, or before, this call waited."""

class TokenSource:
    """Where tokens come from: TokenSource.open(path) or TokenSource.pushed()."""

    @staticmethod
    def open(
        path: str | bytes | PathLike[str] | PathLike[bytes],
        dtype: str = "auto",
        drop_ids: Iterable[int] = (),
        start: int = 0,
    ) -> FileSource:
        """Opens a 1-D `.npy` file, or a raw little-endian file, which needs `dtype`.

        dtype: "auto", or uint8, uint16, uint32, int32, int64; for `.npy` it must agree with the file.
        drop_ids: ids that are left out of the stream.
        start: the token of the file, before dropping, that streams begin with; its end is allowed.
        Raises InputError for a file that cannot be read, is not what it claims or ends before `start`, ValueError for
        a wrong dtype.
        """

    @staticmethod
    def pushed(drop_ids: Iterable[int] = (), capacity: int = 1 << 20) -> PushedSource:
        """Makes a queue of at most `capacity` tokens (8 bytes each, allocated at once)."""

    @property
    def size(self) -> int:
        """Tokens of the whole file, before dropping. ValueError for a pushed source."""

    def count(self) -> int:
        """Tokens from `start` on, after dropping: reads them if there is anything to drop.

        ValueError for a pushed source.
        """

class FileSource(TokenSource):
    """A token file. Any number of streams may read it, each from `start`."""

    @property
    def dtype(self) -> str: ...

class PushedSource(TokenSource):
    """A bounded queue: other threads push, one stream reads."""

    def push(self, ids: Any) -> None:
        """Adds a list of int, or a contiguous 1-D integer array (DLPack or buffer protocol, on the CPU).

        Waits while the queue is full; pushes of several threads follow one another whole.
        Raises ValueError after close() or fail(), StreamStopped once the stream that reads has stopped.
        """

    def close(self) -> None:
        """The input ends here."""

    def fail(self, message: str) -> None:
        """The input ends here, and the stream raises InputError(message) after the whole segments before it."""

class Segment:
    @property
    def ids(self) -> NDArray[np.int64]:
        """[len(self)], a view that is valid until the following next(); asking for it later is a ValueError.

        An array taken before that stays safe to read, but shows whatever the slot holds by then.
        """

    @property
    def index(self) -> int: ...
    @property
    def position(self) -> int:
        """Tokens before it, after dropping; a file's are counted from its `start`."""

    @property
    def last(self) -> bool:
        """True when no token follows."""

    def __len__(self) -> int: ...

class StreamStats(TypedDict):
    segments: int
    tokens: int
    reader_wait_seconds: float
    consumer_wait_seconds: float

class SegmentStream:
    """Cuts a source into segments, read ahead by a thread of its own. A context manager; leaving it stops it."""

    def __init__(
        self,
        source: TokenSource,
        segment_size: int,
        first_segment_size: int | None = None,
        ring_slots: int = 8,
        vocab_size: int | None = None,
    ) -> None:
        """Starts to read.

        first_segment_size: tokens of the first segment, at most `segment_size` (right alignment).
        vocab_size: ids outside [0, vocab_size) are an InputError.
        """

    def next(self) -> Segment | None:
        """Waits for the next segment; None at the end of the input.

        Raises InputError after the whole segments before the trouble, StreamStopped after stop().
        """

    def stop(self) -> None:
        """Ends the stream, from any thread, any number of times; who waits in next() gets StreamStopped."""

    def stats(self) -> StreamStats: ...
    def __iter__(self) -> Iterator[Segment]: ...
    def __next__(self) -> Segment: ...
    def __enter__(self) -> SegmentStream: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

def load_cuda_driver() -> None:
    """Opens the CUDA driver. Raises BackendError where there is none, or one that lacks what the runner calls."""

class HostGraph:
    """A function in the place of a captured graph, for `driver="host"`; what it raises comes out of `advance`."""

    def __init__(self, run: Callable[[], object]) -> None: ...
    @property
    def handle(self) -> int: ...

class GraphRunnerStats(TypedDict):
    pieces: int
    launches: int
    wait_seconds: float

class GraphRunner:
    """Streams segments through captured graphs: ids go up in pieces, results come down, nothing waits per segment.

    A graph folds its number of segments from the place `counter` of the ring on, moves the counter, and writes
    `finite`. See csrc/graph_runner.hpp. One thread at a time.
    """

    def __init__(
        self,
        driver: str,
        graphs: Sequence[tuple[int, int]],
        *,
        segment_size: int,
        piece_segments: int,
        ids: int,
        lengths: int,
        counter: int,
        finite: int,
        outputs: Sequence[tuple[int, int]] = (),
        stream: int = 0,
        keep: object = None,
    ) -> None:
        """driver: "cuda", or "host" for `HostGraph`s over host memory.

        graphs: (handle of the instantiated graph, segments it folds), one of them for 1. The ring has places =
        2 * piece_segments. Addresses on the device: ids int64 [places, segment_size], lengths int64 [places], counter
        int64, finite int32 [places], outputs (address of [places, bytes], bytes). stream: the CUDA stream that
        computes. keep: lives as long as the runner does: whoever owns that memory and the graphs.
        Raises ValueError, BackendError without a driver, DeviceError.
        """

    def begin(self, rest: Sequence[int], first: int, size: int) -> None:
        """Before the first `advance`: ids read and not folded; tokens of the segment they begin, and of the others."""

    def advance(self, stream: SegmentStream, limit: int) -> bool:
        """Takes segments and queues those that are whole, at most `limit` and a piece; False at the end of the stream,
        and once a memory was not finite.

        Whatever ends it, what was taken is queued or held. Raises what `stream.next` and a HostGraph raise, and
        DeviceError; after one of the device or a graph the runner is of no more use.
        """

    def finish(self) -> None:
        """Waits for all that is queued. Raises DeviceError."""

    @property
    def failed(self) -> bool:
        """Whether the device or a graph failed, and the runner is of no more use."""

    @property
    def segments(self) -> int:
        """Queued since the beginning."""

    @property
    def tokens(self) -> int:
        """Queued since the beginning."""

    @property
    def folded(self) -> int:
        """Segments known to be folded into a finite memory."""

    @property
    def finite(self) -> bool: ...
    @property
    def held(self) -> NDArray[np.int64]:
        """The segment taken last, not queued: it may still grow."""

    def unfolded(self) -> list[NDArray[np.int64]]:
        """After a memory that was not finite: the segments queued since the launch that made it so."""

    def take_outputs(self) -> list[NDArray[np.uint8]]:
        """What has come down since the last call, one array of [segments * bytes] for each output."""

    def stats(self) -> GraphRunnerStats: ...
