"""Memory states that have read nothing but noise, and what keeps them from making something up.

What such a state seems to know is mixed into what it is told next: a first link is taken for the second of two. Nobody
asks a state that knows nothing, so no question trains that. What does is the distance from where the initial memory is
after one segment of noise, its rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FAR = 0.14  # of the squared norm of the rest; states that were told a link are at 0.7 to 1


@dataclass
class Moved:
    """A state that was at rest, and the segment of noise that moved it."""

    memory: Tensor  # [M, E]
    ids: Tensor  # int64 [S]


class Blank:
    def __init__(self, first: Tensor) -> None:
        """first: the initial memory, once for each state [B, M, E]."""
        self.states = first.detach().clone()
        self.rest: Tensor | None = None  # [M, E]
        self.moved: list[Moved] = []

    def draw(self, rng: np.random.Generator, count: int) -> Tensor:
        return self.states[torch.from_numpy(rng.permutation(len(self.states))[:count])]

    def rest_is(self, memory: Tensor, follows: float = 0.05) -> None:
        """memory: initial memories after a segment of noise [B, M, E]. The rest follows as the weights change."""
        now = memory.detach().mean(0)
        self.rest = now if self.rest is None else self.rest + follows * (now - self.rest)

    def far(self, memory: Tensor) -> Tensor:
        """The squared distance of memory states [B, M, E] from their rest, in its squared norm: [B]."""
        assert self.rest is not None
        return (memory - self.rest).square().sum((1, 2)) / self.rest.square().sum()

    def near(self, rng: np.random.Generator, count: int) -> Tensor:
        """Up to `count` of the states at rest. Others hold something: to move them back would teach to forget."""
        near = (self.far(self.states) < FAR).nonzero()[:, 0].numpy()
        return self.states[torch.from_numpy(rng.permutation(near)[:count])]

    def keep_worst(self, read: Tensor, ids: Tensor, count: int) -> Tensor:
        """read: the states after one more segment, ids [B, S]. Keeps up to `count` moves that went furthest from rest.

        -> those that are at rest, bool [B].
        """
        before, after = self.far(self.states), self.far(read)
        moves = torch.where(before < FAR, after - before, -1.0)
        for i in moves.topk(min(count, len(moves))).indices.tolist():
            if moves[i] > 0:
                self.moved.append(Moved(self.states[i].clone(), ids[i]))
        return after < FAR

    def leaving(self, rng: np.random.Generator, oldest: float, share: float = 0.2) -> Tensor:
        """The states that start again, bool [B]: one in `oldest`, and a share of those that are far from rest. The
        others stay, since they have to be told things, too."""
        leave = torch.from_numpy(rng.random(len(self.states)) < 1 / oldest)
        if self.rest is not None:
            leave |= (self.far(self.states) > FAR) & torch.from_numpy(rng.random(len(self.states)) < share)
        return leave
