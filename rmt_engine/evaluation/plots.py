"""Figures of a measurement, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rmt_engine.errors import InputError
from rmt_engine.evaluation.perplexity import Column
from rmt_engine.evaluation.retrieval import PLACES, Cell

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#808080"


def check_plot(path: str | Path) -> None:
    """Tells before hours of reading what could not be drawn after them. Raises InputError, ValueError."""
    known = _pyplot().gcf().canvas.get_supported_filetypes()
    kind = Path(path).suffix.lstrip(".")
    if kind not in known:
        raise ValueError(f"cannot draw {path}: expected a file that ends in one of {', '.join(sorted(known))}")
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"there is no folder {Path(path).absolute().parent} to draw in: make it first")


def draw_heat_maps(cells: Sequence[Cell], path: str | Path) -> None:
    """Accuracy over length (down) and place of the fact (across), a panel for each task. Raises OSError."""
    plt = _pyplot()
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    figure, panels = plt.subplots(
        1, len(tasks), figsize=(1 + 4.5 * len(tasks), 3.2), squeeze=False, layout="constrained"
    )
    for axes, task in zip(panels[0], tasks, strict=True):
        rows = sorted((cell for cell in cells if cell.task == task), key=lambda cell: cell.tokens)
        image = axes.imshow(_shares(rows), vmin=0, vmax=100, aspect="auto", cmap="viridis")
        axes.set_title(task)
        axes.set_xlabel("place of the fact, % of the text")
        axes.set_xticks(range(PLACES), [str(100 * place // PLACES) for place in range(PLACES)])
        axes.set_yticks(range(len(rows)), [f"{cell.tokens:,}" for cell in rows])
    panels[0][0].set_ylabel("tokens")
    figure.colorbar(image, ax=panels[0].tolist(), label="% right")
    _save(figure, path)


def draw_perplexity(columns: Sequence[Column], path: str | Path) -> None:
    """Perplexity over the segments read before, with the controls. Raises OSError."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(5, 3.4))
    read = [column.segments for column in columns]
    for name, color, values in (
        ("own text", BLUE, [column.perplexity for column in columns]),
        ("memory reset", GREY, [column.reset for column in columns]),
        ("memory of another text", ORANGE, [column.other for column in columns]),
    ):
        axes.plot(read, values, "o-", color=color, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(read, [str(n) for n in read])
    axes.set_xlabel("segments read before")
    axes.set_ylabel("perplexity")
    axes.legend()
    _save(figure, path)


def _shares(cells: Sequence[Cell]) -> list[list[float]]:
    return [[100 * right / n if n else float("nan") for n, right in cell.by_place] for cell in cells]


def _save(figure: Any, path: str | Path) -> None:
    figure.savefig(path, bbox_inches="tight", dpi=150)
    _pyplot().close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise InputError("a figure needs matplotlib, which is not here: pip install 'rmt-engine[figures]'") from None
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt
