"""Memory states that live on from one training step to the next."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from episodes import Row
from facts_data import World
from torch import Tensor


@dataclass
class Lived:
    memory: Tensor  # [M, E]
    world: World  # what it has been told
    age: int  # tokens read since the first step it was in


class Pool:
    """Memory states that have answered right so far, each with what it knows.

    patience: how often one that answered wrong stays; renewed: how often a new one takes the place of another.
    """

    def __init__(self, size: int, patience: float = 0.5, renewed: float = 0.05) -> None:
        self.states: list[Lived | None] = [None] * size
        self.patience, self.renewed = patience, renewed

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """Up to `count` different places that hold a state, rather those that know what few states do: what is
        forgotten most is what the pool holds least of."""
        filled = [i for i, state in enumerate(self.states) if state is not None]
        known = [self.at(i).world.known for i in filled]
        often = Counter(fact for facts in known for fact in facts)
        weights = np.array([np.mean([1 / often[fact] for fact in facts]) for facts in known])
        count = min(count, len(filled))
        chosen = rng.choice(len(filled), count, replace=False, p=weights / weights.sum()) if count else []
        return [filled[i] for i in chosen]

    def at(self, place: int) -> Lived:
        state = self.states[place]
        assert state is not None
        return state

    def settle(self, rng: np.random.Generator, place: int | None, state: Lived, right: bool) -> None:
        """Puts a state back if it answered right. New ones (None) fill gaps."""
        if place is not None:
            if right:
                self.states[place] = state
            elif rng.random() >= self.patience:
                self.states[place] = None
        elif right:
            empty = [i for i, old in enumerate(self.states) if old is None]
            if empty:
                self.states[empty[0]] = state
            elif rng.random() < self.renewed:
                self.states[int(rng.integers(len(self.states)))] = state

    def ages(self) -> list[int]:
        return [state.age for state in self.states if state is not None]


@dataclass
class Hard:
    """What a state did not take well: the state, and the segment that it then read."""

    memory: Tensor  # [M, E]
    row: Row


def disturbed(memory: Tensor, noise: float, mix: float) -> Tensor:
    """Memory states [B, M, E], of which a half gets random noise of up to `noise` of its scale, and a half, drawn
    apart, a share of up to `mix` of another one: what states are told apart by is where they must be hard to move."""
    count = len(memory)
    if not count:
        return memory
    size, share = (most * torch.rand(count, 1, 1) * (torch.rand(count, 1, 1) < 0.5) for most in (noise, mix))
    other = memory[torch.randperm(count)]
    return memory + share * (other - memory) + size * torch.randn_like(memory) * memory.std()
