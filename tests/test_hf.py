"""`generate` as transformers has it: its streamers, logits processors and stopping criteria fit."""

from __future__ import annotations

import ast
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints_for_tests import byte_tokenizer
from test_floors import imports
from test_stream import SEGMENT, engine_of, fed, random_ids, reference
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation import logits_process

from rmt_engine import hf
from rmt_engine.sampling import DECODE_ROWS

LENGTHS = (1, SEGMENT - 3, 2 * SEGMENT + 7, 5 * SEGMENT)


def batch(length: int, rows: int = 1) -> Tensor:
    return torch.from_numpy(np.stack([random_ids(length, seed) for seed in range(rows)]))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("length", LENGTHS)
def test_greedy_tokens_are_the_authors(kind: str, length: int) -> None:
    generator = engine_of(kind).as_generator()
    for rows in (1, 3, DECODE_ROWS + 2):
        ids = batch(length, rows)
        out = generator.generate(ids, max_new_tokens=9)
        assert torch.equal(out[:, :length], ids)
        for i in {0, rows - 1}:
            assert out[i, length:].tolist() == reference(kind).generate(ids[i].numpy(), 9)


def test_a_streamer_gets_the_text() -> None:
    engine = engine_of()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer())
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    arguments: dict[str, Any] = {"max_new_tokens": 30, "do_sample": True, "temperature": 2.0, "seed": 5}
    ids = batch(2 * SEGMENT + 3)
    thread = threading.Thread(
        target=engine.as_generator().generate, args=(ids,), kwargs={"streamer": streamer, **arguments}
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(engine.as_generator().generate(ids, **arguments)[0, ids.shape[1] :])
    with pytest.raises(ValueError, match=r"^a streamer takes one row: give input_ids \[1, N\]$"):
        engine.as_generator().generate(batch(5, 2), streamer=streamer)


def test_processors_see_all_ids_and_change_scores() -> None:
    generator, ids = engine_of().as_generator(), batch(SEGMENT + 3, 2)
    seen: list[Tensor] = []

    def only_these(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(input_ids.clone())
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, 250:253] = scores[:, 250:253]
        return allowed

    processors = LogitsProcessorList([logits_process.NoRepeatNGramLogitsProcessor(1), only_these])
    out = generator.generate(ids, max_new_tokens=3, logits_processor=processors)
    assert out[:, ids.shape[1] :].sort().values.tolist() == [[250, 251, 252]] * 2
    assert [s.shape[1] for s in seen] == [ids.shape[1] + n for n in range(3)]
    assert torch.equal(seen[-1], out[:, :-1])


def test_stopping_criteria_and_eos() -> None:
    generator, ids = engine_of().as_generator(), batch(SEGMENT + 3, 2)
    free = generator.generate(ids, max_new_tokens=12)
    start = ids.shape[1]
    limit = StoppingCriteriaList([MaxLengthCriteria(start + 4)])
    assert torch.equal(generator.generate(ids, max_new_tokens=12, stopping_criteria=limit), free[:, : start + 4])
    eos = int(free[0, start + 2])
    out = generator.generate(ids, max_new_tokens=12, eos_token_id=eos, pad_token_id=7)
    first = free[0].tolist().index(eos, start)
    assert torch.equal(out[0, : first + 1], free[0, : first + 1]) and set(out[0, first + 1 :].tolist()) <= {7}
    row = free[1].tolist()
    end = row.index(eos, start) + 1 if eos in row[start:] else len(row)
    assert out[1, :end].tolist() == row[:end]


def test_sampling_is_that_of_transformers() -> None:
    """The scores that transformers' own processors make of ours, drawn with torch's generator."""
    generator, ids = engine_of().as_generator(), batch(SEGMENT + 3)
    scores: list[Tensor] = []

    def keep(_: Tensor, row: Tensor) -> Tensor:
        scores.append(row.clone())
        return row

    torch.manual_seed(3)
    out = generator.generate(
        ids, max_new_tokens=8, do_sample=True, temperature=1.3, top_k=30, top_p=0.8, logits_processor=[keep]
    )
    torch.manual_seed(3)
    warpers = LogitsProcessorList(
        [
            logits_process.TemperatureLogitsWarper(1.3),
            logits_process.TopKLogitsWarper(30),
            logits_process.TopPLogitsWarper(0.8),
        ]
    )
    drawn = [int(torch.multinomial(warpers(out[:, :1], row).softmax(-1), 1)) for row in scores]
    assert out[0, ids.shape[1] :].tolist() == drawn
    seeded = [generator.generate(batch(9, 3), do_sample=True, seed=1, max_new_tokens=6) for _ in range(2)]
    assert torch.equal(*seeded)
    alone = generator.generate(batch(9, 3)[1:2], do_sample=True, seed=1, max_new_tokens=6)
    assert torch.equal(seeded[0][1:2], alone), "a row does not depend on its neighbours"


def test_the_penalty_is_over_all_ids() -> None:
    generator, ids = engine_of().as_generator(), batch(3 * SEGMENT)
    raw: list[Tensor] = []
    generator.generate(ids, max_new_tokens=1, logits_processor=[lambda _, s: raw.append(s) or s])
    punished: list[Tensor] = []
    generator.generate(
        ids, max_new_tokens=1, repetition_penalty=1.8, logits_processor=[lambda _, s: punished.append(s) or s]
    )
    theirs = logits_process.RepetitionPenaltyLogitsProcessor(1.8)(ids, raw[0])
    assert torch.equal(punished[0], theirs)


def test_padding_is_left_out() -> None:
    generator, ids = engine_of().as_generator(), batch(2 * SEGMENT)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.int64), ids], 1)
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.int64), torch.ones_like(ids)], 1)
    assert torch.equal(
        generator.generate(padded, mask, max_new_tokens=5)[:, 5:], generator.generate(ids, max_new_tokens=5)
    )


def test_rolling_on_goes_through_segments() -> None:
    engine, ids = engine_of(), batch(SEGMENT + 3, 2)
    out = engine.as_generator().generate(ids, max_new_tokens=2 * SEGMENT, roll=True)
    for row, start in zip(out, ids, strict=True):
        expected = fed(engine, start).generate(2 * SEGMENT, roll=True)
        assert str(row[ids.shape[1] :].tolist()) == expected


@pytest.mark.parametrize(
    "ids, options, words",
    [
        (torch.zeros(3, dtype=torch.int64), {}, r"^input_ids: expected \[B, N\], got \[3\]$"),
        (torch.tensor([[5, 999]]), {}, r"^input_ids, row 0: token id 999 at place 1 is outside 0\.\.270 "),
        (batch(7), {"max_new_tokens": 200}, r"^max_new_tokens=200 does not fit: 4 memory tokens and 7 tokens "),
        (batch(7), {"max_new_tokens": 0}, r"^max_new_tokens must be at least 1; got 0$"),
    ],
)
def test_what_cannot_be_generated(ids: Tensor, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        engine_of().as_generator().generate(ids, **options)


def test_a_classifier_generates_nothing() -> None:
    with pytest.raises(
        ValueError, match=r"^this checkpoint is a classifier: it generates no text; use Engine.forward$"
    ):
        engine_of("bert", "left").as_generator()


def test_transformers_is_not_imported() -> None:
    found = imports(ast.parse(Path(hf.__file__).read_text()), "rmt_engine")
    assert not [name for name, _ in found if name.startswith("transformers")]
