"""Answers on the disk: what a run that was cut off need not ask again.

A folder holds settings.json, written once, and answers.jsonl, a line for each batch of texts that was read. A line is
written whole and on the disk before the next batch begins; one that a crash tore is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rmt_engine.errors import InputError
from rmt_engine.memory import write_atomically

SETTINGS, ANSWERS = "settings.json", "answers.jsonl"
Key = tuple[str | int, ...]  # what names a text
Asked = tuple[Key, int]  # a text, and after how many tokens it was asked


class Store:
    """The answers of one measurement, in memory and, with a folder, on the disk too."""

    def __init__(self, folder: str | Path | None = None, settings: Mapping[str, Any] | None = None):
        """settings: everything that decides an answer. Raises ValueError for a folder of another measurement."""
        self.answers: dict[Asked, str] = {}
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_settings(self.folder / SETTINGS, dict(settings or {}))
            self._load(self.folder / ANSWERS)

    def add(self, answers: Iterable[tuple[Key, int, str]]) -> None:
        """Keeps the answers of a batch. Raises OSError."""
        new = [(key, length, given) for key, length, given in answers]
        if self.folder is not None and new:
            with open(self.folder / ANSWERS, "ab") as file:
                file.write(json.dumps(new).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        self.answers.update({(key, length): given for key, length, given in new})

    def _check_settings(self, path: Path, settings: dict[str, Any]) -> None:
        if not path.exists():
            write_atomically(path, json.dumps(settings, indent=1, sort_keys=True).encode() + b"\n")
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is no settings file: {error}; give another folder") from None
        ours = json.loads(json.dumps(settings))
        differ = sorted(name for name in {*found, *ours} if found.get(name) != ours.get(name))
        if differ:
            told = "; ".join(f"{name}: {found.get(name)!r} there, {ours.get(name)!r} now" for name in differ)
            raise ValueError(f"{path.parent} holds another measurement ({told}): give another folder")

    def _load(self, path: Path) -> None:
        if not path.exists():
            return
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                for key, length, given in json.loads(line):
                    self.answers[tuple(key), length] = given
            except (ValueError, TypeError) as error:
                raise InputError(f"{path}, line {number}, is damaged: {error}; remove that line") from None
        if whole < len(data):  # torn by a crash: what it would have said is asked again
            os.truncate(path, whole)
