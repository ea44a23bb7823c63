"""Runs with `--checkpoint-every`, killed and resumed until they end: the last state is that of a run left in peace."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from pathlib import Path

import numpy as np

from campaign.engines import text, tiny_folder
from campaign.faulty_os import KILLS, FaultyOs
from campaign.processes import exit_code, fork
from campaign.watched import Report
from rmt_engine import memory
from rmt_engine.cli import main

INPUT_SIZE = 3000  # characters or tokens
IN_A_SAVE = 5  # every so many-th kill happens inside a save
MOST_KILLS = 3  # of one run
CHECKPOINT_EVERY = ["37", "150", "1000"]


def run(count: int, seed: int) -> Report:
    """`count` kills. Needs a process with one thread: children are forked."""
    report = Report("kills")
    with tempfile.TemporaryDirectory() as folder:
        runs = [Run(name, arguments, Path(folder)) for name, arguments in _inputs(Path(folder))]
        rng = random.Random(f"kills {seed}")
        number = 0
        while report.attempts < count and len(report.failures) < 10:
            number += 1
            one = rng.choice(runs)
            try:
                one.killed_and_resumed(report, rng, min(rng.randint(1, MOST_KILLS), count - report.attempts))
            except Exception as error:
                report.failures.append(f"run {number} ({one.name}): {type(error).__name__}: {error}")
                report.attempts += 1
    return report


def _inputs(folder: Path) -> list[tuple[str, list[str]]]:
    model = ["--model", str(tiny_folder(folder)), "--device", "cpu"]
    (folder / "book.txt").write_bytes(text(INPUT_SIZE, seed=3))
    ids = np.random.default_rng(4).integers(0, 256, INPUT_SIZE)
    np.save(folder / "book.npy", ids.astype(np.uint16))
    return [
        ("text", ["run", "--input", str(folder / "book.txt"), *model]),
        ("scored text", ["run", "--input", str(folder / "book.txt"), "--score", *model]),
        ("tokens", ["run", "--input", str(folder / "book.npy"), *model]),
    ]


class Run:
    """One command, and what it gives when nobody disturbs it."""

    def __init__(self, name: str, arguments: list[str], folder: Path):
        self.name, self.arguments, self.folder = name, arguments, folder
        self.state, self.log = folder / "book.state", folder / "log"
        start = time.monotonic()
        self._finish([*arguments, "--save-state", str(self.state)])
        self.seconds = time.monotonic() - start
        self.expected = self.state.read_bytes()

    def killed_and_resumed(self, report: Report, rng: random.Random, kills: int) -> None:
        for file in self.folder.glob("*book.state*"):
            file.unlink()
        every = rng.choice(CHECKPOINT_EVERY)
        for _ in range(kills):
            inside = report.attempts % IN_A_SAVE == 0
            code = self._kill_inside_a_save(every, rng) if inside else self._kill(every, rng)
            if code == 0:
                break  # it was faster; nothing was killed
            assert code == -signal.SIGKILL, f"exit code {code}: {self.log.read_text()[-2000:]}"
            report.attempts += 1
            report.outcomes["killed in a save" if inside else "killed at a random moment"] += 1
            report.outcomes["of them with a state to go on from"] += self.state.exists()
        self._finish(self._command(every))
        assert self.state.read_bytes() == self.expected, "the state differs from that of the run left in peace"

    def _command(self, every: str) -> list[str]:
        resume = ["--resume", str(self.state)] if self.state.exists() else []
        return [*self.arguments, "--save-state", str(self.state), "--checkpoint-every", every, *resume]

    def _finish(self, command: list[str]) -> None:
        code = exit_code(fork(lambda: main(command), self.log))
        assert code == 0, f"exit code {code} of {' '.join(command)}: {self.log.read_text()[-2000:]}"

    def _kill(self, every: str, rng: random.Random) -> int:
        command = self._command(every)
        child = fork(lambda: main(command), self.log)
        time.sleep(rng.uniform(0, self.seconds))
        os.kill(child, signal.SIGKILL)
        return exit_code(child)

    def _kill_inside_a_save(self, every: str, rng: random.Random) -> int:
        command, kind, at = self._command(every), rng.choice(KILLS), rng.randrange(rng.choice([8, 80]))

        def work() -> int:
            memory.os = FaultyOs(kind, at)  # type: ignore[assignment]
            return main(command)

        return exit_code(fork(work, self.log))
