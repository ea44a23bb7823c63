"""The engine's own mistakes and limits, told in words before work is done."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_for_tests import SPECIAL, TinyCheckpoint, tiny_encoder

from rmt_engine import engine as engine_module
from rmt_engine.engine import Engine
from rmt_engine.errors import BackendError

SEGMENT = 20


@pytest.fixture(scope="module")
def decoder(tiny_gpt2: TinyCheckpoint) -> Engine:
    return Engine.from_weights(tiny_gpt2.rmt_config(SEGMENT), tiny_gpt2.weights(), device="cpu")


@pytest.fixture(scope="module")
def encoder() -> Engine:
    tiny = tiny_encoder("bert", seed=3, layers=2)
    return Engine.from_weights(tiny.rmt_config(SEGMENT), tiny.weights(), device="cpu")


def ids(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(5, 97, (batch, length), generator=torch.Generator().manual_seed(length))


WRONG_INPUTS: list[tuple[Any, str]] = [
    (torch.arange(5), "input_ids, row 0: expected 1-D integer ids, got torch.int64 []"),
    (torch.zeros(1, 5), "input_ids, row 0: expected 1-D integer ids, got torch.float32 [5]"),
    (torch.ones(1, 5, dtype=torch.bool), "input_ids, row 0: expected 1-D integer ids, got torch.bool [5]"),
    ([[3, 4], [[5]]], "input_ids, row 1: expected 1-D integer ids, got torch.int64 [1, 1]"),
    ([[3, 4], torch.empty(0, dtype=torch.int64)], "input_ids, row 1 holds no tokens: there is nothing to read"),
    (torch.empty(1, 0, dtype=torch.int64), "input_ids, row 0 holds no tokens: there is nothing to read"),
    ([], "input_ids is empty: expected at least one row of ids"),
    ([[3], [4, 271]], "input_ids, row 1: ids must lie in 0..270 (vocab_size)"),
    ([[-1]], "input_ids, row 0: ids must lie in 0..270 (vocab_size)"),
]


@pytest.mark.parametrize("wrong, words", WRONG_INPUTS, ids=[words for _, words in WRONG_INPUTS])
def test_input_ids_that_cannot_be_read(wrong: Any, words: str, decoder: Engine) -> None:
    for read in (decoder.forward, lambda rows: list(decoder.segments(rows))):
        with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
            read(wrong)


@pytest.mark.parametrize(
    "use, words",
    [
        (lambda e: e.forward(ids(5), output="some"), "output must be last, all or none; got 'some'"),
        (lambda e: next(e.segments(ids(5), "some")), "output must be last, all or none; got 'some'"),
        (lambda e: e.forward(ids(5), max_n_segments=0), "max_n_segments must be at least 1; got 0"),
        (lambda e: e.forward(ids(5), max_n_segments=-2), "max_n_segments must be at least 1; got -2"),
        (
            lambda e: next(e.segments([ids(5)[0], ids(7)[0]])),
            "the rows hold from 5 to 7 tokens of content: give one row at a time",
        ),
        (
            lambda e: next(e.segments(ids(5, 2), memory_state=e.initial_memory(1))),
            "memory_state: expected [B=2, M=4, E=32], got [1, 4, 32]",
        ),
        (
            lambda e: next(e.segments(ids(5), memory_state=e.initial_memory(1)[0])),
            "memory_state: expected [B=1, M=4, E=32], got [4, 32]",
        ),
    ],
)
def test_arguments_that_cannot_be_meant(use: Callable[[Engine], Any], words: str, decoder: Engine) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        use(decoder)


def test_all_logits_of_a_long_input_are_refused(decoder: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 3 * 60 * 271 * 4
    monkeypatch.setattr(engine_module, "MAX_LOGITS_BYTES", size)
    assert decoder.forward(ids(60, 3), output="all").logits.shape == (3, 60, 271)
    with pytest.raises(ValueError, match=r'^output="all" would hold 0\.0 GiB of logits, over 0 GiB; iterate over '):
        decoder.forward(ids(61, 3), output="all")
    decoder.forward(ids(61, 3), output="last")
    assert sum(segment.logits.shape[1] for segment in decoder.segments(ids(61, 3))) == 61


def test_segments_leaves_out_what_the_checkpoint_drops(encoder: Engine) -> None:
    clean = ids(50)
    dropped = torch.tensor([[SPECIAL.cls, SPECIAL.pad]])
    mixed = torch.cat([dropped, clean[:, :30], dropped, clean[:, 30:]], 1)
    ours, truth = list(encoder.segments(mixed)), list(encoder.segments(clean))
    assert [(s.index, s.start, s.end) for s in ours] == [(0, 0, 10), (1, 10, 30), (2, 30, 50)]  # aligned right
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(ours, truth, strict=True))
    with pytest.raises(ValueError, match=r"^the rows hold from 50 to 54 tokens of content: give one row at a time$"):
        next(encoder.segments(torch.cat([mixed, ids(54)])))


def test_rows_are_read_as_given(decoder: Engine) -> None:
    """One tensor, a list of tensors, lists of numbers, any integer type."""
    rows = ids(33, 3)
    truth = decoder.forward(rows)
    for given in (list(rows), rows.tolist(), rows.to(torch.int32), rows.numpy(), [rows[0].tolist(), *rows[1:]]):
        out = decoder.forward(given)
        assert torch.equal(out.logits, truth.logits) and torch.equal(out.memory_state, truth.memory_state)


def test_max_n_segments_of_forward(encoder: Engine, decoder: Engine) -> None:
    for engine in (encoder, decoder):
        for most in (1, 2, 3, 9):
            out = engine.forward(ids(50), output="none", max_n_segments=most)
            kept = engine.forward(ids(50)[:, : most * SEGMENT], output="none")
            assert torch.equal(out.memory_state, kept.memory_state)


@pytest.mark.parametrize(
    "options, kind, words",
    [
        ({"executor": "graphs"}, ValueError, r"^executor must be .*; got 'graphs'$"),
        ({"device": "tpu9"}, ValueError, r"^device must be auto, cpu, cuda or cuda:N; got 'tpu9'$"),
        ({"device": "meta"}, ValueError, r"^device must be auto, cpu, cuda or cuda:N; got 'meta'$"),
        ({"dtype": "int8"}, ValueError, r"^dtype must be auto, float32, bfloat16, float16; got 'int8'$"),
        ({"backend": "mps"}, ValueError, r"^backend must be one of auto, ref, cpu, triton, cuda; got 'mps'$"),
        ({"backend": "cuda", "device": "cpu"}, BackendError, r"^backend 'cuda' cannot run: "),
    ],
)
def test_a_mistake_is_told_before_the_checkpoint_is_read(
    options: dict[str, str], kind: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module.checkpoint, "load", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(kind, match=words):
        Engine.from_pretrained("anything", **options)


@pytest.mark.parametrize(
    "dtype, probe", [("bfloat16", "_is_mkldnn_bf16_supported"), ("float16", "_is_mkldnn_fp16_supported")]
)
def test_a_cpu_without_half_precision_computes_in_fp32_and_rounds(
    dtype: str, probe: str, tiny_gpt2: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, probe, lambda: False)
    config, weights = tiny_gpt2.rmt_config(SEGMENT), tiny_gpt2.weights()
    half, single = (
        Engine.from_weights(config, weights, device="cpu", dtype=one, backend="cpu").forward(ids(50))
        for one in (dtype, "float32")
    )
    assert half.memory_state.dtype == getattr(torch, dtype) and half.logits.dtype == torch.float32
    torch.testing.assert_close(half.memory_state.float(), single.memory_state, atol=0.05, rtol=0.05)


def test_from_pretrained_is_from_weights(decoder: Engine, decoder_folder: Path) -> None:
    for path in (decoder_folder, str(decoder_folder)):
        loaded = Engine.from_pretrained(path, device="cpu")
        assert torch.equal(loaded.forward(ids(50)).logits, decoder.forward(ids(50)).logits)
        assert loaded.config.ask_template == " Q: {question} A:" and loaded.config.stop_ids == (0,)
        assert loaded.tokenizer.decode(loaded.tokenizer.encode("text")) == "text"
