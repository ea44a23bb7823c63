"""Facts and questions of the paper's retrieval tasks ("Beyond attention", section on memorization).

The one home of their sentences: evaluation, recipes and examples all take them from here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

NAMES = ("Mary", "John", "Daniel", "Sandra")
VERBS = ("moved", "went", "went back", "journeyed", "travelled")
ROOMS = ("bathroom", "hallway", "garden", "office", "bedroom", "kitchen")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
DIRECTIONS = tuple(OPPOSITE)


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
        return is_answer(self.room, answer)


@dataclass(frozen=True)
class Relation:
    """Where a room lies, seen from another."""

    room: str
    direction: str
    other: str

    @property
    def sentence(self) -> str:
        return f"The {self.room} is {self.direction} of the {self.other}."


@dataclass(frozen=True)
class Problem:
    """Sentences to hide, in the order in which they stand, and a question that they answer.

    asked: index of the sentence that holds the answer, or 0 where it takes all of them. choices: every possible answer.
    """

    sentences: tuple[str, ...]
    question: str
    answer: str
    asked: int = 0
    choices: tuple[str, ...] = ROOMS

    def is_answered_by(self, answer: str) -> bool:
        return is_answer(self.answer, answer)


def is_answer(right: str, given: str) -> bool:
    """Whether a generated answer is the right one and nothing else, space, case and a full stop apart."""
    return given.strip().rstrip(".").lower() == right.lower()


def all_facts() -> Iterator[Fact]:
    """Every fact there is."""
    return (Fact(*choice) for choice in itertools.product(NAMES, VERBS, ROOMS))


def all_relations() -> Iterator[Relation]:
    """Every relation between two rooms."""
    pairs = itertools.permutations(ROOMS, 2)
    return (Relation(room, direction, other) for (room, other), direction in itertools.product(pairs, DIRECTIONS))


def random_fact(rng: np.random.Generator) -> Fact:
    return Fact(*(str(rng.choice(choices)) for choices in (NAMES, VERBS, ROOMS)))


def people_problem(rng: np.random.Generator, count: int = 1) -> Problem:
    """Where is one of `count` (1 to 4) people? Each went to a room of their own, so the room alone does not tell."""
    if not 1 <= count <= len(NAMES):
        raise ValueError(f"there are {len(NAMES)} names: expected 1 to {len(NAMES)} facts, got {count}")
    names, rooms = rng.permutation(NAMES)[:count], rng.permutation(ROOMS)[:count]
    facts = [Fact(str(name), str(rng.choice(VERBS)), str(room)) for name, room in zip(names, rooms, strict=True)]
    asked = int(rng.integers(count))
    return Problem(tuple(fact.sentence for fact in facts), facts[asked].question, facts[asked].room, asked)


def furthest_question(direction: str) -> str:
    return f"Which room is furthest {direction}?"


def line_problem(rng: np.random.Generator) -> Problem:
    """Three rooms on a line, told by two relations: which one stands at one end of it?

    Both sentences are needed: one alone leaves its own room and the unnamed third one equally likely.
    """
    first, middle, last = (str(room) for room in rng.permutation(ROOMS)[:3])
    direction = str(rng.choice(DIRECTIONS))  # from last to first
    relations = [_told(first, direction, middle, rng), _told(middle, direction, last, rng)]
    if rng.random() < 0.5:
        relations.reverse()
    sentences = tuple(relation.sentence for relation in relations)
    if rng.random() < 0.5:
        return Problem(sentences, furthest_question(direction), first)
    return Problem(sentences, furthest_question(OPPOSITE[direction]), last)


def _told(room: str, direction: str, other: str, rng: np.random.Generator) -> Relation:
    """The same relation from either of its ends."""
    return Relation(room, direction, other) if rng.random() < 0.5 else Relation(other, OPPOSITE[direction], room)
