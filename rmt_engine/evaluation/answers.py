"""Three ways to get an answer from a memory state: generate it, score the possible ones, or ask the classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from rmt_engine.engine import Engine
from rmt_engine.evaluation.facts import Problem
from rmt_engine.sampling import generate

ANSWER_TOKENS = 8
WAYS = ("generate", "score", "classify")

# (rests of the texts [B, r], problems [B], memory states [B, M, E]) -> the answers
Answer = Callable[[np.ndarray, Sequence[Problem], Tensor], list[str]]


def way_of(engine: Engine, way: str) -> str:
    """The way a checkpoint answers: `auto` is generate for a decoder, classify for an encoder. Raises ValueError."""
    classifier = engine.config.family != "decoder"
    if way == "auto":
        return "classify" if classifier else "generate"
    if way not in WAYS:
        raise ValueError(f"answer must be auto, {', '.join(WAYS)}; got {way!r}")
    if classifier != (way == "classify"):
        kind, own = ("classifier", "classify") if classifier else ("decoder", "generate or score")
        raise ValueError(f"this checkpoint is a {kind}: it answers by {own}, not by {way}")
    return way


def answerer(engine: Engine, way: str, labels: Sequence[str] | None = None) -> Answer:
    """way: one of `WAYS`. labels: answers of a classifier's classes, where the checkpoint does not name them."""
    if way == "classify":
        return _Classifier(engine, labels)
    return _Generator(engine) if way == "generate" else _Scorer(engine)


def question_ids(engine: Engine, problem: Problem) -> np.ndarray:
    """The ids of a question as the checkpoint is asked, int64 [q]."""
    ids = engine.tokenizer.encode(_asked(engine, problem))
    return ids[~np.isin(ids, engine.config.drop_ids)]


def _asked(engine: Engine, problem: Problem) -> str:
    return engine.config.ask_template.replace("{question}", problem.question)


def rows_of(memory: Tensor, rows: Sequence[int]) -> Tensor:
    """The memory states of some rows; those of all are not copied."""
    return memory if list(rows) == list(range(len(memory))) else memory[list(rows)]


def by_length(rows: Sequence[np.ndarray]) -> list[list[int]]:
    """Indices of rows that are of one length, shortest first."""
    lengths = [len(row) for row in rows]
    return [[i for i, n in enumerate(lengths) if n == length] for length in sorted(set(lengths))]


def tensor(engine: Engine, rows: Sequence[np.ndarray]) -> Tensor:
    """Rows of one length as int64 [B, L] on the engine's device."""
    return torch.from_numpy(np.stack(rows)).to(engine.device)


class _Decoder:
    """What generating and scoring share: rest and question make the answering segment, as in `Stream.ask`."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def __call__(self, rests: np.ndarray, problems: Sequence[Problem], memory: Tensor) -> list[str]:
        """Where rest and question do not fit one segment, the rest is folded first."""
        questions = [question_ids(self.engine, problem) for problem in problems]
        folded: Tensor | None = None
        answers = [""] * len(problems)
        for members in by_length(questions):
            fits = rests.shape[1] + len(questions[members[0]]) <= self.engine.config.segment_size
            if not fits and folded is None:
                folded = self.engine.executor.fold(tensor(self.engine, list(rests)), memory)
            state = memory if fits or folded is None else folded
            final = [np.concatenate([rests[i], questions[i]]) if fits else questions[i] for i in members]
            given = self.answer(tensor(self.engine, final), [problems[i] for i in members], rows_of(state, members))
            for i, text in zip(members, given, strict=True):
                answers[i] = text
        return answers

    def answer(self, ids: Tensor, problems: Sequence[Problem], memory: Tensor) -> list[str]:
        raise NotImplementedError


class _Generator(_Decoder):
    """Greedy decoding."""

    def answer(self, ids: Tensor, problems: Sequence[Problem], memory: Tensor) -> list[str]:
        engine = self.engine
        engine.check_answer_fits(ids.shape[1], ANSWER_TOKENS)
        new = generate(engine.executor, ids, memory, ANSWER_TOKENS, engine.config.stop_ids)
        return [engine.tokenizer.decode(row) for row in new]


class _Scorer(_Decoder):
    """The possible answer whose tokens have the largest probability after the question; the first one of equals."""

    def answer(self, ids: Tensor, problems: Sequence[Problem], memory: Tensor) -> list[str]:
        choices = [[self._tokens(problem, choice) for choice in problem.choices] for problem in problems]
        longest = max(len(tokens) for row in choices for tokens in row)
        self.engine.check_answer_fits(ids.shape[1], longest)
        executor = self.engine.executor
        logits, caches = executor.prefill(ids, memory, longest)
        filled = caches[0].length
        first = logits.float().log_softmax(-1)
        scores = []
        for column in zip(*choices, strict=True):  # one possible answer of every row
            score = _picked(first, [tokens[0] for tokens in column])
            for step in range(1, max(map(len, column))):
                # Rows whose answer has ended read anything: nothing of it is counted.
                before = [tokens[min(step - 1, len(tokens) - 1)] for tokens in column]
                logits = executor.decode(torch.tensor(before, device=ids.device)[:, None], caches)
                more = _picked(
                    logits.float().log_softmax(-1), [tokens[min(step, len(tokens) - 1)] for tokens in column]
                )
                score = score + more * torch.tensor([step < len(tokens) for tokens in column], device=ids.device)
            for cache in caches:
                cache.length = filled  # the next answer begins where this one did
            scores.append(score)
        best = torch.stack(scores, dim=1).argmax(1).tolist()
        return [problem.choices[i] for problem, i in zip(problems, best, strict=True)]

    def _tokens(self, problem: Problem, choice: str) -> list[int]:
        """The ids of an answer behind the question, as the two are tokenized together."""
        asked, tokenizer = _asked(self.engine, problem), self.engine.tokenizer
        answer = choice if asked[-1:].isspace() else f" {choice}"
        before, whole = tokenizer.encode(asked).tolist(), tokenizer.encode(asked + answer).tolist()
        return whole[len(before) :] if whole[: len(before)] == before else tokenizer.encode(answer).tolist()


def _picked(log_probabilities: Tensor, tokens: Sequence[int]) -> Tensor:
    """[B, V] -> [B], of one token a row."""
    return log_probabilities.gather(1, torch.tensor(tokens, device=log_probabilities.device)[:, None])[:, 0]


class _Classifier:
    """The likeliest class, in the encoder's way: the question ends the text, the last segment is classified."""

    def __init__(self, engine: Engine, labels: Sequence[str] | None):
        self.engine = engine
        self.labels = list(labels or engine.config.labels)

    def __call__(self, rests: np.ndarray, problems: Sequence[Problem], memory: Tensor) -> list[str]:
        """rests: what the memory has not read, the question at its end."""
        logits = self.engine.executor.logits(tensor(self.engine, list(rests)), memory)
        if logits.shape[1] != len(self.labels):
            raise ValueError(
                f"the checkpoint has {logits.shape[1]} classes: --labels must name as many, in their order"
            )
        return [self.labels[i] for i in logits.argmax(-1).tolist()]


def check_labels(engine: Engine, labels: Sequence[str] | None, choices: Sequence[str]) -> None:
    """Raises ValueError where a classifier has no class for an answer."""
    names = [name.lower() for name in labels or engine.config.labels]
    if missing := [choice for choice in choices if choice.lower() not in names]:
        raise ValueError(
            f"the checkpoint's labels are {', '.join(names) or 'not named'}: none for {', '.join(missing)}; "
            "name the answers of its classes, in their order, with --labels bathroom,hallway,…"
        )
