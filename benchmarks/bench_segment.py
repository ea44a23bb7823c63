"""A segment step on a CPU, fp32: what a stream, a score and an answer call. The embedded checkpoint, and two layers of
GPT-2 small in segments of 512 rows."""

from __future__ import annotations

import pytest
from conftest import ids_of
from pytest_benchmark.fixture import BenchmarkFixture

from rmt_engine import Engine


@pytest.fixture(params=["embedded", "gpt2"])
def engine(request: pytest.FixtureRequest) -> Engine:
    found: Engine = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("batch", [1, 8])
def test_fold(timed: BenchmarkFixture, embedded: Engine, batch: int) -> None:
    memory = embedded.initial_memory(batch)
    assert timed(embedded.executor.fold, ids_of(embedded, batch), memory).shape == memory.shape


def test_fold_of_gpt2(timed: BenchmarkFixture, gpt2: Engine) -> None:
    memory = gpt2.initial_memory()
    assert timed(gpt2.executor.fold, ids_of(gpt2, 1), memory).shape == memory.shape


def test_fold_of_a_short_segment(timed: BenchmarkFixture, engine: Engine) -> None:
    memory = engine.initial_memory()
    assert timed(engine.executor.fold, ids_of(engine, 1, 20), memory).shape == memory.shape


def test_fold_with_scores(timed: BenchmarkFixture, embedded: Engine) -> None:
    ids = ids_of(embedded, 1)
    assert timed(embedded.executor.fold_with_scores, ids, embedded.initial_memory(), None)[1].shape == ids.shape


def test_prefill(timed: BenchmarkFixture, engine: Engine) -> None:
    logits, _ = timed(engine.executor.prefill, ids_of(engine, 1, 100), engine.initial_memory(), 1)
    assert logits.shape == (1, engine.vocab_size)


def test_decode(timed: BenchmarkFixture, engine: Engine) -> None:
    """One token behind 32 rows of text; the caches are those of a fresh prefill each time."""
    ids, memory = ids_of(engine, 1, 32), engine.initial_memory()

    def fresh() -> tuple[tuple[object, ...], dict[str, object]]:
        return (ids[:, :1], engine.executor.prefill(ids, memory, 1)[1]), {}

    logits = timed.pedantic(engine.executor.decode, setup=fresh, rounds=50)
    assert logits.shape == (1, engine.vocab_size)
