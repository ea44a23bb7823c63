"""Does a lower precision forget more? The same trials under two dtypes, compared trial by trial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rmt_engine.evaluation.intervals import paired_difference
from rmt_engine.evaluation.retrieval import Plan
from rmt_engine.evaluation.store import Store


@dataclass(frozen=True)
class Drift:
    """One task at one length under two dtypes. same: trials with the same answer, right or wrong, word for word.

    interval: of `difference`, the accuracy of the second less that of the first, in points, for paired trials.
    """

    task: str
    tokens: int
    dtypes: tuple[str, str]
    both: int
    only_first: int
    only_second: int
    neither: int
    same: int

    @property
    def trials(self) -> int:
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def accuracy(self) -> tuple[float, float]:
        """Of the first and of the second dtype."""
        return (self.both + self.only_first) / self.trials, (self.both + self.only_second) / self.trials

    @property
    def difference(self) -> float:
        return 100 * (self.only_second - self.only_first) / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        low, high = paired_difference(self.both, self.only_second, self.only_first, self.neither)
        return 100 * low, 100 * high


def compare(plan: Plan, dtypes: tuple[str, str], stores: Sequence[Store]) -> list[Drift]:
    """What two measurements of one plan say, a store each. Raises ValueError where an answer is missing."""
    found = []
    for task in plan.settings.tasks:
        for length in sorted(set(plan.settings.lengths)):
            asked = [((key, length), trial) for key, trial, at in plan.asked if key[0] == task and length in at]
            if any(key not in store.answers for store in stores for key, _ in asked):
                raise ValueError(f"{task} at {length:,} tokens is not answered under both dtypes yet")
            given = [tuple(store.answers[key] for store in stores) for key, _ in asked]
            right = [
                tuple(trial.problem.is_answered_by(text) for text in texts)
                for (_, trial), texts in zip(asked, given, strict=True)
            ]
            found.append(Drift(task, length, dtypes, *_table(right), sum(len(set(texts)) == 1 for texts in given)))
    return found


def _table(right: Sequence[tuple[bool, ...]]) -> tuple[int, int, int, int]:
    """Trials that were right under both, only the first, only the second, neither."""
    return (
        right.count((True, True)),
        right.count((True, False)),
        right.count((False, True)),
        right.count((False, False)),
    )
