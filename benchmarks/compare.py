"""Compares a run of the pytest-benchmark suite with the committed one. `make bench` calls it.

    python benchmarks/compare.py build/bench-*.json              exit code 1 where something has become slower
    python benchmarks/compare.py build/bench-*.json --accept     make this run the one to compare with

What is compared is the fastest round of each benchmark, of all reports, over the fastest calibration kernel that ran
between them (`calibration.py`): another machine changes both, and what else runs on it touches neither, if it lets one
round of each alone. Above `THRESHOLD` times the committed ratio a benchmark fails, and so does one that is gone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import about

BASELINE = Path(__file__).parent / "results" / "bench_cpu.json"
THRESHOLD = 1.5


@dataclass(frozen=True)
class Change:
    """One benchmark. then, now: ratios to the calibration kernel, None where there is none."""

    name: str
    then: float | None
    now: float | None

    @property
    def factor(self) -> float | None:
        return self.now / self.then if self.now is not None and self.then is not None else None

    def verdict(self, threshold: float = THRESHOLD) -> str:
        """ok, new, gone, slower; faster is worth a look, and a new baseline."""
        if self.factor is None:
            return "new" if self.then is None else "gone"
        return "slower" if self.factor > threshold else "faster" if self.factor < 1 / threshold else "ok"


def compare(then: Mapping[str, float], now: Mapping[str, float]) -> list[Change]:
    """Of every benchmark of either run, the worst first."""
    changes = [Change(name, then.get(name), now.get(name)) for name in {**then, **now}]
    return sorted(changes, key=lambda change: -(change.factor or float("inf")))


def ratios(reports: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """From what pytest-benchmark wrote, a report a pass: name -> fastest round over the fastest calibration kernel."""
    entries = [entry for report in reports for entry in report["benchmarks"]]
    calibration = min(entry["extra_info"]["calibration"] for entry in entries)
    best: dict[str, float] = {}
    for entry in entries:
        name, seconds = entry["fullname"].rpartition("/")[2], entry["stats"]["min"]
        best[name] = min(seconds, best.get(name, seconds))
    return {name: seconds / calibration for name, seconds in best.items()}


def failed(changes: list[Change], threshold: float, some: bool) -> list[Change]:
    """some: only a part of the suite was run, so what is missing is no fault."""
    bad = {"slower"} if some else {"slower", "gone"}
    return [change for change in changes if change.verdict(threshold) in bad]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+", help="written by pytest --benchmark-json, one a pass")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--threshold", type=float, default=THRESHOLD, metavar="X", help=f"(default: {THRESHOLD})")
    parser.add_argument("--accept", action="store_true", help="write the baseline in place of comparing with it")
    parser.add_argument("--some", action="store_true", help="only a part of the suite was run")
    options = parser.parse_args()
    now = ratios([json.loads(path.read_text(encoding="utf-8")) for path in options.reports])
    if options.accept:
        text = json.dumps({**about(), "unit": "calibration kernels", "ratios": now}, indent=1) + "\n"
        options.baseline.write_text(text, encoding="utf-8")
        print(f"{len(now)} benchmarks are now what {options.baseline} holds")
        return 0
    changes = compare(json.loads(options.baseline.read_text(encoding="utf-8"))["ratios"], now)
    for change in changes:
        print(line(change, options.threshold))
    bad = failed(changes, options.threshold, options.some)
    print(
        f"{len(bad)} of {len(changes)} benchmarks fail" if bad else f"{len(changes)} benchmarks: none has become slower"
    )
    return 1 if bad else 0


def line(change: Change, threshold: float) -> str:
    then, now = (f"{value:10.4f}" if value is not None else f"{'':>10}" for value in (change.then, change.now))
    factor = f"{change.factor:6.2f}" if change.factor is not None else f"{'':>6}"
    return f"{change.verdict(threshold):<7}{factor} {then} {now}  {change.name}"


if __name__ == "__main__":
    raise SystemExit(main())
