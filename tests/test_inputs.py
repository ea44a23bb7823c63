"""Inputs of every kind: their places, containers, errors, and memory that stays the same."""

from __future__ import annotations

import gzip
import io
import json
import random
import sys
import threading
import time
from functools import cache
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_zoo import ATOMS, definition

from rmt_engine import inputs, records, sources
from rmt_engine.errors import InputError, StateError
from rmt_engine.inputs import InputPosition, count_tokens, open_input
from rmt_engine.layouts import Cut
from rmt_engine.records import open_text
from rmt_engine.tokens import Tokenizer

SEGMENT = 16
VOCABULARY = 5000


@cache
def tokenizer(name: str) -> Tokenizer:
    return Tokenizer(definition(name), name)


def engine(name: str = "gpt2", drop_ids: tuple[int, ...] = (), segment: int = SEGMENT) -> Any:
    """What an input needs of an engine."""
    return SimpleNamespace(
        tokenizer=tokenizer(name),
        config=SimpleNamespace(drop_ids=drop_ids, segment_size=segment),
        vocab_size=VOCABULARY,
    )


def read(opened: Any, stop: int | None = None) -> tuple[list[int], list[tuple[int, InputPosition]]]:
    """All tokens, and a place after each segment (and up to a segment before it); at most about `stop` tokens."""
    ids: list[int] = []
    places = []
    with opened as feed, feed.segments(Cut(SEGMENT, SEGMENT), VOCABULARY) as segments:
        for segment in feed.errors_of(segments):
            ids += segment.ids.tolist()
            places += [(n, feed.position_at(n)) for n in {len(ids), max(len(ids) - len(ids) % 7, 0)}]
            if stop is not None and len(ids) >= stop:
                break
    return ids, places


def restored(position: InputPosition) -> InputPosition:
    return InputPosition.from_dict(json.loads(json.dumps(position.to_dict())))


# ------------------------------------------------------------------------------------------------- places


@pytest.mark.parametrize("name", ["gpt2", "llama3", "llama2", "bert-uncased", "unigram-first"])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(atoms=st.lists(st.sampled_from(ATOMS), min_size=1, max_size=300), seed=st.integers(0, 2**32), drop=st.booleans())
def test_a_text_goes_on_from_any_place(
    name: str, atoms: list[str], seed: int, drop: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    generator = random.Random(seed)
    path = tmp_path_factory.getbasetemp() / "places.txt"
    text = "a" + "".join(atoms)
    path.write_bytes(text.encode("utf-8"))
    ids = tokenizer(name).encode(text).tolist()
    dropped = tuple(generator.sample(ids, min(len(ids), 3))) if drop else ()
    expected = [i for i in ids if i not in dropped]
    with pytest.MonkeyPatch.context() as patch:  # arrays of a few tokens, places at each
        patch.setattr(inputs, "PLACE_TOKENS", generator.choice([1, 8, 512]))
        patch.setattr(inputs, "READ_BYTES", generator.choice([1, 2, 7, 1 << 15]))
        whole, places = read(open_input(engine(name, dropped), path))
        assert whole == expected
        for count, place in generator.sample(places, min(len(places), 5)):
            rest, later = read(open_input(engine(name, dropped), path, start=restored(place)))
            assert rest == expected[count:]
            for more, place in later[:2]:
                rest, _ = read(open_input(engine(name, dropped), path, start=place))
                assert rest == expected[count + more :]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    ids=st.lists(st.integers(0, 20), min_size=1, max_size=300),
    drop=st.sets(st.integers(0, 22), max_size=4),
    kind=st.sampled_from(["npy", "uint16", "int64"]),
    seed=st.integers(0, 2**32),
)
def test_a_token_file_goes_on_from_any_place(
    ids: list[int], drop: set[int], kind: str, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / ("places.npy" if kind == "npy" else "places.bin")
    np.save(path, np.array(ids, np.uint16)) if kind == "npy" else np.array(ids, kind).tofile(path)
    options = {"token_dtype": None if kind == "npy" else kind}
    model = engine(drop_ids=tuple(drop))
    expected = [i for i in ids if i not in drop]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "COUNTED_TOKENS", 5)
        whole, places = read(open_input(model, path, **options))
        assert whole == expected
        random.Random(seed).shuffle(places)
        for count, place in places[:5]:
            assert place.skip == 0
            rest, later = read(open_input(model, path, start=restored(place), **options))
            assert rest == expected[count:]
            for more, place in later[:1]:
                assert read(open_input(model, path, start=place, **options))[0] == expected[count + more :]


def test_places_are_few_and_old_ones_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "AHEAD_TOKENS", 256)
    monkeypatch.setattr(inputs, "READER_TOKENS", 64)
    monkeypatch.setattr(inputs, "PLACE_TOKENS", 32)
    monkeypatch.setattr(inputs, "READ_BYTES", 64)
    path = tmp_path / "long.txt"
    path.write_text("one two three\n" * 5000)
    expected = tokenizer("gpt2").encode(path.read_text()).tolist()
    opened = open_input(engine(), path)
    ids, places = read(opened)
    assert ids == expected and len(opened._places) <= 2 * ((256 + 64 + 10 * SEGMENT) // 32) + 4
    for count, place in places[:: len(places) // 20]:
        assert read(open_input(engine(), path, start=place))[0] == expected[count:]
        assert place.skip < 200
    with pytest.raises(AssertionError, match="this place is forgotten"):
        opened.position_at(0)


def test_a_place_in_the_standard_input_reads_up_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "où est Mary ? " * 200

    def stdin(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    monkeypatch.setattr(inputs, "READ_BYTES", 33)
    stdin(text)
    ids, places = read(open_input(engine(), "-"))
    count, place = places[len(places) // 2]
    assert place.offset % 33 == 0 < place.offset and place.size is None
    stdin(text)
    assert read(open_input(engine(), "-", start=place))[0] == ids[count:]
    stdin(text[:10])
    with pytest.raises(InputError, match=rf"at least {place.offset:,} bytes in the standard input, found 11; the text"):
        read(open_input(engine(), "-", start=place))


def test_a_place_in_another_input_is_refused(tmp_path: Path) -> None:
    text, tokens = tmp_path / "a.txt", tmp_path / "a.npy"
    text.write_text("one two three " * 30)
    np.save(tokens, np.arange(50, dtype=np.uint16))
    _, (*_, (_, place)) = read(open_input(engine(), text))
    _, (*_, (_, token_place)) = read(open_input(engine(), tokens))
    text.write_text("one two three " * 31)
    with pytest.raises(InputError, match=r"expected 420 bytes in .*a\.txt, found 434; its place was saved in another"):
        open_input(engine(), text, start=place)
    with pytest.raises(InputError, match=r"a\.txt is opened as text, and was tokens of uint16 when its place"):
        open_input(engine(), text, start=token_place)
    np.save(tokens, np.arange(50, dtype=np.int64))
    with pytest.raises(InputError, match=r"a\.npy is opened as tokens of int64, and was tokens of uint16"):
        open_input(engine(), tokens, start=token_place)


def test_a_damaged_place_is_refused() -> None:
    good = InputPosition("text", 3, b"\xe4", "held", True, 2, "a.txt", 9).to_dict()
    assert InputPosition.from_dict(good).held_bytes == b"\xe4"
    changes: list[dict[str, Any]] = [
        {"offset": -1}, {"offset": "3"}, {"skip": True}, {"size": 1.5}, {"held_bytes": "e"}, {"held_bytes": None},
        {"kind": "other"}, {"held_text": None}, {"continued": 1}, {"name": None}, {"field": 3}, {"dtype": 3},
        {"new": 1},
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(StateError, match="the position of the input is damaged: "):
            InputPosition.from_dict(good | change)
    with pytest.raises(StateError):
        InputPosition.from_dict({"kind": "text"})


# ------------------------------------------------------------------------------------- containers of a text

TEXT = "Où est Mary ? \n中文 one two don't\r\n" * 300


def text_of(source: str | Path, field: str | None = None, errors: str = "strict", offset: int = 0) -> bytes:
    return b"".join(open_text(source, field, errors).reads(100, offset, threading.Event()))


def zstd() -> Any:
    return pytest.importorskip("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")


def contain(path: Path, data: bytes) -> str:
    """`data` at `path`, compressed by its suffix; a URL is written through fsspec."""
    if path.suffix.lower() == ".gz":
        data = gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :])  # two members
    if path.suffix == ".zst":
        options = {zstd().CompressionParameter.checksum_flag: 1}  # as the zstd program does
        half = len(data) // 2
        data = zstd().compress(data[:half], options=options) + zstd().compress(data[half:], options=options)
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.TXT.GZ", "a.zst", "file", "memory"])
def test_a_text_in_any_container_is_the_same_text(name: str, tmp_path: Path) -> None:
    data = TEXT.encode()
    if name == "memory":
        source = "memory://texts/a.txt.gz"
        fsspec.filesystem("memory").pipe("/texts/a.txt.gz", gzip.compress(data))
    else:
        source = contain(tmp_path / name.replace("file", "a.gz"), data)
        source = f"file://{source}" if name == "file" else source
    assert text_of(source) == data
    for offset in (1, 777, len(data)):
        assert text_of(source, offset=offset) == data[offset:]
    with pytest.raises(InputError, match=rf"expected at least {len(data) + 5:,} bytes in .*, found {len(data):,}; the"):
        text_of(source, offset=len(data) + 5)
    expected = tokenizer("gpt2").encode(TEXT).tolist()
    ids, places = read(open_input(engine(), source))
    assert ids == expected
    for count, place in places[:: len(places) // 4]:
        assert place.size is not None
        assert read(open_input(engine(), source, start=restored(place)))[0] == expected[count:]
    assert count_tokens(engine(), source) == len(expected)


def test_a_text_over_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(sources, "URL_BLOCK", 1000)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    (tmp_path / "b.txt").write_bytes(TEXT.encode())

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:  # it gives no parts: read from the beginning
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert text_of(f"{address}/a.txt.gz?download=1") == TEXT.encode()
        assert text_of(f"{address}/b.txt", offset=777) == TEXT.encode()[777:]
        assert open_text(f"{address}/b.txt").size == len(TEXT.encode())
        with pytest.raises(InputError, match=r"there is no file http://127\.0\.0\.1:.*/gone\.txt"):
            open_text(f"{address}/gone.txt")
        server.shutdown()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_container_is_said_in_words(suffix: str, tmp_path: Path) -> None:
    noise = random.Random(0).randbytes(20_000).hex()
    path = Path(contain(tmp_path / f"a.txt{suffix}", noise.encode()))
    good = path.read_bytes()
    path.write_bytes(good[:-20])
    with pytest.raises(InputError, match=r"a\.txt.* is damaged or cut off: .*; copy or compress it again"):
        read(open_input(engine(), path))
    path.write_bytes(good[:2000] + b"\xff" * 50 + good[2050:])
    with pytest.raises(InputError, match=r"a\.txt.* is damaged or cut off: .*; copy or compress it again"):
        text_of(path)
    path.write_bytes(b"no such thing at all")
    with pytest.raises(InputError, match=r"a\.txt.* is damaged or cut off: .*; copy or compress it again"):
        text_of(path)
    path.write_bytes(gzip.compress(b"") if suffix == ".gz" else zstd().compress(b""))
    with pytest.raises(InputError, match="expected text, found an empty input"):
        read(open_input(engine(), path))


def test_what_is_missing_for_a_url_is_said_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot open nosuch://a\.txt: Protocol not known: nosuch"):
        open_text("nosuch://a.txt")
    with pytest.raises(InputError, match=r"there is no file memory://gone\.txt"):
        open_text("memory://gone.txt")
    for package, source, words in (
        ("s3fs", "s3://bucket/a.txt", r"s3:// needs a package that is not here: .*; pip install 'rmt-engine\[s3\]'"),
        ("aiohttp", "https://a.invalid/a", r"https:// needs a package that is .*; pip install 'rmt-engine\[url\]'"),
        ("pyarrow", "a.parquet", r"a\.parquet needs a package that .* pip install 'rmt-engine\[parquet\]'"),
        ("backports", "a.zst", r"a\.zst needs a package that is not here: pip install 'rmt-engine\[zst\]'"),
    ):
        if package == "backports" and sys.version_info >= (3, 14):
            continue
        path = tmp_path / source
        if "://" not in source:
            path.write_bytes(b"x")
            source = str(path)
        for name in [
            name for name in sys.modules if name.split(".")[0] == package or name == "fsspec.implementations.http"
        ]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(InputError, match=words):
            open_text(source, "text" if "parquet" in source else None)


def test_token_files_are_read_in_place(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.npy\.gz: a token file is read in place, by offset: decompress it first"):
        open_input(engine(), tmp_path / "a.npy.gz")
    with pytest.raises(ValueError, match=r"a\.bin\.zst: a token file is read in place, by offset: decompress it first"):
        open_input(engine(), tmp_path / "a.bin.zst", token_dtype="uint16")
    with pytest.raises(ValueError, match=r"s3://b/a\.npy: a token file is read in place, by offset: download it first"):
        open_input(engine(), "s3://b/a.npy")
    with pytest.raises(
        ValueError, match=r"a\.bin: a raw token file needs its type: --token-dtype uint16, uint32, int32"
    ):
        open_input(engine(), tmp_path / "a.bin")


def test_the_fraction_is_of_what_was_handed_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "READ_BYTES", 1000)
    generator = random.Random(0)
    text = " ".join(generator.randbytes(4).hex() for _ in range(50_000))
    total = len(tokenizer("gpt2").encode(text))
    for name, within in (("a.txt", 0.05), ("a.txt.gz", 0.2), ("a.zst", 0.6)):  # zstd reads half of it at once
        source = contain(tmp_path / name, text.encode())
        with open_input(engine(), source) as feed, feed.segments(Cut(SEGMENT, SEGMENT), VOCABULARY) as segments:
            seen = [(s.position, feed.fraction(s.position)) for s in feed.errors_of(segments)]
        later = [(tokens / total, fraction) for tokens, fraction in seen if tokens > total // 10]
        assert all(fraction is not None and abs(tokens - fraction) < within for tokens, fraction in later), name


# ------------------------------------------------------------------------------------------------- records


def write_parquet(path: Path, columns: dict[str, list[Any]], **options: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    documents=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=20),
    read_bytes=st.integers(1, 50),
    share=st.floats(0, 1),
)
def test_records_are_joined_by_newlines(
    documents: list[str], read_bytes: int, share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    lines = "\n".join(
        json.dumps({"x": 1, "text": document}, ensure_ascii=len(document) % 2 == 0) for document in documents
    )
    texts = [folder / "a.jsonl", contain(folder / "a.ndjson.gz", lines.encode())]
    (folder / "a.jsonl").write_bytes(lines.replace("\n", "\r\n\n").encode() + b"\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "BATCH_ROWS", 3)
        texts.append(write_parquet(folder / "a.parquet", {"x": documents, "text": documents}, row_group_size=4))
        expected = "\n".join(documents).encode()
        offset = int(share * len(expected))
        for source in texts:
            pieces = list(open_text(source, "text").reads(read_bytes, offset, threading.Event()))
            assert b"".join(pieces) == expected[offset:] and all(pieces)


def test_records_go_on_from_any_place(tmp_path: Path) -> None:
    documents = [f"{i} où est Mary ?" * (i % 7) for i in range(300)]
    lines = "\n".join(json.dumps({"text": document}) for document in documents)
    expected = tokenizer("gpt2").encode("\n".join(documents)).tolist()
    table = write_parquet(tmp_path / "a.parquet", {"text": documents})
    for source in (contain(tmp_path / "a.jsonl.gz", lines.encode()), table):
        ids, places = read(open_input(engine(), source, field="text"))
        assert ids == expected and count_tokens(engine(), source, field="text") == len(ids)
        for count, place in places[:: len(places) // 4]:
            assert read(open_input(engine(), source, field="text", start=restored(place)))[0] == expected[count:]
    with pytest.raises(InputError, match=r"is opened as text, field other, and was text, field text when its place"):
        open_input(engine(), tmp_path / "a.jsonl.gz", field="other", start=place)


def test_json_lines_come_on_the_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"t": "one"}\n{"t": "two"}')))
    assert text_of("-", "t") == b"one\ntwo"


BROKEN_LINES = {
    "no JSON": (b'{"text": "a"}\n\n{"text": ', r"a\.jsonl, line 3: expected a JSON object, .* at its character \d+$"),
    "no object": (b'["text"]', r"line 1: expected a JSON object, found a list$"),
    "no field": (b'{"a": 1, "b": 2}', r"line 1 has no field 'text'; its fields: 'a', 'b'$"),
    "no fields": (b"{}", r"line 1 has no field 'text'; its fields: none$"),
    "null": (b'{"text": "a"}\n{"text": null}', r"line 2: expected a string in 'text', found null$"),
    "number": (b'{"text": 3}', r"line 1: expected a string in 'text', found a number$"),
    "bytes": (b'{"text": "\xff"}', r"line 1: expected UTF-8, found 0xff at its byte 10; convert .* --errors replace$"),
    "surrogate": (b'{"text": "\\ud800"}', r"line 1: 'text' holds the lone surrogate '\\ud800'; give --errors replace"),
    "deep": (b"[" * 100_000, r"line 1: expected a JSON object, "),
    "digits": (b'{"text": ' + b"1" * 5000 + b"}", r"line 1: expected a (JSON object|string in 'text')"),
    "endless": (b" " * 3000, r"line 1: expected a record of at most 0 MiB, found no end of the line; is this one JSON"),
}


@pytest.mark.parametrize("case", BROKEN_LINES)
def test_a_broken_line_is_named(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, words = BROKEN_LINES[case]
    (tmp_path / "a.jsonl").write_bytes(data)
    if case == "endless":
        monkeypatch.setattr(records, "LINE_CAP", 2000)
    with pytest.raises(InputError, match=words):
        text_of(tmp_path / "a.jsonl", "text")
    if case in ("bytes", "surrogate"):
        assert text_of(tmp_path / "a.jsonl", "text", "replace") == "\ufffd".encode()


def test_a_broken_table_is_named(tmp_path: Path) -> None:
    table = write_parquet(tmp_path / "a.parquet", {"text": ["a", None], "n": [1, 2], "l": [["a"], ["b"]]})
    with pytest.raises(InputError, match=r"a\.parquet has no column 'x'; its columns: 'text', 'n', 'l'"):
        open_text(table, "x")
    with pytest.raises(InputError, match=r"a\.parquet, column 'n': expected strings, found int64"):
        open_text(table, "n")
    with pytest.raises(InputError, match=r"a\.parquet, column 'l': expected strings, found list<"):
        open_text(table, "l")
    with pytest.raises(InputError, match=r"a\.parquet, row 2: expected a string in 'text', found null"):
        text_of(table, "text")
    data = table.read_bytes()
    table.write_bytes(data[:-10])
    with pytest.raises(InputError, match=r"a\.parquet is no Parquet file that pyarrow can read: "):
        open_text(table, "text")
    table.write_bytes(data[:20] + b"\xff" * 20 + data[40:])
    with pytest.raises(InputError, match=r"cannot read .*a\.parquet after row 0: "):
        text_of(table, "text")
    with pytest.raises(ValueError, match=r"a\.parquet\.gz: a Parquet file is compressed inside; decompress it first"):
        open_text(tmp_path / "a.parquet.gz", "text")


def test_fields_belong_to_records(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz holds records: name the field to read, as in --field text"):
        open_text(tmp_path / "a.jsonl.gz")
    with pytest.raises(ValueError, match=r"--field \(field=\) is for records, \.jsonl, .*; not for .*a\.txt"):
        open_text(tmp_path / "a.txt", "text")
    with pytest.raises(ValueError, match=r"--field \(field=\) is for records; .*a\.npy is a token file"):
        open_input(engine(), tmp_path / "a.npy", field="text")


# ------------------------------------------------------------------------------------------------- memory


def own_memory() -> int:
    """RssAnon in bytes."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")
    return int(status.read_text().split("RssAnon:")[1].split()[0]) << 10


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.zst", "a.jsonl"])
def test_fifty_megabytes_of_one_letter_end_at_the_cap(name: str, tmp_path: Path) -> None:
    data = b"x" * (50 << 20)
    if name == "a.jsonl":
        data = b'{"text": "' + data[: 4 << 20] + b'"}'
    source = contain(tmp_path / name, data)
    del data
    before, start = own_memory(), time.monotonic()
    with pytest.raises(InputError, match=r"expected a place to cut the text .* at least every 1,048,576 characters"):
        read(open_input(engine(), source, field="text" if name == "a.jsonl" else None))
    assert time.monotonic() - start < 10
    assert own_memory() - before < 48 << 20
