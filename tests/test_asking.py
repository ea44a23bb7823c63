"""Questions to a context: many side by side, in pieces, sampled, rolling on, awaited, cancelled."""

from __future__ import annotations

import asyncio
import gc
import json
import weakref
from typing import Any

import numpy as np
import pytest
from checkpoints_for_tests import byte_tokenizer
from rmt_kernels.segment_attention import KVCache
from test_stream import SEGMENT, TEMPLATE, engine_of, fed, picture, random_ids, reference, tiny

from rmt_engine import sampling
from rmt_engine.engine import Engine
from rmt_engine.tokens import Tokenizer

QUESTIONS = ["the hall?", "who?", "Where is it?", "a", "the milk", "why not", "ok?", "no", "x y z"] * 2 + ["is it?"]


@pytest.fixture(scope="module")
def engine() -> Engine:
    """Bytes are its tokens: its answers are texts, of a kind."""
    config = tiny().rmt_config(SEGMENT, ask_template=TEMPLATE.replace("Q: ", "").replace(" A:", ""))
    return Engine.from_weights(config, tiny().weights(), Tokenizer(byte_tokenizer().to_str()), device="cpu")


def stream_of(engine: Engine, length: int = SEGMENT + 3) -> Any:
    return fed(engine, random_ids(length))


# --------------------------------------------------------------------------------------------- side by side


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_questions_side_by_side_are_questions_one_by_one(kind: str) -> None:
    """More of them than there are slots, of different lengths; every answer has the bits of one asked alone."""
    engine = engine_of(kind)
    stream = stream_of(engine)
    assert len(QUESTIONS) > sampling.DECODE_ROWS
    before = picture(stream)
    for how in ({}, {"temperature": 1.5, "seed": 3}, {"repetition_penalty": 1.7}, {"roll": True}):
        alone = [stream.ask(question, 4, **how) for question in QUESTIONS]
        assert stream.ask(QUESTIONS, 4, **how) == alone
        assert stream.ask(tuple(QUESTIONS[:3]), 4, **how) == alone[:3]
    assert picture(stream) == before and stream.ask([]) == []


def test_logits_of_a_row_do_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, seen = engine_of(), {}
    stream = stream_of(engine)

    def watch(questions: list[str]) -> dict[str, list[list[float]]]:
        seen.clear()

        def chosen(answers: Any, in_slot: dict[int, int], logits: dict[int, Any]) -> dict[int, int]:
            for slot, number in in_slot.items():
                seen.setdefault(questions[number], []).append(logits[slot].tolist())
            return {slot: int(logits[slot].argmax()) for slot in in_slot}

        monkeypatch.setattr(sampling, "_chosen", chosen)
        stream.ask(questions, 6)
        return dict(seen)

    alone = {question: watch([question])[question] for question in QUESTIONS[:9]}
    for some in (QUESTIONS[:9], QUESTIONS[4:9], QUESTIONS[8:2:-1]):
        assert watch(some) == {question: alone[question] for question in some}


def test_a_row_that_is_done_makes_room(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "DECODE_ROWS", 2)
    sizes: list[int] = []
    real = engine.executor.decode

    def decode(ids: Any, caches: list[KVCache]) -> Any:
        sizes.append(len(ids))
        return real(ids, caches)

    monkeypatch.setattr(engine.executor, "decode", decode)
    stream = stream_of(engine)
    answers = stream.ask(QUESTIONS, 5)
    assert set(sizes) == {2} and len(sizes) == 4 * -(-len(QUESTIONS) // 2)
    monkeypatch.undo()
    assert answers == [stream.ask(question, 5) for question in QUESTIONS]


# ------------------------------------------------------------------------------------------------ in pieces


@pytest.mark.parametrize(
    "how", [{}, {"temperature": 2.0, "seed": 5}, {"temperature": 2.0, "seed": 6, "stop": ["a", "\x01"]}]
)
def test_pieces_are_the_answer(engine: Engine, how: dict[str, Any]) -> None:
    stream = stream_of(engine)
    for question in QUESTIONS[:5]:
        assert "".join(stream.ask(question, 40, stream=True, **how)) == stream.ask(question, 40, **how)
    assert "".join(stream.generate(40, stream=True, **how)) == stream.generate(40, **how)
    texts = [""] * 5
    for number, piece in stream.ask(QUESTIONS[:5], 40, stream=True, **how):
        texts[number] += piece
    assert texts == stream.ask(QUESTIONS[:5], 40, **how)


def test_a_piece_comes_before_the_next_is_computed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    real = engine.executor.decode
    monkeypatch.setattr(engine.executor, "decode", lambda ids, caches: [steps.append(1), real(ids, caches)][1])
    pieces = stream_of(engine).ask("who?", 30, stream=True, temperature=5.0, seed=1)
    assert steps == []
    next(pieces)
    first = len(steps)
    next(pieces)
    assert first < len(steps) < 29
    pieces.close()


def test_closing_drops_the_caches_at_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[Any]] = []
    real = engine.executor.decode

    def decode(ids: Any, caches: list[KVCache]) -> Any:
        seen[:] = [weakref.ref(cache.keys) for cache in caches]
        return real(ids, caches)

    monkeypatch.setattr(engine.executor, "decode", decode)
    gc.disable()  # it must not take a garbage collection
    try:
        for question in ("who?", QUESTIONS):
            pieces = stream_of(engine).ask(question, 40, stream=True, temperature=5.0, seed=1)
            seen.clear()
            while not seen:
                next(pieces)
            assert all(cache() is not None for cache in seen)
            pieces.close()
            assert all(cache() is None for cache in seen)
    finally:
        gc.enable()


def test_an_answer_ends_before_a_stop_string(engine: Engine) -> None:
    stream = stream_of(engine)
    free = stream.ask("who?", 40, temperature=3.0, seed=2)
    stop = free[7:9]
    assert stream.ask("who?", 40, temperature=3.0, seed=2, stop=[stop, "never"]) == free[: free.index(stop)]


# -------------------------------------------------------------------------------------------------- sampled


def test_seeds(engine: Engine) -> None:
    stream = stream_of(engine)
    answers = [stream.ask("who?", 20, temperature=3.0, seed=seed) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    assert stream.ask(["who?", "who?"], 20, temperature=3.0, seed=1) == answers[:1] * 2
    assert len({stream.ask("who?", 20, temperature=3.0) for _ in range(3)}) == 3
    assert stream.ask("who?", 20, temperature=3.0, top_k=1) == stream.ask("who?", 20)


# -------------------------------------------------------------------------------------------------- rolling


@pytest.mark.parametrize("kind, alignment", [("gpt2", "left"), ("llama", "left"), ("gpt2", "right")])
def test_rolling_on_is_reading_ones_own_answer(kind: str, alignment: str) -> None:
    engine = engine_of(kind)
    for length in (1, SEGMENT - 2, SEGMENT, 2 * SEGMENT + 7):
        stream = stream_of(engine, length)
        by_hand: list[int] = []
        reader = stream.fork()
        for _ in range(2 * SEGMENT + 5):
            by_hand += json.loads(reader.generate(1))
            reader.feed(by_hand[-1:])
        assert json.loads(stream.generate(2 * SEGMENT + 5, roll=True)) == by_hand


def test_rolling_has_no_limit(engine: Engine) -> None:
    stream = stream_of(engine)
    pieces = stream.generate(None, stream=True, roll=True, temperature=1.0, seed=0)
    text = ""
    while len(text) < 5 * SEGMENT:
        text += next(pieces)
    pieces.close()
    assert text == stream.generate(len(text.encode()) * 2, roll=True, temperature=1.0, seed=0)[: len(text)]


def test_what_does_not_fit_without_rolling_is_said_before_decoding(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = stream_of(engine)
    monkeypatch.setattr(engine.executor, "prefill", None)
    for stream_it in (False, True):
        with pytest.raises(
            ValueError, match=r"^max_new_tokens=200 does not fit: 4 memory tokens and \d+ tokens of text"
        ):
            stream.ask("who?", 200, stream=stream_it)
    monkeypatch.undo()
    assert len(stream.ask("who?", 200, roll=True, temperature=1.0, seed=0)) > 100


@pytest.mark.parametrize(
    "options, words",
    [
        ({"max_new_tokens": None}, "^max_new_tokens=None, no limit, needs roll=True: one segment is soon full$"),
        ({"max_new_tokens": 0}, "^max_new_tokens must be at least 1; got 0$"),
        ({"max_new_tokens": 0, "roll": True}, "^max_new_tokens must be at least 1; got 0$"),
        ({"stop": "END"}, "^stop must be a sequence of strings that are not empty; got 'END'$"),
        ({"stop": [""]}, "^stop must be a sequence of strings that are not empty; got "),
        ({"top_p": 2}, "^top_p must be above 0 and at most 1; got 2$"),
    ],
)
def test_options_that_mean_nothing(engine: Engine, options: dict[str, Any], words: str) -> None:
    for stream in (False, True):
        with pytest.raises(ValueError, match=words):
            stream_of(engine).ask("who?", stream=stream, **options)


def test_an_unknown_option_is_named(engine: Engine) -> None:
    with pytest.raises(TypeError, match=r"^expected options of stop, roll, temperature, top_k, .*; got top_q$"):
        stream_of(engine).ask("who?", top_q=0.5)


# --------------------------------------------------------------------------------------------------- asyncio


def test_awaited_answers_take_turns(engine: Engine) -> None:
    stream = stream_of(engine)
    how: dict[str, Any] = {"temperature": 3.0, "seed": 4}
    order: list[int] = []

    async def pieces(number: int) -> str:
        text = ""
        async for piece in stream.aask(QUESTIONS[number], 20, stream=True, **how):
            order.append(number)
            text += piece
        return text

    async def main() -> list[Any]:
        return await asyncio.gather(
            pieces(0), pieces(1), stream.aask(QUESTIONS[2], 20, **how), stream.aask(QUESTIONS[:3], 20, **how)
        )

    *single, many = asyncio.run(main())
    assert single == many == stream.ask(QUESTIONS[:3], 20, **how)
    assert 0 in order[order.index(1) :] and 1 in order[order.index(0) :], "one answer waited for the other's end"


def test_what_is_cancelled_ends(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, steps = stream_of(engine), []
    real = engine.executor.decode
    monkeypatch.setattr(engine.executor, "decode", lambda ids, caches: [steps.append(1), real(ids, caches)][1])

    async def main() -> None:
        endless = asyncio.ensure_future(stream.aask("who?", None, roll=True, temperature=1.0, seed=0))
        while len(steps) < 5:
            await asyncio.sleep(0.001)
        endless.cancel()
        with pytest.raises(asyncio.CancelledError):
            await endless
        pieces = stream.aask("who?", None, stream=True, roll=True, temperature=1.0, seed=0)
        await anext(pieces)
        await pieces.aclose()

    asyncio.run(main())
    engine.thread.submit(int).result()  # whatever ran there has ended
    done = len(steps)
    assert stream.ask("who?", 3) and len(steps) <= done + 3


def test_errors_come_to_who_awaits(engine: Engine) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match=r"^max_new_tokens=200 does not fit"):
            await stream_of(engine).aask("who?", 200)

    asyncio.run(main())


def test_answers_are_the_authors(engine: Engine) -> None:
    """A list too is what `generate` of the reference gives for each."""
    engine = engine_of()
    ids = random_ids(SEGMENT + 3)
    questions = [
        q
        for q in dict.fromkeys(QUESTIONS)
        if len(engine.tokenizer.encode(TEMPLATE.replace("{question}", q))) <= SEGMENT - 3
    ]
    assert len(questions) > 3
    for question, text in zip(questions, fed(engine, ids).ask(questions, 12), strict=True):
        asked = engine.tokenizer.encode(TEMPLATE.replace("{question}", question))
        assert json.loads(text) == reference().generate(np.concatenate([ids, asked]), 12)
