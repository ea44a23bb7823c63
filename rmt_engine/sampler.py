"""Choosing the next token of a row: greedy, or drawn from a filtered distribution."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, in the order of transformers: repetition penalty, temperature, top-k, top-p.

    temperature: 0 takes the likeliest token, else logits are divided by it and a token is drawn. top_k: of the k
    likeliest, 0 for all. top_p: of the smallest set that holds so much probability. repetition_penalty: over 1 makes
    tokens less likely that stand in the answering segment (text, question, answer). seed: of each row's own generator,
    so that what a row draws does not depend on the others; None draws anew each time. Raises ValueError.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, allowed, fits in (
            ("temperature", "at least 0", self.temperature >= 0),
            ("top_k", "at least 0", self.top_k >= 0),
            ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
            ("repetition_penalty", "above 0", self.repetition_penalty > 0),
        ):
            if not fits:
                raise ValueError(f"{name} must be {allowed}; got {getattr(self, name)}")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token of the plain logits is taken."""
        return self.temperature == 0 and self.repetition_penalty == 1


class Sampler:
    """Chooses the tokens of one row. seen: the ids that the repetition penalty knows."""

    def __init__(self, sampling: Sampling, seen: Iterable[int] = ()) -> None:
        self.sampling = sampling
        self.seen = set(seen)
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> int:
        """logits [V] on any device -> the token, which is seen from now on."""
        scores = logits.float().cpu()
        if self.sampling.repetition_penalty != 1 and self.seen:
            scores = penalized(scores, torch.tensor(sorted(self.seen)), self.sampling.repetition_penalty)
        if self.sampling.temperature == 0:
            token = int(scores.argmax())
        else:
            token = int(torch.multinomial(filtered(scores, self.sampling).softmax(-1), 1, generator=self.generator))
        self.seen.add(token)
        return token


def penalized(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """scores [V] with those of the ids `seen` divided by the penalty, or multiplied where they are below 0 (Keskar et
    al., 2019)."""
    found = scores[seen]
    return scores.index_put((seen,), torch.where(found < 0, found * penalty, found / penalty))


def filtered(scores: Tensor, sampling: Sampling) -> Tensor:
    """scores [V] after temperature, top-k and top-p: -inf for what cannot be drawn."""
    scores = scores / sampling.temperature
    if sampling.top_k:
        lowest = scores.topk(min(sampling.top_k, len(scores))).values[-1]
        scores = scores.masked_fill(scores < lowest, -torch.inf)
    if sampling.top_p < 1:
        ascending, places = scores.sort()
        removed = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        removed[-1] = False
        scores = scores.index_fill(0, places[removed], -torch.inf)
    return scores
