"""Decoding rows side by side, each in its own answering segment; with `roll`, on through further segments."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from rmt_kernels.per_slot import PerSlot
from rmt_kernels.segment_attention import KVCache
from torch import Tensor

from rmt_engine.detokenizer import AnswerText
from rmt_engine.executors import EagerExecutor
from rmt_engine.layouts import ROW_MULTIPLE
from rmt_engine.sampler import Sampler, Sampling
from rmt_engine.tokens import Tokenizer

DECODE_ROWS = ROW_MULTIPLE  # side by side at most: a GEMM then has this many rows, however many are filled


@dataclass(frozen=True)
class Prompt:
    """One row's answering segment: its text ids int64 [L] behind the memory state [1, M, E]."""

    ids: np.ndarray
    memory: Tensor


@dataclass(frozen=True)
class Decoding:
    """What ends an answer, and how its tokens are chosen.

    max_new_tokens: None for no limit. stop_ids, stop: ids and strings that end it and are left out. roll: decode on
    through further segments: a full one is folded when a further token comes, as if the stream had read it.
    """

    max_new_tokens: int | None
    stop_ids: Collection[int] = ()
    stop: Sequence[str] = ()
    roll: bool = False
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if self.max_new_tokens is None and not self.roll:
            raise ValueError("max_new_tokens=None, no limit, needs roll=True: one segment is soon full")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1; got {self.max_new_tokens}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"stop must be a sequence of strings that are not empty; got {self.stop!r}")


class DecodeSlots:
    """The KV caches of `size` rows, each at its own place in its own segment. room: text rows of the longest one."""

    def __init__(self, executor: EagerExecutor, size: int, room: int) -> None:
        self.executor, self.size, self.room = executor, size, room
        self.caches: list[KVCache] = []
        self.lengths = torch.zeros(size, dtype=torch.int32)  # filled rows of each cache; 0 where a slot is free

    def start(self, slot: int, ids: np.ndarray, memory: Tensor) -> Tensor:
        """Prefills ids [L] behind memory [1, M, E], by itself: what its bits are must not depend on the other slots.
        -> the logits [V] of its last row."""
        tensor = torch.from_numpy(ids).to(memory.device)[None]
        if self.size == 1:
            self.caches = []  # a graph's buffers come back for this segment
        logits, caches = self.executor.prefill(tensor, memory, self.room - len(ids))
        if self.size == 1:
            self.caches = caches
            return logits[0]
        if not self.caches:
            self.caches = self.executor.caches(self.size, self.room)
        for all_slots, own in zip(self.caches, caches, strict=True):
            all_slots.keys[slot], all_slots.values[slot] = own.keys[0], own.values[0]
        self.lengths[slot] = self.executor.initial.shape[0] + len(ids)
        return logits[0]

    def step(self, tokens: dict[int, int]) -> Tensor:
        """One more token in each of the slots named -> logits [size, V]; the other slots stay as they are."""
        ids = torch.tensor([[tokens.get(slot, 0)] for slot in range(self.size)], device=self.executor.initial.device)
        if self.size == 1:
            return self.executor.decode(ids, self.caches)
        places = PerSlot(self.lengths.to(ids.device))
        for cache in self.caches:
            cache.length = places
        logits = self.executor.decode(ids, self.caches)  # what it puts behind the other slots is written over later
        self.lengths[list(tokens)] += 1
        return logits

    def free(self, slot: int) -> None:
        self.lengths[slot] = 0


class Answer:
    """One answer in the making. ids: its tokens so far, without the one that ended it."""

    def __init__(self, prompt: Prompt, how: Decoding, tokenizer: Tokenizer | None) -> None:
        self.how = how
        self.ids: list[int] = []
        self.done = False
        self.segment, self.memory = prompt.ids, prompt.memory  # what stands in the segment, behind which memory state
        self.sampler = Sampler(how.sampling, prompt.ids.tolist())
        self.text = None if tokenizer is None else AnswerText(tokenizer, how.stop)

    def take(self, token: int) -> str:
        """The text that is certain with one token more."""
        piece = ""
        if token in self.how.stop_ids:
            self.done = True
        else:
            self.ids.append(token)
            piece = self.text.feed(token) if self.text is not None else ""
            stopped = self.text is not None and self.text.stopped
            self.done = stopped or len(self.ids) == self.how.max_new_tokens
        return piece + self.text.flush() if self.done and self.text is not None else piece

    def rolled(self, executor: EagerExecutor, segment_size: int) -> bool:
        """Puts the last token into the segment; whether that was full, and a new one has begun behind a new memory
        state."""
        last = np.array(self.ids[-1:], dtype=np.int64)
        full = self.how.roll and len(self.segment) == segment_size
        if full:
            self.memory = executor.fold(torch.from_numpy(self.segment).to(self.memory.device)[None], self.memory)
        self.segment = last if full else np.concatenate([self.segment, last])
        return full


def decode(
    executor: EagerExecutor, segment_size: int, prompts: Sequence[Prompt], how: Decoding, tokenizer: Tokenizer | None
) -> Generator[tuple[int, str], None, list[Answer]]:
    """Answers prompts side by side: yields (number, piece of text) as text becomes certain; returns the answers.

    A slot takes the next prompt when its answer is done. Each step is computed when its pieces are asked for; closing
    the generator drops the KV caches. Without a tokenizer there is no text, and nothing is yielded.
    """
    answers = [Answer(prompt, how, tokenizer) for prompt in prompts]
    longest = max((len(prompt.ids) for prompt in prompts), default=0)
    if executor.fixed:  # caches of one size, whatever the prompts are: those that were made ready
        longest = max(longest, executor.segment_size)
    room = longest + (how.max_new_tokens or 0)
    slots = DecodeSlots(executor, min(len(prompts), DECODE_ROWS), segment_size + 1 if how.roll else room)
    waiting = iter(range(len(prompts)))
    in_slot: dict[int, int] = {}  # slot -> number of the answer
    logits: dict[int, Tensor] = {}
    while True:
        for slot in set(range(slots.size)) - in_slot.keys():
            number = next(waiting, None)
            if number is not None:
                in_slot[slot] = number
                logits[slot] = slots.start(slot, answers[number].segment, answers[number].memory)
        if not in_slot:
            return answers
        tokens: dict[int, int] = {}
        for slot, token in _chosen(answers, in_slot, logits).items():
            answer = answers[in_slot[slot]]
            if piece := answer.take(token):
                yield in_slot[slot], piece
            if answer.done:
                slots.free(slot)
                del in_slot[slot]
            elif answer.rolled(executor, segment_size):
                logits[slot] = slots.start(slot, answer.segment, answer.memory)
            else:
                tokens[slot] = token
        if tokens:
            rows = slots.step(tokens)
            logits |= {slot: rows[slot] for slot in tokens}


def _chosen(answers: Sequence[Answer], in_slot: dict[int, int], logits: dict[int, Tensor]) -> dict[int, int]:
    """The next token of each slot. One transfer from the device for all that are greedy."""
    greedy = [slot for slot, number in in_slot.items() if answers[number].how.sampling.is_greedy]
    best = torch.stack([logits[slot] for slot in greedy]).argmax(-1).tolist() if greedy else []
    chosen: dict[int, int] = dict(zip(greedy, best, strict=True))
    return {
        slot: chosen[slot] if slot in chosen else answers[number].sampler(logits[slot])
        for slot, number in sorted(in_slot.items())
    }


def finished(decoding: Generator[tuple[int, str], None, list[Answer]]) -> list[Answer]:
    """The answers, once nothing is left to decode."""
    while True:
        try:
            next(decoding)
        except StopIteration as end:
            answers: list[Answer] = end.value
            return answers


def generate(
    executor: EagerExecutor, ids: Tensor, memory: Tensor, max_new_tokens: int, stop_ids: Collection[int]
) -> list[list[int]]:
    """Greedy decoding of rows side by side. ids [B, L], memory [B, M, E] -> the new ids of each row, without the stop.

    New tokens stay within the answering segment, as in the authors' `generate`.
    """
    prompts = [Prompt(row.cpu().numpy(), state[None]) for row, state in zip(ids, memory, strict=True)]
    how = Decoding(max_new_tokens, stop_ids)
    return [answer.ids for answer in finished(decode(executor, ids.shape[1], prompts, how, None))]
