"""benchmarks/compute.py on tiny lengths: what is measured, what the cost model says, and which is which."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import compute

from rmt_engine import Engine, checkpoint
from rmt_engine.engine import EMBEDDED


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained(EMBEDDED, device="cpu")


@pytest.fixture(scope="module")
def weights() -> compute.Weights:
    return dict(checkpoint.load(EMBEDDED)[1])


def test_both_sides_are_checked_before_they_are_timed(engine: Engine, weights: compute.Weights) -> None:
    compute.check(engine, weights)
    name = next(name for name in weights if ".0." in name and weights[name].ndim == 2)
    wrong = {**weights, name: weights[name] * 1.1}
    with pytest.raises(SystemExit, match="nothing is timed"):
        compute.check(engine, wrong)


def test_lengths_beyond_the_limit_are_marked(engine: Engine, weights: compute.Weights) -> None:
    rows = compute.measure(engine, weights, [2, 4, 8], limit=0.0, repeats=1)
    assert [row.by for row in rows["recurrent"]] == ["measured"] * 3
    assert [row.by for row in rows["full_attention"]] == ["measured", "model", "model"]
    first, _, third = rows["full_attention"]
    assert third.seconds / first.seconds == pytest.approx(third.flops / first.flops)
    assert third.flops > 4 * first.flops and third.memory == 4 * first.memory
    shortest, _, longest = rows["recurrent"]
    assert longest.flops == 4 * shortest.flops and longest.memory == shortest.memory
    everything = compute.measure(engine, weights, [2, 4], limit=60.0, repeats=1)
    assert [row.by for row in everything["full_attention"]] == ["measured", "measured"]


def test_spread() -> None:
    assert compute.spread([2.0, 2.1, 2.0]) == pytest.approx(0.05)
