"""What the benchmarks share: the record of machine, versions and command, and numbers as 512, 16k, 2M or 1G."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rmt_engine.cli import counts

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("rmt-engine", "torch", "transformers", "tokenizers", "numpy")


def count(text: str) -> int:
    """A whole number above zero, for argparse; 16k is 16,000, 2M is 2,000,000, 1G is 1,000,000,000."""
    return counts(text)[0]


def about() -> dict[str, Any]:
    """Where and from what a result comes. Call it first: a run may be long, and others may commit meanwhile."""
    libc = " ".join(platform.libc_ver())
    return {
        "command": command(),
        "commit": _commit(),
        "machine": f"{_cpu()}, {os.cpu_count()} cores, {libc}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def command() -> str:
    """The command line of this process, without the place where its result goes."""
    line = " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
    return re.sub(r" --out(put)?[ =]\S+", "", line)


def _commit() -> str:
    """HEAD, marked where files that it tracks are changed."""
    done = subprocess.run(
        ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"model name\s*: (.*)", text)
    return found.group(1) if found else platform.processor() or platform.machine()
