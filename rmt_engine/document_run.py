"""Many documents from the command line: their results as JSON lines, in a folder where a run can go on, or at once."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmt_engine.documents import Document
from rmt_engine.errors import InputError
from rmt_engine.results import ResultsFolder
from rmt_engine.slots import POOLINGS, DocumentResult

if TYPE_CHECKING:
    from rmt_engine.engine import Engine

FAILURES_SHOWN = 20


@dataclass(frozen=True)
class Wanted:
    """What a line holds besides id, index, tokens and segments."""

    questions: Sequence[str] = ()
    score: bool = False
    pooling: str | None = None
    save_states: bool = False


@dataclass
class Tally:
    """What became of a run. skipped: done by an earlier one. failures: the first ones, as lines."""

    done: int = 0
    skipped: int = 0
    failed: int = 0
    tokens: int = 0
    seconds: float = 0.0
    failures: list[dict[str, Any]] = field(default_factory=list)


class DocumentRun:
    """One run: gives each document that is not done to `Engine.run_many`, and each result to `write`."""

    def __init__(self, engine: Engine, wanted: Wanted, options: Mapping[str, Any]) -> None:
        self.engine, self.wanted, self.options = engine, wanted, options
        self.tally = Tally()
        self._numbers: dict[str, int] = {}  # id -> number in the input, of what is open
        self._known: set[str] = set()

    def about(self) -> dict[str, Any]:
        """What lines of one folder have in common."""
        origin, wanted = self.engine.origin, self.wanted
        apart = ("slots", "order", "on_step", "errors")
        options = {key: value for key, value in self.options.items() if key not in apart and value is not None}
        return {"format": 1, "model": origin.model, "dtype": origin.dtype, **vars(wanted), "options": options}

    def into(self, documents: Iterable[Document], output: str | Path, order: str) -> Tally:
        """Appends to the results in a folder. order: "input" sorts them at the end."""
        with ResultsFolder(output, self.about()) as results:
            states = results.folder / "states" if self.wanted.save_states else None
            if states is not None:
                states.mkdir(exist_ok=True)
            self._run(documents, results.done, results.add, results.add_failure, states)
            if order == "input":
                results.sort()
        return self.tally

    def onto(self, documents: Iterable[Document], write: Callable[[Mapping[str, Any]], None]) -> Tally:
        """Writes the results, and failures too, and keeps nothing."""
        self._run(documents, set(), write, write, None)
        return self.tally

    def _run(
        self,
        documents: Iterable[Document],
        done: set[str],
        write: Callable[[Mapping[str, Any]], None],
        write_failure: Callable[[Mapping[str, Any]], None],
        states: Path | None,
    ) -> None:
        start = time.perf_counter()
        results = self.engine.run_many(
            self._left(documents, done), ask=self.wanted.questions, score=self.wanted.score, **self.options
        )
        with closing(results):
            for result in results:
                index = self._numbers.pop(result.id, result.index)
                if result.error is None:
                    write(self._line(result, index, states))
                    self.tally.done += 1
                    self.tally.tokens += result.tokens
                else:
                    line = {"id": result.id, "index": index, "error": str(result.error)}
                    write_failure(line)
                    self.tally.failed += 1
                    self.tally.failures += [line][: FAILURES_SHOWN - len(self.tally.failures)]
                self.tally.seconds = time.perf_counter() - start

    def _left(self, documents: Iterable[Document], done: set[str]) -> Iterator[Document]:
        """Those that are not done; one whose id has come before is an error."""
        for index, document in enumerate(documents):
            name = document.id if document.id is not None else str(index)
            if name in self._known:
                twice = f"{name} (again, number {index})"
                self._numbers[twice] = index
                yield Document(twice, InputError(f"the id {name!r} has come before: ids tell documents apart"))
                continue
            self._known.add(name)
            if name in done:
                self.tally.skipped += 1
            else:
                self._numbers[name] = index
                yield Document(name, document.source)

    def _line(self, result: DocumentResult, index: int, states: Path | None) -> dict[str, Any]:
        assert result.stream is not None
        line: dict[str, Any] = {"id": result.id, "index": index, "tokens": result.tokens, "segments": result.segments}
        if self.wanted.questions:
            pairs = zip(self.wanted.questions, result.answers, strict=True)
            line["answers"] = [{"question": question, "answer": text.strip()} for question, text in pairs]
        if result.labels:
            line["labels"] = [{"label": name, "score": score} for name, score in result.labels]
        if self.wanted.score:
            line["score"] = result.stream.scores().total.to_dict()
        if states is not None:
            path = states / f"{index:06d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', result.id)[-80:]}.state"
            result.stream.save(path)
            line["state"] = f"{states.name}/{path.name}"
        if self.wanted.pooling is not None:
            result.stream.finish()
            line["features"] = POOLINGS[self.wanted.pooling](result.stream.memory).float().tolist()
        return line
