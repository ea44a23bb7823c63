"""One unbounded input: fed piece by piece, asked at any time, saved and resumed, never held whole."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from rmt_engine.asking import (
    NumberedPieces,
    Pieces,
    answer,
    answer_in_pieces,
    check_fits,
    decoding_of,
    in_turns,
    joined,
    only_piece,
    question_ids,
)
from rmt_engine.errors import NumericalError, StateError
from rmt_engine.layouts import Cut, check_alignment
from rmt_engine.memory import MemoryState, StateFile
from rmt_engine.sampling import Prompt
from rmt_engine.scoring import Scores, check_scorable
from rmt_engine.text_input import Utf8Decoder

if TYPE_CHECKING:
    from rmt_engine.engine import Engine

Ids = np.ndarray | Tensor | Sequence[int]
Many = list[str] | tuple[str, ...]
Plain = Literal[False]
InPieces = Literal[True]


class Stream:
    """Made by `Engine.stream`. A full segment is folded into the memory when the next token arrives, or at `finish`.

    memory: the memory state [M, E]; position: tokens read; rest: ids of the segment not yet folded.
    """

    def __init__(
        self, engine: Engine, length: int | None = None, alignment: str | None = None, score: bool = False
    ) -> None:
        self.engine = engine
        if score:
            check_scorable(engine.config)
        alignment = check_alignment(alignment or engine.config.alignment)
        if length is not None and length < 0:
            raise ValueError(f"length must be at least 0; got {length}")
        if alignment != "left" and length is None:
            raise ValueError(
                f"this checkpoint aligns segments {alignment}, which needs the length: "
                'use engine.stream(length=N), or engine.stream(alignment="left")'
            )
        cut = Cut.of(length or 0, engine.config.segment_size, alignment)
        # All that a stream is, replaced whole and never written in place: an interruption falls between two states.
        self.place = MemoryState(
            engine.initial_memory(),
            cut.first,
            cut.size,
            length if alignment != "left" else None,
            scores=Scores() if score else None,
        )

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    @property
    def memory(self) -> Tensor:
        return self.place.memory[0]

    @property
    def rest(self) -> np.ndarray:
        return self.place.rest

    @property
    def position(self) -> int:
        return self.place.position

    @property
    def segments(self) -> int:
        """Segments folded into the memory."""
        return self.place.segments

    def feed(self, text_or_ids: str | bytes | Ids) -> None:
        """Reads more: text, UTF-8 bytes that may end inside a character, or token ids (1-D).

        What the tokenizer holds back is flushed before ids. Raises ValueError for ids outside the vocabulary and more
        tokens than announced, InputError for bytes that are not UTF-8; the stream is then as it was. Raises
        NumericalError for a memory that is no longer finite; the stream then stands at the last segment that was.
        """
        with self._all_or_nothing():
            if isinstance(text_or_ids, bytes):
                self._feed_bytes(text_or_ids)
            elif isinstance(text_or_ids, str):
                self._flush_bytes()
                self._feed_text(text_or_ids)
            else:
                ids = as_ids(text_or_ids)
                self.flush()
                self._read(ids)

    def finish(self) -> None:
        """Folds the unfinished rest as a short segment. Raises ValueError before the announced length has come."""
        with self._all_or_nothing():
            self.flush()
            self._check_complete()
            self._fold_rest()

    def scores(self) -> Scores:
        """The scores of all that was read, the unfinished rest included: it is folded in a fork, the stream stays.

        Raises ValueError unless the stream was made with `score=True`.
        """
        if self.place.scores is None:
            raise ValueError("this stream is not scored: make it with engine.stream(score=True)")
        fork = self.fork()
        fork.flush()
        fork._fold_rest()
        assert fork.place.scores is not None
        return fork.place.scores

    def fork(self) -> Stream:
        """An independent stream at the same place."""
        return copy.copy(self)

    def save(self, path: str | Path, input: Mapping[str, Any] | None = None) -> None:
        """Writes the context to a small file, atomically; `Engine.resume` goes on from it with the same bits.

        input: the place in an input that is not read to its end (`InputPosition.to_dict`). Raises OSError.
        """
        StateFile(self.place, self.engine.origin, input).save(path)

    @overload
    def ask(
        self, question: str, max_new_tokens: int | None = ..., split: str = ..., *, stream: Plain = ..., **how: Any
    ) -> str: ...

    @overload
    def ask(
        self, question: str, max_new_tokens: int | None = ..., split: str = ..., *, stream: InPieces, **how: Any
    ) -> Pieces: ...

    @overload
    def ask(
        self, question: Many, max_new_tokens: int | None = ..., split: str = ..., *, stream: Plain = ..., **how: Any
    ) -> list[str]: ...

    @overload
    def ask(
        self, question: Many, max_new_tokens: int | None = ..., split: str = ..., *, stream: InPieces, **how: Any
    ) -> NumberedPieces: ...

    def ask(
        self,
        question: str | Many,
        max_new_tokens: int | None = 16,
        split: str = "fold",
        *,
        stream: bool = False,
        **how: Any,
    ) -> Any:
        """The answer to a question about what was read; to a list of questions their answers, decoded side by side.

        All of it happens in forks: the stream itself does not move. When rest and question do not fit one segment,
        split="fold" folds the rest first, and split="reference" cuts the concatenated ids as the authors' `generate`
        does. stream: the answer in pieces, as they come; of a list (number, piece). Closing that generator ends the
        decoding. how: temperature, top_k, top_p, repetition_penalty and seed (`Sampling`; greedy by default);
        stop=["…"], strings that end an answer; roll=True to go on through further segments, where max_new_tokens may
        be None. Raises ValueError when the answer cannot fit, before anything is decoded.
        """
        questions = [question] if isinstance(question, str) else list(question)
        ids = [question_ids(self.engine, text) for text in questions]
        return self._answers(ids, isinstance(question, str), split, max_new_tokens, stream, how)

    def generate(self, max_new_tokens: int | None = 16, *, stream: bool = False, **how: Any) -> Any:
        """The continuation of what was read, from a fork: a text, or with stream=True its pieces; options as `ask`."""
        return self._answers([np.empty(0, dtype=np.int64)], True, "fold", max_new_tokens, stream, how)

    def aask(self, question: str | Many, *arguments: Any, stream: bool = False, **how: Any) -> Any:
        """`ask` for asyncio: `await stream.aask(…)`, or `async for piece in stream.aask(…, stream=True)`.

        All that is awaited of one engine shares a thread, a piece at a time: answers take turns. Cancelling the task or
        closing the generator, ends the decoding after the piece that is being computed.
        """
        pieces = in_turns(self.engine, lambda: self.ask(question, *arguments, stream=True, **how))
        return pieces if stream else joined(pieces, None if isinstance(question, str) else len(question))

    def prompts(self, questions: Sequence[np.ndarray], split: str = "fold") -> list[Prompt]:
        """The answering segments of questions (ids [L]), if the stream ended here; what stands before them is folded
        in forks. Raises ValueError as `ask` does."""
        if split not in ("fold", "reference"):
            raise ValueError(f"split must be fold or reference; got {split!r}")
        if split == "reference" and self.place.length is not None:
            raise ValueError('split="reference" needs a stream that is aligned left: the question moves every border')
        read = self.fork()
        read.place = replace(read.place, scores=None)  # nobody asks for the scores of a question
        read.flush()
        folded = read.fork()  # its rest is folded when the first question needs it
        return [read._prompt(self.content(ids), folded, split) for ids in questions]

    def _prompt(self, question: np.ndarray, folded: Stream, split: str) -> Prompt:
        size = self.engine.config.segment_size
        if len(self.rest) + len(question) == 0:
            raise ValueError("nothing was read and nothing was asked: feed a text first")
        if len(self.rest) + len(question) <= size:
            return Prompt(np.concatenate([self.rest, question]), self.place.memory)
        if split == "reference":
            whole = self.fork()
            whole._read(question)
            return Prompt(whole.rest, whole.place.memory)
        if len(question) > size:
            raise ValueError(f"the question has {len(question)} tokens; a segment holds {size}")
        folded._fold_rest()
        return Prompt(question, folded.place.memory)

    def _answers(
        self,
        questions: Sequence[np.ndarray],
        single: bool,
        split: str,
        max_new_tokens: int | None,
        stream: bool,
        options: Mapping[str, Any],
    ) -> Any:
        how = decoding_of(self.engine, max_new_tokens, **options)
        prompts = self.prompts(questions, split)
        for prompt in prompts:
            check_fits(self.engine, len(prompt.ids), how)
        if stream:
            pieces = answer_in_pieces(self.engine, prompts, how)
            return only_piece(pieces) if single else pieces
        texts = answer(self.engine, prompts, how)
        return texts[0] if single else texts

    def classify(self) -> list[tuple[str, float]]:
        """A classifier's labels with their probabilities, best first, if the input ended here. The stream stays.

        Raises ValueError where nothing stands in the last segment, and before the announced length has come.
        """
        if self.engine.config.family != "encoder_classifier":
            raise ValueError("this checkpoint is a decoder: it has no labels; use ask or generate")
        fork = self.fork()
        fork.flush()
        fork._check_complete()
        if not len(fork.rest):
            raise ValueError("nothing stands in the last segment: classify before finish(), after feeding the input")
        logits = self.engine.executor.logits(fork._tensor(fork.rest), fork.place.memory)
        scores = logits[0].softmax(-1).tolist()
        names = self.engine.config.labels or [str(i) for i in range(len(scores))]
        return sorted(zip(names, scores, strict=True), key=lambda pair: -pair[1])

    def _feed_text(self, text: str) -> None:
        place = self.place
        tokenizer = self.engine.tokenizer.incremental(place.held_text, place.continued)
        ids = tokenizer.feed(text)
        self._read(ids, held_text=tokenizer.held, continued=tokenizer.continued)

    def _feed_bytes(self, data: bytes) -> None:
        decoder = Utf8Decoder(held=self.place.held_bytes, offset=self.place.bytes_read)
        self._feed_text(decoder.feed(data))
        self.place = replace(self.place, held_bytes=decoder.held, bytes_read=decoder.offset)

    def _flush_bytes(self) -> None:
        """The end of a text that came as bytes. Raises InputError inside a character."""
        if self.place.held_bytes:
            Utf8Decoder(held=self.place.held_bytes, offset=self.place.bytes_read).flush()
        self.place = replace(self.place, bytes_read=0)

    def flush(self) -> None:
        """Ends the text that was fed so far: what the tokenizer holds back becomes tokens."""
        self._flush_bytes()
        place = self.place
        if place.held_text or place.continued:
            ids = self.engine.tokenizer.incremental(place.held_text, place.continued).flush()
            self._read(ids, held_text="", continued=False)

    def content(self, ids: np.ndarray) -> np.ndarray:
        """Ids of the vocabulary, int64, without those that the checkpoint drops."""
        wrong = np.flatnonzero((ids < 0) | (ids >= self.engine.vocab_size))
        if len(wrong):
            last = self.engine.vocab_size - 1
            raise ValueError(f"token id {ids[wrong[0]]} at place {wrong[0]} is outside 0..{last} (vocab_size)")
        if self.engine.config.drop_ids:
            ids = ids[~np.isin(ids, self.engine.config.drop_ids)]
        return ids.astype(np.int64)

    def _read(self, ids: np.ndarray, **text: Any) -> None:
        """Reads ids, and sets what the tokenizer holds back after them."""
        ids = self.content(ids)
        length, position = self.place.length, self.position + len(ids)
        if length is not None and position > length:
            raise ValueError(f"the stream was made for {length} tokens of content; {position} have come")
        self.take(ids, **text)

    def take(self, ids: np.ndarray, **text: Any) -> None:
        """`feed` for checked ids [N] of content, as a segment stream gives them."""
        waiting, start, place = np.concatenate([self.rest, ids]), 0, self.place
        while len(waiting) - start > place.next_size:
            end = start + place.next_size
            place = self._folded(replace(place, rest=waiting[:0]), waiting[start:end])
            start = end
            if len(waiting) - start > place.next_size:  # the last one is set below, together with its rest
                self.place = place
        self.place = replace(place, rest=waiting[start:].copy(), **text)

    def _fold_rest(self) -> None:
        if len(self.rest):
            self.place = self._folded(replace(self.place, rest=self.rest[:0]), self.rest)

    def _check_complete(self) -> None:
        length = self.place.length
        if length is not None and self.position < length:
            raise ValueError(f"the stream was made for {length} tokens of content; only {self.position} have come")

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        before = self.place
        try:
            yield
        except NumericalError:
            raise
        except BaseException:
            self.place = before
            raise

    def _folded(self, place: MemoryState, ids: np.ndarray) -> MemoryState:
        executor, tensor = self.engine.executor, self._tensor(ids)
        if place.scores is None:
            return after_segment(place, len(ids), executor.fold(tensor, place.memory))
        return after_segment(place, len(ids), *executor.fold_with_scores(tensor, place.memory, place.scores.row))

    def _tensor(self, ids: np.ndarray) -> Tensor:
        return torch.from_numpy(ids).to(self.engine.device)[None]


def after_segment(
    place: MemoryState,
    tokens: int,
    memory: Tensor,
    log_probabilities: Tensor | None = None,
    row: Tensor | None = None,
    finite: bool | None = None,
) -> MemoryState:
    """The place after a segment of `tokens` tokens, from what the executor gave for it: the new memory [1, M, E]; in a
    stream that is scored also its log-probabilities [1, L] and last row [1, E]. finite: of the memory, where that is
    known. Raises NumericalError."""
    if not (bool(memory.isfinite().all()) if finite is None else finite):
        raise NumericalError(
            f"the memory state is not finite after segment {place.segments} (tokens {place.folded} to "
            f"{place.folded + tokens - 1}); the stream stands before it. Half-precision overflows where "
            "float32 does not: try --dtype float32"
        )
    scores = place.scores
    if scores is not None:
        assert log_probabilities is not None and row is not None
        scores = scores.add(log_probabilities[0].cpu().numpy(), row)
    return replace(place, memory=memory, segments=place.segments + 1, folded=place.folded + tokens, scores=scores)


def as_ids(ids: Ids) -> np.ndarray:
    """1-D integers of any kind as an array. Raises ValueError for anything else."""
    array = np.asarray(ids)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"expected 1-D integer token ids, got {array.dtype} {list(array.shape)}")
    return array


def resume(engine: Engine, path: str | Path, allow_inexact: bool = False) -> tuple[Stream, Mapping[str, Any] | None]:
    """The stream of a state file, and the place in its input if that was not read to the end. Raises StateError."""
    saved = StateFile.load(path)
    saved.origin.check(engine.origin, allow_inexact)
    initial = engine.initial_memory()
    if saved.state.memory.shape != initial.shape:
        raise StateError(f"{path}: memory {list(saved.state.memory.shape)}, expected {list(initial.shape)}")
    place, size, vocab = saved.state, engine.config.segment_size, engine.vocab_size
    if place.size > size or len(place.rest[(place.rest < 0) | (place.rest >= vocab)]):
        raise StateError(f"{path}: its segments of {place.size} or the ids in them do not fit this model")
    stream = Stream(engine, alignment="left")
    scores = saved.state.scores
    if scores is not None and scores.row is not None:
        scores = replace(scores, row=scores.row.to(initial))
    stream.place = replace(saved.state, memory=saved.state.memory.to(initial), scores=scores)
    return stream, saved.input
