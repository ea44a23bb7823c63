"""One unbounded input: fed piece by piece, asked at any time, never held whole."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rmt_engine.layouts import Cut
from rmt_engine.sampling import generate
from rmt_engine.tokens import IncrementalTokenizer

if TYPE_CHECKING:
    from rmt_engine.engine import Engine

Ids = np.ndarray | Tensor | Sequence[int]


class Stream:
    """Made by `Engine.stream`. A full segment is folded into the memory when the next token arrives, or at `finish`.

    memory: the memory state [M, E]; position: tokens read; rest: ids of the segment not yet folded.
    """

    def __init__(self, engine: Engine, length: int | None = None, alignment: str | None = None):
        self.engine = engine
        alignment = alignment or engine.config.alignment
        if alignment != "left" and length is None:
            raise ValueError(
                f"this checkpoint aligns segments {alignment}, which needs the length: "
                'use engine.stream(length=N), or engine.stream(alignment="left")'
            )
        self.cut = Cut.of(length or 0, engine.config.segment_size, alignment)
        self.length = length if alignment != "left" else None
        self.state = engine.initial_memory()  # [1, M, E]
        self.rest = np.empty(0, dtype=np.int64)
        self.segments = 0
        self.folded = 0
        self._text: IncrementalTokenizer | None = None  # made when text comes

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    @property
    def memory(self) -> Tensor:
        return self.state[0]

    @property
    def position(self) -> int:
        return self.folded + len(self.rest)

    def feed(self, text_or_ids: str | Ids) -> None:
        """Reads more: text, or token ids (1-D). Text held back by the tokenizer is flushed before ids.

        Raises ValueError for ids outside the vocabulary; the stream is then as it was.
        """
        if isinstance(text_or_ids, str):
            if self._text is None:
                self._text = self.engine.tokenizer.incremental()
            self._read(self._text.feed(text_or_ids))
        else:
            ids = self._checked(text_or_ids)
            self._flush_text()
            self._read(ids)

    def finish(self) -> None:
        """Folds the unfinished rest as a short segment."""
        self._flush_text()
        if len(self.rest):
            self.fold(self.rest)
            self.rest = self.rest[:0]

    def fork(self) -> Stream:
        """An independent stream at the same place."""
        twin = copy.copy(self)
        twin._text = None if self._text is None else self._text.clone()
        return twin  # the state and the rest are replaced, never written in place

    def ask(self, question: str, max_new_tokens: int = 16, split: str = "fold") -> str:
        """The greedy answer to a question about what was read, from a fork: the stream itself does not move.

        When rest and question do not fit one segment, split="fold" folds the rest first, and split="reference" cuts
        the concatenated ids as the authors' `generate` does. Raises ValueError when the answer cannot fit.
        """
        text = self.engine.config.ask_template.replace("{question}", question)
        return self._answer(self.engine.tokenizer.encode(text), max_new_tokens, split)

    def generate(self, max_new_tokens: int = 16) -> str:
        """The greedy continuation of what was read, from a fork."""
        return self._answer(np.empty(0, dtype=np.int64), max_new_tokens, "fold")

    def classify(self) -> list[tuple[str, float]]:
        """A classifier's labels with their probabilities, best first, if the input ended here. The stream stays."""
        if self.engine.config.family != "encoder_classifier":
            raise ValueError("this checkpoint is a decoder: it has no labels; use ask or generate")
        fork = self.fork()
        fork._flush_text()
        if not len(fork.rest):
            raise ValueError("nothing stands in the last segment: classify before finish(), after feeding the input")
        logits = self.engine.executor.logits(fork._tensor(fork.rest), fork.state)
        scores = logits[0].softmax(-1).tolist()
        names = self.engine.config.labels or [str(i) for i in range(len(scores))]
        return sorted(zip(names, scores, strict=True), key=lambda pair: -pair[1])

    def _answer(self, question: np.ndarray, max_new_tokens: int, split: str) -> str:
        engine = self.engine
        if engine.config.family != "decoder":
            raise ValueError("this checkpoint is a classifier: it generates no text; use classify")
        fork = self.fork()
        fork._flush_text()
        final = fork._final_segment(question, split)
        engine.check_answer_fits(len(final), max_new_tokens)
        new = generate(engine.executor, fork._tensor(final), fork.state, max_new_tokens, engine.config.stop_ids)
        return engine.tokenizer.decode(new[0])

    def _final_segment(self, question: np.ndarray, split: str) -> np.ndarray:
        """The answering segment's ids; folds what comes before them."""
        size = self.engine.config.segment_size
        if split not in ("fold", "reference"):
            raise ValueError(f"split must be fold or reference; got {split!r}")
        if len(self.rest) + len(question) == 0:
            raise ValueError("nothing was read and nothing was asked: feed a text first")
        if len(self.rest) + len(question) > size and split == "fold":
            if len(question) > size:
                raise ValueError(f"the question has {len(question)} tokens; a segment holds {size}")
            self.finish()
        self.length = None  # the question comes on top of the length that was announced
        self._read(question)
        return self.rest

    def _flush_text(self) -> None:
        if self._text is not None:
            self._read(self._text.flush())

    def _checked(self, ids: Ids) -> np.ndarray:
        array = np.asarray(ids)
        if array.size == 0:
            array = array.astype(np.int64)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(f"expected 1-D integer token ids, got {array.dtype} {list(array.shape)}")
        wrong = np.flatnonzero((array < 0) | (array >= self.engine.vocab_size))
        if len(wrong):
            last = self.engine.vocab_size - 1
            raise ValueError(f"token id {array[wrong[0]]} at place {wrong[0]} is outside 0..{last} (vocab_size)")
        return array.astype(np.int64)

    def _read(self, ids: np.ndarray) -> None:
        if self.engine.config.drop_ids:
            ids = ids[~np.isin(ids, self.engine.config.drop_ids)]
        if self.length is not None and self.position + len(ids) > self.length:
            raise ValueError(f"the stream was made for {self.length} tokens; {self.position + len(ids)} have come")
        waiting = np.concatenate([self.rest, ids])
        start = 0
        while len(waiting) - start > self._next_size():
            size = self._next_size()
            self.fold(waiting[start : start + size])
            start += size
        self.rest = waiting[start:].copy()

    def _next_size(self) -> int:
        return self.cut.size if self.segments else self.cut.first

    def fold(self, ids: np.ndarray) -> None:
        """Folds one whole segment of checked ids [L] into the memory; `feed` is the way in for everything else."""
        self.state = self.engine.executor.fold(self._tensor(ids), self.state)
        self.segments += 1
        self.folded += len(ids)

    def _tensor(self, ids: np.ndarray) -> Tensor:
        return torch.from_numpy(ids).to(self.engine.device)[None]
