"""Where the bytes of a text come from: a file, the standard input, a URL, compressed or not. All of it as it is read.

A source gives its bytes once, from any offset on. Offsets count the bytes of the text, decompressed; `size` and
`fraction` are of the file as it lies there.
"""

from __future__ import annotations

import gzip
import io
import os
import select
import stat
import sys
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from rmt_engine.errors import InputError

COMPRESSED = (".gz", ".zst")
URL_BLOCK = 1 << 20  # bytes fetched ahead of a URL's reader


class TextSource(ABC):
    """The bytes of one text, in UTF-8. size: bytes of the file as it lies there, None for a pipe."""

    name: str
    size: int | None
    given = 0  # bytes of the text so far

    @abstractmethod
    def reads(self, read_bytes: int, offset: int, stop: threading.Event) -> Iterator[bytes]:
        """Non-empty pieces after the first `offset` bytes, until the end or `stop`. Once; it closes the source then.

        Raises InputError, here or from the iterator, for what cannot be read or ends before the offset.
        """

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def _taken(self) -> float | None:
        """How much of the file has been read, None where its size is not known."""

    def fraction(self, offset: int) -> float | None:
        """How much of the file lies before `offset` bytes of its text; near enough where that is not plain."""
        taken = self._taken()
        return taken * min(offset / self.given, 1.0) if taken and self.given else None

    def _after(self, offset: int, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """What comes after `offset` bytes, counted; for what cannot be sought in."""
        for data in pieces:
            left = max(offset - self.given, 0)
            self.given += len(data)
            if left < len(data):
                yield data[left:]
        if self.given < offset:
            raise too_short(offset, self.given, self.name)


def is_url(source: str | Path) -> bool:
    return isinstance(source, str) and "://" in source


def suffixes(source: str | Path) -> tuple[str, str]:
    """(kind, compression) of a path or URL, in lower case: book.jsonl.GZ -> (".jsonl", ".gz"); "" for what is not."""
    path = Path(urlsplit(str(source)).path if is_url(source) else source)
    last = path.suffix.lower()
    if last not in COMPRESSED:
        return last, ""
    return Path(path.stem).suffix.lower(), last


class ByteFile(TextSource):
    """A path, a URL or "-", decompressed by its suffix."""

    def __init__(self, source: str | Path) -> None:
        """Raises InputError for what cannot be opened, is empty, or needs a package that is not there."""
        self.name = "the standard input" if str(source) == "-" else str(source)
        self.compression = "" if str(source) == "-" else suffixes(source)[1]
        file, self.size = open_file(source)
        self._raw = _Counted(file)
        self._file, self._damage = self._decompressed()

    def reads(self, read_bytes: int, offset: int, stop: threading.Event) -> Iterator[bytes]:
        if self._seeks(offset):
            self.given = offset
        return self._after(offset, self._pieces(read_bytes, stop))

    def _taken(self) -> float | None:
        return min(self._raw.taken / self.size, 1.0) if self.size else None

    def close(self) -> None:
        self._raw.file.close()

    def _decompressed(self) -> tuple[BinaryIO, tuple[type[Exception], ...]]:
        """The file, and what it raises where its container is damaged."""
        if self.compression == ".gz":
            file = gzip.GzipFile(fileobj=cast(BinaryIO, self._raw), mode="rb")
            return cast(BinaryIO, file), (EOFError, gzip.BadGzipFile, zlib.error)
        if self.compression == ".zst":
            zstd = _zstd(self.name)
            return cast(BinaryIO, zstd.ZstdFile(self._raw)), (EOFError, zstd.ZstdError)
        return self._raw.file, ()

    def _seeks(self, offset: int) -> bool:
        """Whether it now stands at `offset`."""
        if self.compression or not offset:
            return not offset
        try:
            size = self._file.seek(0, io.SEEK_END)
            if size >= offset:
                self._raw.taken = self._file.seek(offset)
                return True
        except (OSError, ValueError, NotImplementedError):
            return False  # a pipe, or a server that gives no parts: it stands where it stood
        self.close()
        raise too_short(offset, size, self.name)

    def _pieces(self, read_bytes: int, stop: threading.Event) -> Iterator[bytes]:
        try:
            for data in read_pieces(self._file, read_bytes, stop):
                if not self.compression:
                    self._raw.taken += len(data)
                yield data
        except self._damage as error:
            raise InputError(f"{self.name} is damaged or cut off: {error}; copy or compress it again") from error
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {self.name}: {getattr(error, 'strerror', None) or error}") from error
        finally:
            self.close()


class _Counted:
    """What a decompressor reads from: a file, and how many of its bytes were taken."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.taken = 0

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.taken += len(data)
        return data


def read_pieces(file: BinaryIO, read_bytes: int, stop: threading.Event) -> Iterator[bytes]:
    """Non-empty pieces of a binary file, until its end or `stop`."""
    while _wait_until_readable(file, stop) and (data := file.read(read_bytes)):
        yield data


def _wait_until_readable(file: BinaryIO, stop: threading.Event) -> bool:
    """Wait for data or the end of an unbuffered file, so that a silent pipe does not keep the thread. False: stop."""
    while isinstance(file, io.RawIOBase) and not stop.is_set():
        try:
            if select.select([file], [], [], 0.05)[0]:
                break
        except (OSError, ValueError):
            break  # nothing select knows (a raw stream without a descriptor)
    return not stop.is_set()


def too_short(offset: int, size: int, name: str) -> InputError:
    return InputError(f"expected at least {offset:,} bytes in {name}, found {size:,}; the text was another one before")


# ------------------------------------------------------------------------------------------------- opening


def open_file(source: str | Path) -> tuple[BinaryIO, int | None]:
    """A path, a URL, or "-" for the standard input, opened for binary reading, and its bytes where they are known.

    A path comes without a buffer. Raises InputError for a missing file, a directory, an empty file, where there is no
    permission, and for a URL that fsspec cannot open.
    """
    if str(source) == "-":
        return _open_stdin(), None
    if is_url(source):
        return open_url(str(source))
    path = Path(source)
    if path.is_dir():
        raise InputError(f"expected a text file, found a directory: {path}; give one of the files in it")
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115 - handed to the caller
    except FileNotFoundError:
        raise InputError(
            f"there is no file {path}; give the path of a text file, or - for the standard input"
        ) from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        return cast(BinaryIO, file), None
    if status.st_size == 0:
        file.close()
        raise InputError(f"expected text, found an empty file: {path}")
    return cast(BinaryIO, file), status.st_size


def _open_stdin() -> BinaryIO:
    try:
        return cast(BinaryIO, open(sys.stdin.fileno(), "rb", buffering=0, closefd=False))
    except (OSError, ValueError, AttributeError):
        pass  # not a file of the system's: replaced by a program that runs us
    if getattr(sys.stdin, "buffer", None) is None:
        raise InputError("there is no standard input to read; give the path of a text file")
    return sys.stdin.buffer


def open_url(url: str) -> tuple[BinaryIO, int | None]:
    """What fsspec opens, read ahead by a bounded piece, and its bytes where they are known. Raises InputError."""
    from fsspec.core import url_to_fs  # comes with torch

    protocol = url.split("://", 1)[0]
    try:
        system, path = url_to_fs(url)
        info = system.info(path)
        parts = not protocol.startswith("http") or info.get("partial")  # a server may give the whole only, in one go
        file = system.open(path, "rb", block_size=URL_BLOCK if parts else 0, cache_type="readahead")
        return cast(BinaryIO, file), info.get("size") or None
    except ImportError as error:
        extra = {"http": "url", "https": "url", "s3": "s3"}.get(protocol)
        remedy = f"pip install 'rmt-engine[{extra}]'" if extra else "install the package that it names"
        raise InputError(f"{protocol}:// needs a package that is not here: {error}; {remedy}") from None
    except FileNotFoundError:
        raise InputError(f"there is no file {url}") from None
    except Exception as error:  # each file system has its own
        raise InputError(f"cannot open {url}: {error or type(error).__name__}") from error


def _zstd(name: str) -> Any:
    """The module with ZstdFile: Python's own from 3.14 on, before that its backport."""
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        raise InputError(f"{name} needs a package that is not here: pip install 'rmt-engine[zst]'") from None
    return zstd
