"""Answers on the disk: what a run that was cut off need not ask again.

A folder holds settings.json, written once, and answers.jsonl, a line for each time that a batch of texts was asked. A
line is on the disk before the reading goes on; one that a crash tore is dropped. place.safetensors is where the batch
stood that is being read: the memory states are all that it takes to go on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from rmt_engine.errors import InputError
from rmt_engine.memory import write_atomically

SETTINGS, ANSWERS, PLACE = "settings.json", "answers.jsonl", "place.safetensors"
PLACE_SECONDS = 60.0  # between two places that are kept
Key = tuple[str | int, ...]  # what names a text
Asked = tuple[Key, int]  # a text, and after how many tokens it was asked


class Store:
    """The answers of one measurement, in memory and, with a folder, on the disk too."""

    def __init__(self, folder: str | Path | None = None, settings: Mapping[str, Any] | None = None):
        """settings: everything that decides an answer. Raises ValueError for a folder of another measurement."""
        self.answers: dict[Asked, str] = {}
        self._kept_at = time.monotonic()
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

    def keep_place(self, whose: str, position: int, memory: Tensor) -> None:
        """Remembers where a batch stands, now and then. whose: its signature. Raises OSError."""
        if self.folder is None or time.monotonic() - self._kept_at < PLACE_SECONDS:
            return
        about = {"whose": whose, "position": str(position)}
        data = safetensors.torch.save({"memory": memory.cpu().contiguous()}, about)
        write_atomically(self.folder / PLACE, data)
        self._kept_at = time.monotonic()

    def place_of(self, whose: str) -> tuple[int, Tensor] | None:
        """The position and the memory states that were kept last, where they are of this batch. Raises InputError."""
        if self.folder is None or not (self.folder / PLACE).exists():
            return None
        try:
            with safetensors.safe_open(self.folder / PLACE, "pt") as file:
                about = file.metadata()
                return (int(about["position"]), file.get_tensor("memory")) if about["whose"] == whose else None
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self.folder / PLACE} is damaged: {error}; remove it") from None

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
