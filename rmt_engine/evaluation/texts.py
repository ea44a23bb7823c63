"""A trial's text: endless noise in which sentences are hidden, read by token ranges and never held whole."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rmt_engine.evaluation.facts import Problem, line_problem, people_problem
from rmt_engine.evaluation.noise import Noise

TASKS = ("memorize", "detect", "reasoning")


@dataclass(frozen=True)
class Patch:
    """ids in place of the noise [start, end), counted from the text's offset in it."""

    start: int
    end: int
    ids: np.ndarray


class HiddenText:
    """Noise from `offset` on with patches in it; the noise begins again where it ends."""

    def __init__(self, noise: Noise, offset: int, patches: Sequence[Patch]):
        self.noise = noise
        self.offset = offset
        self._starts: list[int] = []  # where each span of the text begins
        self._spans: list[tuple[np.ndarray | None, int]] = []  # its ids, or None and its place in the noise
        position = place = 0
        for patch in patches:
            position = self._add(position, None, place, patch.start - place)
            position = self._add(position, patch.ids, 0, len(patch.ids))
            place = patch.end
        self._add(position, None, place, 1)

    def _add(self, position: int, ids: np.ndarray | None, place: int, length: int) -> int:
        if length:
            self._starts.append(position)
            self._spans.append((ids, place))
        return position + length

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids [start, stop) of the text, int64."""
        parts = []
        index = bisect_right(self._starts, start) - 1
        while start < stop:
            last = index + 1 == len(self._starts)
            end = stop if last else min(stop, self._starts[index + 1])
            (ids, place), skip = self._spans[index], start - self._starts[index]
            parts.append(self._noise(place + skip, end - start) if ids is None else ids[skip : skip + end - start])
            start, index = end, index + 1
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _noise(self, place: int, count: int) -> np.ndarray:
        first = (self.offset + place) % len(self.noise)
        if first + count <= len(self.noise):
            return self.noise.ids[first : first + count]
        return self.noise.ids.take(np.arange(first, first + count), mode="wrap")


@dataclass(frozen=True, eq=False)
class Trial:
    """A problem and the text that hides its sentences.

    places: token at which each sentence begins. drawn: the largest of the random numbers that placed them, for
    `holds_at`; None where no chance was in it (`memorize`).
    """

    problem: Problem
    text: HiddenText
    places: tuple[int, ...]
    drawn: int | None

    def holds_at(self, tokens: int) -> bool:
        """Whether the first `tokens` tokens are a trial of that length as good as one made for it.

        All sentences lie in them, and are spread as `make_trial` spreads them: a uniform draw that happens to lie below
        a bound is uniform below it.
        """
        return self.drawn is None or self.drawn < room_for(tokens, self.text.noise, len(self.places))


def make_trial(task: str, tokens: int, noise: Noise, rng: np.random.Generator, facts: int = 1) -> Trial:
    """A random problem in the noise, all of it within the first `tokens` tokens.

    memorize: `facts` facts open the text. detect: each stands anywhere. reasoning: two relations, anywhere.
    """
    problem = line_problem(rng) if task == "reasoning" else people_problem(rng, facts)
    first = int(rng.integers(len(noise.pieces)))
    offset = int(noise.starts[first])
    if task == "memorize":
        ids = noise.opened_by(first, problem.sentences)
        opening = Patch(0, int(noise.starts[first + 1]) - offset, ids)
        return Trial(problem, HiddenText(noise, offset, [opening]), _line_starts(noise, problem), None)
    room = room_for(tokens, noise, len(problem.sentences))
    draws = sorted(int(rng.integers(room)) for _ in problem.sentences)
    patches, places = _hide(problem.sentences, draws, offset, noise, rng)
    return Trial(problem, HiddenText(noise, offset, patches), places, draws[-1])


def room_for(tokens: int, noise: Noise, sentences: int) -> int:
    """Places are drawn below this: from there on the text might end before all sentences do."""
    return max(tokens - sentences * noise.longest_sentence, 1)


def _line_starts(noise: Noise, problem: Problem) -> tuple[int, ...]:
    lengths = [len(noise.whole(f"{sentence}\n")) for sentence in problem.sentences[:-1]]
    return tuple(int(start) for start in np.cumsum([0, *lengths]))


def _hide(
    sentences: Sequence[str], draws: Sequence[int], offset: int, noise: Noise, rng: np.random.Generator
) -> tuple[list[Patch], tuple[int, ...]]:
    """Patches for sentences at drawn places (ascending), those that fall in one piece of the noise in one patch."""
    found = [_piece_at(offset + draw, noise) for draw in draws]
    patches: list[Patch] = []
    places: list[int] = []
    moved = 0  # tokens that earlier sentences push this piece back
    for piece, start in dict.fromkeys(found):
        inside = [i for i, where in enumerate(found) if where == (piece, start)]
        begin, length = start - offset, int(noise.starts[piece + 1] - noise.starts[piece])
        ids, begun = noise.with_sentences(piece, [(draws[i] - begin, sentences[i]) for i in inside], rng)
        patches.append(Patch(begin, begin + length, ids))
        places += [begin + moved + place for place in begun]
        moved += len(ids) - length
    return patches, tuple(places)


def _piece_at(place: int, noise: Noise) -> tuple[int, int]:
    """The piece that holds a place of the endless noise, and where it begins there."""
    laps, inside = divmod(place, len(noise))
    piece = int(np.searchsorted(noise.starts, inside, side="right")) - 1
    return piece, laps * len(noise) + int(noise.starts[piece])
