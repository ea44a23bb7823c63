"""Log-probabilities of the tokens of a stream: what is carried from segment to segment, and what they add up to.

Every token is scored exactly once, by the row before it, with the context that row has:
  - inside a segment, the memory state and the tokens of the segment before it;
  - the first token of a later segment, by the last row of the segment before: as in the logits of the authors' code,
    which shifts the logits of all segments, one after the other, by one;
  - the first token of the stream, by the last row of read memory, which has seen the initial memory alone. The authors'
    loss leaves this token out, and so does `Total.loss`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from rmt_engine.config import RMTConfig


@dataclass(frozen=True)
class Total:
    """A stream up to some token. nll: in nats, of all `tokens`; first: the share of the very first token in it."""

    tokens: int = 0
    nll: float = 0.0
    first: float = 0.0

    @property
    def perplexity(self) -> float:
        """exp of the mean NLL of all tokens; infinite where that overflows."""
        return _perplexity(self.nll, self.tokens)

    @property
    def bits_per_token(self) -> float:
        return self.nll / self.tokens / math.log(2)

    @property
    def loss(self) -> float | None:
        """The authors' loss: the mean NLL of all tokens but the first; None before the second token."""
        return (self.nll - self.first) / (self.tokens - 1) if self.tokens > 1 else None

    def to_dict(self) -> dict[str, float | None]:
        """For JSON, which knows no infinity: then None."""
        means = {"nll": self.nll, "perplexity": self.perplexity, "bits_per_token": self.bits_per_token}
        return {"tokens": self.tokens, **_finite({**means, "loss": self.loss})}


@dataclass(frozen=True)
class SegmentScores:
    """One segment's tokens [start, end) of the stream. log_probabilities: fp32 [end - start], of each token in nats.

    total: of the stream up to `end`.
    """

    index: int
    start: int
    end: int
    log_probabilities: np.ndarray = field(repr=False)
    nll: float
    total: Total

    @property
    def perplexity(self) -> float:
        return _perplexity(self.nll, self.end - self.start)

    def to_dict(self) -> dict[str, float | None]:
        """For JSON: the segment without its tokens."""
        place = {"segment": self.index, "start": self.start, "end": self.end}
        return {**place, **_finite({"nll": self.nll, "perplexity": self.perplexity})}


@dataclass(frozen=True, eq=False)
class Scores:
    """What a stream that is scored carries from segment to segment, of constant size.

    row: the last row of the last segment [1, E] in the model's dtype, None before the first one; segments: scored so
    far; total: of their tokens; last: the last one of them, a result that nothing is computed from.
    """

    row: Tensor | None = None
    segments: int = 0
    total: Total = Total()
    last: SegmentScores | None = field(default=None, repr=False)

    def add(self, log_probabilities: np.ndarray, row: Tensor) -> Scores:
        """The scores with one segment more: the log-probabilities of its tokens, fp32 [L], and its last row [1, E]."""
        before, nll = self.total, -float(log_probabilities.sum(dtype=np.float64))
        first = -float(log_probabilities[0]) if self.row is None else before.first
        total = Total(before.tokens + len(log_probabilities), before.nll + nll, first)
        last = SegmentScores(self.segments, before.tokens, total.tokens, log_probabilities, nll, total)
        return Scores(row, self.segments + 1, total, last)

    def sums(self) -> dict[str, float]:
        """All but the row, as a state file holds it."""
        return {"segments": self.segments, **vars(self.total)}

    @classmethod
    def restored(cls, sums: Mapping[str, float], row: Tensor | None) -> Scores:
        """Inverse of `sums`. Raises KeyError, TypeError, ValueError for what is none."""
        total = Total(int(sums["tokens"]), float(sums["nll"]), float(sums["first"]))
        return cls(row, int(sums["segments"]), total)


def check_scorable(config: RMTConfig) -> None:
    """Raises ValueError for a checkpoint that gives no probabilities to tokens."""
    if config.family != "decoder":
        raise ValueError(
            "this checkpoint is a classifier: it predicts labels, not tokens, so there is nothing to score"
        )


def _finite(values: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: None if value is None or not math.isfinite(value) else value for name, value in values.items()}


def _perplexity(nll: float, tokens: int) -> float:
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf
