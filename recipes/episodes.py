"""Batches for the retrieval recipe: what each row reads, segment by segment, and what it is asked on the way."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from facts_data import Fact, FactWriter, NoiseBank, distractor_sentences
from torch import Tensor

from rmt_engine.evaluation.facts import NAMES

UNKNOWN = -1


@dataclass
class Row:
    """The text of one row and where each of its facts is complete."""

    ids: np.ndarray
    rooms: np.ndarray  # int [names]: what was known before this text
    facts: list[tuple[int, int, int, int]] = field(default_factory=list)  # start, end, name, room

    def known(self, position: int) -> np.ndarray:
        """What is known once `position` tokens are read."""
        rooms = self.rooms.copy()
        for _, end, name, room in sorted(self.facts):
            if end <= position:
                rooms[name] = room
        return rooms

    def cut_at(self, position: int) -> bool:
        """Whether a fact is only partly read at `position`."""
        return any(start < position < end for start, end, _, _ in self.facts)


@dataclass
class Asks:
    """One question per row at one place: the ids to append to the memory, where to read, what is right."""

    ids: Tensor  # int [B, T]
    rows: Tensor  # int [B, 2]: where the room, then the end of the answer, are predicted
    targets: Tensor  # int [B, 2]
    weight: Tensor  # float [B]: 0 where nothing can be asked


class EpisodeMaker:
    def __init__(self, writer: FactWriter, bank: NoiseBank, segment_size: int, distractors: float, seed: int) -> None:
        self.writer = writer
        self.bank = bank
        self.segment_size = segment_size
        self.distracted = distractors
        self.eos = bank.eos
        bank.never = np.array([bank.eos, *writer.rooms])
        self.rng = np.random.default_rng(seed)
        self.distractors = [writer.sentence(s) for s in distractor_sentences(np.random.default_rng(seed), 400)]
        self.longest_rest = segment_size - max(len(q) for q in writer.questions)

    def segment_lengths(self, count: int, short: float = 0.15) -> list[int]:
        """Lengths of the segments to fold; one of them is short now and then."""
        lengths = [self.segment_size] * count
        if count and self.rng.random() < short:
            lengths[int(self.rng.integers(count))] = int(self.rng.integers(1, self.segment_size))
        return lengths

    def row(self, length: int, rooms: np.ndarray, facts: list[tuple[int, int | None]]) -> Row:
        """Noise of `length` tokens with facts (wanted position, name or None) in it, sometimes with a distractor."""
        row = Row(self.bank.sample(self.rng, length), rooms)
        if self.rng.random() < self.distracted:
            for _ in range(int(self.rng.integers(1, 4))):
                sentence = self.distractors[int(self.rng.integers(len(self.distractors)))]
                self._insert(row, int(self.rng.integers(1, max(length, 2))), sentence)
        for position, name in sorted(facts, key=lambda fact: -fact[0]):
            self._insert(row, position, self.writer.random_fact(self.rng, name))
        return row

    def _insert(self, row: Row, at: int, fact: Fact) -> None:
        if at >= len(row.ids):
            return
        at, ids = self.writer.place(row.ids, at, fact, self.rng)
        length = len(row.ids)
        if at + len(ids) > length:
            return
        row.ids = np.concatenate([row.ids[:at], ids, row.ids[at:]])[:length]
        moved = []
        for start, end, name, room in row.facts:
            start, end = (start, end) if end <= at else (start + len(ids), end + len(ids))
            if end <= length:
                moved.append((start, end, name, room))
        row.facts = moved
        if fact.name >= 0:
            row.facts.append((at, at + len(ids), fact.name, fact.room))

    def asks(self, rows: list[Row], position: int, rests: np.ndarray) -> Asks:
        """A question about a known name after `position` tokens and each row's rest."""
        prompts, targets, weights = [], [], []
        for row, rest in zip(rows, rests, strict=True):
            end = position + int(rest)
            rooms = row.known(end)
            names = np.flatnonzero(rooms != UNKNOWN)
            askable = len(names) > 0 and not row.cut_at(end)
            name = int(self.rng.choice(names)) if askable else 0
            room = self.writer.rooms[rooms[name]] if askable else 0
            prompts.append(np.concatenate([row.ids[position:end], self.writer.questions[name]]))
            targets.append((room, self.eos))
            weights.append(float(askable))
        width = max(len(p) for p in prompts) + 1
        ids = np.zeros((len(rows), width), dtype=np.int64)
        at = np.zeros((len(rows), 2), dtype=np.int64)
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt)] = prompt
            ids[i, len(prompt)] = targets[i][0]
            at[i] = len(prompt) - 1, len(prompt)
        return Asks(torch.from_numpy(ids), torch.from_numpy(at), torch.tensor(np.array(targets)), torch.tensor(weights))

    def rests(self, batch: int, share: float) -> np.ndarray:
        """Lengths of the rests of a batch: none at all, or any that fits beside the question."""
        if self.rng.random() >= share:
            return np.zeros(batch, dtype=np.int64)
        return self.rng.integers(0, self.longest_rest + 1, size=batch)


def nothing_known() -> np.ndarray:
    return np.full(len(NAMES), UNKNOWN)
