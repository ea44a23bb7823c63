"""Documents: what `run_many` and `encode` read. Each is opened when a slot is free for it, and closed when it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rmt_engine.errors import InputError, RMTError
from rmt_engine.inputs import TokenFile, count_tokens, is_token_file, open_input
from rmt_engine.layouts import Cut
from rmt_engine.records import open_text
from rmt_engine.stream import Ids, Stream, as_ids
from rmt_engine.text_input import Utf8Decoder, tokenize_stream

if TYPE_CHECKING:
    from rmt_engine.engine import Engine

WHOLE_CHARS = 1 << 16  # a text in memory up to here is tokenized at once, a longer one piece by piece


@dataclass(frozen=True)
class Document:
    """One input of many. id: what its result is filed under; None: its number.

    source: a text (str), UTF-8 (bytes), token ids (1-D), the path of a file (Path: text or tokens), or the error that
    was met where it should have stood, which is then what is reported.
    """

    id: str | None
    source: str | bytes | Path | Ids | RMTError


AnyDocument = Document | str | bytes | Path | Ids


@dataclass(frozen=True)
class Reading:
    """How documents are read. errors: of UTF-8, strict or replace; token_dtype: of raw token files; finish: fold the
    last segment too."""

    errors: str = "strict"
    token_dtype: str | None = None
    alignment: str | None = None
    score: bool = False
    finish: bool = False


class OpenDocument:
    """A document in a slot: a stream, and the ids that wait for it."""

    def __init__(self, engine: Engine, index: int, document: Document, reading: Reading) -> None:
        """Raises RMTError, ValueError, OSError for what cannot be read."""
        self._finish = reading.finish
        self.index, self.id = index, document.id if document.id is not None else str(index)
        self._resources = ExitStack()
        try:
            length, self._pieces = _opened(engine, document.source, reading, self._resources)
            self.stream = Stream(engine, length, reading.alignment, reading.score)
        except BaseException:
            self.close()
            raise
        self._waiting = np.empty(0, dtype=np.int64)

    def next_segment(self) -> np.ndarray | None:
        """The ids of the segment that is to be folded next, or None at the end: what is left then is the stream's rest.

        Raises what the source raises, ValueError for ids outside the vocabulary, InputError where there is nothing.
        """
        size = self.stream.place.next_size
        while len(self._waiting) <= size:
            piece = next(self._pieces, None)
            if piece is None:
                if self._finish and len(self._waiting):
                    size = len(self._waiting)
                    break
                self._end()
                return None
            self._waiting = np.concatenate([self._waiting, self.stream.content(piece)])
        segment, self._waiting = self._waiting[:size], self._waiting[size:]
        return segment

    def _end(self) -> None:
        self.close()
        self.stream.take(self._waiting)
        if not self.stream.position:
            raise InputError("expected a text, found no tokens of content")

    def close(self) -> None:
        self._resources.close()


def _opened(
    engine: Engine, source: object, reading: Reading, resources: ExitStack
) -> tuple[int | None, Iterator[np.ndarray]]:
    """The length where the alignment needs it, and the ids in pieces."""
    needs_length = (reading.alignment or engine.config.alignment) != "left"
    if isinstance(source, RMTError):
        raise source
    if isinstance(source, Path):
        length = None
        if needs_length:
            length = count_tokens(engine, source, token_dtype=reading.token_dtype, errors=reading.errors)
        return length, _file_pieces(engine, source, reading, resources)
    pieces = _memory_pieces(engine, source, reading.errors)
    if not needs_length:
        return None, pieces
    ids = np.concatenate(list(pieces))
    return len(ids) - int(np.isin(ids, engine.config.drop_ids).sum()), iter([ids])


def _file_pieces(engine: Engine, path: Path, reading: Reading, resources: ExitStack) -> Iterator[np.ndarray]:
    if not is_token_file(path, reading.token_dtype):
        text = tokenize_stream(engine.tokenizer, open_text(path, None, reading.errors), errors=reading.errors)
        return resources.enter_context(text)
    opened = open_input(engine, path, token_dtype=reading.token_dtype)
    assert isinstance(opened, TokenFile)
    size = engine.config.segment_size
    segments = resources.enter_context(opened.segments(Cut(size, size), engine.vocab_size))
    return (segment.ids.copy() for segment in segments)  # a view is valid until the next one


def _memory_pieces(engine: Engine, source: object, errors: str) -> Iterator[np.ndarray]:
    if isinstance(source, bytes):
        decoder = Utf8Decoder(errors)
        source = decoder.feed(source) + decoder.flush()
    if not isinstance(source, str):
        return iter([as_ids(source)])  # type: ignore[arg-type]
    return _text_pieces(engine, source)


def _text_pieces(engine: Engine, text: str) -> Iterator[np.ndarray]:
    if len(text) <= WHOLE_CHARS:
        yield engine.tokenizer.encode(text)
        return
    tokenizer = engine.tokenizer.incremental()
    for start in range(0, len(text), WHOLE_CHARS):
        yield tokenizer.feed(text[start : start + WHOLE_CHARS])
    yield tokenizer.flush()


def as_document(document: AnyDocument) -> Document:
    return document if isinstance(document, Document) else Document(None, document)
