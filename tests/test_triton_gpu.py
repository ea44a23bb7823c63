"""The Triton kernels on a card: triton_ops.py, compiled. `make test-gpu` runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parent / "triton_ops.py"


@pytest.mark.gpu
def test_every_kernel_on_a_card() -> None:
    if not torch.cuda.is_available():
        pytest.skip("this torch sees no CUDA device")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(FILE)],
        env=environment,
        cwd=FILE.parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
