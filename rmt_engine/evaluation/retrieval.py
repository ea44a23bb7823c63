"""Do facts survive so many tokens of noise? The paper's tasks, many trials side by side.

memorize: the facts open the text. detect: they stand anywhere in it. reasoning: two relations stand anywhere, and both
are needed. The question comes at the end.

A text is read once and asked on the way, from forks, at every length at which it is as good a trial as one made for
that length (`Trial.holds_at`) and that is not far below its own; what is missing to `trials` is filled up with texts of
that length. So each cell has `trials` independent texts with their facts spread evenly over its length, and the cells
of one curve share texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from rmt_engine.engine import Engine
from rmt_engine.evaluation.answers import Answer, answerer, check_labels, question_ids, way_of
from rmt_engine.evaluation.cost import Load
from rmt_engine.evaluation.facts import NAMES, ROOMS
from rmt_engine.evaluation.intervals import wilson
from rmt_engine.evaluation.noise import Noise
from rmt_engine.evaluation.reading import (
    OnStep,
    Place,
    Reading,
    batches,
    last_border,
    read_and_ask,
    readings_of,
    signature,
)
from rmt_engine.evaluation.store import Key, Store
from rmt_engine.evaluation.texts import TASKS, Trial, make_trial

PLACES = 10  # bins of a fact's place, as a share of the length
SHARED = 4  # times as long, at most, is a text that serves a shorter length too: few would, and it would wait for them


@dataclass(frozen=True)
class Settings:
    """What is measured. lengths: tokens of the whole text; facts: sentences of `memorize` and `detect`; answer: a way
    of `answers.WAYS` or auto; labels: answers of a classifier's classes."""

    tasks: Sequence[str] = ("memorize", "detect")
    lengths: Sequence[int] = (16_000, 128_000, 2_000_000)
    trials: int = 100
    facts: int = 1
    seed: int = 0
    answer: str = "auto"
    labels: Sequence[str] | None = None

    def check(self, engine: Engine, noise: Noise) -> None:
        """Tells before hours of reading what cannot be measured. Raises ValueError."""
        unknown = sorted(set(self.tasks) - set(TASKS))
        if unknown or not self.tasks:
            raise ValueError(f"tasks must be of {', '.join(TASKS)}; got {', '.join(unknown) or 'none'}")
        if self.trials < 1:
            raise ValueError("trials must be at least 1")
        if not 1 <= self.facts <= len(NAMES):
            raise ValueError(f"facts must be 1 to {len(NAMES)}, one for each name; got {self.facts}")
        most = max([self.facts if task != "reasoning" else 2 for task in self.tasks], default=1)
        if min(self.lengths) < (least := most * noise.longest_sentence):
            raise ValueError(f"the facts take up to {least} tokens: lengths below that do not hold them")
        if way_of(engine, self.answer) == "classify":
            check_labels(engine, self.labels, ROOMS)


@dataclass(frozen=True)
class Cell:
    """One task at one length. wrong: question, right answer and given answer of each miss.

    by_place: trials and right answers for each tenth of the text in which the fact stands (reasoning: the first fact).
    """

    task: str
    facts: int
    tokens: int
    segments: int
    trials: int
    correct: int
    by_place: tuple[tuple[int, int], ...]
    wrong: tuple[tuple[str, str, str], ...] = field(repr=False)

    @property
    def accuracy(self) -> float:
        return self.correct / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.correct, self.trials)


class Plan:
    """Every text that a measurement reads, and where it is asked."""

    def __init__(self, engine: Engine, noise: Noise, settings: Settings):
        settings.check(engine, noise)
        self.engine = engine
        self.settings = settings
        self.asked = [(key, trial, at) for task in settings.tasks for key, trial, at in _texts(noise, settings, task)]
        if way_of(engine, settings.answer) != "classify":
            _check_questions(engine, [trial for _, trial, _ in self.asked])

    def batches(self, store: Store, slots: int) -> list[list[Reading]]:
        """What is left to read, in the order in which it is read."""
        if slots < 1:
            raise ValueError("slots must be at least 1")
        left = []
        for key, trial, lengths in self.asked:
            if missing := [length for length in lengths if (key, length) not in store.answers]:
                left += readings_of(self.engine, key, trial, missing)
        by_task = [[reading for reading in left if reading.key[0] == task] for task in self.settings.tasks]
        return [batch for readings in by_task for batch in batches(readings, slots)]

    def loads(self, store: Store, slots: int) -> list[Load]:
        """What is left to read, as `cost.estimate` takes it."""
        size = self.engine.config.segment_size
        left = [(len(batch), batch[0].length + batch[0].tail) for batch in self.batches(store, slots)]
        return [Load(count, -(-length // size), count * length) for count, length in left]

    def cells(self, store: Store) -> list[Cell]:
        """The cells whose every answer is there."""
        found = []
        for task in self.settings.tasks:
            for length in sorted(set(self.settings.lengths)):
                asked = [(key, trial) for key, trial, at in self.asked if key[0] == task and length in at]
                if all((key, length) in store.answers for key, _ in asked):
                    given = [store.answers[key, length] for key, _ in asked]
                    found.append(self._cell(task, length, [trial for _, trial in asked], given))
        return found

    def _cell(self, task: str, length: int, trials: Sequence[Trial], given: Sequence[str]) -> Cell:
        right = [trial.problem.is_answered_by(text) for trial, text in zip(trials, given, strict=True)]
        problems = [trial.problem for trial in trials]
        wrong = [(p.question, p.answer, text) for p, text, ok in zip(problems, given, right, strict=True) if not ok]
        bins = [min(PLACES * trial.places[trial.problem.asked] // length, PLACES - 1) for trial in trials]
        by_place = tuple(
            (bins.count(place), sum(ok for b, ok in zip(bins, right, strict=True) if b == place))
            for place in range(PLACES)
        )
        facts = len(trials[0].places)
        segments = -(-length // self.engine.config.segment_size)
        return Cell(task, facts, length, segments, len(trials), sum(right), by_place, tuple(wrong))


def evaluate(
    plan: Plan, store: Store | None = None, *, slots: int = 100, on_step: OnStep = lambda tokens: None
) -> Iterator[Cell]:
    """Reads what the store does not hold yet, `slots` texts side by side; yields each cell once it is complete.

    Raises OSError where the store cannot be written, NumericalError.
    """
    store = Store() if store is None else store
    engine, settings = plan.engine, plan.settings
    answer = answerer(engine, way_of(engine, settings.answer), settings.labels)
    told: set[tuple[str, int]] = set()
    yield from _new(plan.cells(store), told)
    for batch in plan.batches(store, slots):
        for asked in _read(engine, answer, batch, store, on_step):
            store.add([(reading.key, length, text) for reading, length, text in asked])
        yield from _new(plan.cells(store), told)


def _read(
    engine: Engine, answer: Answer, batch: Sequence[Reading], store: Store, on_step: OnStep
) -> Iterator[list[tuple[Reading, int, str]]]:
    """`read_and_ask`, from the place that the store has kept of this very batch."""
    whose, first = signature(batch), min(reading.asked_at[0] for reading in batch)
    kept = store.place_of(whose)
    start = None
    if kept is not None and kept[0] <= last_border(batch[0].cut, first, batch[0].tail):
        start = Place(kept[0], kept[1].to(engine.device))
    return read_and_ask(
        engine, answer, batch, on_step, start, lambda place: store.keep_place(whose, place.position, place.memory)
    )


def _new(cells: Sequence[Cell], told: set[tuple[str, int]]) -> Iterator[Cell]:
    for cell in cells:
        if (cell.task, cell.tokens) not in told:
            told.add((cell.task, cell.tokens))
            yield cell


def _texts(noise: Noise, settings: Settings, task: str) -> list[tuple[Key, Trial, list[int]]]:
    """The texts of a task with the lengths at which each is asked; those of the longest length come first."""
    facts = 2 if task == "reasoning" else settings.facts
    made: list[tuple[Key, Trial, list[int]]] = []
    for length in sorted(set(settings.lengths), reverse=True):
        shared = [at for key, trial, at in made if _serves(trial, int(key[2]), length)][: settings.trials]
        for at in shared:
            at.append(length)
        for index in range(settings.trials - len(shared)):
            rng = np.random.default_rng([settings.seed, TASKS.index(task), facts, length, index])
            made.append(((task, facts, length, index), make_trial(task, length, noise, rng, facts), [length]))
    return made


def _serves(trial: Trial, made_for: int, length: int) -> bool:
    return trial.drawn is None or (made_for <= SHARED * length and trial.holds_at(length))


def _check_questions(engine: Engine, trials: Sequence[Trial]) -> None:
    size = engine.config.segment_size
    for problem in {trial.problem.question: trial.problem for trial in trials}.values():
        if (count := len(question_ids(engine, problem))) > size:
            raise ValueError(f"the question {problem.question!r} has {count} tokens; a segment holds {size}")
