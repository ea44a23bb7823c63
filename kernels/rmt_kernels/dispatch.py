"""Which backend serves an op. Chosen once, when an engine is built; a forced one that cannot run says why."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import torch

BACKENDS = ("auto", "ref", "cpu", "triton", "cuda")
SERVED = ("ref", "cpu", "triton")  # the backends whose ops are written
OLDEST_CAPABILITY = (8, 0)  # of a CUDA device that the Triton kernels are compiled for


def choose(backend: str = "auto", device: str | torch.device = "cpu") -> str:
    """The backend's name for `device`. `RMT_BACKEND` stands in for "auto".

    Raises ValueError for an unknown name, RuntimeError when the one asked for cannot run here.
    """
    said_by = "backend"
    if backend == "auto" and os.environ.get("RMT_BACKEND"):
        said_by, backend = "RMT_BACKEND", os.environ["RMT_BACKEND"]
    if backend not in BACKENDS:
        raise ValueError(f"{said_by} must be one of {', '.join(BACKENDS)}; got {backend!r}")
    kind = torch.device(device).type
    if backend == "auto":
        return "cpu" if kind == "cpu" else "ref" if _why_not_triton(device) else "triton"
    if backend not in SERVED:
        raise RuntimeError(
            f"backend {backend!r} cannot run: no CUDA C++ kernel ships, as none has been shown on a card to be faster "
            f"than the Triton one; use one of auto, {', '.join(SERVED)}"
        )
    if backend == "triton" and (reason := _why_not_triton(device)):
        raise RuntimeError(f"backend 'triton' cannot run: {reason}")
    if backend == "cpu" and kind != "cpu":
        raise RuntimeError(f"backend 'cpu' cannot run on device {kind!r}; use backend='auto' or device='cpu'")
    return backend


def _why_not_triton(device: str | torch.device) -> str | None:
    """What keeps the Triton kernels from running on `device`, and what to do; None when nothing does."""
    kind = torch.device(device).type
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'rmt-engine[gpu]', or use backend='auto'"
    if kind == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return (
            "it needs a CUDA device (on a CPU, TRITON_INTERPRET=1 interprets the kernels, slowly); use backend='auto'"
        )
    if kind != "cuda":
        return f"it needs a CUDA device, not {kind!r}; use backend='auto'"
    if torch.cuda.is_available() and (found := torch.cuda.get_device_capability(device)) < OLDEST_CAPABILITY:
        return "it needs compute capability 8.0 or newer, this device has {}.{}; use backend='auto'".format(*found)
    return None


def implementation(op: str, backend: str) -> ModuleType:
    """The module that implements `op` on `backend`."""
    return importlib.import_module(f"rmt_kernels.{op}.{backend}")
