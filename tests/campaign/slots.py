"""A document's bits in random company: the same, whatever the other slots hold and however many are filled."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from checkpoints_for_tests import byte_tokenizer, tiny_decoder, tiny_encoder
from torch import Tensor

from campaign.watched import Report
from rmt_engine.engine import Engine
from rmt_engine.slots import DocumentResult, SegmentBatch
from rmt_engine.tokens import Tokenizer

SEGMENT = 12
QUESTIONS = ("a?", "where is it?")
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"score": True},
    {"ask": QUESTIONS, "max_new_tokens": 4},
    {"ask": QUESTIONS, "max_new_tokens": 5, "temperature": 2.0, "top_k": 9, "seed": 3},
    {"ask": QUESTIONS[:1], "max_new_tokens": 15, "roll": True},
    {"batch_invariant": True},
)
Wrap = Callable[[Any], Any]


@dataclasses.dataclass
class Probe:
    """Documents that are read again and again, and the bits that they have by themselves."""

    engine: Engine
    slots: int
    options: dict[str, Any]
    documents: list[np.ndarray]
    bits: list[Any] | None = None

    def differs(self, rng: random.Random) -> bool:
        """Reads the documents among others; whether one has other bits than without them."""
        if self.bits is None:
            self.bits = self._read(self.documents, range(len(self.documents)), "input")
        company = [ids_of(rng, self.engine) for _ in range(rng.randrange(2 * self.slots))]
        places = sorted(rng.sample(range(len(company) + len(self.documents)), len(self.documents)))
        for place, ids in zip(places, self.documents, strict=True):
            company.insert(place, ids)
        return self._read(company, places, rng.choice(("input", "completed"))) != self.bits

    def _read(self, documents: Sequence[np.ndarray], places: Sequence[int], order: str) -> list[Any]:
        results = {r.index: r for r in self.engine.run_many(documents, slots=self.slots, order=order, **self.options)}
        return [bits_of(results[place]) for place in places]


def run(count: int, seed: int, wrap: Wrap = lambda executor: executor, *, fixed: bool = True) -> Report:
    """`count` random companies. wrap: an executor in place of each engine's own; fixed=False switches the rule off:
    only the rows that hold something are run. Needs no process of its own: what may go wrong is a number."""
    report, rng = Report("slots"), random.Random(f"slots {seed}")
    probes = list(_probes(rng, wrap))
    for number in range(count):
        probe = rng.choice(probes)
        report.attempts += 1
        if probe.differs(rng) if fixed else _with_filled_rows_only(probe, rng):
            report.failures.append(
                f"case {number}: {probe.engine.config.model_type}, slots={probe.slots}, {probe.options}"
            )
        else:
            report.outcomes[f"{probe.engine.config.model_type}, the same bits"] += 1
    return report


def ids_of(rng: random.Random, engine: Engine) -> np.ndarray:
    length = rng.choice((rng.randrange(1, SEGMENT), SEGMENT, 3 * SEGMENT, rng.randrange(1, 6 * SEGMENT)))
    return np.random.default_rng(rng.randrange(2**32)).integers(5, engine.vocab_size, length)  # none that are dropped


def bits_of(result: DocumentResult) -> Any:
    """Everything that is computed for a document."""
    assert result.error is None and result.stream is not None, result.error
    place = result.stream.place
    scores = None if place.scores is None else place.scores.sums()
    return place.memory.numpy().tobytes(), place.rest.tolist(), scores, result.answers, result.labels


def _probes(rng: random.Random, wrap: Wrap) -> Iterator[Probe]:
    for engine in _engines(wrap):
        for slots in (2, 3, 8, 11):
            for options in OPTIONS if engine.config.family == "decoder" else OPTIONS[:1]:
                yield Probe(engine, slots, options, [ids_of(rng, engine) for _ in range(2)])


def _engines(wrap: Wrap) -> Iterator[Engine]:
    tokenizer = Tokenizer(byte_tokenizer().to_str())
    for tiny, alignment in (
        (tiny_decoder("gpt2", layers=2), "left"),
        (tiny_decoder("llama", layers=2), "right"),
        (tiny_encoder("bert", layers=2), "center"),
    ):
        config = tiny.rmt_config(SEGMENT, alignment)
        decodes = config.family == "decoder"
        engine = Engine.from_weights(config, tiny.weights(), tokenizer if decodes else None, device="cpu")
        engine.executor = wrap(engine.executor)
        yield engine


def _with_filled_rows_only(probe: Probe, rng: random.Random) -> bool:
    """The rule switched off: batches have as many rows as are filled."""
    real = SegmentBatch._run

    def run_filled(self: SegmentBatch, places: Any, segments: Any) -> tuple[Tensor, ...]:
        size, self.size = self.size, len(places)
        try:
            return real(self, places, segments)
        finally:
            self.size = size

    SegmentBatch._run = run_filled  # type: ignore[method-assign]
    try:
        return probe.differs(rng)
    finally:
        SegmentBatch._run = real  # type: ignore[method-assign]


class Wrapped:
    """An executor whose folds go wrong in a way that a test wants to be found."""

    def __init__(self, executor: Any) -> None:
        self.executor = executor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.executor, name)

    def spoilt(self, memory: Tensor) -> Tensor:
        raise NotImplementedError

    def fold(self, ids: Tensor, memory: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.spoilt(self.executor.fold(ids, memory, lengths))


class RowsMatter(Wrapped):
    """Bits that depend on how many rows a call has, as those of a bf16 GEMM with AMX do."""

    def spoilt(self, memory: Tensor) -> Tensor:
        return torch.nextafter(memory, torch.full_like(memory, 9.0)) if len(memory) % 2 else memory


class NeighboursMatter(Wrapped):
    """A slot that looks at another."""

    def spoilt(self, memory: Tensor) -> Tensor:
        return memory + 1e-7 * memory.mean(0)
