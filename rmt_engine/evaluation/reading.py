"""Texts read side by side from their start, and asked on the way from forks of their memory states."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rmt_engine.engine import Engine
from rmt_engine.errors import NumericalError
from rmt_engine.evaluation.answers import Answer, question_ids, rows_of, tensor
from rmt_engine.evaluation.store import Key
from rmt_engine.evaluation.texts import Trial
from rmt_engine.layouts import Cut
from rmt_engine.slot_count import batch_size

OnStep = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class Reading:
    """One trial's text, read once and asked after each of `asked_at` tokens (ascending).

    key: task, facts, length that the text was made for, its number.
    tail: tokens of the question where it is a part of the text (an encoder's), else 0.
    """

    key: Key
    trial: Trial
    asked_at: tuple[int, ...]
    cut: Cut
    tail: int

    @property
    def length(self) -> int:
        return self.asked_at[-1]


def readings_of(engine: Engine, key: Key, trial: Trial, asked_at: Iterable[int]) -> list[Reading]:
    """One reading for each way in which the lengths cut the text into segments: one in all where they align left."""
    config = engine.config
    tail = 0 if config.family == "decoder" else len(question_ids(engine, trial.problem))
    cuts: dict[Cut, list[int]] = {}
    for length in sorted(asked_at):
        cuts.setdefault(Cut.of(length + tail, config.segment_size, config.alignment), []).append(length)
    return [Reading(key, trial, tuple(lengths), cut, tail) for cut, lengths in cuts.items()]


def batches(readings: Sequence[Reading], slots: int) -> list[list[Reading]]:
    """Readings that go segment by segment together, at most `slots` at a time; the short ones first."""
    alike: dict[tuple[int, int, int, int], list[Reading]] = {}
    for reading in readings:
        shape = (reading.length, reading.cut.first, reading.cut.size, reading.tail)
        alike.setdefault(shape, []).append(reading)
    return [group[i : i + slots] for _, group in sorted(alike.items()) for i in range(0, len(group), slots)]


@dataclass(frozen=True, eq=False)
class Place:
    """Where a batch stands: its memory states [B, M, E] after `position` tokens of each text."""

    position: int
    memory: Tensor


def signature(batch: Sequence[Reading]) -> str:
    """Which texts a batch reads, and how they are cut: what a place belongs to."""
    cut = batch[0].cut
    return json.dumps([[reading.key for reading in batch], cut.first, cut.size, batch[0].tail])


def read_and_ask(
    engine: Engine,
    answer: Answer,
    batch: Sequence[Reading],
    on_step: OnStep = lambda tokens: None,
    start: Place | None = None,
    on_place: Callable[[Place], None] = lambda place: None,
) -> Iterator[list[tuple[Reading, int, str]]]:
    """Reads a batch of `batches`; yields (reading, length, answer) of all that are asked at a length, ascending.

    on_step is told the tokens read by each step, on_place where the batch stands after it. start: such a place to go
    on from; it must not lie behind the first length.
    """
    place = Place(0, engine.initial_memory(len(batch))) if start is None else start
    on_step(place.position * len(batch))
    for length in sorted({length for reading in batch for length in reading.asked_at}):
        border = last_border(batch[0].cut, length, batch[0].tail)
        assert place.position <= border
        while place.position < border:
            stop = place.position + next_size(batch[0].cut, place.position)
            ids = tensor(engine, [reading.trial.text.read(place.position, stop) for reading in batch])
            place = Place(stop, fold(engine, ids, place.memory))
            on_place(place)
            on_step(ids.numel())
        members = [i for i, reading in enumerate(batch) if length in reading.asked_at]
        asked = [batch[i] for i in members]
        answers = _ask(engine, answer, asked, rows_of(place.memory, members), place.position, length)
        yield [(reading, length, text) for reading, text in zip(asked, answers, strict=True)]


def fold(engine: Engine, ids: Tensor, memory: Tensor) -> Tensor:
    """The memory states after one segment of each text, in batches whose rows stay in a processor's caches."""
    size = batch_size(engine, len(ids))
    if size >= len(ids):
        return engine.executor.fold(ids, memory)
    return torch.cat([engine.executor.fold(*part) for part in zip(ids.split(size), memory.split(size), strict=True)])


def next_size(cut: Cut, position: int) -> int:
    """Tokens of the segment that begins at a border."""
    return cut.size if position else cut.first


def last_border(cut: Cut, length: int, tail: int) -> int:
    """Where the last segment of `length + tail` tokens begins, or the last border before it that is within the text."""
    if length + tail <= cut.first:
        return 0
    border = cut.first + (length + tail - cut.first - 1) // cut.size * cut.size
    while border > length:
        border = border - cut.size if border > cut.first else 0
    return border


def _ask(
    engine: Engine, answer: Answer, readings: Sequence[Reading], memory: Tensor, position: int, length: int
) -> list[str]:
    """Answers with the rest [position, length) of the texts not yet folded; `memory` is not changed."""
    if not bool(memory.isfinite().all()):
        raise NumericalError(f"the memory state is not finite after {position:,} tokens; try --dtype float32")
    problems = [reading.trial.problem for reading in readings]
    rests = [reading.trial.text.read(position, length) for reading in readings]
    if readings[0].tail:
        rests = [np.concatenate([r, question_ids(engine, p)]) for r, p in zip(rests, problems, strict=True)]
        while len(rests[0]) > (size := next_size(readings[0].cut, position)):  # the question crosses a border
            memory = fold(engine, tensor(engine, [rest[:size] for rest in rests]), memory)
            rests, position = [rest[size:] for rest in rests], position + size
    return answer(np.stack(rests), problems, memory)
