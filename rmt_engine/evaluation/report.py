"""Cells of a measurement as text: a table, markdown, CSV, JSON, and a heat map of characters."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rmt_engine.evaluation.babilong import Score
from rmt_engine.evaluation.drift import Drift
from rmt_engine.evaluation.perplexity import Change, Result
from rmt_engine.evaluation.retrieval import PLACES, Cell


def cell_dict(cell: Cell) -> dict[str, Any]:
    """A cell as JSON holds it."""
    return {**asdict(cell), "accuracy": cell.accuracy, "interval": cell.interval}


def cell_line(cell: Cell) -> str:
    """A cell as a line of the table."""
    low, high = (100 * bound for bound in cell.interval)
    task = cell.task if cell.facts == 1 or cell.task == "reasoning" else f"{cell.task} ({cell.facts} facts)"
    return (
        f"{task:<18} {cell.tokens:>11,} tokens {cell.segments:>9,} segments  {cell.correct}/{cell.trials} "
        f"= {100 * cell.accuracy:.1f} % (95 %: {low:.1f} to {high:.1f})"
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns, but for the first, are aligned right."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def comma_separated(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().rstrip("\n")


def retrieval(cells: Sequence[Cell], kind: str, about: Mapping[str, Any]) -> str:
    """All cells as `md`, `csv`, `json` (with what `about` says) or a `table`."""
    if kind == "json":
        return json.dumps({**about, "cells": [cell_dict(cell) for cell in cells]})
    if kind == "table":
        return "\n".join(map(cell_line, cells))
    if kind == "md":
        header = ["task", "facts", "tokens", "segments", "right", "accuracy", "95 %"]
        return markdown(header, [_markdown_row(cell) for cell in cells])
    header = ["task", "facts", "tokens", "segments", "trials", "correct", "accuracy", "low", "high"]
    return comma_separated(header, [_csv_row(cell) for cell in cells])


def _markdown_row(cell: Cell) -> list[str]:
    right = f"{cell.correct} of {cell.trials}"
    return [cell.task, str(cell.facts), f"{cell.tokens:,}", f"{cell.segments:,}", right, *_percents(cell)]


def _csv_row(cell: Cell) -> list[Any]:
    count = [cell.task, cell.facts, cell.tokens, cell.segments, cell.trials, cell.correct]
    return [*count, *(f"{share:.6f}" for share in (cell.accuracy, *cell.interval))]


def heat_map(cells: Sequence[Cell]) -> str:
    """Percent right for each length (down) and tenth of the text in which the fact stands (across); · for no trial."""
    wide = max(len(f"{cell.tokens:,}") for cell in cells)
    lines = [" " * wide + "  " + " ".join(f"{100 * place // PLACES:>4}" for place in range(PLACES)) + "  % of the text"]
    for cell in cells:
        shares = " ".join(f"{'·' if not n else round(100 * right / n):>4}" for n, right in cell.by_place)
        lines.append(f"{cell.tokens:>{wide},}  {shares}")
    return "\n".join(lines)


def heat_maps(cells: Sequence[Cell]) -> str:
    """One for each task whose facts stand anywhere; empty where there is none."""
    tasks = [task for task in dict.fromkeys(cell.task for cell in cells) if task != "memorize"]
    maps = [f"{task}: percent right by the place of the fact\n{heat_map(_of(cells, task))}" for task in tasks]
    return "\n\n".join(maps)


def _of(cells: Sequence[Cell], task: str) -> list[Cell]:
    return sorted((cell for cell in cells if cell.task == task), key=lambda cell: cell.tokens)


# ------------------------------------------------------------------------------------------------- the other measures


def babilong(scores: Sequence[Score], kind: str, about: Mapping[str, Any]) -> str:
    """Scores of BABILong's files, in the same formats."""
    if kind == "json":
        found = [{**asdict(s), "accuracy": s.accuracy, "interval": s.interval} for s in scores]
        return json.dumps({**about, "scores": found})
    if kind == "table":
        return "\n".join(map(score_line, scores))
    if kind == "md":
        header = ["task", "length", "right", "accuracy", "95 %"]
        rows = [[s.task, s.length, f"{s.correct} of {s.samples}", *_percents(s)] for s in scores]
        return markdown(header, rows)
    header = ["task", "length", "samples", "correct", "accuracy", "low", "high"]
    return comma_separated(header, [[s.task, s.length, s.samples, s.correct, s.accuracy, *s.interval] for s in scores])


def score_line(score: Score) -> str:
    accuracy, interval = _percents(score)
    return f"{score.task:<5} {score.length:>5}  {score.correct}/{score.samples} = {accuracy} (95 %: {interval})"


def _percents(score: Score | Cell) -> list[str]:
    low, high = (100 * bound for bound in score.interval)
    return [f"{100 * score.accuracy:.1f} %", f"{low:.1f}–{high:.1f}"]


def drift(found: Sequence[Drift], kind: str, about: Mapping[str, Any]) -> str:
    """Paired trials under two dtypes, in the same formats."""
    if kind == "json":
        return json.dumps({**about, "drift": [_drift_dict(row) for row in found]})
    first, second = found[0].dtypes
    header = ["task", "tokens", "trials", first, second, "difference, points", "95 %", "same answer"]
    rows = [_drift_row(row) for row in found]
    if kind == "csv":
        return comma_separated(header, rows)
    return markdown(header, rows) if kind == "md" else aligned(header, rows)


def _drift_dict(row: Drift) -> dict[str, Any]:
    return {**asdict(row), "accuracy": row.accuracy, "difference": row.difference, "interval": row.interval}


def _drift_row(row: Drift) -> list[str]:
    first, second = (f"{100 * accuracy:.1f} %" for accuracy in row.accuracy)
    low, high = row.interval
    interval = f"{low:+.1f} to {high:+.1f}"
    return [
        row.task,
        str(row.tokens),
        str(row.trials),
        first,
        second,
        f"{row.difference:+.1f}",
        interval,
        str(row.same),
    ]


def perplexity(result: Result, kind: str, about: Mapping[str, Any]) -> str:
    """Perplexity over segments read before, in the same formats."""
    if kind == "json":
        return json.dumps({**about, **_finite(asdict(result))})
    header = ["segments before", "perplexity", "change", "memory reset", "change", "another's memory", "change"]
    rows = [
        [
            str(column.segments),
            *(f"{column.perplexity:.4g}", _change(column.change)),
            *(f"{column.reset:.4g}", _change(column.reset_change)),
            *(f"{column.other:.4g}", _change(column.other_change)),
        ]
        for column in result.columns
    ]
    if kind == "csv":
        return comma_separated(header, rows)
    return markdown(header, rows) if kind == "md" else aligned(header, rows)


def perplexity_note(result: Result) -> str:
    """What a table of perplexities counts, and how its intervals were made."""
    return (
        f"{result.tokens:,} tokens of {result.targets} segments in {result.documents} documents, the same in each row; "
        f"change: against the first row, with the 95 % interval of a paired bootstrap over {result.unit}s"
    )


def _change(change: Change) -> str:
    if change.interval is None:
        return f"{change.percent:+.2f} %"
    low, high = change.interval
    return f"{change.percent:+.2f} % ({low:+.2f} to {high:+.2f})"


def _finite(value: Any) -> Any:
    """For JSON, which knows no NaN: then null."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join("  ".join(f"{text:>{w}}" for text, w in zip(row, widths, strict=True)) for row in [header, *rows])
