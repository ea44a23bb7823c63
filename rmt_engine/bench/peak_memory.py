"""How much memory a reader takes: a process that loads it, reads once, and does nothing else."""

from __future__ import annotations

import multiprocessing
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import torch

from rmt_engine.bench.readers import ENGINE, EngineReader, random_ids, reader
from rmt_engine.bench.setup import Setup
from rmt_engine.engine import device_of
from rmt_engine.run import resident_bytes

SAMPLED_EVERY = 0.005  # seconds


def peak_memory(setup: Setup, name: str, batch: int, tokens: int, text: Path | None = None) -> int | None:
    """Bytes at most while `tokens` tokens are read in each of `batch` slots, or the file `text`.

    A CPU: anonymous resident memory (RssAnon) of the process, looked at every 5 ms; what is mapped from files, as the
    weights may be, is no part of it. A GPU: torch's peak of allocated memory. None where the process was killed, as for
    lack of memory, or the system does not tell.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_measured, setup, name, batch, tokens, text).result()
        except BrokenProcessPool:
            return None


def _measured(setup: Setup, name: str, batch: int, tokens: int, text: Path | None) -> int | None:
    if setup.threads is not None:
        torch.set_num_threads(setup.threads)
    loaded, device = setup.load(), device_of(setup.device)
    with tempfile.TemporaryDirectory() as folder:
        who = reader(name, setup, loaded, Path(folder), tokens)
        if text is not None:
            assert name == ENGINE and isinstance(who, EngineReader)
            run = who.text(text)
        else:
            run = who.stream(random_ids(loaded, batch, tokens))
        del loaded
        with _watched(device) as peak:
            run(lambda: None)
        return peak[0]


@contextmanager
def _watched(device: torch.device) -> Iterator[list[int | None]]:
    """A list whose only entry is the peak, once the block has ended."""
    peak: list[int | None] = [None]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device)
        return
    done = threading.Event()

    def watch() -> None:
        while True:
            size = resident_bytes()
            if size is not None:
                peak[0] = max(peak[0] or 0, size)
            if done.wait(SAMPLED_EVERY):
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
