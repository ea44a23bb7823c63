"""Questions to a context: the answering segments, the answers as text or in pieces, and their asyncio twins."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from rmt_engine.sampler import Sampling
from rmt_engine.sampling import Answer, Decoding, Prompt, decode, finished

if TYPE_CHECKING:
    from rmt_engine.engine import Engine

Item = TypeVar("Item")
Pieces = Generator[str, None, None]
NumberedPieces = Generator[tuple[int, str], None, None]


def decoding_of(
    engine: Engine, max_new_tokens: int | None, *, stop: Sequence[str] = (), roll: bool = False, **sampling: Any
) -> Decoding:
    """What the options of `Stream.ask` mean. Raises ValueError for a classifier and for what no answer can be."""
    if engine.config.family != "decoder":
        raise ValueError("this checkpoint is a classifier: it generates no text; use classify")
    try:
        chosen = Sampling(**sampling)
    except TypeError:
        known = ", ".join(["stop", "roll", *Sampling.__dataclass_fields__])
        raise TypeError(f"expected options of {known}; got {', '.join(sampling)}") from None
    return Decoding(max_new_tokens, engine.config.stop_ids, stop, roll, chosen)


def question_ids(engine: Engine, question: str) -> np.ndarray:
    """A question as the checkpoint was taught to read it, int64 [L]."""
    return engine.tokenizer.encode(engine.config.ask_template.replace("{question}", question))


def check_question(engine: Engine, question: str, how: Decoding) -> None:
    """Tells before a text is read what can never be answered after it. Raises ValueError."""
    if not question.strip():
        raise ValueError("expected a question, got an empty one")
    length = len(question_ids(engine, question))
    if length > engine.config.segment_size:
        raise ValueError(f"the question {question!r} has {length} tokens; a segment holds {engine.config.segment_size}")
    check_fits(engine, length, how)


def check_fits(engine: Engine, text: int, how: Decoding) -> None:
    """Raises ValueError unless `text` tokens and their answer fit the answering segment, or decoding rolls on."""
    if not how.roll:
        assert how.max_new_tokens is not None
        engine.check_answer_fits(text, how.max_new_tokens)


def answer(engine: Engine, prompts: Sequence[Prompt], how: Decoding) -> list[str]:
    """The answers to prompts, side by side."""
    tokenizer = engine.tokenizer
    with closing(_decoded(engine, prompts, how, in_pieces=bool(how.stop))) as decoding:
        if not how.stop:
            return [tokenizer.decode(answer.ids) for answer in finished(decoding)]
        texts = [""] * len(prompts)
        for number, piece in decoding:
            texts[number] += piece
    return texts


def answer_in_pieces(engine: Engine, prompts: Sequence[Prompt], how: Decoding) -> NumberedPieces:
    """(number of the prompt, piece of its answer) as the text becomes certain; joined they are what `answer` gives."""
    yield from _decoded(engine, prompts, how, in_pieces=True)


def only_piece(pieces: NumberedPieces) -> Pieces:
    """The pieces of a single answer."""
    with closing(pieces):
        for _, piece in pieces:
            yield piece


def _decoded(
    engine: Engine, prompts: Sequence[Prompt], how: Decoding, in_pieces: bool
) -> Generator[tuple[int, str], None, list[Answer]]:
    tokenizer = engine.tokenizer if in_pieces else None
    return decode(engine.executor, engine.config.segment_size, prompts, how, tokenizer)


async def joined(pieces: AsyncGenerator[Any, None], count: int | None) -> str | list[str]:
    """The whole of one answer's pieces, or, of numbered ones, of `count` answers."""
    texts = [""] * (1 if count is None else count)
    async with aclosing(pieces):
        async for piece in pieces:
            number, text = (0, piece) if count is None else piece
            texts[number] += text
    return texts[0] if count is None else texts


async def in_turns(engine: Engine, start: Callable[[], Generator[Item, None, None]]) -> AsyncGenerator[Item, None]:
    """What a generator gives, each step in the engine's own thread; one that is left early is closed there."""
    loop, steps = asyncio.get_running_loop(), _begun_by(start)
    try:
        while (item := await loop.run_in_executor(engine.thread, next, steps, None)) is not None:
            yield item
    finally:
        engine.thread.submit(steps.close)  # behind the step that may be running


def _begun_by(start: Callable[[], Generator[Item, None, None]]) -> Generator[Item, None, None]:
    """Begins in the thread that asks for the first item: folding a rest is work too."""
    yield from start()
