"""Which CUDA graphs an engine captures and what they hold on the card: from shapes alone, no device needed.

A graph is captured for one step, one number of slots and one width of text. Everything that differs between two of its
replays lies in static buffers: ids, lengths, the memory state, a KV cache. docs/graph_executor.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch

from rmt_engine.config import RMTConfig
from rmt_engine.layouts import ROW_MULTIPLE, padded
from rmt_engine.memory_plan import Widths

Step = Literal["fold", "logits", "scores", "classify", "prefill", "decode", "stream", "scored stream"]
STREAMS: tuple[Step, ...] = ("stream", "scored stream")  # launched by the C++ runner
ANSWERS: tuple[Step, ...] = ("prefill", "decode")

STREAM_SEGMENTS = (8, 1)  # that one launch folds: eight, and one for what eights leave
PIECE_SEGMENTS = 64  # that are uploaded in one piece
PIECES = 2  # in the ring: one is filled while the other is computed
LEAST_ROOM = 16  # new tokens of an answer; more is the next power of two
MOST_ANSWERS = ROW_MULTIPLE  # that are decoded side by side
SPLIT_BYTES = 148 * 128 * 128 * 4  # fp32 parts of a split GEMM, at most: a tile for each multiprocessor, of one slot


@dataclass(frozen=True)
class GraphKey:
    """One captured graph. segments: that it folds, one by one. room: new tokens that its KV caches have rows for."""

    step: Step
    slots: int = 1
    segments: int = 1
    room: int = 0


@dataclass(frozen=True)
class Buffer:
    """A static tensor that graphs read or write."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Sizes:
    """The sizes that graphs are made of, as in CONTRIBUTING.md. outputs: V, or a classifier's labels."""

    segment: int
    memory: int
    width: int
    layers: int
    kv_heads: int
    head_dim: int
    outputs: int
    rows: int  # of a segment, padded
    live: int  # elements of a row that live at once
    inner: int
    decoder: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, config: RMTConfig, dtype: torch.dtype) -> Sizes:
        backbone: Mapping[str, Any] = config.backbone
        widths = Widths.of(backbone)
        heads = backbone.get("n_head") or backbone["num_attention_heads"]
        kv_heads = backbone.get("num_key_value_heads") or heads
        decoder = config.family == "decoder"
        return cls(
            segment=config.segment_size,
            memory=config.num_mem_tokens,
            width=widths.hidden,
            layers=widths.layers,
            kv_heads=kv_heads,
            head_dim=widths.key_values // 2 // kv_heads,
            outputs=int(backbone["vocab_size"]) if decoder else len(config.labels),
            rows=padded(config.segment_size + config.overhead),
            live=widths.live,
            inner=widths.inner,
            decoder=decoder,
            dtype=dtype,
        )


def slots_bucket(slots: int) -> int:
    """The number of slots a graph is captured for, at least `slots`: a power of two. The slots left over are padding.

    Raises ValueError for less than one.
    """
    if slots < 1:
        raise ValueError(f"slots must be at least 1; got {slots}")
    return 1 << (slots - 1).bit_length()


def answer_room(max_new_tokens: int) -> int:
    """Rows behind a full segment in a KV cache: a power of two of at least 16. Raises ValueError for less than one."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    return max(LEAST_ROOM, 1 << (max_new_tokens - 1).bit_length())


def answer_rows(segment_size: int, text: int) -> int:
    """Rows of a KV cache, memory tokens apart, for answering segments of at most `text` tokens with the answer: those
    of a full segment and `answer_room` behind it."""
    return segment_size + answer_room(max(text - segment_size, 1))


def ring_width(segment_size: int) -> int:
    """Ids of one place in the ring: even, so that every place begins at a multiple of 16 bytes."""
    return segment_size + segment_size % 2


def step_buffers(sizes: Sizes, key: GraphKey) -> tuple[Buffer, ...]:
    """What a graph of `key` reads and writes beyond weights, its own results apart. Graphs of one step and one number
    of slots share them."""
    if key.step in STREAMS:
        return _stream_buffers(sizes, key.step == "scored stream")
    if key.step in ANSWERS:
        return _answer_buffers(sizes, key)
    buffers = [
        Buffer("ids", (key.slots, sizes.segment), torch.int64),
        Buffer("lengths", (key.slots,), torch.int32),
        Buffer("memory", (key.slots, sizes.memory, sizes.width), sizes.dtype),
    ]
    if key.step == "scores":
        buffers += [
            Buffer("before", (key.slots, sizes.width), sizes.dtype),
            Buffer("begun", (key.slots,), torch.bool),
        ]
    return tuple(buffers)


def _answer_buffers(sizes: Sizes, key: GraphKey) -> tuple[Buffer, ...]:
    rows = sizes.memory + sizes.segment + key.room
    cache = (key.slots, sizes.kv_heads, rows, sizes.head_dim)
    tables = [Buffer(f"{what} {i}", cache, sizes.dtype) for i in range(sizes.layers) for what in ("keys", "values")]
    common = [Buffer("lengths", (key.slots,), torch.int32), Buffer("filled", (key.slots,), torch.int32), *tables]
    memory = Buffer("memory", (key.slots, sizes.memory, sizes.width), sizes.dtype)
    inputs = [
        Buffer("ids", (key.slots, sizes.segment), torch.int64),
        memory,
        Buffer("tokens", (key.slots, 1), torch.int64),
    ]
    return tuple(inputs + common)


def _stream_buffers(sizes: Sizes, scored: bool) -> tuple[Buffer, ...]:
    places = PIECES * PIECE_SEGMENTS
    buffers = [
        Buffer("ids", (places, ring_width(sizes.segment)), torch.int64),
        Buffer("lengths", (places,), torch.int64),
        Buffer("counter", (1,), torch.int64),
        Buffer("finite", (places,), torch.int32),
        Buffer("good", (1,), torch.bool),
        Buffer("memory", (1, sizes.memory, sizes.width), sizes.dtype),
    ]
    if scored:
        buffers += [
            Buffer("scores", (places, ring_width(sizes.segment)), torch.float32),
            Buffer("before", (1, sizes.width), sizes.dtype),
            Buffer("begun", (1,), torch.bool),
        ]
    return tuple(buffers)


def output_bytes(sizes: Sizes, key: GraphKey) -> int:
    """Results of a graph, which stay where it wrote them until its next replay."""
    hidden = key.slots * sizes.width * sizes.dtype.itemsize  # a row of each slot
    state = sizes.memory * hidden
    row = key.slots * sizes.outputs * 4
    if key.step == "fold":
        return state
    if key.step == "logits":  # a decoder's graph ends before the head: logits of all tokens are the caller's own
        return state + ((sizes.segment + sizes.memory) * hidden if sizes.decoder else row)
    if key.step == "scores":
        return state + key.slots * sizes.segment * 4 + hidden
    return 0 if key.step in STREAMS else row


def logits_bytes(sizes: Sizes, slots: int) -> int:
    """Logits of all tokens of one segment, fp32: 4 · slots · S · V, behind the graph and the caller's own. Of a
    classifier they are a graph's result."""
    return 4 * slots * sizes.segment * sizes.outputs if sizes.decoder else 0


def workspace_bytes(sizes: Sizes, key: GraphKey) -> int:
    """What lives at once inside a graph; graphs of which only one runs at a time share it: see `pool_of`.

    Activations of the wider half of a layer, and the fp32 parts that a GEMM leaves to be summed.
    """
    rows = 1 if key.step == "decode" else sizes.rows
    activations = rows * sizes.live * sizes.dtype.itemsize
    return key.slots * (activations + max(SPLIT_BYTES, rows * sizes.width * 4))


@dataclass(frozen=True)
class GraphPlan:
    """The graphs captured when an engine is built, and bytes on the card beside the weights.

    buffers: static tensors; outputs: results; workspace: of the largest graph of each pool; pinned: of the host, for
    uploads.
    """

    keys: tuple[GraphKey, ...]
    buffers: int
    outputs: int
    workspace: int
    pinned: int

    @property
    def total(self) -> int:
        """On the card, weights apart."""
        return self.buffers + self.outputs + self.workspace

    def to_dict(self) -> dict[str, Any]:
        graphs = [{name: value for name, value in vars(key).items() if value} for key in self.keys]
        sizes = {name: getattr(self, name) for name in ("buffers", "outputs", "workspace", "pinned", "total")}
        return {"graphs": graphs, **sizes}


def keys_for(sizes: Sizes, slots: int = 1, max_new_tokens: int = LEAST_ROOM) -> tuple[GraphKey, ...]:
    """All that is captured for up to `slots` slots: a stream and every step, the fewest slots first.

    Answers of up to max_new_tokens behind a full segment; at most 16 of them side by side. Raises ValueError for less
    than one of either.
    """
    bucket, room = slots_bucket(slots), answer_room(max_new_tokens)
    streams = STREAMS if sizes.decoder else STREAMS[:1]
    steps: tuple[Step, ...] = ("fold", "logits", "scores" if sizes.decoder else "classify")
    keys = [GraphKey(step, 1, segments) for step in streams for segments in STREAM_SEGMENTS]
    for n in (1 << power for power in range(bucket.bit_length())):
        keys += [GraphKey(step, n) for step in steps]
        if sizes.decoder and n <= MOST_ANSWERS:
            keys += [GraphKey(step, n, room=room) for step in ANSWERS]
    return tuple(keys)


def pool_of(key: GraphKey) -> str:
    """Graphs of one pool never run at the same time, so that they share their workspace. Those of a stream have their
    own: the C++ runner launches them whenever it likes, also between another graph's replay and the copy of its result.
    """
    return "stream" if key.step in STREAMS else "steps"


def plan_graphs(sizes: Sizes, keys: tuple[GraphKey, ...]) -> GraphPlan:
    """Bytes of a set of graphs; a buffer that several of them share counts once."""
    shared = {(_family(key), buffer.name): buffer.bytes for key in keys for buffer in step_buffers(sizes, key)}
    ring = PIECES * PIECE_SEGMENTS * (ring_width(sizes.segment) + 1) * 8 + PIECES * 8 + PIECES * PIECE_SEGMENTS * 4
    scores = PIECES * PIECE_SEGMENTS * ring_width(sizes.segment) * 4
    steps = {key.step for key in keys}
    workspaces: dict[str, int] = {}
    for key in keys:
        workspaces[pool_of(key)] = max(workspaces.get(pool_of(key), 0), workspace_bytes(sizes, key))
    return GraphPlan(
        keys=keys,
        buffers=sum(shared.values()),
        outputs=sum(output_bytes(sizes, key) for key in keys),
        workspace=sum(workspaces.values()),
        pinned=(ring if steps & {*STREAMS} else 0) + (scores if "scored stream" in steps else 0),
    )


def _family(key: GraphKey) -> tuple[str, int, int]:
    """Graphs that share their buffers."""
    step = "answer" if key.step in ANSWERS else key.step
    return step, key.slots, key.room
