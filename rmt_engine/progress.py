"""The progress bar on stderr: there on a terminal, silent elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from rmt_engine.run import Event, Progress, Summary, resident_bytes

if TYPE_CHECKING:
    import rich.progress

REFRESH_SECONDS = 0.1


def human(number: float) -> str:
    """1234567 -> 1.23M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}" if number < 1000 * size else f"{number / size:.0f}{unit}"
    return f"{number:.0f}"


def mebibytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:.1f} MiB"


def finish(events: Generator[Event, None, None], title: str) -> Summary:
    """Runs to the end, showing a bar if stderr is a terminal; returns the summary. Whatever happens, the run ends."""
    with closing(events):
        for event in _with_bar(events, title) if sys.stderr.isatty() else events:
            if isinstance(event, Summary):
                return event
    raise AssertionError("a run ends with its summary")


@contextmanager
def counting(total: int | None, title: str) -> Iterator[Callable[[int], None]]:
    """A bar over `total` tokens (None: not known); gives the function that is told of each step's tokens."""
    if not sys.stderr.isatty():
        yield lambda tokens: None
        return
    with _bar() as bar:
        task = bar.add_task(title, total=total, figures="")
        yield lambda tokens: bar.update(task, advance=tokens)


def _bar() -> rich.progress.Progress:
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}", markup=False),  # the name of a file may hold brackets
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[figures]}"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    return progress.Progress(*columns, console=Console(stderr=True), refresh_per_second=1 / REFRESH_SECONDS)


def _with_bar(events: Iterable[Event], title: str) -> Iterator[Event]:
    with _bar() as bar:
        task = bar.add_task(title, total=None, figures="")
        start = shown = time.monotonic()
        for event in events:
            now = time.monotonic()
            if isinstance(event, Progress) and now - shown > REFRESH_SECONDS:
                shown = now
                total = None if event.fraction is None else 1.0
                bar.update(task, completed=event.fraction or 0.0, total=total, figures=_figures(event, now - start))
            elif isinstance(event, Summary):
                bar.update(task, completed=1.0, total=1.0)
            yield event


def _figures(event: Progress, seconds: float) -> str:
    return (
        f"{human(event.position)} tokens · {human(event.position / seconds)} tokens/s · "
        f"{human(event.segments)} segments · {mebibytes(resident_bytes())}"
    )
