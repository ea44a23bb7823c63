"""Draws the figures of the README from committed results.

python benchmarks/figures.py            # needs matplotlib (the `figures` extra)
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
GREY, BLUE, ORANGE = "#808080", "#0072b2", "#d55e00"  # told apart by colour-blind eyes, on white and on black


def length_figure(result: Path, target: Path) -> None:
    """Seconds and memory over the length of one stream, log-log."""
    data = json.loads(result.read_text(encoding="utf-8"))
    tokens = [row["tokens"] for row in data["rows"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3))
    left.plot(tokens, [row["seconds"] for row in data["rows"]], "o-", color=BLUE)
    left.set_ylabel("seconds")
    left.set_yscale("log")
    right.plot(tokens, [row["rss_anon_late"] / 2**20 for row in data["rows"]], "o-", color=ORANGE)
    right.set_ylabel("memory of the process, MiB")
    right.set_ylim(0, 1.25 * max(row["rss_anon_late"] for row in data["rows"]) / 2**20)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("tokens read")
        axes.tick_params(colors=GREY, which="both")
        axes.xaxis.label.set_color(GREY)
        axes.yaxis.label.set_color(GREY)
        axes.grid(color=GREY, alpha=0.25)
        for spine in axes.spines.values():
            spine.set_color(GREY)
    figure.tight_layout()
    figure.savefig(target, transparent=True, metadata={"Date": None})


def main() -> None:
    plt.rcParams["svg.hashsalt"] = "rmt-engine"  # the same file from the same figures
    target = HERE.parent / "docs" / "figures"
    target.mkdir(parents=True, exist_ok=True)
    length_figure(HERE / "results" / "length_cpu.json", target / "length.svg")


if __name__ == "__main__":
    main()
