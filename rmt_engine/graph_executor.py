"""The graph executor: every step is recorded once, over static buffers, and replayed. Its bits are the eager ones.

What may change between two replays lies in the buffers of `graph_plan`: ids, lengths, the memory state, KV caches.
Slots that are left over in a bucket hold whatever was there before; no slot's results depend on them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from rmt_kernels.per_slot import PerSlot, added
from rmt_kernels.segment_attention import KVCache
from torch import Tensor

from rmt_engine.backbones.common import Backbone
from rmt_engine.config import RMTConfig
from rmt_engine.executors import EagerExecutor
from rmt_engine.graph_plan import (
    ANSWERS,
    LEAST_ROOM,
    STREAM_SEGMENTS,
    STREAMS,
    GraphKey,
    GraphPlan,
    Sizes,
    Step,
    answer_rows,
    keys_for,
    plan_graphs,
    pool_of,
    slots_bucket,
    step_buffers,
)
from rmt_engine.recording import Recorder, Recording

Buffers = dict[str, Tensor]
CARRIED = ("memory", "before", "begun")  # by a stream, from segment to segment


@dataclass(eq=False)
class Recorded:
    """Static buffers, and what was recorded over them."""

    buffers: Buffers
    recordings: dict[GraphKey, Recording] = field(default_factory=dict)


class AnswerCaches(list[KVCache]):
    """The KV caches of answers, views of buffers that are theirs until the last reference goes."""

    def __init__(self, recorded: Recorded, key: GraphKey, slots: int, layers: int) -> None:
        buffers = recorded.buffers
        super().__init__(KVCache(buffers[f"keys {i}"][:slots], buffers[f"values {i}"][:slots]) for i in range(layers))
        self.recorded, self.key = recorded, key


class GraphExecutor(EagerExecutor):
    """Replays recorded steps. Inputs and results are those of `EagerExecutor` with `fixed=True`; results are copies.

    slots: how many stand side by side at most in what is recorded when it is built, as `prepare` says; what goes beyond
    is recorded on first use. Calls of several threads follow one another. Raises BackendError, and
    torch.OutOfMemoryError where not one slot fits.
    """

    def __init__(
        self, config: RMTConfig, backbone: Backbone, memory: Tensor, recorder: Recorder, slots: int = 1
    ) -> None:
        super().__init__(config, backbone, memory, fixed=True)
        self.eager = EagerExecutor(config, backbone, memory, fixed=True)  # what is recorded
        self.recorder = recorder
        self.sizes = Sizes.of(config, memory.dtype)
        self.most_slots: int | None = None  # side by side, once memory has run out
        self.stream_in_use = False
        self._lock = threading.RLock()
        self._steps: dict[tuple[Step, int], Recorded] = {}
        self._free_answers: dict[tuple[int, int], list[Recorded]] = {}  # by slots and room: of nobody's now
        self.prepare(slots)

    def prepare(self, slots: int = 1, max_new_tokens: int = LEAST_ROOM) -> None:
        """Records what is not yet recorded of `keys_for`; for fewer slots where memory ends."""
        with self._lock:
            for key in keys_for(self.sizes, slots, max_new_tokens):
                if self.most_slots is not None and key.slots > self.most_slots:
                    return
                try:
                    self._prepare(key)
                except torch.OutOfMemoryError:
                    if key.slots == 1:
                        raise
                    self.most_slots = key.slots // 2

    def _prepare(self, key: GraphKey) -> None:
        if key.step in ANSWERS:
            free = self._free_answers.setdefault((key.slots, key.room), [])
            recorded = free[-1] if free else Recorded(self._allocated(key))
            self._recording(recorded, key)
            if not free:
                free.append(recorded)
            return
        first = self.sizes.decoder and key == GraphKey("logits") and (key.step, key.slots) not in self._steps
        recorded = self.recorded(key)
        if first:  # the head stands behind the graph: its kernel is compiled now
            self._logits(recorded.recordings[key].result[1])

    @property
    def plan(self) -> GraphPlan:
        """What is recorded and not in use by an answer."""
        free = [recorded for answers in self._free_answers.values() for recorded in answers]
        plans = [plan_graphs(self.sizes, tuple(recorded.recordings)) for recorded in (*self._steps.values(), *free)]
        keys = tuple(key for plan in plans for key in plan.keys)
        return replace(
            plan_graphs(self.sizes, keys),
            buffers=sum(plan.buffers for plan in plans),  # two answers of one size share none
            outputs=sum(plan.outputs for plan in plans),
        )

    def fold(self, ids: Tensor, memory: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self._side_by_side("fold", ids, memory, lengths)[0]

    def fold_with_logits(self, ids: Tensor, memory: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state, result = self._side_by_side("logits", ids, memory, lengths)
        return state, self._logits(result)[:, : ids.shape[1]] if self.sizes.decoder else result

    @torch.inference_mode()
    def _logits(self, rows: Tensor) -> Tensor:
        """Of all tokens, from the last hidden states [B, S + M, E]: one op behind the graph, so that none is kept."""
        return self.backbone.head(rows[:, : self.sizes.segment])

    def fold_with_scores(
        self,
        ids: Tensor,
        memory: Tensor,
        before: Tensor | None,
        lengths: Tensor | None = None,
        begun: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        state, scores, row = self._side_by_side("scores", ids, memory, lengths, before, begun)
        return state, scores[:, : ids.shape[1]], row

    def logits(self, ids: Tensor, memory: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self._side_by_side("classify", ids, memory, lengths)[0]

    def prefill(
        self, ids: Tensor, memory: Tensor, max_new_tokens: int, lengths: Tensor | None = None
    ) -> tuple[Tensor, list[KVCache]]:
        with self._lock, torch.inference_mode():
            caches = self.caches(len(ids), ids.shape[1] + max_new_tokens)
            recording = self._recording(caches.recorded, replace(caches.key, step="prefill"))
            buffers = caches.recorded.buffers
            self._load(buffers, ids, memory, lengths)
            recording.replay()
            filled = buffers["lengths"][: len(ids)].clone()
            for cache in caches:
                cache.length = PerSlot(filled, self.sizes.memory)
            return recording.result[0][: len(ids)].clone(), caches

    def decode(self, ids: Tensor, caches: Sequence[KVCache]) -> Tensor:
        if not isinstance(caches, AnswerCaches):
            raise ValueError("decode: expected caches that this executor gave (prefill, caches)")
        with self._lock, torch.inference_mode():
            buffers, length, slots = caches.recorded.buffers, caches[0].length, len(ids)
            if isinstance(length, PerSlot):
                buffers["filled"][:slots].copy_(length.numbers())
            else:
                buffers["filled"][:slots].fill_(length)
            buffers["tokens"][:slots].copy_(ids)
            # Recorded only now, if it is the first time: what runs for it then puts its row where this one's goes.
            recording = self._recording(caches.recorded, replace(caches.key, step="decode"))
            recording.replay()
            for cache in caches:
                cache.length = added(length, 1)
            return recording.result[0][:slots].clone()

    @torch.inference_mode(False)  # so that anybody may write into them
    def caches(self, slots: int, text: int) -> AnswerCaches:
        room = answer_rows(self.sizes.segment, text) - self.sizes.segment
        key = GraphKey("decode", slots_bucket(slots), room=room)
        with self._lock:
            recorded = self._free_answer(key)
            self._free_answers[key.slots, key.room].remove(recorded)
        caches = AnswerCaches(recorded, key, slots, self.sizes.layers)
        weakref.finalize(caches, self._free_answers[key.slots, key.room].append, recorded)
        return caches

    def _free_answer(self, key: GraphKey) -> Recorded:
        """Buffers of answers that nobody uses now."""
        free = self._free_answers.setdefault((key.slots, key.room), [])
        if not free:
            free.append(Recorded(self._allocated(key)))
        return free[-1]

    def _side_by_side(
        self,
        step: Step,
        ids: Tensor,
        memory: Tensor,
        lengths: Tensor | None,
        before: Tensor | None = None,
        begun: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """One replay for all slots, or several with fewer slots each where the memory does not hold more."""
        if ids.shape[1] > self.sizes.segment:
            raise ValueError(f"ids: expected at most segment_size={self.sizes.segment} tokens, got {ids.shape[1]}")
        inputs = {"ids": ids, "memory": memory, "lengths": lengths, "before": before, "begun": begun}
        with self._lock, torch.inference_mode():
            most = self._fitting(step, len(ids))
            results = []
            for start in range(0, len(ids), most):
                part = slice(start, start + most)
                results.append(self._replayed(step, {n: None if x is None else x[part] for n, x in inputs.items()}))
        return results[0] if len(results) == 1 else tuple(torch.cat(pieces) for pieces in zip(*results, strict=True))

    def _fitting(self, step: Step, slots: int) -> int:
        """How many slots can stand side by side: `slots`, or less where the device's memory ends."""
        most = slots if self.most_slots is None else min(slots, self.most_slots)
        while True:
            try:
                self.recorded(GraphKey(step, slots_bucket(most)))
                return most
            except torch.OutOfMemoryError:
                if most == 1:
                    raise
                most = self.most_slots = slots_bucket(most) // 2

    def _replayed(self, step: Step, inputs: dict[str, Tensor | None]) -> tuple[Tensor, ...]:
        ids, memory = inputs["ids"], inputs["memory"]
        assert ids is not None and memory is not None
        key = GraphKey(step, slots_bucket(len(ids)))
        recorded = self.recorded(key)
        self._load(recorded.buffers, ids, memory, inputs["lengths"])
        if step == "scores":
            self._load_before(recorded.buffers, inputs["before"], inputs["begun"], len(ids))
        recorded.recordings[key].replay()
        return tuple(result[: len(ids)].clone() for result in recorded.recordings[key].result)

    def _load(self, buffers: Buffers, ids: Tensor, memory: Tensor, lengths: Tensor | None) -> None:
        slots, text = ids.shape
        buffers["ids"][:slots, :text].copy_(ids)
        buffers["memory"][:slots].copy_(memory)
        if lengths is None:
            buffers["lengths"][:slots].fill_(text)
        else:
            buffers["lengths"][:slots].copy_(lengths)

    def _load_before(self, buffers: Buffers, before: Tensor | None, begun: Tensor | None, slots: int) -> None:
        if before is not None:
            buffers["before"][:slots].copy_(before)
        if begun is None or before is None:
            buffers["begun"][:slots].fill_(before is not None)
        else:
            buffers["begun"][:slots].copy_(begun)

    def claim_stream(self) -> bool:
        """Whether the stream's graphs were free. They are the caller's then, who sets `stream_in_use` back."""
        with self._lock:
            free, self.stream_in_use = not self.stream_in_use, True
        return free

    def stream_graphs(self, scored: bool) -> Recorded:
        """The graphs that fold a stream's segments out of the ring in their buffers."""
        step: Step = "scored stream" if scored else "stream"
        for segments in STREAM_SEGMENTS:
            recorded = self.recorded(GraphKey(step, 1, segments))
        return recorded

    def recorded(self, key: GraphKey) -> Recorded:
        """The buffers and recordings of a step that is no answer; made on first use."""
        with self._lock:
            recorded = self._steps.get((key.step, key.slots)) or Recorded(self._allocated(key))
            self._recording(recorded, key)
            self._steps[key.step, key.slots] = recorded  # only now: memory may have run out before
        return recorded

    def _recording(self, recorded: Recorded, key: GraphKey) -> Recording:
        if key not in recorded.recordings:
            recorded.recordings[key] = self.recorder.record(self._work(key, recorded.buffers), pool_of(key))
        return recorded.recordings[key]

    @torch.inference_mode(False)
    def _allocated(self, key: GraphKey) -> Buffers:
        """Zeros, and lengths that a segment can have: what is recorded runs over them first."""
        device = self.initial.device
        buffers = {b.name: torch.zeros(b.shape, dtype=b.dtype, device=device) for b in step_buffers(self.sizes, key)}
        buffers["lengths"].fill_(1)
        buffers["memory"].copy_(self.initial)
        return buffers

    def _work(self, key: GraphKey, buffers: Buffers) -> Callable[[], tuple[Tensor, ...]]:
        """What a graph does, over its buffers."""
        ids, memory, lengths = buffers.get("ids"), buffers["memory"], buffers["lengths"]
        assert ids is not None
        if key.step in STREAMS:
            return lambda: self._fold_from_ring(buffers, key.segments)
        if key.step == "prefill":
            return lambda: (self.eager.answering(ids, lengths, memory, self._views(buffers, 0)),)
        if key.step == "decode":
            return lambda: (self.eager.decode(buffers["tokens"], self._views(buffers, PerSlot(buffers["filled"]))),)
        if key.step == "scores":
            return lambda: self.eager.fold_with_scores(ids, memory, buffers["before"], lengths, buffers["begun"])
        if key.step == "logits":
            whole = self.eager.fold_with_rows if self.sizes.decoder else self.eager.fold_with_logits
            return lambda: whole(ids, memory, lengths)
        step = {"fold": self.eager.fold, "classify": self.eager.logits}[key.step]
        return lambda: (step(ids, memory, lengths),)

    def _views(self, buffers: Buffers, length: PerSlot | int) -> list[KVCache]:
        return [KVCache(buffers[f"keys {i}"], buffers[f"values {i}"], length) for i in range(self.sizes.layers)]

    def _fold_from_ring(self, buffers: Buffers, segments: int) -> tuple[Tensor, ...]:
        """Folds `segments` segments from the ring's place `counter` on, and moves the counter.

        Nothing moves the memory any more once it was not finite: it stays what it was before that launch.
        """
        places = buffers["counter"] + torch.arange(segments, device=self.initial.device)
        ids = buffers["ids"].index_select(0, places)[:, : self.sizes.segment]
        lengths = buffers["lengths"].index_select(0, places).to(torch.int32)
        lengths = lengths[:, None].expand(-1, 4).contiguous()  # each at a multiple of 16 bytes, as kernels expect it
        state: Buffers = {name: buffers[name] for name in CARRIED if name in buffers}
        scores = []
        for i in range(segments):
            state, segment_scores = self._next_state(state, ids[i : i + 1], lengths[i, :1])
            scores += segment_scores
        if scores:
            buffers["scores"][:, : self.sizes.segment].index_copy_(0, places, torch.cat(scores))
        good = buffers["good"] & state["memory"].isfinite().all()
        for name, new in state.items():
            buffers[name].copy_(torch.where(good, new, buffers[name]))
        buffers["good"].copy_(good)
        buffers["finite"].index_copy_(0, places, good.to(torch.int32).expand(segments))
        buffers["counter"].add_(segments)
        return ()

    def _next_state(self, state: Buffers, ids: Tensor, lengths: Tensor) -> tuple[Buffers, list[Tensor]]:
        """What a stream carries on behind one segment, and the segment's scores where it carries a row for them."""
        if "before" not in state:
            return {"memory": self.eager.fold(ids, state["memory"], lengths)}, []
        before, begun = state["before"], state["begun"]
        memory, scores, row = self.eager.fold_with_scores(ids, state["memory"], before, lengths, begun)
        return {"memory": memory, "before": row, "begun": torch.ones_like(begun)}, [scores]
