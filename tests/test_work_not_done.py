"""What a segment step must not do: no head, no KV cache, no rows of the last layer that nobody reads, nothing kept."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints_for_tests import TinyCheckpoint, tiny_decoder, tiny_encoder
from rmt_kernels import linear_residual, lm_head, memory, norm_linear, segment_attention
from rmt_kernels.segment_attention import KVCache
from rmt_kernels.weights import Linear
from torch import Tensor

from rmt_engine.engine import Engine
from rmt_engine.layouts import padded

SEGMENT, MEMORY, LAYERS, VOCAB = 20, 4, 3, 271
WHOLE = padded(SEGMENT + 2 * MEMORY)  # rows of a full segment as they are computed
Work = list[tuple[str, int, int]]  # op, outputs of its weight (for attention: keys), rows


class Counted:
    """An engine whose planned ops write down what they compute."""

    def __init__(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.work: Work = []
        self.caches = 0
        for op in (norm_linear, linear_residual, segment_attention, lm_head, memory):
            monkeypatch.setattr(op, "implementation", self.implementation(op.implementation))
        make: Callable[..., TinyCheckpoint] = tiny_encoder if kind == "bert" else tiny_decoder
        checkpoint = make(kind, num_mem_tokens=MEMORY, layers=LAYERS)
        config = checkpoint.rmt_config(SEGMENT, "left")
        self.engine = Engine.from_weights(config, checkpoint.weights(), device="cpu", backend="cpu")
        self.executor = self.engine.executor
        self.work.clear()  # what was planned is not yet run

    def implementation(self, real: Callable[[str, str], Any]) -> Callable[[str, str], Any]:
        def counted(op: str, backend: str) -> SimpleNamespace:
            plans = {name: plan for name, plan in vars(real(op, backend)).items() if name.startswith("plan")}
            names = {"plan": op, "plan_nll": "nll", "plan_write": "write_memory"}  # the others multiply by no weight
            return SimpleNamespace(
                **{name: self.counting(names[name], plan) if name in names else plan for name, plan in plans.items()}
            )

        return counted

    def counting(self, op: str, plan: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *weights: self.wrap(op, weights[0], plan(*weights))

    def wrap(self, op: str, weights: Any, planned: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, *rest: Any, **options: Any) -> Tensor:
            size = weights.weight.shape[0] if isinstance(weights, Linear) else 0
            if op == "segment_attention":
                size = options["length"]
                self.caches += options.get("cache") is not None
            out = planned(x, *rest, **options)
            self.work.append((op, size, (out if op == "nll" else out[..., 0]).numel()))
            return out

        return run

    def of(self, step: Callable[[], object]) -> Work:
        """What one step computes."""
        self.work.clear()
        step()
        return list(self.work)

    def head_rows(self, step: Callable[[], object]) -> list[int]:
        """Rows of every call of the head."""
        return [rows for op, _, rows in self.of(step) if op in ("lm_head", "nll")]

    def ids(self, length: int, batch: int = 1) -> Tensor:
        low = 5 if self.engine.config.family == "encoder_classifier" else 0
        return torch.randint(low, 97, (batch, length), generator=torch.Generator().manual_seed(length))


# outputs of q, of k and v, of the attention's projection, of the MLP's two halves (all models are 32 wide)
WIDTHS = {"gpt2": (32, 64, 32, 128, 32), "llama": (32, 32, 32, 112, 32), "bert": (32, 64, 32, 56, 32)}


def layers(kind: str, all_rows: int, keys: int, last_rows: int) -> Work:
    """Every layer over `all_rows`, the last one for `last_rows` of them."""
    q, kv, out, mlp_in, mlp_out = WIDTHS[kind]

    def after(rows: int) -> Work:
        attention = [("segment_attention", keys, rows), ("linear_residual", out, rows)]
        return [*attention, ("norm_linear", mlp_in, rows), ("linear_residual", mlp_out, rows)]

    work: Work = []
    for _ in range(LAYERS - 1):
        work += [("norm_linear", q + kv, all_rows), *after(all_rows)]
    return [*work, ("norm_linear", kv, all_rows), ("norm_linear", q, last_rows), *after(last_rows)]


@pytest.fixture(params=["gpt2", "llama", "bert"])
def counted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(request.param, monkeypatch)


@pytest.fixture(params=["gpt2", "llama"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(request.param, monkeypatch)


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted("bert", monkeypatch)


# ------------------------------------------------------------------------------------------------ one step


@pytest.mark.parametrize("length", [SEGMENT, 7, 1])
def test_a_fold_computes_its_memory_and_nothing_else(counted: Counted, length: int) -> None:
    kind = counted.engine.config.model_type
    extra = 2 * MEMORY if kind != "bert" else MEMORY + 3
    state = counted.engine.initial_memory()
    work = counted.of(lambda: counted.executor.fold(counted.ids(length), state))
    rows = length + extra
    assert work == [*layers(kind, padded(rows), rows, MEMORY), ("write_memory", 0, MEMORY)]
    assert counted.caches == 0


def test_rows_of_a_batch_are_counted_alike(decoder: Counted) -> None:
    work = decoder.of(lambda: decoder.executor.fold(decoder.ids(SEGMENT, batch=3), decoder.engine.initial_memory(3)))
    rows = SEGMENT + 2 * MEMORY
    assert work == [*layers(decoder.engine.config.model_type, 3 * WHOLE, rows, 3 * MEMORY), ("write_memory", 0, 12)]


def test_logits_are_of_the_text_alone(decoder: Counted) -> None:
    state = decoder.engine.initial_memory()
    work = decoder.of(lambda: decoder.executor.fold_with_logits(decoder.ids(SEGMENT), state))
    expected = layers(decoder.engine.config.model_type, WHOLE, SEGMENT + 2 * MEMORY, SEGMENT + MEMORY)
    assert work == [*expected, ("write_memory", 0, MEMORY), ("lm_head", VOCAB, SEGMENT)]
    assert decoder.caches == 0


def test_the_answering_segment_has_one_row_in_the_last_layer(decoder: Counted) -> None:
    kind, rows = decoder.engine.config.model_type, MEMORY + 7
    state = decoder.engine.initial_memory()
    work = decoder.of(lambda: decoder.executor.prefill(decoder.ids(7), state, 5))
    assert work == [*layers(kind, padded(rows), rows, 1), ("lm_head", VOCAB, 1)]
    assert decoder.caches == LAYERS
    _, caches = decoder.executor.prefill(decoder.ids(7), state, 5)
    work = decoder.of(lambda: decoder.executor.decode(torch.tensor([[3]]), caches))
    assert work == [*layers(kind, 1, 1, 1), ("lm_head", VOCAB, 1)]


def test_a_classifier_asked_at_the_end_computes_cls_alone(encoder: Counted) -> None:
    state = encoder.engine.initial_memory()
    rows = SEGMENT + MEMORY + 3
    head = [("norm_linear", 32, 1), ("norm_linear", 6, 1)]  # pooler and classifier
    work = encoder.of(lambda: encoder.executor.logits(encoder.ids(SEGMENT), state))
    assert work == [*layers("bert", padded(rows), rows, 1), *head]
    work = encoder.of(lambda: encoder.executor.fold_with_logits(encoder.ids(SEGMENT), state))
    assert work == [*layers("bert", padded(rows), rows, 1 + MEMORY), ("write_memory", 0, MEMORY), *head]


# -------------------------------------------------------------------------------------------- whole inputs


def test_the_head_runs_where_logits_were_asked_for(decoder: Counted) -> None:
    ids = decoder.ids(4 * SEGMENT + 7, batch=2)
    assert decoder.head_rows(lambda: decoder.engine.forward(ids, output="none")) == []
    assert decoder.head_rows(lambda: decoder.engine.forward(ids, output="last")) == [2 * 7]
    assert decoder.head_rows(lambda: decoder.engine.forward(ids, output="all")) == [2 * SEGMENT] * 4 + [2 * 7]
    assert decoder.head_rows(lambda: list(decoder.engine.segments(ids, output="last"))) == [2 * 7]
    assert decoder.caches == 0


def test_a_classifier_is_asked_once(encoder: Counted) -> None:
    ids = encoder.ids(3 * SEGMENT + 1)

    def pooled(step: Callable[[], object]) -> int:
        return sum(op == "norm_linear" and outputs == 6 for op, outputs, _ in encoder.of(step))

    assert pooled(lambda: encoder.engine.forward(ids, output="none")) == 0
    assert pooled(lambda: encoder.engine.forward(ids, output="last")) == 1
    assert pooled(lambda: encoder.engine.forward(ids, output="all")) == 4
    stream = encoder.engine.stream()
    assert pooled(lambda: stream.feed(ids[0])) == 0
    assert pooled(lambda: stream.classify()) == 1


def test_streams_and_runs_call_the_head_for_answers_alone(decoder: Counted, tmp_path: Path) -> None:
    ids = decoder.ids(5 * SEGMENT + 7)[0].numpy()
    stream = decoder.engine.stream()
    assert decoder.head_rows(lambda: (stream.feed(ids), stream.finish())) == []
    path = tmp_path / "ids.npy"
    np.save(path, ids)
    assert decoder.head_rows(lambda: list(decoder.engine.run(path))) == []
    assert decoder.caches == 0


# ------------------------------------------------------------------------------------------ nothing is kept


class Alive:
    """Watches the tensors that segment steps give out."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.memories: list[weakref.ref[Tensor]] = []
        self.logits: list[weakref.ref[Tensor]] = []
        self.most_memories = self.most_logits = 0
        executor = engine.executor
        fold, fold_with_logits = executor.fold, executor.fold_with_logits

        def watched_fold(ids: Tensor, state: Tensor) -> Tensor:
            self.count()
            new = fold(ids, state)
            self.memories.append(weakref.ref(new))
            return new

        def watched_both(ids: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            self.count()
            new, logits = fold_with_logits(ids, state)
            self.memories.append(weakref.ref(new))
            self.logits.append(weakref.ref(logits))
            return new, logits

        monkeypatch.setattr(executor, "fold", watched_fold)
        monkeypatch.setattr(executor, "fold_with_logits", watched_both)

    def count(self) -> None:
        memories, logits = (sum(ref() is not None for ref in refs) for refs in (self.memories, self.logits))
        self.most_memories, self.most_logits = max(self.most_memories, memories), max(self.most_logits, logits)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
@pytest.mark.parametrize("output", ["none", "last", "all"])
def test_forward_keeps_what_was_asked_for(output: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(kind, monkeypatch)
    alive = Alive(counted.engine, monkeypatch)
    out = counted.engine.forward(counted.ids(9 * SEGMENT + 3, batch=2), output=output)
    assert len(alive.memories) == 10
    assert alive.most_memories <= 1, "the state that goes in; the one before it is gone"
    if output == "all" and kind == "bert":
        assert out.logits.shape == (2, 10, 6)  # a few numbers a segment are collected as they come
    else:
        assert alive.most_logits <= 1, "a segment's logits are gone, or copied to their place, when the next one starts"
    assert out.memory_state.untyped_storage().nbytes() == 2 * MEMORY * 32 * 4
    if output == "all" and kind == "gpt2":
        assert out.logits.untyped_storage().nbytes() == 2 * (9 * SEGMENT + 3) * VOCAB * 4


@pytest.mark.parametrize("output", ["none", "last", "all"])
def test_iterating_over_segments_takes_constant_memory(output: Any, decoder: Counted, monkeypatch: Any) -> None:
    alive = Alive(decoder.engine, monkeypatch)
    for segment in decoder.engine.segments(decoder.ids(20 * SEGMENT), output=output):
        assert segment.memory_state.untyped_storage().nbytes() == MEMORY * 32 * 4, "a state of its own, not a view"
    assert len(alive.memories) == 20
    assert alive.most_memories <= 2 and alive.most_logits <= 1  # what the loop above still holds, and what goes in


def test_a_stream_keeps_one_state_and_a_short_rest(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = Alive(counted.engine, monkeypatch)
    stream = counted.engine.stream()
    stream.feed(counted.ids(30 * SEGMENT + 1)[0])
    alive.count()
    assert len(alive.memories) == 30 and alive.most_memories <= 1
    assert len(stream.rest) == 1 and stream.rest.base is None, "not a view of everything that was fed"
    assert stream.place.memory.untyped_storage().nbytes() == MEMORY * 32 * 4


def test_the_caches_hold_one_segment(decoder: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[KVCache] = []
    real = decoder.executor.caches

    def watched(slots: int, text: int) -> list[KVCache]:
        made.extend(real(slots, text))
        return made[-LAYERS:]

    monkeypatch.setattr(decoder.executor, "caches", watched)
    decoder.executor.prefill(decoder.ids(7), decoder.engine.initial_memory(), 5)
    assert len(made) == LAYERS and {cache.keys.shape[2] for cache in made} == {MEMORY + 7 + 5}
