"""Facts and questions of the paper's retrieval tasks ("Beyond attention", section on memorization)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

NAMES = ("Mary", "John", "Daniel", "Sandra")
VERBS = ("moved", "went", "went back", "journeyed", "travelled")
ROOMS = ("bathroom", "hallway", "garden", "office", "bedroom", "kitchen")


@dataclass(frozen=True)
class Fact:
    """Who went where: `sentence` hides in the noise, `question` asks, `room` is the answer."""

    name: str
    verb: str
    room: str

    @property
    def sentence(self) -> str:
        return f"{self.name} {self.verb} to the {self.room}."

    @property
    def question(self) -> str:
        return f"Where is {self.name}?"

    def is_answered_by(self, answer: str) -> bool:
        """Whether a generated answer is the room and nothing else, space and a full stop apart."""
        return answer.strip().rstrip(".").lower() == self.room


def all_facts() -> Iterator[Fact]:
    """Every fact there is."""
    return (Fact(*choice) for choice in itertools.product(NAMES, VERBS, ROOMS))


def random_fact(rng: np.random.Generator) -> Fact:
    return Fact(*(str(rng.choice(choices)) for choices in (NAMES, VERBS, ROOMS)))
