"""A small share of each campaign (`make campaign` runs them whole), and proof that campaigns find what they seek."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from campaign import checkpoints, enospc, kills, slots, states, token_files, watched
from campaign.mutations import mutated
from campaign.watched import Report, Target

from rmt_engine import memory

MUTATIONS = 200
KILLS = 5
COMPANIES = 30


def check(report: Report, attempts: int = 1) -> None:
    assert not report.failures, str(report)
    assert report.attempts >= attempts, str(report)


def test_damaged_token_files() -> None:
    check(token_files.run(MUTATIONS, seed=1, sanitize=""), MUTATIONS)


def test_damaged_checkpoints() -> None:
    report = checkpoints.run(MUTATIONS, seed=1)
    check(report, MUTATIONS)
    assert report.outcomes["refused"] > MUTATIONS // 2


def test_damaged_states() -> None:
    report = states.run(MUTATIONS, seed=1)
    check(report, MUTATIONS)
    assert report.outcomes["refused"] > MUTATIONS // 2


def test_disks_that_fail() -> None:
    check(enospc.run())


def test_killed_runs() -> None:
    report = kills.run(KILLS, seed=1)
    check(report, KILLS)
    assert report.outcomes["killed in a save"]


def test_bits_in_random_company() -> None:
    check(slots.run(COMPANIES, seed=1), COMPANIES)


# The campaigns themselves


def test_bits_that_depend_on_the_other_slots_are_found_out() -> None:
    """A GEMM whose bits depend on its rows is harmless in batches of one size, and is seen without that rule."""
    check(slots.run(8, seed=1, wrap=slots.RowsMatter))
    assert slots.run(8, seed=1, wrap=slots.RowsMatter, fixed=False).failures
    assert slots.run(8, seed=1, wrap=slots.NeighboursMatter).failures


def busy(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_mutations_change_every_file_and_repeat() -> None:
    for size in (1, 2, 50, 5000):
        data = random.Random(size).randbytes(size)
        damaged = [mutated(data, random.Random(seed)) for seed in range(200)]
        assert data not in damaged
        assert damaged == [mutated(data, random.Random(seed)) for seed in range(200)]


def test_a_watched_attempt_that_goes_wrong_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "SECONDS", 0.2)
    monkeypatch.setattr(watched, "HANG_SECONDS", 6.0)
    wrongs = {
        1: (lambda: os.kill(os.getpid(), signal.SIGKILL), "the process died (exit code -9)"),
        2: (lambda: time.sleep(60), "no answer within 6 s"),
        3: (lambda: busy(0.3), "took 0.3"),
        4: (lambda: bytearray(b"x" * (16 << 20)), "bytes for a file of 10"),
        5: (lambda: 1 / 0, "ZeroDivisionError"),
        6: (lambda: os.system("true"), "started a program (os.system)"),
    }

    def prepare(index: int) -> Path:
        path = tmp_path / str(index)
        path.write_bytes(b"0123456789")
        return path

    def attempt(path: Path) -> str:
        wrong = wrongs.get(int(path.name))
        if wrong:
            wrong[0]()
        return "done"

    report = watched.run("wrong", Target(prepare, attempt), 8)
    assert len(report.failures) == len(wrongs)
    for failure, (index, (_, words)) in zip(report.failures, wrongs.items(), strict=True):
        assert failure.startswith(f"attempt {index}: ") and words in failure
    assert report.outcomes["done"] == 5  # 0, 3, 4, 6, 7


def test_a_save_in_place_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_place(path: Path, data: bytes) -> None:
        handle = memory.os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            memory.os.write(handle, data)
        finally:
            memory.os.close(handle)

    monkeypatch.setattr(memory, "write_atomically", in_place)
    failures = enospc.run().failures
    assert "a save must write, fsync, rename" in failures[0]
    assert any("a torn state" in failure for failure in failures)
