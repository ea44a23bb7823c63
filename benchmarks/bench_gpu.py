"""Everything that is measured on a GPU, in under nine minutes: `make bench-gpu`.

    python benchmarks/bench_gpu.py --output benchmarks/results/gpu_h200.json
    python benchmarks/bench_gpu.py --dry-run --output /tmp/dry.json      the same structure on a CPU, tiny; no figures

Each part runs in a process of its own with a share of the time, and what it has measured when its time ends is kept:
the JSON file, and a Markdown table beside it, are written anew after each part. Nothing is timed before its result was
checked; what fails its check is there as failed, without a speed. gpu_parts.py has the parts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rmt_engine.bench.record import about, state
from rmt_engine.memory import write_atomically

HERE = Path(__file__).resolve().parent
SECONDS = 530  # of all parts together
KILL_AFTER = 10  # seconds that a part has to end by itself
CELL = 200  # characters of a text in the table


@dataclass(frozen=True)
class Part:
    """seconds: that it may take where the parts before it have left them."""

    name: str
    seconds: int


PARTS = (
    Part("tests", 130),
    Part("steps", 190),
    Part("streams", 80),
    Part("micro", 50),
    Part("sanitizer", 80),
)


def main() -> int:
    options = arguments()
    if not options.dry_run and not torch.cuda.is_available():
        print("this torch sees no CUDA device; --dry-run goes through the parts on a CPU", file=sys.stderr)
        return 1
    device = torch.device("cpu" if options.dry_run else "cuda")
    report: dict[str, Any] = {"what": "GPU measurements", "dry_run": options.dry_run, **about()}
    report |= {"device": state(device), "parts": {}}
    start = time.monotonic()
    for part in PARTS:
        if options.parts and part.name not in options.parts:
            continue
        left = options.seconds - (time.monotonic() - start)
        seconds = min(part.seconds, left)
        report["parts"][part.name] = run_part(part, seconds, options.dry_run) if seconds > 5 else {"status": "no time"}
        report["seconds"] = round(time.monotonic() - start, 1)
        report["device_at_end"] = state(device)
        write(report, options.output)
        print(f"{part.name}: {report['parts'][part.name]['status']}", file=sys.stderr)
    statuses = [part["status"] for part in report["parts"].values()]
    return 0 if all(status == "done" for status in statuses) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the JSON file; the table goes beside it as .md")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of all parts together (%(default)s)")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="only these")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny shapes: no figure of it counts")
    return parser.parse_args()


def run_part(part: Part, seconds: float, dry_run: bool) -> dict[str, Any]:
    """Rows of a part, as far as it came. status: done, failed, or time (the part's time ended)."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        line = [sys.executable, str(HERE / "gpu_parts.py"), part.name, "--rows", str(rows), "--seconds", str(seconds)]
        process = subprocess.Popen(line + ["--dry-run"] * dry_run, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        words, ended = b"", True
        try:
            _, words = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            ended = False
            process.terminate()
            try:
                process.communicate(timeout=KILL_AFTER)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
        found = read_rows(rows)
    failed = process.returncode != 0 or any("failed" in row for row in found)
    result: dict[str, Any] = {"status": "time" if not ended else "failed" if failed else "done", "rows": found}
    if ended and process.returncode != 0:
        result["error"] = words.decode(errors="replace")[-2000:]
    return result


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Whole lines alone: the last one may have been cut off."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def write(report: dict[str, Any], path: Path) -> None:
    """The JSON file and the table beside it, each whole or not at all."""
    write_atomically(path, (json.dumps(report, indent=1) + "\n").encode())
    write_atomically(path.with_suffix(".md"), markdown(report).encode())


def markdown(report: dict[str, Any]) -> str:
    lines = [f"# {report['what']}", ""]
    if report["dry_run"]:
        lines += ["**A dry run on a CPU with tiny shapes: nothing here says anything about speed.**", ""]
    lines += [f"`{report['command']}`, commit {report['commit']}, {report.get('seconds', 0)} s in all", ""]
    gpu = report["device"].get("gpu") or {"machine": report["machine"]}
    versions = {**gpu, **report["versions"]}
    lines += [", ".join(f"{name} {value}" for name, value in versions.items()), ""]
    for name, part in report["parts"].items():
        lines += [f"## {name}: {part['status']}", ""]
        if "error" in part:
            lines += ["```", part["error"].strip(), "```", ""]
        lines += table(part.get("rows", []), figures=not report["dry_run"])
    return "\n".join(lines).rstrip() + "\n"


def table(rows: list[dict[str, Any]], figures: bool) -> list[str]:
    """Rows with the same columns stand in one table. Without figures, fractions are left out."""
    lines: list[str] = []
    columns: tuple[str, ...] | None = None
    for row in rows:
        shown = {key: value for key, value in row.items() if not isinstance(value, list | dict)}
        if tuple(shown) != columns:
            columns = tuple(shown)
            lines += ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        cells = ("–" if isinstance(value, float) and not figures else cell(value) for value in shown.values())
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines[1:], ""] if lines else []


def cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        text = str(value).replace("|", "/").replace("\n", " ")
        return text if len(text) <= CELL else f"…{text[-CELL:]}"  # the JSON file has all of it
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main())
