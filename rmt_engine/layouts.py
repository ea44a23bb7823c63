"""How a text is cut into segments, and how one segment is assembled around its memory tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rmt_engine.config import ALIGNMENTS, RMTConfig

ROW_MULTIPLE = 16  # rows are padded to it: what makes a row's bits independent of its neighbours


@dataclass(frozen=True)
class Cut:
    """Segment sizes of a text: `first` tokens, then `size` at a time, the last with what is left."""

    first: int
    size: int

    @classmethod
    def of(cls, length: int, segment_size: int, alignment: str) -> Cut:
        """The authors' cut of `length` tokens; `left` needs no length."""
        if alignment == "left" or length <= segment_size:
            return cls(segment_size, segment_size)
        if alignment == "right":
            return cls(length % segment_size or segment_size, segment_size)
        size = math.ceil(length / math.ceil(length / segment_size))
        return cls(size, size)

    def bounds(self, length: int) -> list[tuple[int, int]]:
        """[start, end) of every segment of a text of `length` tokens."""
        starts = [0, *range(self.first, length, self.size)]
        return list(zip(starts, [*starts[1:], length], strict=True)) if length else []


class DecoderLayout:
    """[read memory M][text L][write memory M]; the answering segment has no write memory."""

    def __init__(self, num_mem_tokens: int):
        self.num_mem_tokens = num_mem_tokens

    def rows(self, text: int, write: bool = True) -> int:
        return self.num_mem_tokens * (2 if write else 1) + text

    def memory_offsets(self, text: int, write: bool = True) -> tuple[int, ...]:
        """First rows of the places that the memory state fills."""
        return (0, self.num_mem_tokens + text) if write else (0,)

    def write_rows(self, text: int) -> tuple[int, int]:
        """[start, end) of the rows whose final hidden state is the new memory state."""
        return self.num_mem_tokens + text, 2 * self.num_mem_tokens + text

    def text_rows(self, text: int) -> tuple[int, int]:
        return self.num_mem_tokens, self.num_mem_tokens + text

    def assemble(self, ids: Tensor, write: bool = True) -> Tensor:
        """Text ids [B, L] -> row ids [B, T padded], 0 where memory or padding stands."""
        batch, text = ids.shape
        rows = ids.new_zeros(batch, padded(self.rows(text, write)))
        rows[:, self.num_mem_tokens : self.num_mem_tokens + text] = ids
        return rows


class EncoderLayout:
    """[CLS][memory M][SEP][text L][SEP]; the memory is read and written in the same rows."""

    def __init__(self, num_mem_tokens: int, cls_id: int, sep_id: int):
        self.num_mem_tokens = num_mem_tokens
        self.cls_id = cls_id
        self.sep_id = sep_id

    def rows(self, text: int, write: bool = True) -> int:
        return text + self.num_mem_tokens + 3

    def memory_offsets(self, text: int, write: bool = True) -> tuple[int, ...]:
        return (1,)

    def write_rows(self, text: int) -> tuple[int, int]:
        return 1, 1 + self.num_mem_tokens

    def assemble(self, ids: Tensor, write: bool = True) -> Tensor:
        batch, text = ids.shape
        rows = ids.new_zeros(batch, padded(self.rows(text)))
        start = self.num_mem_tokens + 2
        rows[:, 0] = self.cls_id
        rows[:, start - 1] = self.sep_id
        rows[:, start : start + text] = ids
        rows[:, start + text] = self.sep_id
        return rows


Layout = DecoderLayout | EncoderLayout


def check_alignment(alignment: str) -> str:
    """The name itself. Raises ValueError for one that is not known."""
    if alignment not in ALIGNMENTS:
        raise ValueError(f"alignment must be one of {', '.join(ALIGNMENTS)}; got {alignment!r}")
    return alignment


def padded(rows: int) -> int:
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


def layout_of(config: RMTConfig) -> Layout:
    if config.family == "decoder":
        return DecoderLayout(config.num_mem_tokens)
    assert config.cls_id is not None and config.sep_id is not None
    return EncoderLayout(config.num_mem_tokens, config.cls_id, config.sep_id)


def drop(ids: Tensor, drop_ids: tuple[int, ...]) -> Tensor:
    """A 1-D row without the ids that the checkpoint's authors remove from the content."""
    if not drop_ids:
        return ids
    return ids[~torch.isin(ids, torch.tensor(drop_ids, device=ids.device))]
