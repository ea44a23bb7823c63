"""The cost model against operations counted on the reference kernels, and against the published floors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checkpoints_for_tests import tiny_decoder, tiny_encoder
from rmt_kernels.cost_model import CARDS, ENCODERS, H200, Card, Cost, Model, decode_step, segment_step
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, GPT2Config, LlamaConfig

from rmt_engine.backbones import MODEL_TYPES
from rmt_engine.engine import Engine
from rmt_engine.layouts import padded

GPT2 = Model.of(GPT2Config().to_dict())
MEDIUM = Model.of(GPT2Config(n_embd=1024, n_head=16, n_layer=24).to_dict())
BERT = Model.of(BertConfig().to_dict())
LLAMA = Model.of(
    LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ).to_dict()
)


@pytest.mark.parametrize("kind", MODEL_TYPES)
@pytest.mark.parametrize("slots", [1, 3])
def test_flops_are_those_of_the_reference_kernels(kind: str, slots: int) -> None:
    checkpoint = tiny_encoder(kind) if kind in ENCODERS else tiny_decoder(kind)
    engine = Engine.from_weights(checkpoint.rmt_config(37), checkpoint.weights(), device="cpu", backend="ref")
    ids, memory = torch.zeros(slots, 37, dtype=torch.int64), engine.initial_memory(slots)
    layout, count = engine.executor.layout, checkpoint.num_mem_tokens
    with FlopCounterMode(display=False) as counted:
        engine.executor.fold(ids, memory)
    # The reference multiplies padded queries, and keys behind a query, which the model does not count.
    model = replace(Model.of(checkpoint.backbone), causal=False)
    rows, length = padded(layout.rows(37)), layout.rows(37)
    cost = segment_step(model, rows, slots=slots, last_rows=count)
    unseen = 4 * model.heads * model.head_dim * ((model.layers - 1) * rows + count) * (rows - length) * slots
    assert counted.get_total_flops() == cost.flops - unseen
    matrices = {name: weight for name, weight in checkpoint.weights().items() if weight.ndim == 2}
    inside = [weight.numel() for name, weight in matrices.items() if ".h." in name or "layer" in name]
    assert cost.weight_bytes == 2 * sum(inside)


def test_causal_rows_see_what_stands_before_them() -> None:
    tiny = Model(1, 1, 1, 1, 1, 0, 2, 5, causal=True)
    by_hand = lambda rows, keys: 4 * sum(range(keys - rows + 1, keys + 1))  # noqa: E731
    linears = 2 * 2 + 2 * 2  # q and o, k and v of one row, all one wide
    assert segment_step(tiny, 7).flops == 7 * linears + by_hand(7, 7)
    assert segment_step(tiny, 7, last_rows=2).flops == 2 * 4 + 7 * 4 + by_hand(2, 7)
    assert segment_step(tiny, 7, last_rows=0, head_rows=3).flops == 7 * 4 + 3 * 2 * 5
    assert decode_step(tiny, 9).flops == linears + by_hand(1, 9) + 2 * 5
    assert decode_step(tiny, 9).weight_bytes == 2 * (4 + 5) + 2 * 2 * 9


@pytest.mark.parametrize(
    "model, gigaflops, megabytes, microseconds",
    [(BERT, 96.7, 170, 122), (GPT2, 91.8, 170, 116), (MEDIUM, 322, 604, 408), (LLAMA, 1013, 1946, 1283)],
    ids=["bert-base", "gpt2", "gpt2-medium", "llama-1b"],
)
def test_floors_of_known_models(model: Model, gigaflops: float, megabytes: float, microseconds: float) -> None:
    """512 rows, no head, on an H200: the figures of the published table."""
    cost = segment_step(model, 512)
    assert cost.flops / 1e9 == pytest.approx(gigaflops, rel=2e-3)
    assert cost.weight_bytes / 1e6 == pytest.approx(megabytes, rel=2e-3)
    assert H200.floor(cost) * 1e6 == pytest.approx(microseconds, rel=5e-3)
    assert H200.floor(segment_step(model, 512, slots=8)) == pytest.approx(8 * H200.floor(cost))


def test_what_a_head_adds() -> None:
    for model, share in ((GPT2, 0.43), (MEDIUM, 0.16), (LLAMA, 0.27)):
        bare, headed = segment_step(model, 512), segment_step(model, 512, head_rows=512)
        assert headed.flops / bare.flops - 1 == pytest.approx(share, abs=0.01)
        assert headed.weight_bytes - bare.weight_bytes == 2 * model.width * model.vocabulary


def test_a_decoded_row_waits_for_its_weights() -> None:
    cost = decode_step(GPT2, 512)
    assert H200.floor(cost) == cost.weight_bytes / H200.bandwidth
    assert H200.floor(Cost(790, 0, 0)) == pytest.approx(1e-12)


def test_cards_are_named_with_where_their_figures_come_from() -> None:
    step = segment_step(GPT2, 512)
    assert CARDS["h100"].floor(step) < CARDS["h200"].floor(step) < CARDS["a100"].floor(step)
    assert CARDS["a100"].floor(step) == step.flops / 312e12
    assert [card.name.split(", ")[-1] for card in CARDS.values()] == ["measured", "published", "published"]


def test_a_cpu_is_held_by_its_matrix_products() -> None:
    """At a segment's rows a CPU of 200 GFLOP/s waits for arithmetic, at one row for weights."""
    cpu = Card("two cores, fp32", flops=200e9, bandwidth=40e9)
    step, row = segment_step(GPT2, 512, element_bytes=4), decode_step(GPT2, 512, element_bytes=4)
    assert cpu.floor(step) == step.flops / cpu.flops == pytest.approx(0.459, abs=1e-3)
    assert cpu.floor(row) == row.weight_bytes / cpu.bandwidth


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^model_type='mamba': the cost model knows gpt2, llama, .*, bert, roberta$"):
        Model.of({"model_type": "mamba"})
