"""Many small attempts in a child process: a crash, a hang, a second too long or too much memory is a failure, not the
end of the campaign."""

from __future__ import annotations

import collections
import ctypes
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

SECONDS = 1.0  # of processor time, for one attempt: a busy machine is not the file's fault
HANG_SECONDS = 120.0
MEMORY_FACTOR = 2  # times the file
MEMORY_NOISE = 1 << 20  # Python's own
TRIES = 3  # a page is new once; a file that does harm does it every time
LIBC = ctypes.CDLL(None)
STARTS_PROGRAMS = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork")


@dataclass(frozen=True)
class Target:
    """One kind of attempt, told by its number alone.

    prepare(index) -> the damaged file; attempt(path) -> a word for what happened, like "refused". An exception of
    `attempt` is a failure: it lets through what is allowed to happen.
    """

    prepare: Callable[[int], Path]
    attempt: Callable[[Path], str]


@dataclass
class Report:
    name: str
    attempts: int = 0
    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)
    slowest_seconds: float = 0.0
    largest_growth: int = 0  # bytes, the most that an attempt took
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        words = [f"{count:,} {outcome}" for outcome, count in sorted(self.outcomes.items())]
        if self.slowest_seconds:
            words.append(f"slowest {1000 * self.slowest_seconds:.0f} ms")
            words.append(f"at most {self.largest_growth / (1 << 20):.1f} MiB more")
        line = f"{self.name}: {self.attempts:,} attempts, {len(self.failures)} failed; " + ", ".join(words + self.notes)
        return "\n  ".join([line, *self.failures[:20]])


def run(name: str, target: Target, count: int, first: int = 0) -> Report:
    """Attempts `first` to `first + count - 1`. Failures are reported, not raised."""
    report = Report(name)
    index = first
    while index < first + count:
        index = _run_child(report, target, index, first + count)
    return report


def _run_child(report: Report, target: Target, index: int, end: int) -> int:
    """Attempts from `index` on, until the end or until the child is lost. Returns the index after the last one."""
    context = multiprocessing.get_context("fork")  # what was imported and prepared is there already
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_attempts, args=(theirs, target, index, end), daemon=True)
    child.start()
    theirs.close()
    try:
        while index < end:
            if not ours.poll(HANG_SECONDS):
                report.failures.append(f"attempt {index}: no answer within {HANG_SECONDS:.0f} s")
                return index + 1
            try:
                outcome, failure, seconds, growth = ours.recv()
            except EOFError:
                child.join()
                report.failures.append(f"attempt {index}: the process died (exit code {child.exitcode})")
                return index + 1
            _note(report, index, outcome, failure, seconds, growth)
            index += 1
        return index
    finally:
        child.kill()
        child.join()
        ours.close()


def _note(report: Report, index: int, outcome: str, failure: str, seconds: float, growth: int) -> None:
    report.attempts += 1
    report.outcomes[outcome] += 1
    report.slowest_seconds = max(report.slowest_seconds, seconds)
    report.largest_growth = max(report.largest_growth, growth)
    if failure:
        report.failures.append(f"attempt {index}: {failure}")


def _attempts(pipe: Connection, target: Target, index: int, end: int) -> None:
    started: list[str] = []
    sys.addaudithook(lambda event, _: started.append(event) if event in STARTS_PROGRAMS else None)
    for number in range(index, end):
        path = target.prepare(number)
        size = path.stat().st_size
        allowed = MEMORY_FACTOR * size + MEMORY_NOISE
        outcome, failure, seconds, growth = _attempt(target, path)
        for _ in range(TRIES - 1):
            if not failure and (seconds > SECONDS or growth > allowed):
                _, _, again, more = _attempt(target, path)
                seconds, growth = min(seconds, again), min(growth, more)
        if seconds > SECONDS:
            failure = failure or f"took {seconds:.2f} s"
        if growth > allowed:
            failure = failure or f"took {growth:,} bytes for a file of {size:,}"
        if started:
            failure = f"started a program ({started.pop()})"
        pipe.send((outcome, failure, seconds, growth))
    pipe.close()


def _attempt(target: Target, path: Path) -> tuple[str, str, float, int]:
    LIBC.malloc_trim(0)  # or what was freed before would serve this attempt unseen
    before = _reset_peak()
    start = time.process_time()
    try:
        outcome, failure = target.attempt(path), ""
    except Exception as error:
        outcome, failure = "failed", f"{type(error).__name__}: {error}"
    return outcome, failure, time.process_time() - start, _memory("VmHWM") - before


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(name: str) -> int:
    for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc has no {name}")
