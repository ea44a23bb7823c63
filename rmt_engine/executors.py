"""Running one segment step. An executor owns the backbone; it knows rows and memory, not texts or files."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rmt_kernels.segment_attention import KVCache
from torch import Tensor

from rmt_engine.backbones.common import Backbone, run_blocks
from rmt_engine.config import RMTConfig
from rmt_engine.layouts import DecoderLayout, EncoderLayout, layout_of


class EagerExecutor:
    """Calls the planned ops one after another, on any device.

    ids are int64 [B, L] with 1 ≤ L ≤ segment_size, memory is [B, M, E] in the model's dtype.
    """

    def __init__(self, config: RMTConfig, backbone: Backbone, memory: Tensor):
        self.layout = layout_of(config)
        self.backbone = backbone
        self.initial = memory  # [M, E]

    def initial_memory(self, batch: int = 1) -> Tensor:
        return self.initial.expand(batch, *self.initial.shape).clone()

    def _layers(self, ids: Tensor, memory: Tensor, rows: tuple[int, int]) -> Tensor:
        """One full segment -> hidden states [B, end-start, E] of `rows` after the last layer."""
        text = ids.shape[1]
        hidden = self.backbone.read_memory(self.layout.assemble(ids), memory, self.layout.memory_offsets(text))
        return run_blocks(self.backbone, hidden, self.layout.rows(text), rows)

    @torch.inference_mode()
    def fold(self, ids: Tensor, memory: Tensor) -> Tensor:
        """One segment -> the new memory state [B, M, E]; no output is computed."""
        return self.backbone.write_memory(self._layers(ids, memory, self.layout.write_rows(ids.shape[1])))

    @torch.inference_mode()
    def fold_with_logits(self, ids: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """One segment -> the new memory state and the logits of its text [B, L, V] (a classifier: [B, C])."""
        text, count = ids.shape[1], self.layout.num_mem_tokens
        if isinstance(self.layout, EncoderLayout):
            hidden = self._layers(ids, memory, (0, 1 + count))
            return self.backbone.write_memory(hidden[:, 1:]), self.backbone.head(hidden[:, 0])
        hidden = self._layers(ids, memory, (count, 2 * count + text))
        return self.backbone.write_memory(hidden[:, text:]), self.backbone.head(hidden[:, :text])

    @torch.inference_mode()
    def fold_with_scores(self, ids: Tensor, memory: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """One segment -> the new memory state, the log-probability of each of its tokens [B, L], its last row [B, E].

        A token is predicted by the row before it. `before` is the last row of the segment before this one, which
        predicts the first token here, as in the reference's logits; None at the start of a stream, where the last row
        of read memory predicts it.
        """
        assert isinstance(self.layout, DecoderLayout)
        text, count = ids.shape[1], self.layout.num_mem_tokens
        hidden = self._layers(ids, memory, (count - 1, 2 * count + text))  # [B, 1 + L + M, E]
        first = hidden[:, :1] if before is None else before[:, None]
        rows = torch.cat([first, hidden[:, 1:text]], dim=1)
        scores = self.backbone.log_probabilities(rows, ids)
        return self.backbone.write_memory(hidden[:, 1 + text :]), scores, hidden[:, text].clone()

    @torch.inference_mode()
    def logits(self, ids: Tensor, memory: Tensor) -> Tensor:
        """A classifier's answer [B, C] if the input ended with this segment; the memory is not written."""
        assert isinstance(self.layout, EncoderLayout)
        return self.backbone.head(self._layers(ids, memory, (0, 1))[:, 0])

    @torch.inference_mode()
    def prefill(self, ids: Tensor, memory: Tensor, max_new_tokens: int) -> tuple[Tensor, list[KVCache]]:
        """The answering segment [memory][text], without write memory -> logits of its last row [B, V] and KV caches."""
        assert isinstance(self.layout, DecoderLayout)
        length = self.layout.rows(ids.shape[1], write=False)
        caches = self._caches(ids.shape[0], length + max_new_tokens)
        row_ids = self.layout.assemble(ids, write=False)
        hidden = self.backbone.read_memory(row_ids, memory, self.layout.memory_offsets(ids.shape[1], write=False))
        hidden = run_blocks(self.backbone, hidden, length, (length - 1, length), caches)
        return self.backbone.head(hidden)[:, 0], caches

    @torch.inference_mode()
    def decode(self, ids: Tensor, caches: Sequence[KVCache]) -> Tensor:
        """One more token [B, 1] behind what the caches hold -> logits [B, V]."""
        hidden = self.backbone.embed(ids, caches[0].length)
        return self.backbone.head(run_blocks(self.backbone, hidden, 1, (0, 1), caches))[:, 0]

    def _caches(self, batch: int, room: int) -> list[KVCache]:
        shape = (batch, self.backbone.kv_heads, room, self.backbone.head_dim)
        like = self.initial
        return [KVCache(like.new_empty(shape), like.new_empty(shape)) for _ in self.backbone.blocks]
