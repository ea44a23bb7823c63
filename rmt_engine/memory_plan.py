"""How much memory a checkpoint takes, from its shapes alone. What each term is and was checked with: docs/memory.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from rmt_kernels.lm_head.cpu import TILE_COLUMNS, TILE_ROWS

from rmt_engine.backbones import module_of
from rmt_engine.config import RMTConfig
from rmt_engine.layouts import padded

ANSWER_TOKENS = 16
GAPS = 2  # freed buffers leave gaps that the next, larger one does not fit in
PACKED = re.compile(r"\.\d+\.|pooler\.dense|^classifier")  # a layer's weights; what belongs to no layer stays as it is


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one stream in one engine.

    file: weights that stay mapped from their file, dropped and read again as the system likes. weights: those that are
    held; loading: what the allocator keeps of the copies that loading made. step: buffers of a segment step. score: of
    scoring a segment, beside them. answer: logits and KV cache of an answering segment. logits: of all text of one
    segment, where they are asked for. state: what is carried on. state_file: at most, with a full rest.
    """

    parameters: int
    file: int
    weights: int
    loading: int
    step: int
    score: int
    answer: int
    logits: int
    state: int
    state_file: int

    @property
    def total(self) -> int:
        """Held at most while a stream is read, scored and asked; the interpreter and its libraries come on top."""
        return self.weights + self.loading + self.step + max(self.score, self.answer) + self.state

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class Widths:
    """Elements of one row: hidden state, queries, keys and values together, inner layer of the MLP."""

    hidden: int
    queries: int
    key_values: int
    inner: int
    layers: int
    gated: bool
    rotary: bool
    grouped: bool
    head_norms: bool
    parallel: bool  # attention and MLP both read the layer's input

    @classmethod
    def of(cls, backbone: Mapping[str, Any]) -> Widths:
        hidden = backbone.get("n_embd") or backbone["hidden_size"]
        heads = backbone.get("n_head") or backbone["num_attention_heads"]
        kv_heads = backbone.get("num_key_value_heads") or heads
        head_dim = backbone.get("head_dim") or hidden // heads
        inner = backbone.get("n_inner") or backbone.get("intermediate_size") or 4 * hidden
        layers = backbone.get("n_layer") or backbone["num_hidden_layers"]
        kind = backbone["model_type"]
        gated = kind in ("llama", "mistral", "qwen2", "qwen3")
        return cls(
            hidden,
            heads * head_dim,
            2 * kv_heads * head_dim,
            inner,
            layers,
            gated,
            rotary=gated or kind == "gpt_neox",
            grouped=kv_heads < heads,
            head_norms=kind == "qwen3",
            parallel=kind == "gpt_neox" and backbone.get("use_parallel_residual", True),
        )

    @property
    def live(self) -> int:
        """Elements of a row that live at once, in the wider half of a layer."""
        attention = self.hidden + self.queries + self.key_values + 2 * self.queries
        turned = self.queries + self.key_values // 2
        if self.rotary:
            attention += turned
        if self.head_norms:
            attention += turned
        if self.grouped:
            attention += 2 * self.queries
        return max(attention, (3 if self.parallel else 2) * self.hidden + self.inner * (2 if self.gated else 1))


def plan_memory(
    config: RMTConfig, dtype: torch.dtype, stored: torch.dtype | None = None, *, device: str = "cpu"
) -> MemoryPlan:
    """The plan of one stream computed in `dtype`. stored: the dtype of the weights' file, by default the same."""
    size = dtype.itemsize
    shapes = module_of(config.model_type).parameter_shapes(config.backbone)
    widths = Widths.of(config.backbone)
    memory, segment = config.num_mem_tokens, config.segment_size
    rows, vocabulary = padded(segment + config.overhead), int(config.backbone["vocab_size"])
    parameters = sum(map(prod, shapes.values())) + memory * widths.hidden
    packed = sum(prod(shape) for name, shape in shapes.items() if len(shape) == 2 and PACKED.search(name))
    mapped = device == "cpu" and stored in (None, dtype)
    decoder = config.family == "decoder"
    cache = 2 * widths.layers * (memory + segment + ANSWER_TOKENS) * widths.key_values // 2 * size
    outputs = vocabulary if decoder else len(config.labels)
    weights = (packed if mapped else parameters) * size
    return MemoryPlan(
        parameters=parameters,
        file=parameters * size if mapped else 0,
        weights=weights,
        loading=weights // 2 if device == "cpu" else 0,
        step=GAPS * rows * widths.live * size,
        score=(2 * TILE_ROWS * TILE_COLUMNS * 4 + segment * widths.hidden * size) if decoder else 0,
        answer=(cache if decoder else 0) + outputs * 4,
        logits=(segment if decoder else 1) * outputs * 4,
        state=memory * widths.hidden * 4,
        state_file=memory * widths.hidden * 4 + segment * 8 + widths.hidden * 4 + 4096,
    )
