"""Fixtures of the pytest-benchmark suite (`bench_ops.py`, `bench_segment.py`, `bench_stream.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from calibration import calibration_seconds
from pytest_benchmark.fixture import BenchmarkFixture

from rmt_engine import Engine
from rmt_engine.bench.setup import BACKBONES, named_config, random_weights

LAYERS = 2  # of the GPT-2 shape: enough for a layer in the middle and the last one


@pytest.fixture
def timed(benchmark: BenchmarkFixture) -> Iterator[BenchmarkFixture]:
    """`benchmark`, with the time of the calibration kernel just before and after: the better of the two."""
    before = calibration_seconds()
    yield benchmark
    benchmark.extra_info["calibration"] = min(before, calibration_seconds())


@pytest.fixture(scope="session")
def embedded() -> Engine:
    return Engine.from_pretrained(device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def gpt2() -> Engine:
    """Two layers of GPT-2 small with random weights, fp32, in segments of 512 rows."""
    whole = BACKBONES["gpt2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, "gpt2", {**whole, "n_layer": LAYERS})
        config = named_config("gpt2")
    return Engine.from_weights(config, random_weights(config), device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60,000 ids of the embedded checkpoint's vocabulary."""
    path = tmp_path_factory.mktemp("bench") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(1, 2048, 60_000, dtype=np.uint16))
    return path


def ids_of(engine: Engine, batch: int, tokens: int | None = None) -> torch.Tensor:
    """int64 [B, L], by default of a full segment."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(engine.vocab_size, (batch, tokens or engine.config.segment_size), generator=generator)
