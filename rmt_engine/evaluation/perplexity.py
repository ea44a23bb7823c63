"""Does reading more before help to predict? Perplexity of the same tokens after 1, 2, 4, … segments of their text.

A target is one full segment of a document. For each column the memory starts from its initial state and reads that many
segments, those just before the target; then the target's tokens are scored. Their first one is left out: only the rows
inside the target predict the rest, so columns differ in the memory state and in nothing else.

Two controls: `reset`, the memory put back to its initial state before the target (the same in every column), and
`other`, the memory that the column gave to another target, of another text or place: what the kind of text gains.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rmt_engine.engine import Engine
from rmt_engine.errors import InputError
from rmt_engine.evaluation.cost import Load
from rmt_engine.evaluation.intervals import bootstrap_mean
from rmt_engine.evaluation.reading import OnStep, fold
from rmt_engine.inputs import count_tokens, open_input
from rmt_engine.layouts import Cut
from rmt_engine.scoring import check_scorable

SEGMENTS = (1, 2, 4, 8, 16, 32, 64)
FEW_DOCUMENTS = 10  # below it the targets, and not the documents, are what is drawn for an interval


@dataclass(frozen=True)
class Target:
    """A segment to predict. ids: int64 [(before + 1) · S], what is read before it and the segment itself."""

    document: int
    ids: np.ndarray


@dataclass(frozen=True)
class Change:
    """A perplexity against that of the first column over the same tokens, in percent; None: too few to say."""

    percent: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Column:
    """Perplexities of all targets after `segments` segments, and of the two controls. `other` needs two targets."""

    segments: int
    perplexity: float
    reset: float
    other: float
    change: Change
    reset_change: Change
    other_change: Change


@dataclass(frozen=True)
class Result:
    """columns; tokens scored in each; unit: what was drawn for the intervals, `document` or `target`."""

    columns: tuple[Column, ...]
    tokens: int
    targets: int
    documents: int
    unit: str


@dataclass(frozen=True)
class Plan:
    """Which segments of which documents are predicted: evenly spread over all that have enough text before them.

    wanted: indices of the target segments of each source.
    """

    sources: tuple[Path, ...]
    wanted: tuple[tuple[int, ...], ...]
    segments: tuple[int, ...]
    field: str | None = None

    @property
    def targets(self) -> int:
        return sum(map(len, self.wanted))

    def loads(self, engine: Engine, slots: int) -> list[Load]:
        """What is to be computed, as `cost.estimate` takes it. Scoring a target is counted as a step."""
        steps = sum(self.segments) + 2 * len(self.segments) + 1
        sizes = [len(part) for part in np.array_split(np.arange(self.targets), -(-self.targets // slots))]
        return [Load(size, steps, size * steps * engine.config.segment_size) for size in sizes]


def plan(
    engine: Engine,
    source: str | Path,
    segments: Sequence[int] = SEGMENTS,
    targets: int = 200,
    field: str | None = None,
) -> Plan:
    """Counts the tokens of a file, or of each file of a folder, and spreads `targets` over them.

    Raises InputError where no document is long enough, ValueError.
    """
    check_scorable(engine.config)
    if min(segments) < 1 or targets < 1:
        raise ValueError("segments and targets must be at least 1")
    columns, size, sources = tuple(sorted(set(segments))), engine.config.segment_size, _files(Path(source))
    if size < 2:
        raise ValueError("segment_size=1 leaves no token to predict inside a segment")
    free = [max(count_tokens(engine, file, field=field) // size - columns[-1], 0) for file in sources]
    if not sum(free):
        raise InputError(
            f"no document of {source} has {columns[-1] + 1} full segments of {size} tokens; "
            "give longer ones, or fewer segments with --segments"
        )
    count, ends = min(targets, sum(free)), np.cumsum(free)
    chosen = (np.arange(count) + 0.5) * sum(free) // count
    at = np.searchsorted(ends, chosen, side="right")
    starts = ends - free
    wanted = [tuple(int(c - starts[d]) + columns[-1] for c in chosen[at == d]) for d in range(len(sources))]
    return Plan(sources, tuple(wanted), columns, field)


def _files(path: Path) -> tuple[Path, ...]:
    if not path.exists():
        raise InputError(f"there is no text at {path}; give a file or a folder of them")
    return (path,) if path.is_file() else tuple(sorted(file for file in path.rglob("*") if file.is_file()))


def read_targets(engine: Engine, plan: Plan) -> Iterator[Target]:
    """The targets, each document streamed once; what is held is what one target needs."""
    size, before = engine.config.segment_size, plan.segments[-1]
    for document, (source, wanted) in enumerate(zip(plan.sources, plan.wanted, strict=True)):
        if not wanted:
            continue
        held: deque[np.ndarray] = deque(maxlen=before + 1)
        targets = set(wanted)
        with (
            open_input(engine, source, field=plan.field) as opened,
            opened.segments(Cut(size, size), engine.vocab_size) as segments,
        ):
            for index, segment in enumerate(opened.errors_of(segments)):
                held.append(np.array(segment.ids, dtype=np.int64))
                if index in targets:
                    yield Target(document, np.concatenate(held))
                if index == wanted[-1]:
                    break


def measure(engine: Engine, plan: Plan, slots: int = 16, on_step: OnStep = lambda tokens: None) -> Result:
    """Reads `slots` targets side by side. on_step is told the tokens of each step."""
    sizes = deque(len(part) for part in np.array_split(np.arange(plan.targets), -(-plan.targets // slots)))
    documents: list[int] = []
    losses: list[np.ndarray] = []
    batch: list[Target] = []
    for target in read_targets(engine, plan):
        batch.append(target)
        if len(batch) == sizes[0]:
            losses.append(_losses(engine, batch, plan.segments, on_step))
            documents += [target.document for target in batch]
            sizes.popleft()
            batch = []
    if len(documents) != plan.targets:
        raise InputError(f"expected {plan.targets} targets, found {len(documents)}: the text changed while it was read")
    return _result(np.concatenate(losses), documents, plan.segments, engine.config.segment_size - 1)


def _losses(engine: Engine, batch: Sequence[Target], segments: Sequence[int], on_step: OnStep) -> np.ndarray:
    """Mean NLL of each target's tokens, float64 [B, columns, 3]: own text, memory reset, memory of another."""
    size, before = engine.config.segment_size, segments[-1]
    ids = torch.from_numpy(np.stack([target.ids for target in batch])).to(engine.device)
    last = ids[:, before * size :]
    reset = _nll(engine, last, engine.initial_memory(len(batch)))
    on_step(last.numel())
    columns = []
    for count in segments:
        memory = engine.initial_memory(len(batch))
        for segment in range(before - count, before):
            memory = fold(engine, ids[:, segment * size : (segment + 1) * size], memory)
            on_step(size * len(batch))
        another = memory.roll(max(len(batch) // 2, 1), 0)  # in one text, the target furthest away
        columns.append(np.stack([_nll(engine, last, memory), reset, _nll(engine, last, another)], axis=1))
        on_step(2 * last.numel())
    losses = np.stack(columns, axis=1)
    if len(batch) == 1:
        losses[:, :, 2] = np.nan
    return losses


def _nll(engine: Engine, ids: Tensor, memory: Tensor) -> np.ndarray:
    """Mean over all tokens of a segment but the first, in nats, float64 [B]."""
    _, scores, _ = engine.executor.fold_with_scores(ids, memory, None)
    return -scores[:, 1:].double().mean(1).cpu().numpy()


def _result(losses: np.ndarray, documents: Sequence[int], segments: Sequence[int], tokens: int) -> Result:
    different = len(set(documents))
    by_document = different >= FEW_DOCUMENTS
    units = list(documents) if by_document else list(range(len(documents)))
    columns = []
    for index, count in enumerate(segments):
        own, reset, other = (float(np.exp(mean)) for mean in losses[:, index].mean(0))
        changes = [_change(losses[:, index, way] - losses[:, 0, way], units) for way in range(3)]
        columns.append(Column(count, own, reset, other, *changes))
    unit = "document" if by_document else "target"
    return Result(tuple(columns), tokens * len(documents), len(documents), different, unit)


def _change(differences: np.ndarray, units: Sequence[int]) -> Change:
    """Paired differences of the mean NLL [targets] -> the change of perplexity, with its bootstrap interval."""
    percent = _percent(float(differences.mean()))
    if len(set(units)) < 2 or not np.isfinite(differences).all():
        return Change(percent, None)
    low, high = bootstrap_mean(differences, units)
    return Change(percent, (_percent(low), _percent(high)))


def _percent(difference: float) -> float:
    return 100 * math.expm1(difference)
