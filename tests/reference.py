"""The oracle: what the authors' recurrent wrappers compute, written on plain Hugging Face modules, one text at a time.

Everything is float32 on the CPU, eager attention, batch 1, and nothing is shared with the engine: a segment is
assembled, cut and read here by its own few lines, in the plainest way there is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

Ids = Tensor | Sequence[int]


def segment_lengths(length: int, segment_size: int, alignment: str) -> list[int]:
    """How many tokens each segment of a text of `length` tokens holds."""
    if length == 0:
        return []
    full, rest = divmod(length, segment_size)
    short = [rest] if rest else []
    if alignment == "left":
        return [segment_size] * full + short
    if alignment == "right":
        return short + [segment_size] * full
    assert alignment == "center", alignment
    even = -(-length // (full + len(short)))
    return [min(even, length - start) for start in range(0, length, even)]


def split(ids: Tensor, segment_size: int, alignment: str) -> list[Tensor]:
    """[N] -> the segments, in the order in which they are read."""
    return list(ids.split(segment_lengths(len(ids), segment_size, alignment)))


def as_ids(ids: Ids) -> Tensor:
    return torch.as_tensor(ids, dtype=torch.long)


class ReferenceDecoder:
    """A CausalLM wrapped in recurrent memory (MemoryCell and RecurrentWrapper).

    A segment is [memory][text][the same memory]; the new memory is the final hidden state (after the last norm) of the
    closing memory rows. `memory` [M, E] is the learned initial state.
    """

    def __init__(self, model: torch.nn.Module, memory: Tensor, segment_size: int, alignment: str = "left"):
        self.model = _prepared(model)
        self.memory = memory.detach().float()
        self.segment_size = segment_size
        self.alignment = alignment

    @torch.no_grad()
    def segment(self, ids: Ids, memory: Tensor) -> tuple[Tensor, Tensor]:
        """ids [L], memory [M, E] -> logits of the text [L, V], new memory [M, E]."""
        size = len(memory)
        rows = torch.cat([memory, self._embed(ids), memory])
        out = self.model(inputs_embeds=rows[None], output_hidden_states=True, use_cache=False)
        return out.logits[0, size:-size], out.hidden_states[-1][0, -size:]

    def forward(self, ids: Ids, memory: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """ids [N] -> logits [L, V] of every segment, memory [M, E] after every segment."""
        memory = self.memory if memory is None else memory
        logits, memories = [], []
        for part in split(as_ids(ids), self.segment_size, self.alignment):
            out, memory = self.segment(part, memory)
            logits.append(out)
            memories.append(memory)
        return logits, memories

    @torch.no_grad()
    def answer(self, ids: Ids, memory: Tensor, max_new_tokens: int, eos_ids: Collection[int] = ()) -> list[int]:
        """Greedy tokens after [memory][ids], with no write memory; an end token is kept and ends the list."""
        rows = torch.cat([memory, self._embed(ids)])
        new: list[int] = []
        while len(new) < max_new_tokens and not (new and new[-1] in eos_ids):
            logits = self.model(inputs_embeds=rows[None], use_cache=False).logits[0, -1]
            new.append(int(logits.argmax()))
            rows = torch.cat([rows, self._embed(new[-1:])])
        return new

    def generate(self, ids: Ids, max_new_tokens: int, eos_ids: Collection[int] = ()) -> list[int]:
        """Every segment but the last is folded into the memory; the last one is answered, never rolling over."""
        *folded, last = split(as_ids(ids), self.segment_size, self.alignment)
        memory = self.memory
        for part in folded:
            memory = self.segment(part, memory)[1]
        return self.answer(last, memory, max_new_tokens, eos_ids)

    def _embed(self, ids: Ids) -> Tensor:
        return self.model.get_input_embeddings()(as_ids(ids))


@dataclass(frozen=True)
class SpecialIds:
    """The special tokens of the encoder's tokenizer."""

    pad: int
    cls: int
    sep: int
    bos: int | None = None
    eos: int | None = None

    def dropped(self) -> set[int]:
        """Ids removed from a text. One that serves two purposes stays: the authors' mask is 1 minus the count, and
        anything but 0 keeps."""
        ids = [i for i in astuple(self) if i is not None]
        return {i for i in ids if ids.count(i) == 1}


class ReferenceEncoder:
    """A sequence classifier wrapped in recurrent memory (RMTEncoderForSequenceClassification).

    The word embeddings have V + M rows and the last M are the initial memory. A segment is
    [CLS][memory][SEP][text][SEP][PAD...], `input_size` long; the memory replaces embedding rows 1..M, before positions,
    token types and the embedding norm are added. The new memory is the last hidden state of the same rows.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        num_mem_tokens: int,
        special: SpecialIds,
        input_size: int,
        alignment: str = "right",
    ):
        self.model = _prepared(model)
        self.words = model.get_input_embeddings()
        self.memory = self.words.weight[-num_mem_tokens:].detach().float()
        self.special = special
        self.input_size = input_size
        self.segment_size = input_size - num_mem_tokens - 3
        self.alignment = alignment

    def content(self, ids: Ids) -> Tensor:
        """ids [N] without special tokens."""
        dropped = self.special.dropped()
        return as_ids([i for i in as_ids(ids).tolist() if i not in dropped])

    @torch.no_grad()
    def segment(self, ids: Ids, memory: Tensor) -> tuple[Tensor, Tensor]:
        """ids [L], memory [M, E] -> logits [classes], new memory [M, E]."""
        size, pad = len(memory), self.special.pad
        place = torch.full((size,), self.words.num_embeddings - size)  # any row that is not pad: it is overwritten
        cls, sep = as_ids([self.special.cls]), as_ids([self.special.sep])
        row = torch.cat([cls, place, sep, as_ids(ids), sep])
        row = torch.nn.functional.pad(row, (0, self.input_size - len(row)), value=pad)
        embeds = self.words(row)
        embeds[1 : 1 + size] = memory
        out = self.model(
            inputs_embeds=embeds[None], attention_mask=(row != pad).long()[None], output_hidden_states=True
        )
        return out.logits[0], out.hidden_states[-1][0, 1 : 1 + size]

    def forward(self, ids: Ids, memory: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """ids [N] -> logits [classes] of every segment, memory [M, E] after every segment."""
        memory = self.memory if memory is None else memory
        logits, memories = [], []
        for part in split(self.content(ids), self.segment_size, self.alignment):
            out, memory = self.segment(part, memory)
            logits.append(out)
            memories.append(memory)
        return logits, memories


def _prepared(model: torch.nn.Module) -> torch.nn.Module:
    assert model.config._attn_implementation == "eager", model.config._attn_implementation
    return model.float().eval()
