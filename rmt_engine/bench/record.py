"""Where a measurement comes from: command, commit, machine, clocks, versions."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]  # of a checkout
PACKAGES = ("rmt-engine", "torch", "transformers", "tokenizers", "numpy", "triton")
GPU_STATE = ("name", "driver_version", "clocks.sm", "clocks.mem", "power.limit", "temperature.gpu")


def about() -> dict[str, Any]:
    """Where and from what a result comes. Call it first: a run may be long, and others may commit meanwhile."""
    libc = " ".join(platform.libc_ver())
    return {
        "command": command(),
        "commit": _commit(),
        "machine": f"{_cpu()}, {os.cpu_count()} cores, {libc}",
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def state(device: torch.device) -> dict[str, Any]:
    """What changes while a machine works: clocks in MHz, load over a minute; a GPU's clocks, power, temperature."""
    found: dict[str, Any] = {"cpu_mhz": _cpu_clocks(), "load": os.getloadavg()[0]}
    if device.type == "cuda":
        found["gpu"] = _gpu_state(device.index or 0)
    return found


def command() -> str:
    """The command line of this process, without the place where its result goes."""
    script = Path(sys.argv[0])
    if script.name == "rmt-engine":
        words = ["rmt-engine"]
    elif script.name == "__main__.py":
        words = ["python", "-m", script.parent.name]
    else:
        words = ["python", os.path.relpath(script, ROOT)]
    return re.sub(r" --out(put)?[ =]\S+", "", " ".join([*words, *sys.argv[1:]]))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """HEAD of the checkout, marked where files that it tracks are changed; None outside of one."""
    if not (ROOT / ".git").exists():
        return None
    words = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def _cpu() -> str:
    found = re.search(r"model name\s*: (.*)", _cpuinfo())
    return found.group(1) if found else platform.processor() or platform.machine()


def _cpu_clocks() -> list[float]:
    return [float(value) for value in re.findall(r"cpu MHz\s*: ([\d.]+)", _cpuinfo())]


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""


def _gpu_state(index: int) -> dict[str, str]:
    """As nvidia-smi tells it; empty where there is none."""
    words = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(GPU_STATE)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError:
        return {}
    return dict(zip(GPU_STATE, (part.strip() for part in done.stdout.split(",")), strict=False))
