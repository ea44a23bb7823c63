"""The oracle is itself held to Hugging Face's own generate, to the layouts and to hand-made cases."""

from __future__ import annotations

import pytest
import torch
from checkpoints_for_tests import DECODER_VOCAB, ENCODER_VOCAB, SPECIAL, tiny_decoder, tiny_encoder
from reference import SpecialIds, segment_lengths

from rmt_engine.layouts import Cut

S = 11
LENGTHS = [1, S - 1, S, S + 1, 2 * S, 3 * S - 1, 3 * S, 3 * S + 1]


def text(length: int, vocab: int = DECODER_VOCAB) -> torch.Tensor:
    return torch.randint(5, vocab, (length,), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("alignment", ["left", "right", "center"])
def test_segment_lengths_are_those_of_the_layouts(alignment: str) -> None:
    for length in range(1, 8 * S):
        bounds = Cut.of(length, S, alignment).bounds(length)
        assert segment_lengths(length, S, alignment) == [end - start for start, end in bounds]


def test_segment_lengths_by_hand() -> None:
    assert segment_lengths(25, 10, "left") == [10, 10, 5]
    assert segment_lengths(25, 10, "right") == [5, 10, 10]
    assert segment_lengths(25, 10, "center") == [9, 9, 7]
    assert segment_lengths(0, 10, "left") == []


@pytest.mark.parametrize(
    ("model_type", "rope"),
    [("gpt2", "default"), ("llama", "default"), ("llama", "llama3"), ("gpt_neox", "default"), ("qwen3", "default")],
)
@pytest.mark.parametrize("length", [S, S + 1, 3 * S - 1])
def test_generate_is_hugging_face_generate_after_the_memory(model_type: str, rope: str, length: int) -> None:
    tiny = tiny_decoder(model_type, seed=3, noise="all", rope=rope)
    reference = tiny.reference(S)
    ids = text(length)
    new = reference.generate(ids, max_new_tokens=9)
    _, memories = reference.forward(ids)
    memory = ([tiny.memory, *memories])[len(memories) - 1]
    last = ids[(length - 1) // S * S :]
    rows = torch.cat([memory, tiny.model.get_input_embeddings()(last)])[None]
    mask = torch.ones(rows.shape[:2], dtype=torch.long)
    options = {"do_sample": False, "max_new_tokens": 9, "pad_token_id": 0}
    out = tiny.model.generate(inputs_embeds=rows, attention_mask=mask, eos_token_id=None, **options)
    assert new == out[0].tolist()
    stop = new[3]
    out = tiny.model.generate(inputs_embeds=rows, attention_mask=mask, eos_token_id=stop, **options)
    assert reference.generate(ids, max_new_tokens=9, eos_ids=[stop]) == out[0].tolist()


def test_a_segment_does_not_see_its_own_write_memory() -> None:
    tiny = tiny_decoder("gpt2", noise="all")
    reference = tiny.reference(S)
    logits, _ = reference.segment(text(S), tiny.memory)
    shorter, _ = reference.segment(text(S)[:4], tiny.memory)
    torch.testing.assert_close(logits[:4], shorter)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_padding_does_not_reach_the_encoder(model_type: str, length: int) -> None:
    tiny = tiny_encoder(model_type, noise="all")
    ids = text(length, ENCODER_VOCAB)
    tight, wide = tiny.reference(S, "left"), tiny.reference(S, "left")
    wide.input_size += 13
    for a, b in zip(tight.forward(ids), wide.forward(ids), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_special_tokens_are_dropped_unless_one_id_serves_two_purposes() -> None:
    tiny = tiny_encoder()
    content = tiny.reference(S).content([SPECIAL.cls, 7, 8, SPECIAL.sep, 9, SPECIAL.pad, SPECIAL.pad])
    assert content.tolist() == [7, 8, 9]
    roberta = tiny_encoder("roberta")
    own = roberta.special
    assert own == SpecialIds(pad=1, cls=0, sep=2, bos=0, eos=2) and own.dropped() == {1}
    content = roberta.reference(S).content([own.cls, 7, own.pad, 8, own.sep, 9, own.pad])
    assert content.tolist() == [own.cls, 7, 8, own.sep, 9]


def test_memory_moves_and_matters() -> None:
    for tiny in (tiny_decoder("gpt2", noise="all"), tiny_decoder("llama", noise="all"), tiny_encoder(noise="all")):
        reference = tiny.reference(S)
        first, (memory,) = reference.forward(text(S, ENCODER_VOCAB))
        again, _ = reference.forward(text(S, ENCODER_VOCAB), memory)
        assert memory.shape == tiny.memory.shape
        assert not torch.allclose(first[0], again[0], atol=1e-4)
