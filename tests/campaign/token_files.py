"""Token files of arbitrary bytes, in C++ under sanitizers."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from campaign.watched import Report

CSRC = Path(__file__).parents[2] / "csrc"


def run(count: int, seed: int, sanitize: str = "address,undefined") -> Report:
    report = Report("token_files")
    command = ["make", "-s", "-C", str(CSRC), "fuzz", f"COUNT={count}", f"SEED={seed}", f"SANITIZE={sanitize}"]
    result = subprocess.run(command, capture_output=True, text=True)
    done = re.search(r"(\d+) token files: (\d+) read, (\d+) refused", result.stdout)
    if result.returncode or not done:
        report.failures.append((result.stdout + result.stderr)[-4000:])
        return report
    report.attempts = int(done[1])
    report.outcomes.update(read=int(done[2]), refused=int(done[3]))
    report.notes.append(f"under {sanitize}" if sanitize else "without sanitizers")
    return report
