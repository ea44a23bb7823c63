"""Every call of a save fails once in every way: afterwards the old state is there or the new one, never a torn one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from campaign.engines import text, tiny_folder
from campaign.faulty_os import ERRORS, KILLS, SHORT, FaultyOs
from campaign.processes import exit_code, fork
from campaign.watched import Report
from rmt_engine import Engine, memory
from rmt_engine.stream import Stream


def run(engine: Engine | None = None) -> Report:
    """Every call, every fault, with and without an old state: no count and no chance is needed."""
    report = Report("enospc")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if engine is None:
            (folder / "made").mkdir()
            engine = Engine.from_pretrained(tiny_folder(folder / "made"), device="cpu")
        saves = Saves(engine, folder / "states")
        report.notes.append(f"{len(saves.calls)} calls a save: {' '.join(saves.calls)}")
        report.failures += saves.order_failures()
        for kind in (*ERRORS, SHORT, *KILLS):
            for at in range(1 if kind == SHORT else len(saves.calls)):  # short writes happen at every write
                for has_old in (True, False):
                    report.attempts += 1
                    try:
                        report.outcomes[saves.attempt(kind, at, has_old)] += 1
                    except Exception as error:
                        where = f"{kind} at call {at} ({saves.calls[at]}), {'an' if has_old else 'no'} old state"
                        report.failures.append(f"{where}: {type(error).__name__}: {error}")
    return report


class Saves:
    """Two states of one stream, and a folder where the second is saved over the first."""

    def __init__(self, engine: Engine, folder: Path):
        folder.mkdir()
        self.folder, self.path = folder, folder / "book.state"
        self.old = engine.stream()
        self.old.feed(text(300, seed=1))
        self.new = self.old.fork()
        self.new.feed(text(400, seed=2))
        self.old_bytes, self.new_bytes = self._bytes(self.old), self._bytes(self.new)
        assert self.old_bytes != self.new_bytes
        watching = FaultyOs()
        with_os(watching, lambda: self.new.save(self.path))
        self.calls = watching.calls

    def _bytes(self, stream: Stream) -> bytes:
        stream.save(self.path)
        return self.path.read_bytes()

    def order_failures(self) -> list[str]:
        """Written, on the disk, renamed, and the new name on the disk: in this order."""
        try:
            rename = self.calls.index("replace")
            write = self.calls.index("write")
            assert write < self.calls.index("fsync") < rename and "fsync" in self.calls[rename:]
        except (AssertionError, ValueError):
            return [f"a save must write, fsync, rename and fsync its folder; it does {' '.join(self.calls)}"]
        return []

    def attempt(self, kind: str, at: int, has_old: bool) -> str:
        for file in self.folder.iterdir():
            file.unlink()
        if has_old:
            self.path.write_bytes(self.old_bytes)
        outcome = self._killed(kind, at) if kind in KILLS else self._failing(kind, at)
        found = self.path.read_bytes() if self.path.exists() else None
        assert found in (self.new_bytes, self.old_bytes if has_old else None), "a torn state"
        if outcome == "saved":
            assert found == self.new_bytes, "saved without an error, and not there"
        self.new.save(self.path)
        assert self.path.read_bytes() == self.new_bytes, "the following save"
        return outcome

    def _failing(self, kind: str, at: int) -> str:
        faulty = FaultyOs(kind, at)
        outcome = "saved"
        try:
            with_os(faulty, lambda: self.new.save(self.path))
        except OSError as error:
            assert error.errno == ERRORS[kind]
            outcome = "failed with the disk's error"
        assert faulty.happened or kind == "full disk, half a write", "the fault did not happen"
        cleans = kind != "bad disk from then on"  # there, nothing can be removed either
        left = [name for name in os.listdir(self.folder) if name != self.path.name]
        assert not (cleans and left), f"left behind: {left}"
        return outcome

    def _killed(self, kind: str, at: int) -> str:
        def save() -> int:
            with_os(FaultyOs(kind, at), lambda: self.new.save(self.path))
            return 0

        code = exit_code(fork(save, self.folder / "log"))
        assert code == -9, f"expected a kill, came exit code {code}"
        return "killed"


def with_os(faulty: FaultyOs, save: Callable[[], object]) -> None:
    """`save` with `faulty` in place of the `os` of `rmt_engine.memory`."""
    true = memory.os
    memory.os = faulty  # type: ignore[assignment]
    try:
        save()
    finally:
        memory.os = true
