"""Where many documents come from: a folder, a pattern, JSON lines, Parquet rows. Listed as they are asked for."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rmt_engine.documents import Document
from rmt_engine.errors import InputError
from rmt_engine.records import JSON_LINES, PARQUET, encoded, records_of
from rmt_engine.sources import is_url, suffixes

FIELD = "text"


def is_list(source: str | Path) -> bool:
    """Whether it names many documents: a folder or a pattern. A file of records may be one text or many."""
    return not is_url(source) and (os.path.isdir(source) or _is_pattern(source))


def documents_in(source: str | Path, *, field: str | None = None, errors: str = "strict") -> Iterator[Document]:
    """The documents of `source`, in a fixed order, as they are asked for.

    A folder: all files under it but hidden ones; a pattern (`*`, `?`, `[…]`, `**`): the files it matches; the id is the
    path, from the folder on. Records (.jsonl, .ndjson, .parquet): one document each, whose id is the field `id`, or the
    number of the record. Its text is in `field`, by default "text"; of JSON lines also "path" of a file (from the
    list's folder on) or "ids", token ids. A record that is none gives a document that holds the error. Any other file
    is one document. Raises InputError where there is nothing, or where a list cannot be read on.
    """
    kind = suffixes(source)[0]
    if is_list(source):
        return _some(_files(source), source)
    if kind in JSON_LINES or kind == PARQUET:
        return _of_records(source, field or FIELD, errors)
    return iter([Document(str(source), Path(source))])


def _is_pattern(source: str | Path) -> bool:
    return glob.has_magic(str(source)) and not os.path.exists(source)


def _some(documents: Iterator[Document], source: str | Path) -> Iterator[Document]:
    first = next(documents, None)
    if first is None:
        raise InputError(f"there is no file in {source}" if os.path.isdir(source) else f"no file matches {source}")
    yield first
    yield from documents


def _files(source: str | Path) -> Iterator[Document]:
    if not os.path.isdir(source):
        for name in sorted(glob.iglob(str(source), recursive=True)):
            if os.path.isfile(name):
                yield Document(name, Path(name))
        return
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                path = Path(folder, name)
                yield Document(path.relative_to(source).as_posix(), path)


def _of_records(source: str | Path, field: str, errors: str) -> Iterator[Document]:
    for number, (where, record) in enumerate(records_of(source, field, errors), 1):
        try:
            if isinstance(record, InputError):
                raise record
            yield Document(_id(record, number, where), _content(record, field, where, Path(str(source)).parent, errors))
        except InputError as error:
            yield Document(str(number), error)


def _id(record: dict[str, Any], number: int, where: str) -> str:
    name = record.get("id", number)
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise InputError(f"{where}: expected a text or a whole number as 'id', found {name!r}")
    return str(name)


def _content(record: dict[str, Any], field: str, where: str, folder: Path, errors: str) -> Any:
    if field in record:
        return encoded(record[field], field, where, errors)
    if "ids" in record:
        return _ids(record["ids"], where)
    if isinstance(record.get("path"), str):
        return folder / record["path"]
    found = ", ".join(map(repr, list(record)[:8])) or "none"
    raise InputError(f"{where} has no field {field!r}, 'ids' or 'path'; its fields: {found}")


def _ids(ids: Any, where: str) -> list[int]:
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise InputError(f"{where}: expected a list of whole numbers in 'ids'")
    return ids
