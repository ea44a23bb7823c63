"""Memory states that live on from one training step to the next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
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
    """Memory states that have answered right so far, each with what it knows."""

    def __init__(self, size: int) -> None:
        self.states: list[Lived | None] = [None] * size

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
        """Puts a state back if it answered right; drops a wrong one half of the time. New ones (None) fill gaps."""
        if place is not None:
            if right:
                self.states[place] = state
            elif rng.random() < 0.5:
                self.states[place] = None
        elif right:
            empty = [i for i, old in enumerate(self.states) if old is None]
            if empty:
                self.states[empty[0]] = state
            elif rng.random() < 0.05:
                self.states[int(rng.integers(len(self.states)))] = state

    def ages(self) -> list[int]:
        return [state.age for state in self.states if state is not None]


class Centres:
    """Where the memory states of each world lie on average. Pulled there, they stand still: an answer's loss says only
    that a state is on the right side of a border, this how far from the middle."""

    def __init__(self, rate: float = 0.05, least: int = 8) -> None:
        self.rate, self.least = rate, least
        self.means: dict[Hashable, Tensor] = {}
        self.counts: Counter[Hashable] = Counter()

    def update(self, world: Hashable, memory: Tensor) -> None:
        """memory: a state [M, E] that answers as it should."""
        self.counts[world] += 1
        mean = self.means.setdefault(world, memory.clone())
        mean += max(self.rate, 1 / self.counts[world]) * (memory - mean)

    def pull(self, memory: Tensor, worlds: Sequence[Hashable | None]) -> Tensor:
        """The squared distance of states [B, M, E] from the centres of their worlds, over that of the centres from
        theirs; 0 where none is known yet. None: a state that belongs to no world."""
        known = {world: mean for world, mean in self.means.items() if self.counts[world] >= self.least}
        near = [i for i, world in enumerate(worlds) if world in known]
        if len(known) < 2 or not near:
            return memory.sum() * 0
        centres = torch.stack([known[worlds[i]] for i in near])
        spread = torch.stack(list(known.values())).var(0).mean()
        return (memory[near] - centres).square().mean() / spread.clamp(min=1e-6)


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
