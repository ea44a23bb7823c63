"""The Triton kernels without a GPU: triton_ops.py, interpreted.

In a process of its own: an interpreted kernel cannot be compiled, and test_triton_compile.py compiles them.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parent / "triton_ops.py"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed: it is for Linux alone")
def test_every_kernel_interpreted() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(FILE)],
        # numpy's AVX2 products give a row other bits at another place of the same tile, those for Nehalem do not
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "Nehalem"},
        cwd=FILE.parent.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
