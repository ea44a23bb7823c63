"""Batches for the retrieval recipe: what each row reads, segment by segment, and what it is asked on the way."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from facts_data import NoiseBank, Statement, StatementWriter, World, distractor_sentences
from torch import Tensor

NOT_ASKED = -100  # the target that cross_entropy leaves out


@dataclass
class Row:
    """The text of one row and where each of its statements stands."""

    ids: np.ndarray
    world: World  # what was known before this text
    said: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list)  # start, end, what it says

    def known(self, position: int) -> World:
        """What is known once `position` tokens are read."""
        world = self.world
        for _, end, says in sorted(self.said):
            if end <= position:
                world = world.told(says)
        return world

    def cut_at(self, position: int) -> bool:
        """Whether a statement is only partly read at `position`."""
        return any(start < position < end for start, end, _ in self.said)


@dataclass
class Asks:
    """The answering segments of a batch: a row's rest, one question and its answer.

    Never two questions in one: the answer to the first would tell what the second's is not.
    """

    ids: Tensor  # int [A, T]
    of: Tensor  # int [A]: the row of the batch that is asked
    rows: Tensor  # int [A, 2]: where the room and the end of the answer are predicted
    targets: Tensor  # int [A, 2]


class EpisodeMaker:
    """Draws from `rng`."""

    def __init__(self, writer: StatementWriter, bank: NoiseBank, seed: int) -> None:
        self.writer = writer
        self.bank = bank
        bank.never = np.concatenate([bank.never, writer.answers])
        self.rng = np.random.default_rng(seed)
        self.feared: deque[np.ndarray] = deque(maxlen=512)  # noise that some memory state took badly
        self.fear = 0.0  # how often it is read again
        self.distractors = [writer.statement(s) for s in distractor_sentences(np.random.default_rng(seed), 600)]

    def row(self, length: int, world: World, said: Sequence[tuple[int, Statement]], distracted: float = 0.0) -> Row:
        """Noise of `length` tokens with statements at the wanted positions; a share of `distracted` also has sentences
        that look like facts and say nothing."""
        row = Row(self._noise(length), world)
        if self.rng.random() < distracted:
            for _ in range(int(self.rng.integers(1, 4))):
                sentence = self.distractors[int(self.rng.integers(len(self.distractors)))]
                self._insert(row, int(self.rng.integers(1, max(length, 2))), sentence)
        for position, statement in sorted(said, key=lambda one: -one[0]):
            self._insert(row, position, statement)
        return row

    def _noise(self, length: int) -> np.ndarray:
        if not self.feared or self.rng.random() >= self.fear:
            return self.bank.sample(self.rng, length)
        ids = self.feared[int(self.rng.integers(len(self.feared)))][:length]
        return np.concatenate([ids, self.bank.sample(self.rng, length - len(ids))]) if len(ids) < length else ids

    def read_on(self, row: Row, length: int) -> Row:
        """A row with noise behind it, or as much of it as `length` tokens hold."""
        missing = max(length - len(row.ids), 0)
        ids = np.concatenate([row.ids, self.bank.sample(self.rng, missing)]) if missing else row.ids[:length]
        return Row(ids, row.world, [one for one in row.said if one[1] <= length])

    def _insert(self, row: Row, at: int, statement: Statement) -> None:
        """Puts a statement in near `at` and drops as much noise from the end; nothing where it does not fit."""
        length = len(row.ids)
        if at >= length:
            return
        at, ids = self.writer.place(row.ids, at, statement, self.rng)
        at = min((start for start, end, _ in row.said if start < at < end), default=at)
        if at + len(ids) > length:
            return
        row.ids = np.concatenate([row.ids[:at], ids, row.ids[at:]])[:length]
        moved = [(s, e, says) if e <= at else (s + len(ids), e + len(ids), says) for s, e, says in row.said]
        row.said = [one for one in moved if one[1] <= length]
        if statement.says:
            row.said.append((at, at + len(ids), statement.says))

    def asks(self, rows: list[Row], position: int, rests: np.ndarray, count: int) -> Asks:
        """Up to `count` different questions a row, after `position` tokens and the row's rest."""
        asked = [
            (i, text)
            for i, (row, rest) in enumerate(zip(rows, rests, strict=True))
            for text in self._ask(row, position, position + int(rest), count)
        ]
        ids = np.zeros((len(asked), max((len(text) for _, text in asked), default=0)), dtype=np.int64)
        for line, (_, text) in zip(ids, asked, strict=True):
            line[: len(text)] = text
        ends = np.array([len(text) for _, text in asked], dtype=np.int64)[:, None]
        at = ends + np.array([-3, -2])  # each predicts the token behind it
        targets = np.take_along_axis(ids, at + 1, axis=1)
        return Asks(torch.from_numpy(ids), torch.tensor([i for i, _ in asked]), *map(torch.from_numpy, (at, targets)))

    def _ask(self, row: Row, start: int, end: int, count: int) -> list[np.ndarray]:
        """The ids of answering segments: what is read, the question, the room and the end of the answer."""
        questions = [] if row.cut_at(end) else self.writer.questions(row.known(end))
        chosen = [questions[i] for i in self.rng.permutation(len(questions))[:count]]
        return [np.concatenate([row.ids[start:end], question, [answer, self.bank.eos]]) for question, answer in chosen]

    def asked_in_text(self, row: Row, start: int, end: int, share: float) -> tuple[np.ndarray, int]:
        """For a classifier: ids [start, end) of a row, in `share` of cases ending in the question, and the label."""
        ids, names = row.ids[start:end], row.known(end).names
        if not names or row.cut_at(end):
            return ids, NOT_ASKED
        name = int(self.rng.choice(names))
        plain = self.writer.asked_plainly[name]
        question = (plain.inline, plain.own_line, self.writer.asked_where[name])[int(self.rng.integers(3))]
        behind = end - len(question)
        if (
            self.rng.random() >= share
            or behind < start
            or not np.array_equal(row.known(behind).rooms, row.known(end).rooms)
        ):
            return ids, row.known(end).rooms[name]
        return np.concatenate([row.ids[start:behind], question]), row.known(end).rooms[name]
