"""The engine against the oracle: same logits, same memory state, same generated tokens."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from checkpoints_for_tests import SPECIAL, TinyCheckpoint, tiny_decoder, tiny_encoder
from torch import Tensor

from rmt_engine.engine import Engine
from rmt_engine.errors import CheckpointError

SEGMENT = 20
BACKENDS = ["ref", "cpu"]
# half of a head's elements turn, not the usual quarter
ROPE = {"rope_type": "default", "rope_theta": 1000.0}
ROTARY = {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}
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
    for length in (
        LENGTHS if kind in ("gpt2", "llama") else LENGTHS[::3]
    ):  # borders are the stream's, not the backbone's
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


def test_roberta_keeps_the_ids_that_serve_two_purposes() -> None:
    checkpoint = tiny("roberta")
    engine, reference = engine_of(checkpoint, "cpu"), checkpoint.reference(SEGMENT)
    own, text = checkpoint.special, random_ids(checkpoint, 50)
    mixed = torch.cat([torch.tensor([own.cls, own.pad]), text[:30], torch.tensor([own.sep, own.pad]), text[30:]])
    kept = mixed[mixed != own.pad]
    assert len(kept) == len(text) + 2
    ours = engine.forward(mixed[None]).logits[0]
    assert difference(ours, reference.forward(mixed)[0][-1]) <= 1e-5
    assert torch.equal(ours, engine.forward(kept[None]).logits[0])


@pytest.mark.parametrize(
    ("kind", "config", "words"),
    [
        ("gpt_neox", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.4}}, "turns 3 of 8 elements of a head"),
        ("gpt_neox", {"hidden_act": "silu"}, "hidden_act='silu'; this engine runs 'gelu', 'gelu_new'"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'; this engine runs"),
        ("mistral", {"hidden_act": "gelu"}, "hidden_act='gelu'; this engine runs 'silu'"),
        ("roberta", {"is_decoder": True}, "is_decoder=True; this engine runs False"),
    ],
)
def test_a_config_that_cannot_run_is_refused(kind: str, config: dict[str, Any], words: str) -> None:
    checkpoint = tiny(kind)
    asked = replace(checkpoint.rmt_config(SEGMENT), backbone={**checkpoint.backbone, **config})
    with pytest.raises(CheckpointError, match=words):
        Engine.from_weights(asked, checkpoint.weights(), device="cpu", backend="ref")


def test_a_row_beyond_the_sliding_window_would_differ() -> None:
    """The window that the config admits is the last one at which full attention is the backbone's own."""
    for window, same in ((SEGMENT + 8, True), (SEGMENT + 7, False)):
        checkpoint = tiny_decoder("mistral", noise="all", sliding_window=window)
        full = replace(checkpoint.rmt_config(12), backbone={**checkpoint.backbone, "sliding_window": None})
        config = replace(full, segment_size=SEGMENT)
        engine = Engine.from_weights(config, checkpoint.weights(), device="cpu", backend="ref")
        ids = random_ids(checkpoint, SEGMENT)
        _, (truth,) = checkpoint.reference(SEGMENT).forward(ids)
        assert (difference(engine.forward(ids[None], output="none").memory_state[0], truth) <= 1e-5) == same


def test_memory_states_can_be_carried_on() -> None:
    checkpoint = tiny("gpt2")
    engine = engine_of(checkpoint, "cpu")
    ids = random_ids(checkpoint, 5 * SEGMENT)
    first = engine.forward(ids[None, : 2 * SEGMENT], output="none").memory_state
    *_, last = engine.segments(ids[None, 2 * SEGMENT :], output="none", memory_state=first)
    assert torch.equal(last.memory_state, engine.forward(ids[None], output="none").memory_state)
