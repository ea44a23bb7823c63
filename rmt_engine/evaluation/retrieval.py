"""Does a fact survive so many tokens of noise? The paper's tasks, many trials side by side.

memorize: the fact opens the text. detect: it stands anywhere in it. The question comes at the end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rmt_engine.engine import Engine
from rmt_engine.evaluation.facts import Fact, random_fact
from rmt_engine.evaluation.noise import Noise
from rmt_engine.sampling import generate

TASKS = ("memorize", "detect")
ANSWER_TOKENS = 8


@dataclass(frozen=True)
class Cell:
    """One task at one length. wrong: question, right answer and given answer of each miss."""

    task: str
    tokens: int
    segments: int
    trials: int
    correct: int
    seconds: float
    wrong: tuple[tuple[str, str, str], ...]

    @property
    def accuracy(self) -> float:
        return self.correct / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.correct, self.trials)


def wilson(correct: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson, 1927)."""
    p, z2 = correct / trials, z * z
    middle = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = z / (1 + z2 / trials) * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Trial:
    """A text: noise from `offset` on, of which [gap, gap_end) is replaced by `ids`, which hold the fact."""

    fact: Fact
    noise: Noise
    offset: int
    gap: int
    gap_end: int
    ids: np.ndarray

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids [start, stop) of the text. The noise begins again where it ends."""
        behind = self.gap + len(self.ids)
        before = self._noise(start, min(stop, self.gap))
        inside = self.ids[max(start - self.gap, 0) : max(stop - self.gap, 0)]
        after = self._noise(max(start, behind) - behind + self.gap_end, stop - behind + self.gap_end)
        return np.concatenate([before, inside, after])

    def _noise(self, start: int, stop: int) -> np.ndarray:
        return self.noise.ids.take(np.arange(self.offset + start, self.offset + stop), mode="wrap")


def make_trial(task: str, tokens: int, noise: Noise, rng: np.random.Generator) -> Trial:
    """A random fact in the noise, at the start (`memorize`) or anywhere in the first `tokens` tokens (`detect`)."""
    fact = random_fact(rng)
    first = int(rng.integers(len(noise.pieces)))
    offset = int(noise.starts[first])
    if task == "memorize":
        length = int(noise.starts[first + 1]) - offset
        return Trial(fact, noise, offset, 0, length, noise.opened_by(first, fact.sentence))
    # The whole fact must lie before the end: in a long text any place of a piece does, well before it.
    spare = 2 * noise.longest_piece if tokens > 4 * noise.longest_piece else noise.longest_fact
    room = max(tokens - spare, 1)
    laps, place = divmod(offset + int(rng.integers(room)), len(noise))
    piece = int(np.searchsorted(noise.starts, place, side="right")) - 1
    start = int(noise.starts[piece]) + laps * len(noise) - offset
    if start < 0:  # the very first piece
        piece, start = first, 0
    end = start + int(noise.starts[piece + 1] - noise.starts[piece])
    return Trial(fact, noise, offset, start, end, noise.with_sentence(piece, fact.sentence, rng, tokens - start))


def evaluate(
    engine: Engine,
    noise: Noise,
    *,
    tasks: Sequence[str] = TASKS,
    lengths: Sequence[int],
    trials: int = 100,
    slots: int = 100,
    seed: int = 0,
    on_step: Callable[[int], None] = lambda tokens: None,
) -> Iterator[Cell]:
    """Yields a Cell for each task and length (tokens of the whole text).

    `slots` trials are read side by side. The facts of `memorize` stand at the start, so one pass gives all its lengths;
    `detect` takes one a length. on_step is told the tokens read by each step. Raises ValueError.
    """
    _check(engine, noise, tasks, lengths, trials, slots)
    for task in tasks:
        passes = [tuple(sorted(lengths))] if task == "memorize" else [(length,) for length in sorted(lengths)]
        for asked_at in passes:
            rng = np.random.default_rng([seed, TASKS.index(task), asked_at[-1]])
            made = [make_trial(task, asked_at[-1], noise, rng) for _ in range(trials)]
            yield from _cells(engine, task, asked_at, made, slots, on_step)


def total_tokens(tasks: Sequence[str], lengths: Sequence[int], trials: int) -> int:
    """What `evaluate` will read: its cost."""
    return trials * sum(max(lengths) if task == "memorize" else sum(lengths) for task in tasks)


def _check(engine: Engine, noise: Noise, tasks: Sequence[str], lengths: Sequence[int], trials: int, slots: int) -> None:
    if engine.config.family != "decoder":
        raise ValueError("retrieval asks for generated answers: this checkpoint is a classifier")
    if unknown := set(tasks) - set(TASKS):
        raise ValueError(f"tasks must be of {', '.join(TASKS)}; got {', '.join(sorted(unknown))}")
    if min(trials, slots) < 1:
        raise ValueError("trials and slots must be at least 1")
    if min(lengths) < noise.longest_fact:
        raise ValueError(f"a fact has up to {noise.longest_fact} tokens: lengths below that hold none")


def _cells(
    engine: Engine,
    task: str,
    asked_at: Sequence[int],
    trials: Sequence[Trial],
    slots: int,
    on_step: Callable[[int], None],
) -> Iterator[Cell]:
    answers: dict[int, list[str]] = {length: [] for length in asked_at}
    seconds = dict.fromkeys(asked_at, 0.0)
    for first in range(0, len(trials), slots):
        start = time.perf_counter()
        for length, given in _read_and_ask(engine, trials[first : first + slots], asked_at, on_step):
            answers[length] += given
            seconds[length] += time.perf_counter() - start
    for length in asked_at:
        pairs = list(zip([trial.fact for trial in trials], answers[length], strict=True))
        wrong = tuple((f.question, f.room, given) for f, given in pairs if not f.is_answered_by(given))
        segments = -(-length // engine.config.segment_size)
        yield Cell(task, length, segments, len(pairs), len(pairs) - len(wrong), seconds[length], wrong)


def _read_and_ask(
    engine: Engine, trials: Sequence[Trial], asked_at: Sequence[int], on_step: Callable[[int], None]
) -> Iterator[tuple[int, list[str]]]:
    """Reads the trials side by side; at each of the lengths, yields the answers from forks."""
    size, position = engine.config.segment_size, 0
    memory = engine.initial_memory(len(trials))
    for length in asked_at:
        while length - position > size:
            memory = engine.executor.fold(_batch(engine, trials, position, position + size), memory)
            position += size
            on_step(size * len(trials))
        yield length, _ask(engine, trials, memory, position, length)


def _batch(engine: Engine, trials: Sequence[Trial], start: int, stop: int) -> Tensor:
    """Ids [start, stop) of every trial, int64 [B, L]."""
    return torch.from_numpy(np.stack([trial.read(start, stop) for trial in trials])).to(engine.device)


def _ask(engine: Engine, trials: Sequence[Trial], memory: Tensor, start: int, stop: int) -> list[str]:
    """The answers with the rest [start, stop) unfolded, as `Stream.ask` gives them one by one."""
    template = engine.config.ask_template
    questions = [engine.tokenizer.encode(template.replace("{question}", trial.fact.question)) for trial in trials]
    folded = None
    answers = [""] * len(trials)
    for length in sorted({len(ids) for ids in questions}):
        members = [i for i, ids in enumerate(questions) if len(ids) == length]
        asked = torch.from_numpy(np.stack([questions[i] for i in members])).to(engine.device)
        if stop - start + length <= engine.config.segment_size:
            final = torch.cat([_batch(engine, [trials[i] for i in members], start, stop), asked], dim=1)
            state = memory
        else:
            if folded is None:
                folded = engine.executor.fold(_batch(engine, trials, start, stop), memory)
            final, state = asked, folded
        engine.check_answer_fits(final.shape[1], ANSWER_TOKENS)
        new = generate(engine.executor, final, state[members], ANSWER_TOKENS, engine.config.stop_ids)
        for i, ids in zip(members, new, strict=True):
            answers[i] = engine.tokenizer.decode(ids)
    return answers
