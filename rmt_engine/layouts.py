"""How a text is cut into segments, and how one segment is assembled around its memory tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from rmt_kernels.memory import Frame
from rmt_kernels.per_slot import Count, Rows, added
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
        memory = tuple(~row for row in range(num_mem_tokens))
        self._frames = {True: Frame(memory, memory), False: Frame(memory, ())}

    def frame(self, write: bool = True) -> Frame:
        """What stands around the text."""
        return self._frames[write]

    def rows(self, text: Count, write: bool = True) -> Count:
        """Rows of a segment whose text has that length."""
        return added(text, self.num_mem_tokens * (2 if write else 1))

    def write_rows(self, text: Count) -> Rows:
        """The rows whose final hidden state is the new memory state, behind a text of that length."""
        return Rows(added(text, self.num_mem_tokens), self.num_mem_tokens)


class EncoderLayout:
    """[CLS][memory M][SEP][text L][SEP]; the memory is read and written in the same rows."""

    def __init__(self, num_mem_tokens: int, cls_id: int, sep_id: int):
        self.num_mem_tokens = num_mem_tokens
        self.cls_id = cls_id
        self.sep_id = sep_id
        memory = tuple(~row for row in range(num_mem_tokens))
        self._frame = Frame((cls_id, *memory, sep_id), (sep_id,))

    def frame(self, write: bool = True) -> Frame:
        return self._frame

    def rows(self, text: Count, write: bool = True) -> Count:
        return added(text, self.num_mem_tokens + 3)

    def write_rows(self, text: Count) -> Rows:
        return Rows(1, self.num_mem_tokens)


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
