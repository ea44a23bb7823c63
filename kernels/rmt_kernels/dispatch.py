"""Which backend serves an op. Chosen once, when an engine is built; a forced one that cannot run says why."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch

BACKENDS = ("auto", "ref", "cpu", "triton", "cuda")
SERVED = ("ref", "cpu")  # the backends whose ops are written


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
        return "cpu" if kind == "cpu" else "ref"
    if backend not in SERVED:
        raise RuntimeError(f"backend {backend!r} cannot run: no op is written for it yet; use one of auto, ref, cpu")
    if backend == "cpu" and kind != "cpu":
        raise RuntimeError(f"backend 'cpu' cannot run on device {kind!r}; use backend='auto' or device='cpu'")
    return backend


def implementation(op: str, backend: str) -> ModuleType:
    """The module that implements `op` on `backend`."""
    return importlib.import_module(f"rmt_kernels.{op}.{backend}")
