"""Rows of results, and the forms they are printed in."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rmt_engine.bench.readers import ENGINE
from rmt_engine.progress import human

MEASURED, FAILED, LEFT_OUT = "measured", "failed", "left out"
DISTURBED = 1.2
UNITS = {"ask": "ms", "save": "1/s", "resume": "1/s", "fork": "1/s"}  # of the others: tokens/s


@dataclass
class Result:
    """One reader's times in one row; one entry of each list a repetition.

    cpu_seconds: on a CPU, the processor time of all threads.
    error: relative difference from the truth that the check found; floor: seconds of one repetition at least; memory:
    bytes at the peak; holds: bytes that grow with the text and are held at its end at least, by the shapes. Unless it
    is `measured` there are no seconds, and `reason` says why.
    """

    name: str
    status: str = MEASURED
    reason: str = ""
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    start_ms: list[float] = field(default_factory=list)
    end_ms: list[float] = field(default_factory=list)
    memory: int | None = None
    error: float | None = None
    floor: float | None = None
    holds: int = 0

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def spread(self) -> float | None:
        """Half of what lies between the fastest and the slowest repetition, over the median; None for one alone."""
        if len(self.seconds) < 2 or self.median is None:
            return None
        return (max(self.seconds) - min(self.seconds)) / 2 / self.median

    @property
    def disturbed(self) -> bool:
        """Whether it waited, as for a disk or for other processes: much more wall time than processor time."""
        waited = [wall > DISTURBED * cpu for wall, cpu in zip(self.seconds, self.cpu_seconds, strict=False)]
        return 2 * sum(waited) > len(self.seconds)

    @property
    def share(self) -> float | None:
        """Of the floor: 1 is as fast as this machine's own matrix product, or its memory."""
        return self.floor / self.median if self.floor and self.median else None


@dataclass
class Row:
    """One point and what every reader did there. amount: tokens, or operations, of one repetition in all slots."""

    scope: str
    model: str
    batch: int
    dtype: str
    tokens: int | None = None
    amount: int = 0
    results: list[Result] = field(default_factory=list)

    @property
    def engine(self) -> Result:
        return self.results[0]

    def of(self, name: str) -> Result | None:
        return next((result for result in self.results if result.name == name), None)

    @property
    def title(self) -> str:
        length = "" if self.tokens is None else f" {human(self.tokens)}"
        return f"{self.scope}{length} × {self.batch}, {self.dtype}"

    def rate(self, result: Result) -> float | None:
        """In the row's unit: tokens/s, 1/s, or ms."""
        if result.median is None:
            return None
        return 1e3 * result.median / self.amount if self.unit == "ms" else self.amount / result.median

    @property
    def unit(self) -> str:
        return UNITS.get(self.scope, "tokens/s")

    def speed_up(self, name: str) -> float | None:
        """How many times faster the engine is than a baseline."""
        other = self.of(name)
        if other is None or other.median is None or self.engine.median is None:
            return None
        return other.median / self.engine.median

    def to_dict(self) -> dict[str, Any]:
        about = {key: value for key, value in vars(self).items() if key != "results"}
        return {**about, "unit": self.unit, "results": [self._result(result) for result in self.results]}

    def _result(self, result: Result) -> dict[str, Any]:
        derived = {"rate": self.rate(result), "median": result.median, "spread": result.spread, "share": result.share}
        if result.name != ENGINE:
            derived["speed_up_of_the_engine"] = self.speed_up(result.name)
        return {**vars(result), **derived}


@dataclass
class Report:
    """A run of `rmt-engine bench`. about: where it comes from, the machine and its measured card among it."""

    about: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return any(result.status == FAILED for row in self.rows for result in row.results)

    def to_dict(self) -> dict[str, Any]:
        return {"format": 1, **self.about, "rows": [row.to_dict() for row in self.rows]}

    def text(self, kind: str) -> str:
        return PRINTED[kind](self)


# ------------------------------------------------------------------------------------------------- forms


def _json(report: Report) -> str:
    return json.dumps(report.to_dict(), ensure_ascii=False, indent=1)


def _jsonl(report: Report) -> str:
    """What the run is, then a row a line."""
    whole = report.to_dict()
    rows = whole.pop("rows")
    return "\n".join(json.dumps(line, ensure_ascii=False) for line in [whole, *rows])


def _csv(report: Report) -> str:
    """A reader of a row a line."""
    columns = ["scope", "model", "tokens", "batch", "dtype", "reader", "status", "reason", "rate", "unit", "spread"]
    columns += ["repetitions", "start_ms", "end_ms", "memory", "share", "speed_up_of_the_engine"]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in report.to_dict()["rows"]:
        for result in row["results"]:
            ends = {key: statistics.median(result[key]) if result[key] else None for key in ("start_ms", "end_ms")}
            about = {"reader": result["name"], "repetitions": len(result["seconds"])}
            writer.writerow({**row, **result, **ends, **about})
    return out.getvalue().rstrip("\n")


def _markdown(report: Report) -> str:
    return _tables(report, _markdown_table)


def _plain(report: Report) -> str:
    return _tables(report, _plain_table)


def _tables(report: Report, draw: Callable[[list[list[str]]], str]) -> str:
    """A table for each unit, and below it what is not in it, with the reasons."""
    parts = []
    for unit in dict.fromkeys(row.unit for row in report.rows):
        rows = [row for row in report.rows if row.unit == unit]
        parts.append(draw(_cells(rows)))
        parts += ["\n".join(lines)] if (lines := list(_notes(rows))) else []
    return "\n\n".join(parts)


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    """The head and a line a row; a column that is empty throughout is left out."""
    baselines = dict.fromkeys(result.name for row in rows for result in row.results if result.name != ENGINE)
    head = ["scope", "model", "tokens", "batch", "dtype", rows[0].unit, "±", "ms/segment, start", "end", "memory"]
    head += ["of the floor", *(f"× {name}" for name in baselines)]
    lines = [[*_line(row), *(_against(row, name) for name in baselines)] for row in rows]
    used = [i for i in range(len(head)) if any(line[i] for line in lines)]
    return [[line[i] for i in used] for line in [head, *lines]]


def _line(row: Row) -> list[str]:
    engine, rate = row.engine, row.rate(row.engine)
    speed = engine.status if rate is None else _number(rate)
    return [
        row.scope,
        row.model,
        "" if row.tokens is None else human(row.tokens),
        str(row.batch),
        row.dtype,
        speed,
        _percent(engine.spread),
        *(_number(statistics.median(times)) if times else "" for times in (engine.start_ms, engine.end_ms)),
        "" if engine.memory is None else f"{engine.memory / 2**20:,.0f} MiB",
        _percent(engine.share),
    ]


def _against(row: Row, name: str) -> str:
    other = row.of(name)
    if other is None:
        return ""
    factor = row.speed_up(name)
    return other.status if factor is None else f"{factor:.2f}"


def _notes(rows: Iterable[Row]) -> Iterable[str]:
    for row in rows:
        for result in row.results:
            if result.disturbed:
                yield f"{row.title}, {result.name} waited in most repetitions: a disk, or other work on this machine"
            if result.reason:
                yield f"{row.title}, {result.name} {result.status}: {result.reason}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _number(value: float) -> str:
    """Three digits at least, a thousand with its comma."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _plain_table(cells: list[list[str]]) -> str:
    wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = [cell in ("scope", "model", "dtype") for cell in cells[0]]
    lines = (
        "  ".join(
            f"{cell:<{width}}" if text else f"{cell:>{width}}"
            for cell, width, text in zip(line, wide, left, strict=True)
        )
        for line in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def _markdown_table(cells: list[list[str]]) -> str:
    rule = ["---" if cell in ("scope", "model", "dtype") else "---:" for cell in cells[0]]
    return "\n".join(f"| {' | '.join(line)} |" for line in [cells[0], rule, *cells[1:]])


PRINTED: Mapping[str, Callable[[Report], str]] = {
    "table": _plain,
    "md": _markdown,
    "json": _json,
    "jsonl": _jsonl,
    "csv": _csv,
}
