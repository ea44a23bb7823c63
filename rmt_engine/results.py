"""The results of many documents in a folder, so that a run that was killed goes on where it was.

results.jsonl has a line for each document that is done, appended in one write as soon as it is: what is not a whole
line at its end was being written when the run was killed, and is done again. failures.jsonl lists what failed in the
latest run. run.json says what was run: other questions or another model belong in another folder.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rmt_engine.errors import InputError
from rmt_engine.memory import write_atomically

SYNC_EVERY = 100  # lines: what was written survives a kill, what was synced also a loss of power


class ResultsFolder:
    """A context manager. done: the ids of the documents that have their line."""

    def __init__(self, folder: str | Path, about: Mapping[str, Any]) -> None:
        """Opens or makes the folder. Raises ValueError where it holds results of something else or another process
        writes to it, InputError where its results are damaged, OSError."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path, self.failures = self.folder / "results.jsonl", self.folder / "failures.jsonl"
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._lock()
            self._check(about)
            self.done: set[str] = set()
            self._places: list[tuple[int, int]] = []  # (index, place in the file) of each line
            self._recover()
            self._failed = os.open(self.failures, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
        except BaseException:
            os.close(self._handle)
            raise

    def __enter__(self) -> ResultsFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        os.fsync(self._handle)
        os.close(self._handle)
        os.close(self._failed)

    def add(self, line: Mapping[str, Any]) -> None:
        """A document that is done; `line` holds its id and index."""
        self._places.append((line["index"], os.lseek(self._handle, 0, os.SEEK_END)))
        _append(self._handle, line)
        self.done.add(line["id"])
        if len(self.done) % SYNC_EVERY == 0:
            os.fsync(self._handle)

    def add_failure(self, line: Mapping[str, Any]) -> None:
        _append(self._failed, line)

    def sort(self) -> None:
        """Puts the lines in the order of the input, atomically."""
        if self._places == sorted(self._places):
            return
        ends = [place for _, place in self._places[1:]] + [os.lseek(self._handle, 0, os.SEEK_END)]
        spans = sorted((index, place, end) for (index, place), end in zip(self._places, ends, strict=True))
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        with open(temporary, "wb") as sorted_file:
            for _, place, end in spans:
                sorted_file.write(os.pread(self._handle, end - place, place))
            sorted_file.flush()
            os.fsync(sorted_file.fileno())
        os.replace(temporary, self.path)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another run writes to {self.folder}: wait for it, or give another --output") from None

    def _check(self, about: Mapping[str, Any]) -> None:
        path = self.folder / "run.json"
        now = json.loads(json.dumps(about))
        if not path.exists():
            if os.fstat(self._handle).st_size:
                raise ValueError(f"{self.path} is of no run of ours (there is no run.json): give another --output")
            write_atomically(path, (json.dumps(now, indent=1, ensure_ascii=False) + "\n").encode())
            return
        try:
            then = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is damaged: {error}; give another --output") from None
        for key in sorted(now.keys() | then.keys()):
            if now.get(key) != then.get(key):
                raise ValueError(
                    f"{self.folder} holds results of another run ({key}: {then.get(key)!r}, now {now.get(key)!r}): "
                    "give another --output"
                )

    def _recover(self) -> None:
        """Reads what is done, and cuts off a last line that is not whole."""
        place = 0
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    known = json.loads(line) if line.endswith(b"\n") else None
                    if known is not None:
                        self.done.add(known["id"])
                        self._places.append((known["index"], place))
                        place += len(line)
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(
                        f"{self.path}, line {number:,} is damaged ({error}): mend it, or give another --output"
                    ) from None
        os.ftruncate(self._handle, place)


def _append(handle: int, line: Mapping[str, Any]) -> None:
    left = memoryview((json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
    while left:
        left = left[os.write(handle, left) :]
