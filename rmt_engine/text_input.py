"""Text from a file, a pipe, a URL or an iterator of bytes, tokenized in a thread that runs ahead of its consumer.

Bytes are UTF-8. A byte order mark at the very beginning is dropped; line ends stay as they are. Memory is bounded: one
read, the held-back text, and at most `ahead` arrays of ids that nobody has taken yet.
"""

import codecs
import contextlib
import ctypes
import os
import queue
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from rmt_engine.errors import InputError
from rmt_engine.sources import ByteFile, TextSource, read_pieces
from rmt_engine.tokens import IncrementalTokenizer, Tokenizer

# Enough for every core, and no more: memory grows with it and speed does not (measured from 32 KiB to 1 MiB).
READ_BYTES = (1 << 14) * max(2, min(os.cpu_count() or 2, 16))
AHEAD = 8

_BOM = "\ufeff"
_M_ARENA_MAX = -8  # of glibc's malloc.h


class Utf8Decoder:
    """Incremental UTF-8 decoding that knows where in the input it is.

    `errors` is "strict" (InputError with the byte offset) or "replace" (U+FFFD, as bytes.decode does).
    A state is kept as `offset` and `held`, and goes on by handing both to a new decoder.
    """

    def __init__(self, errors: str = "strict", held: bytes = b"", offset: int = 0) -> None:
        if errors not in ("strict", "replace"):
            raise ValueError(f"errors={errors!r} is not known; use 'strict' or 'replace'")
        self.errors = errors
        self.offset = offset  # bytes taken, the held ones included
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._decoder.setstate((held, 0))

    @property
    def held(self) -> bytes:
        """The bytes of a character that is not complete yet (at most 3)."""
        held: bytes = self._decoder.getstate()[0]
        return held

    def feed(self, data: bytes) -> str:
        """The characters that are complete now. Raises InputError."""
        return self._decode(data, final=False)

    def flush(self) -> str:
        """The end of the input: U+FFFD or InputError for an incomplete character, else nothing."""
        return self._decode(b"", final=True)

    def _decode(self, data: bytes, final: bool) -> str:
        start = self.offset - len(self.held)
        try:
            text = self._decoder.decode(data, final)
        except UnicodeDecodeError as error:
            bad = error.object[error.start : error.end]
            raise InputError(
                f"expected UTF-8, found {' '.join(f'0x{byte:02x}' for byte in bad)} at byte {start + error.start:,} "
                f"({error.reason}); convert the text to UTF-8, or give --errors replace (errors='replace') to read "
                "such bytes as U+FFFD"
            ) from None
        self.offset += len(data)
        return text[1:] if start == 0 and text.startswith(_BOM) else text


@dataclass(frozen=True)
class TextPosition:
    """A place between two reads: all that is needed to go on from there in the same input.

    `offset` bytes have been read; of these `held_bytes` are an incomplete character and `held_text` waits for a cut.
    """

    offset: int = 0
    held_bytes: bytes = b""
    held_text: str = ""
    continued: bool = False


Source = str | Path | TextSource | BinaryIO | Iterable[bytes]


def tokenize_stream(
    tokenizer: Tokenizer,
    source: Source,
    *,
    errors: str = "strict",
    read_bytes: int = READ_BYTES,
    ahead: int = AHEAD,
    position: TextPosition | None = None,
) -> "TokenStream":
    """The ids of a text, int64 arrays [N] in order, together exactly `tokenizer.encode` of the whole text.

    `source` is a path, a URL, "-", an open `TextSource`, a binary file object or an iterable of bytes of any sizes. A
    file object stays open. From a `position` on, a file object or iterable must begin there.
    Raises TokenizerError at once for a tokenizer that cannot be cut; InputError, here or from the iterator at the place
    where it happens, for what cannot be read.
    """
    return TokenStream(tokenizer, source, errors, read_bytes, ahead, position or TextPosition())


@cache
def _limit_arenas() -> None:
    """One arena of glibc's malloc for all threads of the process, unless MALLOC_ARENA_MAX says how many.

    By itself it makes up to 8 a core, and what is freed in one serves no other: over 100 MB of text the process grew by
    5 to 9 MB, as it does with two arenas, and with one by 2. On two cores that costs no speed.
    """
    if sys.platform == "linux" and "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(AttributeError):  # another libc
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


class TokenStream(Iterator[np.ndarray]):
    """The iterator of `tokenize_stream`: one thread reads and tokenizes at most `ahead` arrays ahead.

    `position` is the place in the text after the last array taken. `close` (or `with`, or dropping the object) ends the
    thread at any moment; only a read of a foreign file object or iterable that blocks is waited for.
    """

    def __init__(
        self, tokenizer: Tokenizer, source: Source, errors: str, read_bytes: int, ahead: int, position: TextPosition
    ) -> None:
        _limit_arenas()
        self.position = position
        self._queue: queue.Queue[_Item] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._done = False
        text = tokenizer.incremental(position.held_text, position.continued)
        decoder = Utf8Decoder(errors, position.held_bytes, position.offset)
        reads = _reads(source, read_bytes, position.offset, self._stop)
        # The thread must not hold this object, or dropping it would not end the thread.
        arguments = (_tokenize(reads, decoder, text), self._queue, self._stop)
        self._thread = threading.Thread(target=_run_ahead, args=arguments, name="rmt-tokenizer", daemon=True)
        self._thread.start()

    def __next__(self) -> np.ndarray:
        """The next ids, int64 [N], N > 0."""
        while not self._done:
            item = self._queue.get()
            if isinstance(item, _Tokens):
                self.position = item.position
                if item.ids.size:
                    return item.ids
                continue
            self.close()
            if item is not None:
                raise item
        raise StopIteration

    def close(self) -> None:
        """Stop reading and end the thread. Nothing more is given out; who waits in `next` in another thread ends."""
        self._done = True
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(queue.Full):  # full: nobody waits
            self._queue.put_nowait(None)

    def __enter__(self) -> "TokenStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_thread"):
            self._stop.set()


@dataclass(frozen=True)
class _Tokens:
    ids: np.ndarray
    position: TextPosition


_Item = _Tokens | BaseException | None


def _run_ahead(tokens: Iterator[_Tokens], items: "queue.Queue[_Item]", stop: threading.Event) -> None:
    """The thread: puts what it makes into `items`, then None or the error that ended it."""
    last: BaseException | None = None
    try:
        for item in tokens:
            if not _put(items, item, stop):
                return
    except BaseException as error:  # carried to the consumer, who raises it
        last = error
    _put(items, last, stop)


def _put(items: "queue.Queue[_Item]", item: _Item, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            items.put(item, timeout=0.05)
            return True
        except queue.Full:
            continue
    return False


def _tokenize(reads: Iterator[bytes], decoder: Utf8Decoder, text: IncrementalTokenizer) -> Iterator[_Tokens]:
    for data in reads:
        ids = text.feed(decoder.feed(data))
        yield _Tokens(ids, TextPosition(decoder.offset, decoder.held, text.held, text.continued))
    if decoder.offset == 0:
        raise InputError("expected text, found an empty input")
    ids = np.concatenate([text.feed(decoder.flush()), text.flush()])
    yield _Tokens(ids, TextPosition(decoder.offset))


def _reads(source: Source, read_bytes: int, offset: int, stop: threading.Event) -> Iterator[bytes]:
    """Non-empty bytes objects, until the end. Opens a path now, so that its errors come before any thread."""
    if isinstance(source, str | Path):
        source = ByteFile(source)
    if hasattr(source, "reads"):
        return cast(TextSource, source).reads(read_bytes, offset, stop)
    if hasattr(source, "read"):
        return _of_file(cast(BinaryIO, source), read_bytes, stop)
    return (data for data in cast(Iterable[bytes], source) if data)


def _of_file(file: BinaryIO, read_bytes: int, stop: threading.Event) -> Iterator[bytes]:
    try:
        yield from read_pieces(file, read_bytes, stop)
    except OSError as error:
        raise InputError(f"cannot read the input: {error.strerror or error}") from error
