"""BABILong (Kuratov et al., 2024): its samples as published, put as its prompts are, scored by its rules.

A sample has `input` (facts of a bAbI task among sentences of books), `question` and `target`. Files are JSON, JSON
lines, Parquet or Arrow; the task and the length stand in their path: data/qa1/4k.json, 4k/qa1-00000-of-00001.parquet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rmt_engine.engine import Engine
from rmt_engine.errors import InputError, RMTError, TokenizerError
from rmt_engine.evaluation.cost import Load
from rmt_engine.evaluation.intervals import wilson
from rmt_engine.evaluation.reading import OnStep
from rmt_engine.evaluation.store import Key, Store

PLAIN = "{context} {question}"  # how the authors put samples to their RMT checkpoints
FIELDS = ("input", "question", "target")
SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".arrow")
RATE_CHARS = 20_000  # of a file's first sample, from which tokens are estimated
SAVED_EVERY = 16  # samples answered between two writes of the store

_ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_ROUTES = ("e,e", "e,n", "e,s", "n,e", "n,n", "n,w", "s,e", "s,s", "s,w", "w,n", "w,s", "w,w")
LABELS: Mapping[str, tuple[str, ...]] = {  # every answer that a bAbI task has
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4", "qa11", "qa12", "qa13"), _ROOMS),
    **dict.fromkeys(("qa6", "qa9", "qa17", "qa18"), ("no", "yes")),
    "qa5": ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"),
    "qa7": ("none", "one", "two", "three"),
    "qa8": ("apple", "football", "milk", "nothing"),
    "qa10": ("maybe", "no", "yes"),
    "qa14": ("bedroom", "cinema", "kitchen", "office", "park", "school"),
    "qa15": ("cat", "mouse", "sheep", "wolf"),
    "qa16": ("gray", "green", "white", "yellow"),
    "qa19": _ROUTES,
    "qa20": ("bedroom", "bored", "garden", "hungry", "kitchen", "thirsty", "tired"),
}


@dataclass(frozen=True)
class Sample:
    """One question about one context."""

    context: str
    question: str
    target: str


@dataclass(frozen=True)
class SampleFile:
    """A file of samples; task and length (`4k`) as its path says; name: its path in the folder that was given."""

    path: Path
    task: str
    length: str
    name: str

    def key(self, index: int) -> Key:
        """What names a sample of the file."""
        return self.task, self.length, self.name, index


@dataclass(frozen=True)
class Score:
    """A file's result. wrong: question, target and answer of each miss."""

    task: str
    length: str
    samples: int
    correct: int
    wrong: tuple[tuple[str, str, str], ...]

    @property
    def accuracy(self) -> float:
        return self.correct / self.samples

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.correct, self.samples)


# ------------------------------------------------------------------------------------------------------------ scoring


def is_right(target: str, output: str, question: str, labels: Sequence[str]) -> bool:
    """BABILong's rule: of the task's labels, the output's first sentence names the target and no other one.

    Labels that stand in the question do not count, and case does not matter. A target of several parts, joined by
    commas, needs all of them. The published code also cuts at the word Question, but in lower-cased text, where it
    never stands; so it is left out here.
    """
    said = output.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    known = {label.lower() for label in labels}
    named = {label for label in known if label in said and label not in question.lower()}
    wanted = target.lower()
    # Routes ("e,s") are single labels that hold a comma; they have three characters.
    parts = wanted.split(",") if "," in wanted and len(wanted) > 3 else [wanted]
    return all(part in named for part in parts) and len(named) == len(parts)


# ------------------------------------------------------------------------------------------------------------ prompts


def check_template(template: str) -> str:
    """The template itself. Raises ValueError unless it holds both fields."""
    if "{context}" not in template or "{question}" not in template:
        raise ValueError(f"the prompt must hold {{context}} and {{question}}; got {template!r}")
    return template


def plain_prompt(sample: Sample, template: str = PLAIN) -> str:
    """A sample put into a template."""
    before, after = template.split("{context}", 1)
    parts = [part.replace("{question}", sample.question) for part in (before, after)]
    return sample.context.join(parts)


def instructed_prompt(sample: Sample, parts: Mapping[str, str]) -> str:
    """The layout of BABILong's instructed prompts: instruction, examples and post_prompt, then context and question."""
    told = [parts.get(name, "") for name in ("instruction", "examples", "post_prompt")]
    asked = f"<context>\n{sample.context.strip()}\n</context>\n\nQuestion: {sample.question}"
    return "\n\n".join([*told, asked]).strip()


def read_instructions(path: str | Path) -> dict[str, dict[str, str]]:
    """JSON: task -> {instruction, examples, post_prompt}. Raises InputError."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no JSON file of instructions: {error}") from None
    if not isinstance(found, dict) or not all(_is_text_map(parts) for parts in found.values()):
        raise InputError(f"{path}: expected an object, task -> instruction, examples, post_prompt")
    return found


def _is_text_map(parts: Any) -> bool:
    return isinstance(parts, dict) and all(isinstance(text, str) for text in parts.values())


# -------------------------------------------------------------------------------------------------------------- files


def find_files(
    source: str | Path, tasks: Sequence[str] | None = None, lengths: Sequence[str] | None = None
) -> list[SampleFile]:
    """The files of samples under a folder, or one file, of these tasks and lengths. Raises InputError."""
    root = Path(source)
    if not root.exists():
        raise InputError(f"there are no samples at {root}; give a file of BABILong's data set or a folder of them")
    paths = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.suffix in SUFFIXES)
    named = [_named(path, path.absolute() if root.is_file() else path.relative_to(root)) for path in paths]
    files = [
        file
        for file in named
        if file is not None and (not tasks or file.task in tasks) and (not lengths or file.length in lengths)
    ]
    if not files:
        raise InputError(
            f"{root} has no samples of these tasks and lengths: expected {', '.join(SUFFIXES)} files whose path names "
            "a task and a length, as data/qa1/4k.json or 4k/qa1-00000-of-00001.parquet do"
        )
    return sorted(files, key=lambda file: (int(file.task[2:]), _tokens(file.length), str(file.path)))


def _named(path: Path, relative: Path) -> SampleFile | None:
    tasks = re.findall(r"(?<![^\W_])(qa\d+)(?!\d)", str(relative))
    lengths = re.findall(r"(?<![^\W_])(\d+[kM])(?![^\W_])", str(relative))
    if not tasks or not lengths or tasks[-1] not in LABELS:
        return None
    return SampleFile(path, tasks[-1], lengths[-1], relative.as_posix())


def _tokens(length: str) -> int:
    return int(length[:-1]) * {"k": 1_000, "M": 1_000_000}[length[-1]]


def read_samples(path: Path, limit: int | None = None) -> Iterator[Sample]:
    """The samples of a file, or its first `limit`, one at a time where the format allows it. Raises InputError."""
    number = -1
    for number, record in enumerate(islice(_records(path), limit)):
        if not isinstance(record, dict) or not all(isinstance(record.get(name), str) for name in FIELDS):
            raise InputError(f"{path}, sample {number}: expected the texts {', '.join(FIELDS)}")
        yield Sample(record["input"], record["question"], record["target"])
    if number < 0:
        raise InputError(f"{path} holds no samples")


def _records(path: Path) -> Iterator[Any]:
    if path.suffix in (".parquet", ".arrow"):
        yield from _arrow_records(path)
        return
    try:
        with open(path, encoding="utf-8-sig") as file:
            if file.read(64).lstrip().startswith("["):  # an array is one JSON value: it can only be read whole
                file.seek(0)
                yield from json.load(file)
                return
            file.seek(0)
            yield from (json.loads(line) for line in file if line.strip())
    except ValueError as error:
        raise InputError(f"{path}: expected a JSON array, or a JSON object a line: {error}") from None


def _arrow_records(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path} needs a package that is not here: pip install 'rmt-engine[parquet]'") from None
    try:
        batches = parquet.ParquetFile(path).iter_batches(1) if path.suffix == ".parquet" else _arrow_batches(path)
        for batch in batches:
            for row in range(batch.num_rows):
                yield from batch.slice(row, 1).to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} cannot be read by pyarrow: {error}") from None


def _arrow_batches(path: Path) -> Iterator[Any]:
    """Record batches of an Arrow file: the datasets library writes the stream format, others the file format."""
    import pyarrow
    from pyarrow import ipc

    with pyarrow.memory_map(str(path)) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        if is_file:
            reader = ipc.open_file(file)
            yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            yield from ipc.open_stream(file)


# ------------------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class Prompts:
    """How samples are put: in a template, or with instructions by task in BABILong's own layout."""

    template: str = PLAIN
    instructions: Mapping[str, Mapping[str, str]] | None = None

    def of(self, task: str, sample: Sample) -> str:
        """Raises ValueError for a task without instructions."""
        if self.instructions is None:
            return plain_prompt(sample, self.template)
        if task not in self.instructions:
            raise ValueError(f"the instructions say nothing of {task}")
        return instructed_prompt(sample, self.instructions[task])


def evaluate(
    engine: Engine,
    files: Sequence[SampleFile],
    prompts: Prompts | None = None,
    store: Store | None = None,
    *,
    limit: int | None = None,
    max_new_tokens: int = 20,
    slots: int = 16,
    on_step: OnStep = lambda tokens: None,
) -> Iterator[Score]:
    """Yields the score of each file; `slots` samples are read side by side.

    The whole prompt is tokenized as one text and cut as the authors' `generate` cuts it: context and question are not
    told apart. Raises ValueError for a classifier, and whatever a prompt that cannot be read raises.
    """
    if engine.config.family != "decoder":
        raise ValueError("BABILong asks for generated answers: this checkpoint is a classifier")
    prompts, store = prompts or Prompts(), Store() if store is None else store
    for file in files:
        reading = _Reading(file)
        documents = reading.documents(engine, prompts, store, limit)
        _answer(engine, documents, reading.missing, store, max_new_tokens, slots, on_step)
        yield _score(file, reading.asked, [store.answers[key, 0] for key in reading.keys])


class _Reading:
    """What is met while a file's samples are read; their contexts are not kept.

    asked: question and target of each. missing: keys of those that were not answered before, in their order.
    """

    def __init__(self, file: SampleFile):
        self.file = file
        self.asked: list[tuple[str, str]] = []
        self.missing: list[Key] = []

    @property
    def keys(self) -> list[Key]:
        return [self.file.key(index) for index in range(len(self.asked))]

    def documents(self, engine: Engine, prompts: Prompts, store: Store, limit: int | None) -> Iterator[np.ndarray]:
        """The ids of the prompts that are missing, each made when it is taken."""
        for index, sample in enumerate(read_samples(self.file.path, limit)):
            self.asked.append((sample.question, sample.target))
            if (self.file.key(index), 0) not in store.answers:
                self.missing.append(self.file.key(index))
                yield encode(engine, prompts.of(self.file.task, sample))


def loads(engine: Engine, files: Sequence[SampleFile], store: Store, limit: int | None, slots: int) -> list[Load]:
    """What is left to read, as `cost.estimate` takes it: its characters, times the tokens of one among the first."""
    found = []
    for file in files:
        chars, rate = 0, 0.0
        for index, sample in enumerate(read_samples(file.path, limit)):
            if (file.key(index), 0) in store.answers:
                continue
            begin = f"{sample.context[:RATE_CHARS]} {sample.question}"
            rate = rate or len(engine.tokenizer.encode(begin)) / len(begin)
            chars += len(sample.context) + len(sample.question) + 1
        tokens = round(chars * rate)
        found.append(Load(slots, -(-tokens // (slots * engine.config.segment_size)), tokens))
    return found


def encode(engine: Engine, prompt: str) -> np.ndarray:
    """The ids of a prompt, in pieces where the tokenizer can be cut: a text of 40 MB takes no GB that way."""
    tokenizer = engine.tokenizer
    try:
        pieces = tokenizer.incremental()
    except TokenizerError:  # the whole at once gives the same ids
        return tokenizer.encode(prompt)
    parts = [pieces.feed(prompt[start : start + (1 << 20)]) for start in range(0, len(prompt), 1 << 20)]
    return np.concatenate([*parts, pieces.flush()])


def _answer(
    engine: Engine,
    documents: Iterator[np.ndarray],
    keys: Sequence[Key],
    store: Store,
    max_new_tokens: int,
    slots: int,
    on_step: OnStep,
) -> None:
    waiting: list[tuple[Key, int, str]] = []
    for result in engine.run_many(documents, slots=slots, order="completed", on_step=on_step):
        if result.error is not None:
            raise result.error if isinstance(result.error, RMTError) else ValueError(str(result.error))
        assert result.stream is not None
        waiting.append((keys[result.index], 0, result.stream.generate(max_new_tokens).strip()))
        if len(waiting) == SAVED_EVERY:
            store.add(waiting)
            waiting = []
    store.add(waiting)


def _score(file: SampleFile, asked: Sequence[tuple[str, str]], answers: Sequence[str]) -> Score:
    labels = LABELS[file.task]
    wrong = tuple(
        (question, target, given)
        for (question, target), given in zip(asked, answers, strict=True)
        if not is_right(target, given, question, labels)
    )
    return Score(file.task, file.length, len(asked), len(asked) - len(wrong), wrong)
