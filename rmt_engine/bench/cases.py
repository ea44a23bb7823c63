"""What only the engine does: reading text, tokenizing, the first token of an answer, saving, resuming and forking."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle
from pathlib import Path

import numpy as np
import torch

from rmt_engine.bench.peak_memory import peak_memory
from rmt_engine.bench.readers import ENGINE, random_ids
from rmt_engine.bench.results import LEFT_OUT, Result, Row
from rmt_engine.bench.session import TOLERANCES, Limits, Session, relative_error
from rmt_engine.bench.timing import OnStep, timed
from rmt_engine.engine import Engine
from rmt_engine.evaluation.noise import noise_text
from rmt_engine.stream import Stream
from rmt_engine.text_input import tokenize_stream

QUESTION, QUESTION_TOKENS = "Where is Mary?", 16  # tokens of it where there is no tokenizer
OPERATIONS = 20  # of save, resume and fork in one repetition
SAMPLE = 200_000  # characters that tell how many of them make a token


def text(session: Session, tokens: int, limits: Limits) -> Row:
    """The scope `text`: from the bytes of a file to the memory state and the last logits."""
    row = _row(session, "text", tokens)
    if not session.has_tokenizer:
        return _without_tokenizer(row)
    path, row.amount = _text_file(session, tokens)
    sample, length = _text_file(session, session.prefix)
    reader, engine = session.engine_reader, session.engine
    once = timed(reader.text(sample), session.device)
    found = once.output

    def check() -> str:
        ids = torch.from_numpy(engine.tokenizer.encode(sample.read_text(encoding="utf-8")))
        expected = engine.forward(ids[None], output="none").memory_state
        assert found is not None
        error = relative_error(found, expected)
        return "" if error <= TOLERANCES[session.dtype] else f"the memory state is off by {error:.2g} of forward's"

    session.case(row, reader.text(path), check, once.seconds / length * row.amount, limits)
    row.engine.floor = session.floors.stream(row.amount, 1)
    if limits.memory and row.engine.seconds:
        row.engine.memory = peak_memory(session.setup, ENGINE, 1, 0, path)
    return row


def tokenize(session: Session, tokens: int, limits: Limits) -> Row:
    """The scope `tokenize`: the same file, its ids thrown away."""
    row = _row(session, "tokenize", tokens)
    if not session.has_tokenizer:
        return _without_tokenizer(row)
    tokenizer = session.engine.tokenizer
    path, row.amount = _text_file(session, tokens)

    def run(on_step: OnStep) -> None:
        for _ in tokenize_stream(tokenizer, path):
            pass

    def check() -> str:
        found = np.concatenate(list(tokenize_stream(tokenizer, path)))
        same = np.array_equal(found, tokenizer.encode(path.read_text(encoding="utf-8")))
        return "" if same else "the streamed tokens are not those of the whole text"

    estimate = timed(run, session.device).seconds
    return session.case(row, run, check, estimate, limits)


def ask(session: Session, limits: Limits) -> Row:
    """The scope `ask`: a state file is resumed and the first token of an answer chosen; a classifier's labels."""
    row = _row(session, "ask", None)
    row.amount = 1
    stream, path = _saved(session)
    answer = _answering(session)
    try:
        expected = answer(stream)
    except ValueError as error:  # the question does not fit into a segment of this checkpoint
        return _left_out(row, str(error))

    def run(on_step: OnStep) -> None:
        answer(session.engine.resume(path))

    def check() -> str:
        found = answer(session.engine.resume(path))
        return "" if found == expected else f"resumed it answers {found!r}, before it {expected!r}"

    return session.case(row, run, check, timed(run, session.device).seconds, limits)


def _answering(session: Session) -> Callable[[Stream], object]:
    engine = session.engine
    if engine.config.family != "decoder":
        return lambda stream: stream.classify()
    if session.has_tokenizer:
        return lambda stream: stream.ask(QUESTION, 1)
    question = random_ids(session.loaded, 1, QUESTION_TOKENS)[0]
    return lambda stream: _first_token(engine, stream, question)


def _first_token(engine: Engine, stream: Stream, question: np.ndarray) -> int:
    ids = torch.from_numpy(np.concatenate([stream.rest, question]))[None].to(engine.device)
    return int(engine.executor.prefill(ids, stream.place.memory, 1)[0].argmax())


def state(session: Session, limits: Limits) -> Iterator[Row]:
    """The scope `state`: how often a second a stream is saved, resumed and forked."""
    stream, path = _saved(session)
    resumed = session.engine.resume(path)
    again = path.with_name("again.state")

    def check() -> str:
        for other in (resumed, stream.fork()):
            if not torch.equal(other.memory, stream.memory) or not np.array_equal(other.rest, stream.rest):
                return "it is not the stream that was saved"
        return ""

    operations: dict[str, Callable[[], object]] = {
        "save": lambda: stream.save(again),
        "resume": lambda: session.engine.resume(path),
        "fork": stream.fork,
    }
    for name, operation in operations.items():
        row = _row(session, name, None)
        row.amount = OPERATIONS
        run = _repeated(operation)
        yield session.case(row, run, check, timed(run, session.device).seconds, limits)


def _repeated(operation: Callable[[], object]) -> Callable[[OnStep], None]:
    def run(on_step: OnStep) -> None:
        for _ in range(OPERATIONS):
            operation()

    return run


def _saved(session: Session) -> tuple[Stream, Path]:
    """A stream with half a segment at its rest, and its file."""
    stream = session.engine.stream()
    stream.feed(random_ids(session.loaded, 1, session.prefix)[0])
    path = session.folder / "bench.state"
    stream.save(path)
    return stream, path


def _row(session: Session, scope: str, tokens: int | None) -> Row:
    return Row(scope, session.title, 1, session.dtype_name, tokens)


def _without_tokenizer(row: Row) -> Row:
    return _left_out(row, "there is no tokenizer: give --model a folder that has one")


def _left_out(row: Row, reason: str) -> Row:
    row.results.append(Result(ENGINE, LEFT_OUT, reason))
    return row


@cache
def _noise() -> str:
    return noise_text()


def _text_file(session: Session, tokens: int) -> tuple[Path, int]:
    """About `tokens` tokens of held-out Python sources, over and over; the file, and how many they are."""
    tokenizer, noise = session.engine.tokenizer, _noise()
    characters = round(tokens * SAMPLE / len(tokenizer.encode(noise[:SAMPLE])))
    path = session.folder / f"{tokens}.txt"
    with open(path, "w", encoding="utf-8") as file:
        for piece in cycle([noise]):
            file.write(piece[:characters])
            characters -= len(piece)
            if characters <= 0:
                break
    return path, sum(len(ids) for ids in tokenize_stream(tokenizer, path))
