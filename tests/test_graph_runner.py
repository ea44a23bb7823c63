"""The C++ graph runner from Python, on the host: functions in place of graphs, numpy in place of device memory."""

from __future__ import annotations

import _thread
import threading
import time
import weakref
from collections.abc import Callable

import numpy as np
import pytest

from rmt_engine._C import GraphRunner, HostGraph, SegmentStream, StreamStopped, TokenSource, load_cuda_driver
from rmt_engine.errors import BackendError, DeviceError, DeviceOutOfMemory, InputError, RMTError

SEGMENT, PIECE = 4, 8
PLACES = 2 * PIECE


class Device:
    """The ring, and graphs of four segments and of one that sum up what they fold."""

    def __init__(self, before: Callable[[int], None] | None = None) -> None:
        self.ids = np.full((PLACES, SEGMENT), -1, dtype=np.int64)
        self.lengths = np.full(PLACES, -1, dtype=np.int64)
        self.counter = np.full(1, -1, dtype=np.int64)
        self.finite = np.full(PLACES, -1, dtype=np.int32)
        self.sums = np.full((PLACES, 2), -1, dtype=np.int64)
        self.read: list[list[int]] = []
        self.before = before
        self.graphs = [HostGraph(lambda: self.fold(4)), HostGraph(lambda: self.fold(1))]

    def fold(self, segments: int) -> None:
        if self.before is not None:
            self.before(len(self.read))
        for _ in range(segments):
            place = self.counter[0]
            row = self.ids[place, : self.lengths[place]]
            self.read.append(row.tolist())
            self.sums[place] = row.sum(), len(row)
            self.finite[place] = 1
            self.counter += 1

    def runner(self, **changed: object) -> GraphRunner:
        options = {
            "segment_size": SEGMENT,
            "piece_segments": PIECE,
            "ids": self.ids.ctypes.data,
            "lengths": self.lengths.ctypes.data,
            "counter": self.counter.ctypes.data,
            "finite": self.finite.ctypes.data,
            "outputs": [(self.sums.ctypes.data, 16)],
            "keep": self,
        }
        graphs = [(self.graphs[0].handle, 4), (self.graphs[1].handle, 1)]
        return GraphRunner("host", graphs, **{**options, **changed})  # type: ignore[arg-type]


def stream_of(ids: np.ndarray | list[int]) -> SegmentStream:
    source = TokenSource.pushed(capacity=len(ids) + 1)
    source.push(np.asarray(ids, dtype=np.int64))
    source.close()
    return SegmentStream(source, SEGMENT)


def read_all(runner: GraphRunner, stream: SegmentStream) -> None:
    while runner.advance(stream, PIECE):
        pass
    runner.finish()


@pytest.mark.parametrize("count", [0, 1, 4, 5, 33, 64, 65, 131])
def test_every_segment_but_the_last_is_folded(count: int) -> None:
    device, ids = Device(), np.arange(count)
    runner = device.runner()
    with stream_of(ids) as stream:
        read_all(runner, stream)
    cut = [ids[at : at + SEGMENT].tolist() for at in range(0, count, SEGMENT)]
    assert device.read == cut[:-1]
    assert runner.held.tolist() == (cut[-1] if cut else [])
    assert (runner.segments, runner.folded, runner.tokens) == (len(cut[:-1]), len(cut[:-1]), SEGMENT * len(cut[:-1]))
    (sums,) = runner.take_outputs()
    assert sums.view(np.int64).reshape(-1, 2).tolist() == [[sum(row), SEGMENT] for row in cut[:-1]]
    assert runner.finite and runner.unfolded() == []
    pieces, left = divmod(len(cut[:-1]), PIECE)
    assert runner.stats()["launches"] == 2 * pieces + left // 4 + left % 4


def test_a_stream_goes_on_from_its_rest() -> None:
    device = Device()
    runner = device.runner()
    runner.begin([7], 2, SEGMENT)
    source = TokenSource.pushed()
    source.push(list(range(10)))
    source.close()
    with SegmentStream(source, SEGMENT, 1) as stream:
        read_all(runner, stream)
    assert device.read == [[7, 0], [1, 2, 3, 4], [5, 6, 7, 8]]
    assert runner.held.tolist() == [9]


def test_what_a_graph_raises_comes_out_and_spoils_the_runner() -> None:
    def fail(done: int) -> None:
        if done == 8:
            raise MemoryError("no room in the fold")

    device = Device(fail)
    runner = device.runner()
    with stream_of(list(range(400))) as stream:
        with pytest.raises(MemoryError, match="no room in the fold"):
            read_all(runner, stream)
        with pytest.raises(DeviceError, match="this graph runner failed before: MemoryError: no room in the fold"):
            runner.advance(stream, PIECE)
    assert len(device.read) == 8


def test_ctrl_c_inside_a_graph_and_while_the_input_is_waited_for() -> None:
    device = Device(lambda done: _thread.interrupt_main() if done == 8 else None)
    with pytest.raises(KeyboardInterrupt), stream_of(list(range(400))) as stream:
        read_all(device.runner(), stream)

    device, source = Device(), TokenSource.pushed()
    source.push(list(range(3 * SEGMENT + 1)))
    runner = device.runner()
    threading.Timer(0.1, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt), SegmentStream(source, SEGMENT) as stream:
        runner.advance(stream, PIECE)
    runner.finish()
    assert runner.folded == len(device.read) == 2  # what was whole is folded, and the runner goes on
    assert runner.held.tolist() == [8, 9, 10, 11]


def test_an_error_of_the_input_comes_after_the_segments_before_it() -> None:
    device, source = Device(), TokenSource.pushed()
    source.push(list(range(5 * SEGMENT)))
    source.fail("the disk is gone")
    runner = device.runner()
    with SegmentStream(source, SEGMENT) as stream, pytest.raises(InputError, match="the disk is gone"):
        read_all(runner, stream)
    runner.finish()
    assert device.read == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


def test_stopped_by_another_thread_with_the_gil_free() -> None:
    device, source = Device(), TokenSource.pushed()
    source.push(list(range(50)))
    stream, runner = SegmentStream(source, SEGMENT), device.runner()
    timer = threading.Timer(0.05, stream.stop)
    timer.start()
    start = time.perf_counter()
    with pytest.raises(StreamStopped):
        read_all(runner, stream)
    assert time.perf_counter() - start < 5
    runner.finish()
    assert runner.folded == runner.segments == len(device.read)


def test_the_runner_keeps_what_it_uses() -> None:
    device = Device()
    gone = weakref.ref(device)
    runner = device.runner()
    del device
    with stream_of(list(range(50))) as stream:
        read_all(runner, stream)
    assert gone() is not None and len(gone().read) == 12  # type: ignore[union-attr]
    del runner
    gone().graphs.clear()  # type: ignore[union-attr]  # the functions hold the device too
    assert gone() is None


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"segment_size": 0}, "segment_size: expected at least 1, came 0"),
        ({"piece_segments": -1}, "piece_segments: expected at least 1, came -1"),
        ({"outputs": [(8, 0)]}, "bytes of an output: expected at least 1, came 0"),
    ],
)
def test_arguments_that_cannot_be_meant(changed: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Device().runner(**changed)


def test_a_driver_that_is_not_here_says_so() -> None:
    with pytest.raises(ValueError, match="driver: expected 'cuda' or 'host', came 'metal'"):
        GraphRunner("metal", [(1, 1)], segment_size=1, piece_segments=1, ids=0, lengths=0, counter=0, finite=0)
    try:
        load_cuda_driver()
    except BackendError as error:
        assert "no CUDA driver: libcuda.so.1" in str(error) and "executor='eager'" in str(error)


def test_errors_of_a_device_have_their_exit_codes() -> None:
    assert issubclass(DeviceOutOfMemory, MemoryError) and issubclass(DeviceOutOfMemory, DeviceError)
    assert issubclass(DeviceError, RMTError)
    assert (DeviceError.exit_code, DeviceOutOfMemory.exit_code) == (1, 4)
