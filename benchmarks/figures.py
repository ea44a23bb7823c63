"""Draws the figures of the README and of docs/benchmarks.md from committed results: `make figures`.

    python benchmarks/figures.py            # needs matplotlib (the `figures` extra)

Read on white and on black, and told apart by colour-blind eyes: grey text, four colours of Okabe and Ito's, a marker
for each. A broken line is no measurement, and its label says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
GREY = "#808080"
LOOKS = {  # of a reader: label, colour, marker
    "rmt-engine": ("rmt-engine", "#0072b2", "o"),
    "fair": ("Hugging Face, lean loop", "#009e73", "s"),
    "hf": ("Hugging Face, the authors' loop", "#d55e00", "^"),
    "full-attention": ("full attention, KV cache", "#cc79a7", "D"),
}
Row = dict[str, Any]
Result = dict[str, Any]
Value = Callable[[Row, Result], float | None]


def rows_of(names: Iterable[str], scope: str) -> list[Row]:
    """The rows of one scope from files of `rmt-engine bench --out`; a later file's row replaces an earlier one's."""
    found: dict[tuple[Any, ...], Row] = {}
    for name in names:
        data = json.loads((HERE / "results" / name).read_text(encoding="utf-8"))
        for row in data["rows"]:
            if row["scope"] == scope:
                found[row["model"], row["batch"], row["dtype"], row["tokens"]] = row
    return sorted(found.values(), key=lambda row: (row["model"], row["batch"], row["tokens"]))


def curve(axes: Axes, rows: Sequence[Row], reader: str, x: str, value: Value, broken: str | None = None) -> None:
    """One reader's values over `row[x]`. broken: not measured, and labelled with these words."""
    points = [(row[x], value(row, result)) for row in rows for result in row["results"] if result["name"] == reader]
    known = [point for point in points if point[1] is not None]
    if not known:
        return
    label, colour, marker = LOOKS[reader]
    if broken:
        axes.plot(*zip(*known, strict=True), "--", color=colour, alpha=0.8, label=broken, linewidth=1.2)
    else:
        axes.plot(*zip(*known, strict=True), marker=marker, color=colour, label=label, markersize=5)


def median(row: Row, result: Result) -> float | None:
    return result["median"]


def floor_of(row: Row, result: Result) -> float | None:
    return result["floor"]


def mebibytes(row: Row, result: Result) -> float | None:
    return None if result["memory"] is None else result["memory"] / 2**20


def held(row: Row, result: Result) -> float | None:
    return result["holds"] / 2**20 or None


def rate(row: Row, result: Result) -> float | None:
    return result["rate"]


def long_figure(name: str) -> Figure:
    """Seconds and memory of the engine alone, to ten million tokens: a result of `length.py`."""
    data = json.loads((HERE / "results" / name).read_text(encoding="utf-8"))
    tokens = [row["tokens"] for row in data["rows"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
    _, colour, marker = LOOKS["rmt-engine"]
    left.plot(tokens, [row["seconds"] for row in data["rows"]], marker=marker, color=colour)
    left.set_yscale("log")
    right.plot(tokens, [row["rss_anon_late"] / 2**20 for row in data["rows"]], marker=marker, color=colour)
    right.set_ylim(0, 1.25 * max(row["rss_anon_late"] for row in data["rows"]) / 2**20)
    for axes, label in ((left, "seconds to read it all"), (right, "memory of the process, MiB")):
        plain(axes, "tokens read", label)
        axes.set_xscale("log")
    figure.tight_layout()
    return figure


def context_figure(names: Sequence[str]) -> Figure:
    """Seconds and memory over the length of one stream beside the baselines, log-log."""
    rows = [row for row in rows_of(names, "tokens") if row["batch"] == 1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    for reader in LOOKS:
        curve(left, rows, reader, "tokens", median)
        curve(right, rows, reader, "tokens", mebibytes)
    curve(left, rows, "full-attention", "tokens", floor_of, "its floor by the cost model")
    curve(right, rows, "full-attention", "tokens", held, "its KV cache by its shape")
    for axes, label in ((left, "seconds to read it all"), (right, "memory of the process, MiB")):
        plain(axes, "tokens read", label)
        axes.set_xscale("log")
        axes.set_yscale("log")
    legend(figure, left, right)
    return figure


def batch_figure(names: Sequence[str]) -> Figure:
    """Tokens per second by how many documents are read side by side."""
    rows = rows_of(names, "tokens")
    length = min((row["tokens"] for row in rows if row["batch"] > 1), default=None)
    rows = [row for row in rows if row["tokens"] == length]
    figure, axes = plt.subplots(figsize=(5.5, 3.4))
    for reader in LOOKS:
        curve(axes, rows, reader, "batch", rate)
    axes.set_xscale("log", base=2)
    batches = sorted({row["batch"] for row in rows})
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_ylim(bottom=0)
    plain(axes, f"documents side by side, {length:,} tokens each", "tokens/s")
    legend(figure, axes)
    return figure


def share_figure(files: dict[str, Sequence[str]]) -> Figure:
    """How near each reader's segment step comes to what the machine's own matrix product allows. files: by title."""
    rows = {title: segment_row(names) for title, names in files.items()}
    readers = [name for name in LOOKS if any(shares(row).get(name) for row in rows.values())]
    figure, axes = plt.subplots(figsize=(5.5, 3.2))
    wide = 0.8 / len(readers)
    for place, reader in enumerate(readers):
        label, colour, _ = LOOKS[reader]
        values = [100 * shares(row).get(reader, 0) for row in rows.values()]
        bars = axes.bar([i + place * wide for i in range(len(rows))], values, wide * 0.9, color=colour, label=label)
        axes.bar_label(bars, [f"{value:.0f}" for value in values], color=GREY, fontsize=8)
    axes.set_xticks([i + (len(readers) - 1) * wide / 2 for i in range(len(rows))], list(rows))
    axes.set_ylim(0, 100)
    plain(axes, "", "share of the floor in fp32, %")
    legend(figure, axes)
    return figure


def segment_row(names: Sequence[str]) -> Row:
    return next(row for row in rows_of(names, "segment") if row["batch"] == 1 and row["dtype"] == "float32")


def shares(row: Row) -> dict[str, float]:
    return {result["name"]: result["share"] for result in row["results"] if result["share"]}


def plain(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, color=GREY)
    axes.set_ylabel(y, color=GREY)
    axes.tick_params(colors=GREY, which="both")
    axes.grid(color=GREY, alpha=0.25)
    for side, spine in axes.spines.items():
        spine.set_color(GREY)
        spine.set_visible(side in ("left", "bottom"))


def legend(figure: Figure, *axes: Axes) -> None:
    """One for all axes, above them, in two lines."""
    entries = {label: handle for one in axes for handle, label in zip(*one.get_legend_handles_labels(), strict=True)}
    figure.tight_layout(rect=(0, 0, 1, 0.84))
    columns = -(-len(entries) // 2)
    figure.legend(
        entries.values(), entries.keys(), loc="upper center", ncols=columns, frameon=False, labelcolor=GREY, fontsize=8
    )


def main() -> None:
    plt.rcParams["svg.hashsalt"] = "rmt-engine"  # the same file from the same figures
    plt.rcParams["svg.fonttype"] = "none"  # text stays text
    target = HERE.parent / "docs" / "figures"
    target.mkdir(parents=True, exist_ok=True)
    embedded, gpt2 = ["bench_embedded_cpu.json"], ["bench_gpt2_cpu.json"]
    figures = {
        "length": long_figure("length_cpu.json"),
        "context": context_figure([*embedded, "bench_embedded_10M_cpu.json"]),
        "batch": batch_figure(["bench_embedded_batch_cpu.json"]),
        "floor": share_figure({"embedded checkpoint\n(128 wide)": embedded, "GPT-2 small\n(768 wide)": gpt2}),
    }
    for name, figure in figures.items():
        figure.savefig(target / f"{name}.svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
