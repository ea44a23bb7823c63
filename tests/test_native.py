"""Builds and runs the C++ tests, which know no Python."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_native():
    result = subprocess.run(["make", "-C", CSRC, "test"], capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " tests, 0 failed" in result.stdout
