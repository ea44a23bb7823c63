"""Opening an input: a text or a token file -> a C++ segment stream, tokens coming ahead of the compute.

An opened input knows its place: `position_at` gives all that is needed to go on from any token, in another process.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from rmt_engine._C import PushedSource, SegmentStream, StreamStopped, TokenSource
from rmt_engine.errors import InputError, StateError
from rmt_engine.layouts import Cut
from rmt_engine.records import open_text
from rmt_engine.sources import is_url, suffixes
from rmt_engine.text_input import READ_BYTES, TextPosition, TokenStream, tokenize_stream

if TYPE_CHECKING:
    from rmt_engine.engine import Engine

T = TypeVar("T")
AHEAD_TOKENS = 1 << 14  # tokens that wait for the compute: enough to hide the tokenizer, little enough to stay even
READER_TOKENS = 1 << 15  # what the C++ reader may hold besides its ring: one piece
RING_SLOTS = 8
PLACE_TOKENS = 1 << 9  # tokens that two remembered places of a text and the one between them span at least
COUNTED_TOKENS = 1 << 16  # tokens looked at in one piece for ids that are dropped


@dataclass(frozen=True)
class InputPosition:
    """A place in an input: opened with `start=` it, the input gives exactly the tokens that would have followed.

    kind: "text" or "tokens". offset: bytes of the text read, or tokens of the file before dropping. held_bytes,
    held_text, continued: what the tokenizer had read and not given out. skip: tokens of content to leave out from
    there. name, size: the source and its bytes (None: unknown, a pipe). dtype: of a token file. field: of records.
    """

    kind: str
    offset: int
    held_bytes: bytes = b""
    held_text: str = ""
    continued: bool = False
    skip: int = 0
    name: str = ""
    size: int | None = None
    dtype: str | None = None
    field: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        return dataclasses.asdict(self) | {"held_bytes": self.held_bytes.hex()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> InputPosition:
        """Raises StateError for what `to_dict` does not give."""
        try:
            position = cls(**{**values, "held_bytes": bytes.fromhex(values["held_bytes"])})
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"the position of the input is damaged: {error}") from None
        optional = (str, type(None))
        fits = (
            position.kind in ("text", "tokens")
            and all(type(n) is int and n >= 0 for n in (position.offset, position.skip, position.size or 0))
            and isinstance(position.held_text, str)
            and isinstance(position.continued, bool)
            and isinstance(position.name, str)
            and isinstance(position.dtype, optional)
            and isinstance(position.field, optional)
        )
        if not fits:
            raise StateError(f"the position of the input is damaged: {dict(values)!r}")
        return position

    def check(self, now: InputPosition) -> None:
        """Raises InputError unless `now`, the beginning of an input, is of the source that this place is in."""
        if self.kind != now.kind or self.dtype != now.dtype or self.field != now.field:
            raise InputError(f"{now.name} is opened as {now._words}, and was {self._words} when its place was saved")
        if self.size is not None and now.size is not None and self.size != now.size:
            raise InputError(
                f"expected {self.size:,} bytes in {now.name}, found {now.size:,}; its place was saved in another file, "
                "or the file has changed: give the same file, or start anew"
            )

    @property
    def _words(self) -> str:
        return f"{self.kind}{f' of {self.dtype}' if self.dtype else ''}{f', field {self.field}' if self.field else ''}"


def is_token_file(source: str | Path, token_dtype: str | None) -> bool:
    """By its type or suffix. Raises ValueError for a token file that cannot be read where it lies."""
    if token_dtype is not None and str(source) == "-":
        raise ValueError("the standard input is read as text: give a token file by its path, or leave out its type")
    kind, compression = suffixes(source)
    tokens = token_dtype is not None or kind == ".npy"
    if (tokens or kind == ".bin") and (compression or is_url(source)):
        remedy = "decompress it" if compression else "download it"
        raise ValueError(f"{source}: a token file is read in place, by offset: {remedy} first")
    if not tokens and kind == ".bin":
        raise ValueError(f"{source}: a raw token file needs its type: --token-dtype uint16, uint32, int32 or int64")
    return tokens


def open_input(
    engine: Engine,
    source: str | Path,
    *,
    token_dtype: str | None = None,
    errors: str = "strict",
    field: str | None = None,
    start: InputPosition | None = None,
) -> TokenFile | Text:
    """Opens an input at its beginning, or at a `start` that `position_at` gave. Raises InputError, ValueError."""
    if not is_token_file(source, token_dtype):
        return Text(engine, source, errors, field, start)
    if field is not None:
        raise ValueError(f"--field (field=) is for records; {source} is a token file")
    return TokenFile(engine, source, token_dtype, start)


def count_tokens(
    engine: Engine,
    source: str | Path,
    *,
    token_dtype: str | None = None,
    errors: str = "strict",
    field: str | None = None,
    alignment: str = "left",
) -> int:
    """Tokens of content: the first pass that right and center alignment need."""
    if is_token_file(source, token_dtype):
        return TokenSource.open(source, token_dtype or "auto", engine.config.drop_ids).count()
    if str(source) == "-" or _is_pipe(source):
        what = "the standard input" if str(source) == "-" else f"the pipe {source}"
        raise ValueError(
            f"this checkpoint aligns segments {alignment}, which needs the length, and {what} has none: "
            "give a file, or use --alignment left"
        )
    with tokenize_stream(engine.tokenizer, open_text(source, field, errors), errors=errors) as tokens:
        return sum(len(_content(ids, engine.config.drop_ids)) for ids in tokens)


def _is_pipe(source: str | Path) -> bool:
    """Whether a first pass over it would leave nothing for a second one."""
    return os.path.exists(source) and not os.path.isfile(source) and not os.path.isdir(source)


def _content(ids: np.ndarray, drop_ids: tuple[int, ...]) -> np.ndarray:
    return ids[~np.isin(ids, drop_ids)] if drop_ids else ids


class TokenFile:
    """A token file, read by the C++ stream's own thread."""

    def __init__(
        self, engine: Engine, path: str | Path, token_dtype: str | None, start: InputPosition | None = None
    ) -> None:
        self.path = path
        self.drop_ids = engine.config.drop_ids
        self.source = TokenSource.open(path, token_dtype or "auto", self.drop_ids)
        self.size = self.source.size
        self.start = InputPosition("tokens", 0, name=str(path), size=Path(path).stat().st_size, dtype=self.source.dtype)
        if start is not None:
            start.check(self.start)
            if start.offset > self.size:
                raise InputError(f"expected at least {start.offset:,} tokens in {path}, found {self.size:,}")
            self.start = dataclasses.replace(self.start, offset=start.offset)
            self.source = TokenSource.open(path, self.source.dtype, self.drop_ids, start=start.offset)
        self._counted = (self.start.offset, 0)  # tokens of the file, tokens of content among them since the start

    def __enter__(self) -> TokenFile:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def segments(self, cut: Cut, vocab_size: int) -> SegmentStream:
        return SegmentStream(self.source, cut.size, cut.first, RING_SLOTS, vocab_size)

    def errors_of(self, segments: Iterable[T]) -> Iterable[T]:
        return segments

    def position_at(self, tokens: int) -> InputPosition:
        """The place after `tokens` tokens of content since this input was opened."""
        offset = self._raw(tokens) if self.drop_ids else self.start.offset + tokens
        return dataclasses.replace(self.start, offset=offset)

    def fraction(self, tokens: int) -> float | None:
        """How much of the file is read after `tokens` tokens since it was opened."""
        return min((self.start.offset + tokens) / self.size, 1.0) if self.size else None

    def _raw(self, tokens: int) -> int:
        """Where in the file `tokens` tokens of content end: counted on from the place that was asked for last."""
        offset, content = self._counted if self._counted[1] <= tokens else (self.start.offset, 0)
        while content < tokens:
            assert offset < self.size, "asked for a place after the end"
            kept = np.flatnonzero(~np.isin(self._piece(offset), self.drop_ids))[: tokens - content]
            content += len(kept)
            offset = offset + int(kept[-1]) + 1 if content == tokens else offset + COUNTED_TOKENS
        self._counted = (offset, content)
        return offset

    def _piece(self, offset: int) -> np.ndarray:
        dtype = np.dtype(self.source.dtype).newbyteorder("<")
        return np.fromfile(self.path, dtype, COUNTED_TOKENS, offset=self._header + offset * dtype.itemsize)

    @cached_property
    def _header(self) -> int:
        """Bytes before the first token. Nothing is read through the mapping: a file that shrinks would kill us."""
        npy = str(self.path).endswith(".npy")
        return int(np.load(self.path, mmap_mode="r", allow_pickle=False).offset) if npy else 0


class Text:
    """A text, tokenized in one thread and pushed to the C++ stream by another.

    What is ahead of the compute is bounded in tokens, and so is the number of places that are remembered for it.
    """

    def __init__(
        self,
        engine: Engine,
        source: str | Path,
        errors: str,
        field: str | None = None,
        start: InputPosition | None = None,
    ) -> None:
        self.text = open_text(source, field, errors)
        self.start = InputPosition("text", 0, name=self.text.name, size=self.text.size, field=field)
        if start is not None:
            start.check(self.start)
        at = start or self.start
        self.drop_ids = engine.config.drop_ids
        self.segment_size = engine.config.segment_size
        text = TextPosition(at.offset, at.held_bytes, at.held_text, at.continued)
        self.tokens: TokenStream = tokenize_stream(
            engine.tokenizer, self.text, errors=errors, read_bytes=READ_BYTES, position=text
        )
        self.source: PushedSource = TokenSource.pushed(capacity=AHEAD_TOKENS)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._push, name="rmt-feeder", daemon=True)
        # Places (tokens of content before it, position): as many as what is ahead of the consumer can need.
        ahead = AHEAD_TOKENS + READER_TOKENS + (RING_SLOTS + 2) * self.segment_size
        at_most = 2 * (ahead // PLACE_TOKENS) + 4
        self._places: deque[tuple[int, TextPosition]] = deque([(-at.skip, text)], maxlen=at_most)
        self._lock = threading.Lock()

    def __enter__(self) -> Text:
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.tokens.close()
        self.thread.join()

    def segments(self, cut: Cut, vocab_size: int) -> SegmentStream:
        assert cut.size <= self.segment_size, "more would be ahead than there are places for"
        return SegmentStream(self.source, cut.size, cut.first, RING_SLOTS, vocab_size)

    def errors_of(self, segments: Iterable[T]) -> Iterator[T]:
        """The segments, or what is made of them; an error of the feeding thread keeps its type."""
        try:
            yield from segments
        except InputError:
            if self.error is None:  # the segment stream's own: a token outside the vocabulary
                raise
            raise self.error from None

    def position_at(self, tokens: int) -> InputPosition:
        """The place after `tokens` tokens of content since this input was opened: of the segments that were taken.

        It goes back at most to the two segments before the latest taken: older places are forgotten.
        """
        with self._lock:
            count, text = next((place for place in reversed(self._places) if place[0] <= tokens), (None, None))
        assert count is not None and text is not None, "this place is forgotten"
        return dataclasses.replace(self.start, **vars(text), skip=tokens - count)

    def fraction(self, tokens: int) -> float | None:
        """How much of the text `tokens` tokens since it was opened are; None where its size is not known."""
        with self._lock:
            places = list(self._places)
        last = next((i for i in range(len(places) - 1, -1, -1) if places[i][0] <= tokens), 0)
        (count, text), (after, next_text) = places[last], places[min(last + 1, len(places) - 1)]
        share = (tokens - count) / (after - count) if after > count else 0.0
        return self.text.fraction(text.offset + round(share * (next_text.offset - text.offset)))

    def _push(self) -> None:
        try:
            self._push_all()
            self.source.close()
        except StreamStopped:
            pass  # the consumer has gone
        except BaseException as error:  # a panic of the tokenizers library is no Exception; raised by the consumer
            self.error = error
            self.source.fail(str(error))

    def _push_all(self) -> None:
        count = self._places[0][0]  # below zero: tokens that were given out before the start
        for ids in self.tokens:
            ids = _content(ids, self.drop_ids)
            new = ids[-count:] if count < 0 else ids
            if new.size:
                self.source.push(new)
            count += ids.size
            self._remember(count, self.tokens.position)
        if count < 0:
            raise InputError(f"{self.start.name} ends before the place that was saved; the text was another one before")
        self._remember(count, self.tokens.position)

    def _remember(self, count: int, position: TextPosition) -> None:
        with self._lock:
            places = self._places
            if len(places) > 1 and count - places[-2][0] < PLACE_TOKENS:
                places.pop()
            places.append((count, position))
