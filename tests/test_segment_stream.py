"""The extension's token sources and segment stream, seen from Python."""

import array
import gc
import itertools
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmt_engine._C import FileSource, PushedSource, SegmentStream, StreamStopped, TokenSource
from rmt_engine.errors import InputError, RMTError


def pushed(*pushes, drop_ids=(), capacity=1 << 12):
    """A closed queue that holds what was pushed."""
    source = TokenSource.pushed(drop_ids, capacity)
    for ids in pushes:
        source.push(ids)
    source.close()
    return source


def read(stream):
    return [(s.index, s.position, s.last, s.ids.tolist()) for s in stream]


def tokens(stream):
    return list(itertools.chain.from_iterable(s.ids.tolist() for s in stream))


def model(ids, segment_size, first=None, drop_ids=()):
    """What SegmentStream must give, written plainly."""
    ids = [i for i in ids if i not in set(drop_ids)]
    starts = [0, *range(first or segment_size, len(ids), segment_size)] if ids else []
    return [
        (index, start, end == len(ids), ids[start:end])
        for index, (start, end) in enumerate(itertools.pairwise([*starts, len(ids)]))
    ]


def in_thread(call):
    """Runs `call` in a thread; the result's `error` is what it raised."""

    class Running(threading.Thread):
        error = None

        def run(self):
            try:
                call()
            except BaseException as error:
                self.error = error

    thread = Running(daemon=True)
    thread.start()
    return thread


def joined(thread):
    thread.join(5)
    assert not thread.is_alive()
    return thread.error


# --- segments ---------------------------------------------------------------------------------------------------------

sizes = st.integers(1, 9).flatmap(lambda size: st.tuples(st.just(size), st.integers(1, size)))
drops = st.sets(st.sampled_from([0, 1, 2, 3, -5, 2**40]))
ids_lists = st.lists(st.sampled_from([0, 1, 2, 3, 4, -5, 2**40, -(2**63), 2**63 - 1]), max_size=60)


@settings(max_examples=200, deadline=None)
@given(ids=ids_lists, size=sizes, drop_ids=drops, slots=st.integers(1, 4), cuts=st.lists(st.integers(0, 60)))
def test_pushed_segments_equal_the_model(ids, size, drop_ids, slots, cuts):
    cuts = [0, *sorted(cuts), 60]
    source = TokenSource.pushed(drop_ids, capacity=5)

    def produce():
        for begin, end in itertools.pairwise(cuts):
            source.push(np.array(ids[begin:end], dtype=np.int64))
        source.close()

    stream = SegmentStream(source, *size, ring_slots=slots)
    producer = in_thread(produce)
    assert read(stream) == model(ids, *size, drop_ids)
    assert joined(producer) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokens")


@settings(max_examples=100, deadline=None)
@given(
    ids=st.lists(st.integers(0, 255), max_size=60),
    dtype=st.sampled_from(["uint8", "uint16", "uint32", "int32", "int64"]),
    size=sizes,
    drop_ids=st.sets(st.integers(0, 255)),
    npy=st.booleans(),
    start=st.integers(0, 60),
)
def test_file_segments_equal_the_model(folder, ids, dtype, size, drop_ids, npy, start):
    start = min(start, len(ids))
    path = folder / ("t.npy" if npy else "t.bin")
    values = np.array(ids, dtype=dtype)
    np.save(path, values) if npy else values.tofile(path)
    source = TokenSource.open(path, "auto" if npy else dtype, drop_ids, start)
    expected = model(ids[start:], *size, drop_ids)
    assert read(SegmentStream(source, *size)) == expected
    assert read(SegmentStream(source, *size)) == expected, "a file can be read again"
    assert source.size == len(ids)
    assert source.count() == sum(i not in drop_ids for i in ids[start:])
    assert isinstance(source, FileSource) and source.dtype == dtype


def test_the_last_full_segment_is_marked():
    assert read(SegmentStream(pushed([1, 2, 3, 4]), 2)) == [(0, 0, False, [1, 2]), (1, 2, True, [3, 4])]
    assert read(SegmentStream(pushed(), 2)) == []


def test_next_is_none_at_the_end_again_and_again():
    stream = SegmentStream(pushed([1]), 2)
    assert stream.next().last
    assert [stream.next(), stream.next()] == [None, None]
    stream.stop()
    assert stream.next() is None


@pytest.mark.parametrize(
    "ids",
    [
        [1, 2, 3],
        (1, 2, 3),
        np.array([1, 2, 3], dtype=np.uint16),
        np.array([1, 2, 3], dtype=np.int32),
        np.frombuffer(b"\x01\x00\x02\x00\x03\x00", dtype=np.uint16),  # read-only
        np.frombuffer(b"x\x01\x00\x00\x00\x02\x00\x00\x00\x03\x00\x00\x00", dtype=np.uint32, offset=1),  # unaligned
        torch.tensor([1, 2, 3]),
        torch.tensor([0, 1, 2, 3], dtype=torch.int32)[1:],
        torch.tensor([1, 2, 3], dtype=torch.uint8),
        array.array("q", [1, 2, 3]),
        [np.int64(1), 2, True + 2],
    ],
    ids=lambda ids: f"{type(ids).__name__}-{getattr(ids, 'dtype', '')}",
)
def test_what_can_be_pushed(ids):
    assert tokens(SegmentStream(pushed(ids), 2)) == [1, 2, 3]


def test_an_empty_push_adds_nothing():
    assert tokens(
        SegmentStream(pushed([], np.array([], dtype=np.int64), torch.tensor([], dtype=torch.int64), [1]), 2)
    ) == [1]


def test_pushed_arrays_are_let_go():
    source = TokenSource.pushed()
    ids = np.arange(10)
    before = sys.getrefcount(ids)
    for _ in range(100):
        source.push(ids)
    assert sys.getrefcount(ids) == before


# --- views ------------------------------------------------------------------------------------------------------------


def test_ids_are_a_view_on_the_slot():
    stream = SegmentStream(pushed(range_array(6)), 2, ring_slots=1)
    segment = stream.next()
    ids = segment.ids
    assert ids.dtype == np.int64 and ids.flags.c_contiguous and not ids.flags.owndata
    assert ids.ctypes.data == segment.ids.ctypes.data
    assert torch.from_numpy(ids).tolist() == [0, 1]
    assert stream.next().ids.ctypes.data == ids.ctypes.data, "one slot: the same memory"


def test_old_ids_are_refused_and_an_old_array_stays_safe():
    stream = SegmentStream(pushed(range_array(6)), 2)
    segment = stream.next()
    array = segment.ids
    stream.next()
    with pytest.raises(
        ValueError, match=r"segment 0: its ids were valid until the following next\(\); copy them before"
    ):
        _ = segment.ids
    del stream, segment
    gc.collect()
    assert array.shape == (2,)
    array.sum()


def test_ids_outlive_the_stream():
    with SegmentStream(pushed([1, 2, 3]), 2) as stream:
        segment = stream.next()
    del stream
    gc.collect()
    assert segment.ids.tolist() == [1, 2]
    assert repr(segment) == "Segment(index=0, position=0, size=2, last=False)" and len(segment) == 2


def range_array(count):
    return np.arange(count, dtype=np.int64)


# --- errors -----------------------------------------------------------------------------------------------------------


def save(folder, name, values):
    path = folder / name
    np.save(path, values) if name.endswith(".npy") else values.tofile(path)
    return path


def test_files_that_are_not_what_they_claim(tmp_path):
    whole = save(tmp_path, "t.npy", np.arange(100, dtype=np.uint16)).read_bytes()
    cases = {
        "(truncated); copy or write the file again": whole[:-1],
        "expected a file of 328 bytes, came 329 (too long)": whole + b"x",
        "does not start with the .npy magic": b"abc" * 100,
        "truncated or damaged .npy header": whole[:9],
        "damaged .npy header: expected": whole.replace(b"descr", b"dexcr"),
        'came "<u8"': whole.replace(b"<u2", b"<u8"),
        'came ">u2"': whole.replace(b"<u2", b">u2"),
        "came shape (50, 2); save array.ravel() instead": whole.replace(b"(100,), }", b"(50, 2)} "),
    }
    for words, data in cases.items():
        path = tmp_path / "bad.npy"
        path.write_bytes(data)
        with pytest.raises(InputError) as error:
            TokenSource.open(path)
        assert words in str(error.value) and str(error.value).startswith(str(path))


def test_files_that_cannot_be_opened(tmp_path):
    raw = save(tmp_path, "t.bin", np.arange(3, dtype=np.uint8))
    with pytest.raises(InputError, match="cannot open the token file: No such file or directory"):
        TokenSource.open(tmp_path / "none.npy")
    with pytest.raises(InputError, match=r"came a directory; name a \.npy or \.bin file, or push the tokens"):
        TokenSource.open(str(tmp_path), "uint16")
    with pytest.raises(InputError, match=r"expected a multiple of 2 bytes \(uint16\), came 3 bytes; check dtype"):
        TokenSource.open(raw, "uint16")
    with pytest.raises(InputError, match=r"came a file with an \.npy header; rename it to \.npy"):
        TokenSource.open(save(tmp_path, "t.npy", np.arange(3)).rename(tmp_path / "u.bin"), "int64")
    with pytest.raises(InputError, match="No such file"):
        TokenSource.open(b"/nowhere/\xff.bin", "int64")
    with pytest.raises(InputError, match="came a pipe or device"):
        TokenSource.open("/dev/null", "uint16")


def test_dtype_mistakes(tmp_path):
    npy = save(tmp_path, "t.npy", np.arange(3, dtype=np.uint16))
    raw = save(tmp_path, "t.bin", np.arange(3, dtype=np.uint16))
    with pytest.raises(ValueError, match='dtype: expected uint8, uint16, uint32, int32 or int64, came "float32"'):
        TokenSource.open(raw, "float32")
    with pytest.raises(ValueError, match="a raw token file does not name its type; pass dtype, one of uint8"):
        TokenSource.open(raw)
    with pytest.raises(ValueError, match='dtype="int32" does not agree with the file, which holds uint16'):
        TokenSource.open(npy, dtype="int32")
    with pytest.raises(ValueError, match="drop_ids: expected integers of 64 bits, came 'a'"):
        TokenSource.open(npy, drop_ids=["a"])


def test_a_start_outside_the_file(tmp_path):
    path = save(tmp_path, "t.npy", np.arange(3))
    assert tokens(SegmentStream(TokenSource.open(path, start=3), 2)) == []
    with pytest.raises(InputError, match=r"t\.npy: cannot start at token 4: the file holds only 3; check that it is"):
        TokenSource.open(path, start=4)
    with pytest.raises(ValueError, match="start: expected 0 or more, came -1"):
        TokenSource.open(path, start=-1)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (b"text", "came bytes; tokenize text first"),
        ("text", "came str; tokenize text first"),
        (7, "came int; tokenize text first"),
        ([1.5], "push(ids): expected integers of 64 bits, came 1.5"),
        ([2**63], "push(ids): expected integers of 64 bits, came 9223372036854775808"),
        (np.zeros(3), "came float64; convert it to one of uint8"),
        (np.zeros(3, dtype=bool), "came bool"),
        (np.zeros(3, dtype=np.uint64), "came uint64"),
        (np.zeros(3, dtype=np.int16), "came int16"),
        (torch.zeros(3, dtype=torch.bfloat16), "came bfloat16"),
        (np.zeros((2, 3), dtype=np.int64), "came one of 2 dimensions"),
        (np.array(5), "came one of 0 dimensions"),
        (np.arange(6)[::2], "came one of 1 dimensions, not contiguous; push one contiguous row at a time"),
        (np.arange(6)[::-1], "not contiguous"),
        (np.zeros(3, dtype=[("a", "<i4"), ("b", "<i2")])["a"], "expected a contiguous buffer, came a strided one"),
        (np.zeros(3, dtype=">i4"), 'expected a buffer of native integers, came format ">i"'),
        (np.array([None]), 'expected a buffer of native integers, came format "O"'),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_what_cannot_be_pushed(ids, words):
    with pytest.raises(ValueError) as error:
        TokenSource.pushed().push(ids)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"segment_size": 0}, "segment_size: expected at least 1, came 0"),
        ({"segment_size": -3}, "segment_size: expected at least 1, came -3"),
        ({"segment_size": 2**60}, "use smaller segments or fewer slots"),
        ({"segment_size": 4, "ring_slots": 0}, "ring_slots: expected at least 1, came 0"),
        ({"segment_size": 1, "ring_slots": 1 << 20}, "ring_slots: expected 1 to 65536, came 1048576"),
        ({"segment_size": 4, "first_segment_size": 0}, "first_segment_size: expected at least 1, came 0"),
        ({"segment_size": 4, "first_segment_size": 5}, "first_segment_size: expected 1 to segment_size=4, came 5"),
        ({"segment_size": 4, "vocab_size": 0}, "vocab_size: expected at least 1, came 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_stream_argument_mistakes(arguments, words):
    source = pushed([1])
    with pytest.raises(ValueError) as error:
        SegmentStream(source, **arguments)
    assert words in str(error.value)
    assert tokens(SegmentStream(source, 2)) == [1], "the source is still free"


def test_a_pushed_source_knows_no_length_and_has_one_reader():
    source = TokenSource.pushed()
    assert isinstance(source, PushedSource)
    with pytest.raises(ValueError, match="size: tokens that are pushed cannot be counted before they come"):
        _ = source.size
    with pytest.raises(ValueError, match=r"count\(\): tokens that are pushed cannot be counted before they come"):
        source.count()
    with pytest.raises(ValueError, match="capacity: expected at least 1, came 0"):
        TokenSource.pushed(capacity=0)
    _stream = SegmentStream(source, 2)
    with pytest.raises(ValueError, match="a pushed source is read once, by one stream; make one source per stream"):
        SegmentStream(source, 2)


def test_a_token_outside_the_vocabulary_comes_after_the_segments_before_it():
    stream = SegmentStream(pushed([0, 9, 9, 1, 2, 50, 3], drop_ids=[9]), 2, vocab_size=50)
    assert [stream.next().ids.tolist()] == [[0, 1]]
    for _ in range(2):
        with pytest.raises(
            InputError, match="token 50 at position 3 is outside the vocabulary: expected 0 to 49; tokenize"
        ):
            stream.next()


def test_a_failed_source_comes_after_the_segments_before_it():
    source = TokenSource.pushed()
    source.push([1, 2, 3, 4, 5])
    source.fail("byte 17 is not UTF-8")
    with pytest.raises(ValueError, match=r"push\(\) after close\(\) or fail\(\): the input has ended"):
        source.push([6])
    stream = SegmentStream(source, 2)
    assert [stream.next().ids.tolist() for _ in range(2)] == [[1, 2], [3, 4]]
    with pytest.raises(InputError, match=r"^byte 17 is not UTF-8$"):
        stream.next()


def test_a_file_that_shrinks_is_an_error(tmp_path):
    path = save(tmp_path, "t.bin", np.zeros(1 << 18, dtype=np.int64))
    stream = SegmentStream(TokenSource.open(path, "int64"), 512)
    stream.next()
    os.truncate(path, 8 << 17)
    with pytest.raises(InputError, match="became shorter while it was read: expected 262144 tokens, came 131072"):
        for _ in stream:
            pass


# --- stopping, waiting ------------------------------------------------------------------------------------------------


def test_stop_wakes_the_consumer():
    stream = SegmentStream(TokenSource.pushed(), 2)
    consumer = in_thread(stream.next)
    time.sleep(0.05)
    stream.stop()
    stream.stop()
    assert isinstance(joined(consumer), StreamStopped)
    with pytest.raises(RMTError, match="the stream was stopped before its input ended"):
        stream.next()


@pytest.mark.parametrize("way", ["stop", "del", "with"])
def test_the_end_of_the_stream_wakes_who_pushes(way):
    source = TokenSource.pushed(capacity=4)
    producer = in_thread(lambda: source.push(np.zeros(10_000_000, dtype=np.uint8)))
    with SegmentStream(source, 2) as stream:
        time.sleep(0.05)
        assert producer.is_alive()
        if way == "stop":
            stream.stop()
        if way == "del":
            del stream
            gc.collect()
    error = joined(producer)
    assert isinstance(error, StreamStopped) and "the stream that reads this source has stopped" in str(error)


def test_close_wakes_who_pushes():
    source = TokenSource.pushed(capacity=4)
    producer = in_thread(lambda: source.push(range_array(10)))
    time.sleep(0.05)
    source.close()
    assert isinstance(joined(producer), ValueError)
    assert tokens(SegmentStream(source, 3)) == [0, 1, 2, 3]


def test_no_thread_is_left():
    def threads():
        return len(os.listdir("/proc/self/task"))

    source = TokenSource.pushed(capacity=4)
    before = threads()
    streams = [SegmentStream(s, 2) for s in (source, pushed(range_array(1000)), pushed([1]))]
    assert before < threads() <= before + 3
    del streams
    gc.collect()
    assert threads() == before


def test_the_interpreter_ends_while_threads_wait():
    program = """
import threading, time
from rmt_engine._C import SegmentStream, TokenSource
full, empty = TokenSource.pushed(capacity=1), TokenSource.pushed()
stream = SegmentStream(empty, 2)
threading.Thread(target=full.push, args=([1, 2],), daemon=True).start()
threading.Thread(target=stream.next, daemon=True).start()
time.sleep(0.05)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=10).returncode == 0


@pytest.mark.parametrize("source", ["open(sys.argv[1], 'uint8')", "pushed(capacity=4)"])
def test_the_interpreter_ends_while_threads_work(source, tmp_path):
    program = f"""
import sys, threading, time
from rmt_engine._C import SegmentStream, TokenSource
def read():
    while True:
        source = TokenSource.{source}
        if hasattr(source, "push"):
            threading.Thread(target=push, args=(source,), daemon=True).start()
        for _ in SegmentStream(source, 4):
            pass
def push(source):
    while True:
        source.push([1, 2, 3])
for _ in range(3):
    threading.Thread(target=read, daemon=True).start()
time.sleep(0.02)
"""
    path = save(tmp_path, "t.bin", np.zeros(10_000, dtype=np.uint8))
    for _ in range(5):
        ended = subprocess.run([sys.executable, "-c", program, path], timeout=20, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr


def test_a_fork_leaves_streams_to_the_parent(tmp_path):
    program = """
import gc, os, sys
from rmt_engine._C import SegmentStream, StreamStopped, TokenSource
waiting, full = TokenSource.pushed(), TokenSource.open(sys.argv[1], "uint8")
streams = [SegmentStream(waiting, 2), SegmentStream(full, 2)]
segment = streams[1].next()
child = os.fork()
if child == 0:
    for call in (streams[0].next, streams[1].stats):
        try:
            call()
        except StreamStopped as error:
            assert "does not survive a fork(); make one in the child" in str(error)
        else:
            os._exit(2)
    streams[0].stop()
    assert segment.ids.tolist() == [0, 0]
    assert len([s.index for s in SegmentStream(full, 10)]) == 1000, "a file can be read on"
    del streams, waiting, segment
    gc.collect()
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
waiting.push([1, 2, 3])
assert streams[0].next().ids.tolist() == [1, 2]
"""
    path = save(tmp_path, "t.bin", np.zeros(10_000, dtype=np.uint8))
    subprocess.run([sys.executable, "-c", program, path], timeout=20, check=True)


@pytest.mark.parametrize("waits_in", ["next", "push"])
def test_ctrl_c_ends_a_wait(waits_in):
    source = TokenSource.pushed(capacity=4)
    stream = SegmentStream(source, 2) if waits_in == "next" else None
    timer = threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        stream.next() if stream else source.push(range_array(10))
    assert time.monotonic() - start < 1
    timer.join()
    if stream:
        source.push([1, 2, 3])
        assert stream.next().ids.tolist() == [1, 2], "the stream goes on"


def test_python_runs_while_next_waits():
    stream = SegmentStream(TokenSource.pushed(), 2)
    consumer = in_thread(stream.next)
    start, count = time.monotonic(), 0
    while time.monotonic() - start < 0.1:
        count += 1
    assert count > 10_000 and consumer.is_alive()
    assert stream.stats()["segments"] == 0
    stream.stop()
    joined(consumer)


def test_stats_say_who_waits():
    source = TokenSource.pushed()
    stream = SegmentStream(source, 2, ring_slots=2)
    timer = threading.Timer(0.05, lambda: source.push(range_array(100)))
    timer.start()
    stream.next()
    time.sleep(0.05)
    stream.next()
    stream.next()
    timer.join()
    stats = stream.stats()
    assert (stats["segments"], stats["tokens"]) == (3, 6)
    assert stats["consumer_wait_seconds"] > 0.01 and stats["reader_wait_seconds"] > 0.01


# --- size -------------------------------------------------------------------------------------------------------------


def resident_bytes():
    """Anonymous and file-mapped pages alike: a mapped file would show here."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon:", "VmSwap:")))


@pytest.mark.parametrize("kind", ["file", "pushed", "failed", "waiting", "refused"])
def test_nothing_is_left_of_ten_thousand_streams(kind, tmp_path):
    file = TokenSource.open(save(tmp_path, "t.npy", np.arange(100)))

    def cycle():
        source = file if kind == "file" else TokenSource.pushed(capacity=100)
        if kind in ("pushed", "failed"):
            source.push(ids)
        if kind == "failed":
            source.fail("gone")
        if kind == "refused":
            with pytest.raises(ValueError, match="segment_size"):
                SegmentStream(source, 0)
            return
        stream = SegmentStream(source, 4)
        if kind != "waiting":
            stream.next()
        stream.stop()

    ids = np.arange(10)
    for _ in range(500):
        cycle()
    before = anonymous_bytes(), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    for _ in range(10_000):
        cycle()
    assert anonymous_bytes() - before[0] < 1 << 19
    assert len(os.listdir("/proc/self/fd")) == before[1]
    # A joined thread may still be listed for a moment, in either count: what leaks here does so thousands of times.
    assert abs(len(os.listdir("/proc/self/task")) - before[2]) <= 1


def test_memory_is_flat_over_a_gigabyte(tmp_path):
    path = tmp_path / "sparse.bin"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    stream = SegmentStream(TokenSource.open(path, "int64"), 1 << 16)
    for _ in range(16):
        stream.next()
    before, peak = resident_bytes(), 0
    for segment in stream:
        if segment.index % 100 == 0:
            peak = max(peak, resident_bytes())
    assert stream.stats()["tokens"] == 1 << 27
    assert peak - before < 1 << 20


def test_a_file_of_many_gigabytes_opens_and_reads_from_its_start(tmp_path):
    path = tmp_path / "sparse.bin"
    with path.open("wb") as file:
        file.write(np.array([7], dtype=np.int64).tobytes())
        file.truncate(5 << 30)
        file.seek(0, os.SEEK_END)
    source = TokenSource.open(path, "int64")
    assert source.size == 5 << 27
    with SegmentStream(source, 4) as stream:
        assert stream.next().ids.tolist() == [7, 0, 0, 0]
