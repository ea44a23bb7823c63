"""Records as one text: a field of each line of a JSONL file, or of each row of a Parquet file, joined by newlines."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rmt_engine.errors import InputError
from rmt_engine.sources import ByteFile, TextSource, open_file, suffixes

JSON_LINES = (".jsonl", ".ndjson")
PARQUET = ".parquet"
LINE_CAP = 1 << 28  # bytes of one line: a record is held whole
BATCH_ROWS = 64  # of Parquet, decoded at once

_LONE = re.compile("[\ud800-\udfff]")


def open_text(source: str | Path, field: str | None = None, errors: str = "strict") -> TextSource:
    """A text by its path, URL or "-"; with `field`, that of every record. Raises InputError, ValueError."""
    kind = suffixes(source)[0]
    if field is None:
        if kind in (*JSON_LINES, PARQUET):
            raise ValueError(f"{source} holds records: name the field to read, as in --field text (field='text')")
        return ByteFile(source)
    if kind == PARQUET:
        return Parquet(source, field, errors)
    if kind in JSON_LINES or str(source) == "-":
        return JSONLines(source, field, errors)
    kinds = ", ".join((*JSON_LINES, PARQUET))
    raise ValueError(f"--field (field=) is for records, {kinds} or JSON lines on the standard input; not for {source}")


class JSONLines(TextSource):
    """`field` of every line. An empty line is skipped; anything else that is no object with that text is an error."""

    def __init__(self, source: str | Path, field: str, errors: str) -> None:
        self.file = ByteFile(source)
        self.name, self.size = self.file.name, self.file.size
        self.field = field
        self.errors = errors

    def reads(self, read_bytes: int, offset: int, stop: threading.Event) -> Iterator[bytes]:
        return self._after(offset, joined(self._texts(read_bytes, stop), read_bytes))

    def _taken(self) -> float | None:
        return self.file._taken()

    def close(self) -> None:
        self.file.close()

    def records(self) -> Iterator[tuple[str, dict[str, Any] | InputError]]:
        """See `records_of`."""
        try:
            for number, line in enumerate(self._lines(1 << 16, threading.Event()), 1):
                if line.strip():
                    where = f"{self.name}, line {number:,}"
                    try:
                        yield where, json_object(line, where, self.errors)
                    except InputError as error:
                        yield where, error
        finally:
            self.close()

    def _texts(self, read_bytes: int, stop: threading.Event) -> Iterator[bytes]:
        for number, line in enumerate(self._lines(read_bytes, stop), 1):
            if line.strip():
                yield self._text(line, f"{self.name}, line {number:,}")

    def _lines(self, read_bytes: int, stop: threading.Event) -> Iterator[bytes]:
        parts: list[bytes] = []
        held = 0
        number = 0
        for data in self.file.reads(read_bytes, 0, stop):
            first, *others = data.split(b"\n")
            parts.append(first)
            held += len(first)
            for other in others:
                yield b"".join(parts)
                number += 1
                parts, held = [other], len(other)
            if held > LINE_CAP:
                raise InputError(
                    f"{self.name}, line {number + 1:,}: expected a record of at most {LINE_CAP >> 20} MiB, found no "
                    "end of the line; is this one JSON object a line?"
                )
        yield b"".join(parts)

    def _text(self, line: bytes, where: str) -> bytes:
        record = json_object(line, where, self.errors)
        return encoded(field_of(record, self.field, where), self.field, where, self.errors)


def json_object(line: bytes, where: str, errors: str) -> dict[str, Any]:
    """The object of one line. Raises InputError for anything else."""
    try:
        record = json.loads(line.decode("utf-8-sig", errors))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: expected UTF-8, found 0x{line[error.start]:02x} at its byte {error.start:,}; convert it to "
            "UTF-8, or give --errors replace"
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: expected a JSON object, {error.msg} at its character {error.pos:,}") from None
    except (RecursionError, ValueError) as error:  # nested too deep, a number too long
        raise InputError(f"{where}: expected a JSON object, {error}") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object, found {_kind(record)}")
    return record


def field_of(record: dict[str, Any], field: str, where: str) -> Any:
    """Raises InputError where it is missing."""
    if field not in record:
        found = ", ".join(map(repr, list(record)[:8])) or "none"
        raise InputError(f"{where} has no field {field!r}; its fields: {found}")
    return record[field]


def records_of(source: str | Path, field: str, errors: str) -> Iterator[tuple[str, dict[str, Any] | InputError]]:
    """Every record by itself: where it stands, and its fields (of Parquet `field` and, if there is one, `id`), or what
    is wrong with it. Raises InputError for a file that cannot be read on."""
    if suffixes(source)[0] == PARQUET:
        return Parquet(source, field, errors).records()
    return JSONLines(source, field, errors).records()


class Parquet(TextSource):
    """`field` of every row, decoded a few rows at a time."""

    def __init__(self, source: str | Path, field: str, errors: str) -> None:
        if suffixes(source)[1]:
            raise ValueError(f"{source}: a Parquet file is compressed inside; decompress it first")
        self.name = str(source)
        self.field = field
        self.errors = errors
        arrow = _arrow(self.name)
        self.file, self.size = open_file(source)
        try:
            # buffer_size: a column is read through a buffer, not a whole row group at once
            self.table = arrow.ParquetFile(self.file, buffer_size=1 << 20, pre_buffer=False)
        except Exception as error:  # arrow's own
            self.file.close()
            raise InputError(f"{source} is no Parquet file that pyarrow can read: {error}") from error
        self._check_column()
        self.done = 0

    def reads(self, read_bytes: int, offset: int, stop: threading.Event) -> Iterator[bytes]:
        return self._after(offset, joined(self._texts(stop), read_bytes))

    def _taken(self) -> float | None:
        rows = self.table.metadata.num_rows
        return self.done / rows if rows else None

    def close(self) -> None:
        self.table.close()
        self.file.close()

    def _check_column(self) -> None:
        schema = self.table.schema_arrow
        if self.field not in schema.names:
            found = ", ".join(map(repr, schema.names[:8]))
            self.close()
            raise InputError(f"{self.name} has no column {self.field!r}; its columns: {found}")
        kind = str(schema.field(self.field).type)
        if not re.fullmatch(r"(dictionary<values=)?(large_)?string(_view)?(,.*)?", kind):
            self.close()
            raise InputError(f"{self.name}, column {self.field!r}: expected strings, found {kind}")

    def records(self) -> Iterator[tuple[str, dict[str, Any] | InputError]]:
        """See `records_of`."""
        columns = [name for name in dict.fromkeys((self.field, "id")) if name in self.table.schema_arrow.names]
        try:
            for batch in self.table.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
                for row in batch.to_pylist():
                    self.done += 1
                    yield f"{self.name}, row {self.done:,}", row
        except Exception as error:  # arrow's own, and whatever a remote file system raises
            raise InputError(f"cannot read {self.name} after row {self.done:,}: {error}") from error
        finally:
            self.close()

    def _texts(self, stop: threading.Event) -> Iterator[bytes]:
        try:
            for batch in self.table.iter_batches(BATCH_ROWS, columns=[self.field], use_threads=False):
                for value in batch.column(0):
                    self.done += 1
                    yield encoded(value.as_py(), self.field, f"{self.name}, row {self.done:,}", self.errors)
                if stop.is_set():
                    return
        except InputError:
            raise
        except Exception as error:  # arrow's own, and whatever a remote file system raises
            raise InputError(f"cannot read {self.name} after row {self.done:,}: {error}") from error
        finally:
            self.close()


def encoded(value: Any, field: str, where: str, errors: str) -> bytes:
    """The UTF-8 of a field. Raises InputError for what is no text."""
    if not isinstance(value, str):
        raise InputError(f"{where}: expected a string in {field!r}, found {_kind(value)}")
    if errors == "replace":
        value = _LONE.sub("\ufffd", value)
    try:
        return value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: {field!r} holds the lone surrogate {value[error.start]!r}; give --errors replace to read it as "
            "U+FFFD"
        ) from None


def joined(texts: Iterator[bytes], read_bytes: int) -> Iterator[bytes]:
    """The texts with a newline between each two, in pieces of about `read_bytes`, however long or short they are."""
    pieces: list[bytes] = []
    size = 0
    for index, text in enumerate(texts):
        pieces += [b"\n", text] if index else [text]
        size += len(text) + 1
        if size >= read_bytes:
            whole = b"".join(pieces)
            yield from (whole[start : start + read_bytes] for start in range(0, len(whole), read_bytes))
            pieces, size = [], 0
    if rest := b"".join(pieces):
        yield rest


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "a list", str: "a string"}
    return names.get(type(value), "an object")


def _arrow(name: str) -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{name} needs a package that is not here: pip install 'rmt-engine[parquet]'") from None
    return parquet
