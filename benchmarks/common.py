"""What the benchmarks share: the record of machine, versions and command, and numbers as 512, 16k, 2M or 1G."""

from __future__ import annotations

from rmt_engine.bench.record import about
from rmt_engine.cli import counts

__all__ = ["about", "count"]


def count(text: str) -> int:
    """A whole number above zero, for argparse; 16k is 16,000, 2M is 2,000,000, 1G is 1,000,000,000."""
    return counts(text)[0]
