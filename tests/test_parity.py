"""The engine against the oracle: same logits, same memory state, same generated tokens."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from checkpoints_for_tests import SPECIAL, TinyCheckpoint, tiny_decoder, tiny_encoder
from torch import Tensor

from rmt_engine.engine import Engine

SEGMENT = 20
BACKENDS = ["ref", "cpu"]
# half of a head's elements turn, not the usual quarter
ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5}}
DECODERS: dict[str, dict[str, Any]] = {
    "gpt2": {"tied": True},
    "gpt2-untied": {"tied": False},
    "llama": {},
    "llama-tied-llama3": {"tied": True, "rope": "llama3", "seed": 4},
    "gpt_neox": {},
    "gpt_neox-serial-tied": {"use_parallel_residual": False, "tied": True, "attention_bias": False, **ROTARY},
    "mistral": {"sliding_window": 4 + SEGMENT + 24},  # as many rows as the longest answering segment below
    "qwen2": {"tied": True},
    "qwen3": {},
    "qwen3-biased-llama3": {"attention_bias": True, "rope": "llama3"},
}
ENCODERS = ["bert", "roberta"]
KINDS = [*DECODERS, *ENCODERS]
LENGTHS = [1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 3 * SEGMENT - 1, 3 * SEGMENT, 3 * SEGMENT + 1]


@lru_cache
def tiny(kind: str, noise: str = "norms") -> TinyCheckpoint:
    if kind in ENCODERS:
        return tiny_encoder(kind, seed=3, noise=noise)
    return tiny_decoder(kind.split("-")[0], noise=noise, **{"seed": 5, **DECODERS[kind]})


def engine_of(checkpoint: TinyCheckpoint, backend: str, alignment: str | None = None) -> Engine:
    config = checkpoint.rmt_config(SEGMENT, alignment)
    return Engine.from_weights(config, checkpoint.weights(), device="cpu", backend=backend)


def random_ids(checkpoint: TinyCheckpoint, length: int, seed: int = 0) -> Tensor:
    low = 5 if checkpoint.family == "encoder_classifier" else 0  # no special ids: lengths are then exact
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(low, checkpoint.backbone["vocab_size"], (length,), generator=generator)


def difference(ours: Tensor, truth: Tensor) -> float:
    """The greatest error, relative to the greatest value."""
    assert ours.shape == truth.shape
    return float((ours - truth).abs().max() / truth.abs().max())


def whole(logits: list[Tensor]) -> Tensor:
    """The oracle's logits per segment as `output="all"` gives them."""
    return torch.stack(logits) if logits[0].dim() == 1 else torch.cat(logits)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alignment", ["left", "right", "center"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_equals_the_reference(kind: str, alignment: str, backend: str) -> None:
    checkpoint = tiny(kind)
    engine, reference = engine_of(checkpoint, backend, alignment), checkpoint.reference(SEGMENT, alignment)
    for length in LENGTHS:
        ids = random_ids(checkpoint, length)
        logits, memories = reference.forward(ids)
        out = engine.forward(ids[None], output="all")
        assert difference(out.logits[0], whole(logits)) <= 1e-5
        assert difference(out.memory_state[0], memories[-1]) <= 1e-5
        last = engine.forward(ids[None], output="last")
        assert difference(last.logits[0], logits[-1]) <= 1e-5
        nothing = engine.forward(ids[None], output="none")
        assert nothing.logits is None
        assert difference(nothing.memory_state[0], memories[-1]) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_segment_from_the_reference_memory_whatever_the_weights(kind: str, backend: str) -> None:
    checkpoint = tiny(kind, noise="all")
    engine, reference = engine_of(checkpoint, backend), checkpoint.reference(SEGMENT)
    memory = checkpoint.memory
    for index in range(12):
        ids = random_ids(checkpoint, SEGMENT if index % 3 else 7, seed=index)
        truth_logits, truth = reference.segment(ids, memory)
        ours, logits = engine.executor.fold_with_logits(ids[None], memory[None])
        assert difference(logits[0], truth_logits) <= 1e-5
        assert difference(ours[0], truth) <= 1e-5
        assert difference(engine.executor.fold(ids[None], memory[None])[0], truth) <= 1e-5
        memory = truth


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_segments_running_free(kind: str, backend: str) -> None:
    checkpoint = tiny(kind)
    engine, reference = engine_of(checkpoint, backend), checkpoint.reference(SEGMENT)
    ids = random_ids(checkpoint, 50 * SEGMENT)
    logits, memories = reference.forward(ids)
    out = engine.forward(ids[None], output="last")
    assert difference(out.memory_state[0], memories[-1]) <= 1e-5
    assert difference(out.logits[0], logits[-1]) <= 1e-5


@pytest.mark.parametrize("alignment", ["left", "right", "center"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_list_of_different_lengths_is_each_alone(kind: str, alignment: str) -> None:
    checkpoint = tiny(kind)
    engine, reference = engine_of(checkpoint, "cpu", alignment), checkpoint.reference(SEGMENT, alignment)
    rows = [random_ids(checkpoint, length, seed=i) for i, length in enumerate([41, 3, 60, 41, 20])]
    out = engine.forward(rows, output="all")
    last = engine.forward(rows, output="last")
    for i, row in enumerate(rows):
        logits, memories = reference.forward(row)
        assert difference(out.logits[i], whole(logits)) <= 1e-5
        assert difference(last.logits[i], logits[-1]) <= 1e-5
        assert difference(out.memory_state[i], memories[-1]) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("noise", ["norms", "all"])
def test_greedy_generate_gives_the_same_tokens(kind: str, backend: str, noise: str) -> None:
    from rmt_engine.sampling import generate

    checkpoint = tiny(kind, noise)
    reference, engine = checkpoint.reference(SEGMENT), engine_of(checkpoint, backend)
    for length in LENGTHS:
        ids = random_ids(checkpoint, length, seed=9)
        stream = engine.stream()
        stream.feed(ids)
        ours = generate(engine.executor, torch.from_numpy(stream.rest)[None], stream.memory[None], 24, ())[0]
        assert ours == reference.generate(ids, 24)


def test_the_encoder_drops_special_ids_from_the_content() -> None:
    checkpoint = tiny("bert")
    engine, reference = engine_of(checkpoint, "cpu"), checkpoint.reference(SEGMENT)
    clean = random_ids(checkpoint, 50)
    mixed = torch.cat([torch.tensor([SPECIAL.cls]), clean[:30], torch.tensor([SPECIAL.sep, SPECIAL.pad]), clean[30:]])
    logits, _ = reference.forward(mixed)
    ours = engine.forward(mixed[None]).logits[0]
    assert difference(ours, logits[-1]) <= 1e-5
    assert torch.equal(ours, engine.forward(clean[None]).logits[0])


def test_memory_states_can_be_carried_on() -> None:
    checkpoint = tiny("gpt2")
    engine = engine_of(checkpoint, "cpu")
    ids = random_ids(checkpoint, 5 * SEGMENT)
    first = engine.forward(ids[None, : 2 * SEGMENT], output="none").memory_state
    *_, last = engine.segments(ids[None, 2 * SEGMENT :], output="none", memory_state=first)
    assert torch.equal(last.memory_state, engine.forward(ids[None], output="none").memory_state)
