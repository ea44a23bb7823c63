"""Streams of the embedded checkpoint on a CPU, fp32: from tokens, from text, side by side; states and answers; and what
happens around the model: tokens, segments."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from rmt_engine import Engine, Summary
from rmt_engine._C import SegmentStream, TokenSource
from rmt_engine.evaluation.noise import noise_text
from rmt_engine.stream import Stream

TOKENS = 60_000  # of the token file
CHARACTERS = 100_000
SEGMENTS = 50


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(noise_text()[:CHARACTERS], encoding="utf-8")
    return path


@pytest.fixture
def stream(embedded: Engine) -> Stream:
    """With half a segment at its rest."""
    made = embedded.stream()
    made.feed(np.arange(1, 2 * embedded.config.segment_size + embedded.config.segment_size // 2))
    return made


def read(engine: Engine, path: Path, **options: object) -> Summary:
    summary = deque(engine.run(path, **options), maxlen=1).pop()
    assert isinstance(summary, Summary)
    return summary


def test_from_tokens(timed: BenchmarkFixture, embedded: Engine, token_file: Path) -> None:
    summary = timed.pedantic(
        read, (embedded, token_file), kwargs={"max_n_segments": SEGMENTS}, rounds=4, warmup_rounds=1
    )
    assert summary.tokens == SEGMENTS * embedded.config.segment_size


def test_from_text(timed: BenchmarkFixture, embedded: Engine, text_file: Path) -> None:
    summary = timed.pedantic(
        read, (embedded, text_file), kwargs={"max_n_segments": SEGMENTS}, rounds=4, warmup_rounds=1
    )
    assert summary.tokens == SEGMENTS * embedded.config.segment_size


@pytest.mark.parametrize("slots", [1, 8])
def test_side_by_side(timed: BenchmarkFixture, embedded: Engine, token_file: Path, slots: int) -> None:
    """Eight documents of six segments."""
    ids = np.load(token_file).astype(np.int64)
    documents = [ids[i * 1200 : i * 1200 + 6 * embedded.config.segment_size] for i in range(8)]

    def run() -> int:
        return sum(result.tokens for result in embedded.run_many(documents, slots=slots))

    assert timed.pedantic(run, rounds=4, warmup_rounds=1) == sum(map(len, documents))


def test_tokenize(timed: BenchmarkFixture, embedded: Engine, text_file: Path) -> None:
    text = text_file.read_text(encoding="utf-8")
    tokenizer = embedded.tokenizer

    def run() -> int:
        incremental = tokenizer.incremental()
        return sum(len(incremental.feed(text[i : i + 8192])) for i in range(0, len(text), 8192)) + len(
            incremental.flush()
        )

    assert timed(run) == len(tokenizer.encode(text))


def test_segments_alone(timed: BenchmarkFixture, embedded: Engine, token_file: Path) -> None:
    """The C++ stream cuts a token file; nothing is computed."""

    def run() -> int:
        source = TokenSource.open(token_file, "auto", ())
        size = embedded.config.segment_size
        with SegmentStream(source, size, size, 4, embedded.vocab_size) as segments:
            return sum(len(segment.ids) for segment in segments)

    assert timed(run) == TOKENS


def test_save(timed: BenchmarkFixture, stream: Stream, tmp_path: Path) -> None:
    stream.save(tmp_path / "s.state")  # the weights' fingerprint, once
    timed(stream.save, tmp_path / "s.state")
    assert np.array_equal(stream.engine.resume(tmp_path / "s.state").rest, stream.rest)


def test_resume(timed: BenchmarkFixture, stream: Stream, tmp_path: Path) -> None:
    stream.save(tmp_path / "s.state")
    assert timed(stream.engine.resume, tmp_path / "s.state").position == stream.position


def test_fork(timed: BenchmarkFixture, stream: Stream) -> None:
    assert timed(stream.fork).position == stream.position


def test_ask(timed: BenchmarkFixture, stream: Stream) -> None:
    """The first token of an answer."""
    assert isinstance(timed(stream.ask, "Where is Mary?", 1), str)
