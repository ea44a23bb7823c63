"""Which graphs are captured and what they hold: numbers from shapes."""

from __future__ import annotations

import pytest
import torch

from rmt_engine.config import RMTConfig
from rmt_engine.graph_plan import (
    PIECE_SEGMENTS,
    PIECES,
    STREAM_SEGMENTS,
    STREAMS,
    GraphKey,
    Sizes,
    answer_room,
    keys_for,
    output_bytes,
    plan_graphs,
    pool_of,
    ring_width,
    slots_bucket,
    step_buffers,
    workspace_bytes,
)

GPT2 = {
    "model_type": "gpt2",
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "vocab_size": 128256,
}
BERT = {
    "model_type": "bert",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "vocab_size": 30522,
    "id2label": {"0": "a", "1": "b", "2": "c"},
}


def sizes_of(backbone: dict, dtype: torch.dtype = torch.bfloat16, segment: int = 480) -> Sizes:
    encoder = {"family": "encoder_classifier", "cls_id": 101, "sep_id": 102} if backbone is BERT else {}
    config = RMTConfig(**{"family": "decoder", **encoder}, backbone=backbone, num_mem_tokens=16, segment_size=segment)
    return Sizes.of(config, dtype)


def test_slots_and_room_come_in_powers_of_two() -> None:
    assert [slots_bucket(n) for n in (1, 2, 3, 4, 5, 8, 9, 32, 33)] == [1, 2, 4, 4, 8, 8, 16, 32, 64]
    assert [answer_room(n) for n in (1, 16, 17, 100, 128)] == [16, 16, 32, 128, 128]
    for call, words in ((slots_bucket, "slots must be at least 1"), (answer_room, "max_new_tokens must be at least 1")):
        with pytest.raises(ValueError, match=words):
            call(0)


def test_every_place_of_the_ring_begins_at_a_multiple_of_16_bytes() -> None:
    assert [ring_width(n) * 8 % 16 for n in range(1, 50)] == [0] * 49
    assert all(n <= ring_width(n) <= n + 1 for n in range(1, 50))


def test_sizes_of_grouped_heads_and_of_a_classifier() -> None:
    llama = sizes_of(LLAMA)
    assert (llama.kv_heads, llama.head_dim, llama.width, llama.layers, llama.outputs) == (8, 64, 2048, 16, 128256)
    assert (sizes_of(BERT).outputs, sizes_of(BERT).decoder, sizes_of(GPT2).rows) == (3, False, 512)


def test_buffers_of_each_step() -> None:
    sizes = sizes_of(GPT2)
    fold = {buffer.name: buffer for buffer in step_buffers(sizes, GraphKey("fold", 8))}
    assert fold["ids"].shape == (8, 480) and fold["lengths"].dtype == torch.int32
    assert fold["memory"].bytes == 8 * 16 * 768 * 2
    stream = {buffer.name: buffer.shape for buffer in step_buffers(sizes, GraphKey("stream"))}
    places = PIECES * PIECE_SEGMENTS
    assert (stream["ids"], stream["lengths"], stream["finite"]) == ((places, 480), (places,), (places,))
    assert "scores" not in stream and "scores" in {b.name for b in step_buffers(sizes, GraphKey("scored stream"))}
    answer = step_buffers(sizes_of(LLAMA), GraphKey("decode", 2, room=32))
    caches = [buffer for buffer in answer if buffer.name.startswith(("keys", "values"))]
    assert len(caches) == 2 * 16 and caches[0].shape == (2, 8, 16 + 480 + 32, 64)


def test_every_step_is_captured_for_every_number_of_slots() -> None:
    keys = keys_for(sizes_of(GPT2), slots=5)
    assert len(keys) == len(set(keys)) and [key.slots for key in keys] == sorted(key.slots for key in keys)
    for step in STREAMS:
        assert [(key.slots, key.segments) for key in keys if key.step == step] == [(1, n) for n in STREAM_SEGMENTS]
    for step in ("fold", "logits", "scores", "prefill", "decode"):
        assert [key.slots for key in keys if key.step == step] == [1, 2, 4, 8]
    assert {key.step for key in keys_for(sizes_of(BERT))} == {"stream", "fold", "logits", "classify"}


def test_answers_stand_side_by_side_by_sixteen_and_have_the_room_that_is_asked_for() -> None:
    keys = keys_for(sizes_of(GPT2), slots=64, max_new_tokens=100)
    assert [key.slots for key in keys if key.step == "decode"] == [1, 2, 4, 8, 16]
    assert {key.room for key in keys if key.step in ("prefill", "decode")} == {128}
    assert max(key.slots for key in keys if key.step == "scores") == 64
    for wrong in ({"slots": 0}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            keys_for(sizes_of(GPT2), **wrong)


def test_a_stream_works_in_memory_of_its_own() -> None:
    keys, sizes = keys_for(sizes_of(GPT2), slots=8), sizes_of(GPT2)
    assert {key.step for key in keys if pool_of(key) == "stream"} == set(STREAMS)
    largest = workspace_bytes(sizes, GraphKey("fold", 8))
    assert plan_graphs(sizes, keys).workspace == largest + workspace_bytes(sizes, GraphKey("stream"))
    assert largest > workspace_bytes(sizes, GraphKey("decode", 8))


def test_the_plan_adds_up_and_counts_shared_buffers_once() -> None:
    sizes = sizes_of(GPT2)
    keys = keys_for(sizes, slots=8)
    plan = plan_graphs(sizes, keys)
    assert plan.total == plan.buffers + plan.outputs + plan.workspace
    prefill, decode = (key for key in keys if key.step in ("prefill", "decode") and key.slots == 4)
    assert step_buffers(sizes, prefill) == step_buffers(sizes, decode)
    alone = plan_graphs(sizes, (prefill,)).buffers
    assert plan_graphs(sizes, (prefill, decode)).buffers == alone
    assert plan.outputs == sum(output_bytes(sizes, key) for key in keys)
    assert plan_graphs(sizes, ()).total == 0
    ring, scores = (PIECES * PIECE_SEGMENTS * 480 * size for size in (8, 4))
    assert ring + scores < plan.pinned < 1.01 * (ring + scores)
    assert plan.to_dict()["total"] == plan.total and len(plan.to_dict()["graphs"]) == len(keys)


def test_results_cost_what_they_weigh_and_a_decoder_keeps_no_logits_of_all_tokens() -> None:
    sizes = sizes_of(GPT2)
    assert output_bytes(sizes, GraphKey("logits", 1)) == 16 * 768 * 2 + (480 + 16) * 768 * 2
    assert output_bytes(sizes_of(BERT), GraphKey("logits", 1)) == 16 * 768 * 2 + 3 * 4
    assert output_bytes(sizes, GraphKey("scores", 2)) == 2 * (16 * 768 * 2 + 480 * 4 + 768 * 2)
