"""Running one segment step. An executor owns the backbone; it knows rows and memory, not texts or files."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from rmt_kernels.checks import dims
from rmt_kernels.per_slot import Count, PerSlot, Rows, added
from rmt_kernels.segment_attention import KVCache
from torch import Tensor

from rmt_engine.backbones.common import Backbone, run_blocks
from rmt_engine.config import RMTConfig
from rmt_engine.graph_plan import LEAST_ROOM, answer_rows
from rmt_engine.layouts import DecoderLayout, EncoderLayout, layout_of, padded


class EagerExecutor:
    """Calls the planned ops one after another, on any device.

    ids are int64 [B, L] with 1 ≤ L ≤ segment_size, memory is [B, M, E] in the model's dtype. With lengths, int32 [B] on
    the device and each in 1..L, slot b's text is ids[b, :lengths[b]] and what stands behind it is not looked at; None
    is L for all. Shapes depend on B and L alone, and a slot's results do not depend on its neighbours.

    fixed: every segment is computed as wide as a full one, whatever L is, and KV caches come in a few sizes: the shapes
    of `GraphExecutor`, and so its bits. What a GPU runs; a CPU would pay for the empty rows.
    """

    def __init__(self, config: RMTConfig, backbone: Backbone, memory: Tensor, fixed: bool = False):
        self.layout = layout_of(config)
        self.backbone = backbone
        self.initial = memory  # [M, E]
        self.segment_size = config.segment_size
        self.fixed = fixed

    def prepare(self, slots: int = 1, max_new_tokens: int = LEAST_ROOM) -> None:
        """What can be made ready for so many slots side by side and answers of so many tokens: here nothing."""

    def initial_memory(self, batch: int = 1) -> Tensor:
        return self.initial.expand(batch, *self.initial.shape).clone()

    def _layers(
        self,
        ids: Tensor,
        memory: Tensor,
        rows: Rows,
        lengths: Tensor | None,
        caches: Sequence[KVCache] | None = None,
    ) -> Tensor:
        """One segment, an answering one with caches -> hidden states [B, R, E] of `rows` after the last layer."""
        write = caches is None
        frame = self.layout.frame(write)
        width = padded(len(frame.before) + ids.shape[1] + len(frame.after))
        hidden = self.backbone.read_memory(ids, memory, frame, width, lengths)
        return run_blocks(self.backbone, hidden, self.layout.rows(text_of(ids, lengths), write), rows, caches)

    def _widened(self, ids: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The shape that a segment is computed in."""
        if not self.fixed:
            return ids, lengths
        if lengths is None:
            lengths = torch.full((len(ids),), ids.shape[1], dtype=torch.int32, device=ids.device)
        missing = self.segment_size - ids.shape[1]
        return F.pad(ids, (0, missing)) if missing else ids, lengths

    @torch.inference_mode()
    def fold(self, ids: Tensor, memory: Tensor, lengths: Tensor | None = None) -> Tensor:
        """One segment -> the new memory state [B, M, E]; no output is computed."""
        ids, lengths = self._widened(ids, lengths)
        rows = self.layout.write_rows(text_of(ids, lengths))
        return self.backbone.write_memory(self._layers(ids, memory, rows, lengths))

    @torch.inference_mode()
    def fold_with_logits(self, ids: Tensor, memory: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One segment -> the new memory state and the logits of its text [B, L, V] (a classifier: [B, C]).

        Logits behind a slot's length mean nothing.
        """
        asked = ids.shape[1]
        ids, lengths = self._widened(ids, lengths)
        text, count = ids.shape[1], self.layout.num_mem_tokens
        if isinstance(self.layout, EncoderLayout):
            hidden = self._layers(ids, memory, Rows(0, 1 + count), lengths)
            return self.backbone.write_memory(hidden[:, 1:]), self.backbone.head(hidden[:, 0])
        written, hidden = self.fold_with_rows(ids, memory, lengths)
        return written, self.backbone.head(hidden[:, :text])[:, :asked]

    @torch.inference_mode()
    def fold_with_rows(self, ids: Tensor, memory: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One segment of a decoder -> the new memory state, and the last hidden states of its text and of what stands
        behind it [B, L + M, E]: the head makes the logits of their first L rows."""
        text, count = ids.shape[1], self.layout.num_mem_tokens
        hidden = self._layers(ids, memory, Rows(count, text + count), lengths)
        return self.backbone.write_memory(hidden, Rows(text_of(ids, lengths), count)), hidden

    @torch.inference_mode()
    def fold_with_scores(
        self,
        ids: Tensor,
        memory: Tensor,
        before: Tensor | None,
        lengths: Tensor | None = None,
        begun: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One segment -> the new memory state, the log-probability of each of its tokens [B, L], its last row [B, E].

        A token is predicted by the row before it. `before` is the last row of the segment before this one, which
        predicts the first token here, as in the reference's logits; None at the start of a stream, where the last row
        of read memory predicts it. begun: bool [B], False for slots at the start, where `before` is not looked at.
        Behind a slot's length stands 0.
        """
        assert isinstance(self.layout, DecoderLayout)
        asked = ids.shape[1]
        ids, lengths = self._widened(ids, lengths)
        text, count = ids.shape[1], self.layout.num_mem_tokens
        hidden = self._layers(ids, memory, Rows(count - 1, 1 + text + count), lengths)  # [B, 1 + L + M, E]
        first = hidden[:, :1] if before is None else before[:, None]
        if begun is not None:
            first = torch.where(begun[:, None, None], first, hidden[:, :1])
        rows = torch.cat([first, hidden[:, 1:text]], dim=1)
        scores = self.backbone.log_probabilities(rows, ids, lengths)
        length = text_of(ids, lengths)
        written = self.backbone.write_memory(hidden, Rows(added(length, 1), count))
        return written, scores[:, :asked], Rows(length, 1).of(hidden)[:, 0].clone()

    @torch.inference_mode()
    def logits(self, ids: Tensor, memory: Tensor, lengths: Tensor | None = None) -> Tensor:
        """A classifier's answer [B, C] if the input ended with this segment; the memory is not written."""
        assert isinstance(self.layout, EncoderLayout)
        ids, lengths = self._widened(ids, lengths)
        return self.backbone.head(self._layers(ids, memory, Rows(0, 1), lengths)[:, 0])

    @torch.inference_mode()
    def prefill(
        self, ids: Tensor, memory: Tensor, max_new_tokens: int, lengths: Tensor | None = None
    ) -> tuple[Tensor, list[KVCache]]:
        """The answering segment [memory][text], without write memory -> logits of its last row [B, V] and KV caches.

        With lengths, the last row is each slot's own, and so is the length of its caches.
        """
        caches = self.caches(len(ids), ids.shape[1] + max_new_tokens)
        return self.answering(*self._widened(ids, lengths), memory, caches), caches

    @torch.inference_mode()
    def answering(self, ids: Tensor, lengths: Tensor | None, memory: Tensor, caches: Sequence[KVCache]) -> Tensor:
        """The answering segment into empty caches -> logits of its last row [B, V]."""
        assert isinstance(self.layout, DecoderLayout)
        last = Rows(added(text_of(ids, lengths), self.layout.num_mem_tokens - 1), 1)
        return self.backbone.head(self._layers(ids, memory, last, lengths, caches))[:, 0]

    @torch.inference_mode()
    def decode(self, ids: Tensor, caches: Sequence[KVCache]) -> Tensor:
        """One more token [B, 1] behind what the caches hold, each slot at its own place -> logits [B, V]."""
        hidden = self.backbone.embed(ids, caches[0].length)
        return self.backbone.head(run_blocks(self.backbone, hidden, 1, Rows(0, 1), caches))[:, 0]

    def caches(self, slots: int, text: int) -> list[KVCache]:
        """Empty KV caches of answering segments of at most `text` tokens each, the answer among them."""
        rows = self.layout.num_mem_tokens + (answer_rows(self.segment_size, text) if self.fixed else text)
        shape = (slots, self.backbone.kv_heads, rows, self.backbone.head_dim)
        like = self.initial
        return [KVCache(like.new_zeros(shape), like.new_zeros(shape)) for _ in self.backbone.blocks]


def text_of(ids: Tensor, lengths: Tensor | None) -> Count:
    """The length of each slot's text. Raises ValueError for lengths that are not int32 [B] on the ids' device.

    Whether they lie in 1..L is checked on a CPU alone: a device would have to be waited for.
    """
    if lengths is None:
        return ids.shape[1]
    dims("lengths", lengths, "B", B=ids.shape[0])
    if lengths.dtype != torch.int32 or lengths.device != ids.device:
        raise ValueError(f"lengths: expected int32 on {ids.device}, got {lengths.dtype} on {lengths.device}")
    if lengths.device.type == "cpu" and not 1 <= int(lengths.min()) <= int(lengths.max()) <= ids.shape[1]:
        raise ValueError(f"lengths: expected 1..{ids.shape[1]}, got {lengths.tolist()}")
    return PerSlot(lengths)
