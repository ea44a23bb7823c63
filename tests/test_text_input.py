"""Bytes to ids: decoding with offsets, the thread that runs ahead, its errors and its end."""

import io
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_zoo import ATOMS, corpus, definition

from rmt_engine.errors import InputError, TokenizerError
from rmt_engine.sources import open_file
from rmt_engine.text_input import TextPosition, Utf8Decoder, tokenize_stream
from rmt_engine.tokens import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(definition("llama3"))


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 2
    while names := [thread.name for thread in threading.enumerate() if thread.name == "rmt-tokenizer"]:
        assert time.monotonic() < deadline, f"left running: {names}"
        time.sleep(0.01)


def cut_bytes(data: bytes, generator: random.Random, longest: int = 9) -> list[bytes]:
    pieces = []
    while data:
        size = generator.randint(0, longest)
        pieces.append(data[:size])
        data = data[size:]
    return pieces


# ------------------------------------------------------------------------------------------------- decoding


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.binary(max_size=40), seed=st.integers(0, 2**32))
def test_replace_gives_what_bytes_decode_gives(data: bytes, seed: int) -> None:
    decoder = Utf8Decoder("replace")
    text = "".join(decoder.feed(piece) for piece in cut_bytes(data, random.Random(seed))) + decoder.flush()
    assert text == data.decode("utf-8", "replace").removeprefix("\ufeff")
    assert decoder.offset == len(data)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(text=st.text(max_size=20), bad=st.sampled_from([b"\xff", b"\xe2\x28", b"\xc0\x80"]), seed=st.integers(0, 2**32))
def test_strict_names_the_offset_across_any_reads(text: str, bad: bytes, seed: int) -> None:
    good = text.encode("utf-8")
    decoder = Utf8Decoder()
    with pytest.raises(InputError, match=rf"^expected UTF-8, found 0x{bad[0]:02x} at byte {len(good):,} "):
        for piece in cut_bytes(good + bad + b"abc", random.Random(seed)):
            decoder.feed(piece)


def test_the_end_inside_a_character() -> None:
    decoder = Utf8Decoder()
    assert decoder.feed(b"ab\xe4\xb8") == "ab" and decoder.held == b"\xe4\xb8"
    assert Utf8Decoder(held=decoder.held, offset=decoder.offset).feed(b"\xad") == "中"
    words = r"found 0xe4 0xb8 at byte 2 \(unexpected end of data\); convert .* or give --errors replace"
    with pytest.raises(InputError, match=words):
        decoder.flush()


def test_only_the_first_byte_order_mark_is_dropped() -> None:
    decoder = Utf8Decoder()
    assert [decoder.feed(piece) for piece in (b"\xef", b"\xbb", b"\xbfa", b"\xef\xbb\xbfb")] == ["", "", "a", "\ufeffb"]
    later = Utf8Decoder(offset=10)
    assert later.feed(b"\xef\xbb\xbf") == "\ufeff"


def test_errors_is_strict_or_replace() -> None:
    with pytest.raises(ValueError, match="errors='ignore' is not known; use 'strict' or 'replace'"):
        Utf8Decoder("ignore")


# ------------------------------------------------------------------------------------------------- opening


def test_what_cannot_be_opened_is_said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"there is no file .*gone\.txt; give the path of a text file, or -"):
        open_file(tmp_path / "gone.txt")
    with pytest.raises(InputError, match=r"expected a text file, found a directory: .*; give one of the files"):
        open_file(tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(InputError, match=r"expected text, found an empty file: .*empty\.txt"):
        open_file(tmp_path / "empty.txt")
    (tmp_path / "a").write_text("x")
    with pytest.raises(InputError, match=r"cannot read .*a/b: Not a directory"):
        open_file(tmp_path / "a" / "b")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="there is no standard input to read"):
        open_file("-")


def test_dash_is_the_standard_input(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one two")))
    assert np.concatenate(list(tokenize_stream(tokenizer, "-"))).tolist() == tokenizer.encode("one two").tolist()


# ------------------------------------------------------------------------------------------------- the stream


@settings(max_examples=60, deadline=None, derandomize=True)
@given(atoms=st.lists(st.sampled_from(ATOMS), min_size=1, max_size=60), seed=st.integers(0, 2**32))
def test_any_reads_give_the_ids_of_the_whole(atoms: list[str], seed: int) -> None:
    tokenizer = shared_tokenizer()
    text = "a" + "".join(atoms)
    pieces = cut_bytes(text.encode("utf-8"), random.Random(seed), longest=40)
    ids = [i for array in tokenize_stream(tokenizer, iter(pieces), ahead=2) for i in array.tolist()]
    assert ids == tokenizer.backend.encode(text, add_special_tokens=False).ids


def shared_tokenizer(loaded: list[Tokenizer] = []) -> Tokenizer:  # noqa: B006 - one for all examples
    if not loaded:
        loaded.append(Tokenizer(definition("llama3")))
    return loaded[0]


def write_source(folder: Path) -> tuple[Path, str]:
    text = "".join(corpus())
    path = folder / "source.txt"
    path.write_text(text, encoding="utf-8", newline="")
    return path, text


def test_a_file_by_path_and_by_object(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path, text = write_source(tmp_path)
    expected = tokenizer.encode(text)
    arrays = list(tokenize_stream(tokenizer, path, read_bytes=1000))
    assert all(array.dtype == np.int64 and array.ndim == 1 and array.size for array in arrays)
    assert np.array_equal(np.concatenate(arrays), expected)
    with open(path, "rb") as file:
        assert np.array_equal(np.concatenate(list(tokenize_stream(tokenizer, file))), expected)
        assert not file.closed


def test_the_position_after_any_array_goes_on_from_there(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path, text = write_source(tmp_path)
    expected, taken = tokenizer.encode(text), 0
    data = path.read_bytes()
    stream = tokenize_stream(tokenizer, path, read_bytes=997)
    for count, array in enumerate(stream):
        taken += array.size
        if count % 20 == 0:
            rest = [data[stream.position.offset :]]
            for source in (path, rest):
                ids = np.concatenate(list(tokenize_stream(tokenizer, source, position=stream.position)))
                assert np.array_equal(ids, expected[taken:])
    assert stream.position == TextPosition(len(data)) and taken == expected.size
    with pytest.raises(InputError, match=rf"expected at least {len(data) + 1:,} bytes in .*, found {len(data):,}; the"):
        tokenize_stream(tokenizer, path, position=TextPosition(len(data) + 1))


def test_errors_come_where_they_happen(tokenizer: Tokenizer) -> None:
    stream = tokenize_stream(tokenizer, [b"one two ", b"three\xff four"])
    assert tokenizer.decode(next(stream)) == "one two"
    with pytest.raises(InputError, match=r"found 0xff at byte 13 "):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)
    replaced = tokenize_stream(tokenizer, [b"one two ", b"three\xff four"], errors="replace")
    assert tokenizer.decode(np.concatenate(list(replaced))) == "one two three\ufffd four"


def test_an_error_of_the_source_is_carried(tokenizer: Tokenizer) -> None:
    def source() -> Iterator[bytes]:
        yield b"one two "
        raise RuntimeError("the line is down")

    with pytest.raises(RuntimeError, match="the line is down"):
        list(tokenize_stream(tokenizer, source()))


def test_an_empty_source_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="expected text, found an empty input"):
        list(tokenize_stream(tokenizer, io.BytesIO(b"")))


def test_a_tokenizer_that_cannot_be_cut_is_refused_at_once() -> None:
    with pytest.raises(TokenizerError, match="cannot be run over a stream exactly"):
        tokenize_stream(Tokenizer(definition("gpt2").replace('"dropout":null', '"dropout":0.5')), [b"a b"])


# ------------------------------------------------------------------------------------- back-pressure, stopping


def endless(reads: list[int]) -> Iterator[bytes]:
    while True:
        reads.append(1)
        yield b"some words that go on and on "


def test_a_slow_consumer_holds_the_reader_back(tokenizer: Tokenizer) -> None:
    reads: list[int] = []
    stream = tokenize_stream(tokenizer, endless(reads), ahead=3)
    next(stream)
    time.sleep(0.2)
    assert len(reads) <= 3 + 1 + 2  # queued, taken, in the thread's hands and being read
    stream.close()


def test_stopping_early_leaves_no_thread(tokenizer: Tokenizer) -> None:
    with tokenize_stream(tokenizer, endless([])) as stream:
        next(stream)
    assert list(stream) == []
    dropped = tokenize_stream(tokenizer, endless([]))
    next(dropped)
    del dropped  # no_thread_is_left looks
    tokenize_stream(tokenizer, endless([])).close()


def test_a_silent_pipe_can_be_left(tokenizer: Tokenizer) -> None:
    reader, writer = os.pipe()
    with open(reader, "rb", buffering=0) as pipe:
        os.write(writer, b"one two ")
        stream = tokenize_stream(tokenizer, pipe)
        assert tokenizer.decode(next(stream)) == "one two"
        start = time.monotonic()
        stream.close()
        assert time.monotonic() - start < 1
    os.close(writer)


def test_memory_stays_flat(tokenizer: Tokenizer) -> None:
    def rss() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0])

    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    data = corpus()[0].encode("utf-8")
    seen, early = 0, 0
    for array in tokenize_stream(tokenizer, (data for _ in range(50))):
        seen += array.size
        early = early or (rss() if seen > 200_000 else 0)
    assert seen > 500_000
    assert rss() - early < 8 * 1024, "kB"
