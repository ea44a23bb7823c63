"""Opening an input: a text or a token file -> a C++ segment stream, tokens coming ahead of the compute."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rmt_engine._C import PushedSource, Segment, SegmentStream, StreamStopped, TokenSource
from rmt_engine.errors import InputError
from rmt_engine.layouts import Cut
from rmt_engine.text_input import TokenStream, open_text, tokenize_stream

if TYPE_CHECKING:
    from rmt_engine.engine import Engine

AHEAD_TOKENS = 1 << 14  # tokens that wait for the compute: enough to hide the tokenizer, little enough to stay even


def is_token_file(source: str | Path, token_dtype: str | None) -> bool:
    return token_dtype is not None or str(source).endswith(".npy")


def open_input(engine: Engine, source: str | Path, token_dtype: str | None, errors: str) -> TokenFile | Text:
    if is_token_file(source, token_dtype):
        return TokenFile(engine, source, token_dtype)
    if str(source).endswith(".bin"):
        raise ValueError(f"{source}: a raw token file needs its type: --token-dtype uint16, uint32, int32 or int64")
    return Text(engine, source, errors)


def count_tokens(engine: Engine, source: str | Path, token_dtype: str | None, errors: str, alignment: str) -> int:
    """Tokens of content: the first pass that right and center alignment need."""
    if is_token_file(source, token_dtype):
        return TokenSource.open(source, token_dtype or "auto", engine.config.drop_ids).count()
    if str(source) == "-":
        raise ValueError(
            f"this checkpoint aligns segments {alignment}, which needs the length, and the standard input has none: "
            "give a file, or use --alignment left"
        )
    drop = engine.config.drop_ids
    with tokenize_stream(engine.tokenizer, source, errors=errors) as tokens:
        return sum(len(ids) - int(np.isin(ids, drop).sum()) if drop else len(ids) for ids in tokens)


class TokenFile:
    """A token file, read by the C++ stream's own thread."""

    def __init__(self, engine: Engine, path: str | Path, token_dtype: str | None):
        self.source = TokenSource.open(path, token_dtype or "auto", engine.config.drop_ids)
        self.size = self.source.size

    def __enter__(self) -> TokenFile:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def segments(self, cut: Cut, vocab_size: int) -> SegmentStream:
        return SegmentStream(self.source, cut.size, cut.first, vocab_size=vocab_size)

    def errors_of(self, segments: SegmentStream) -> Iterable[Segment]:
        return segments

    def fraction(self, position: int) -> float | None:
        return position / self.size if self.size else None


class Text:
    """A text, tokenized in one thread and pushed to the C++ stream by another."""

    def __init__(self, engine: Engine, source: str | Path, errors: str):
        self.size = None if str(source) == "-" else _text_size(source)
        self.tokens: TokenStream = tokenize_stream(engine.tokenizer, source, errors=errors)
        self.source: PushedSource = TokenSource.pushed(engine.config.drop_ids, capacity=AHEAD_TOKENS)
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._push, name="rmt-feeder", daemon=True)

    def __enter__(self) -> Text:
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.tokens.close()
        self.thread.join()

    def _push(self) -> None:
        try:
            for ids in self.tokens:
                self.source.push(ids)
            self.source.close()
        except StreamStopped:
            pass  # the consumer has gone
        except Exception as error:  # raised by the consumer, in its own thread
            self.error = error
            self.source.fail(str(error))

    def segments(self, cut: Cut, vocab_size: int) -> SegmentStream:
        return SegmentStream(self.source, cut.size, cut.first, vocab_size=vocab_size)

    def errors_of(self, segments: SegmentStream) -> Iterator[Segment]:
        """The segments; an error of the feeding thread keeps its type."""
        try:
            yield from segments
        except InputError:
            raise (self.error or InputError("the text could not be read")) from None

    def fraction(self, position: int) -> float | None:
        return min(self.tokens.position.offset / self.size, 1.0) if self.size else None


def _text_size(source: str | Path) -> int | None:
    """Bytes of a text file, None for a pipe. Raises InputError for what cannot be opened."""
    open_text(source).close()
    path = Path(source)
    return path.stat().st_size if path.is_file() else None
