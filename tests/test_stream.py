"""Streams: any pieces equal the whole, questions do not move them, and what cannot be done leaves them as they were."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints_for_tests import (
    DECODER_VOCAB,
    SPECIAL,
    TinyCheckpoint,
    bert_tokenizer,
    byte_tokenizer,
    tiny_decoder,
    tiny_encoder,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ReferenceDecoder
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from rmt_engine.engine import Engine
from rmt_engine.errors import InputError, TokenizerError
from rmt_engine.stream import Stream
from rmt_engine.tokens import Tokenizer

SEGMENT = 20
MEMORY = 4
TEMPLATE = " Q: {question} A:"
TEXT = "The milk is in the garden. Mary went to the kitchen, then to the hall.\nSandra took the football there; "


class IdTokenizer(Tokenizer):
    """Decodes to a list of ids: a tiny model says things that are no words."""

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = True) -> str:
        return json.dumps([int(i) for i in ids])


@cache
def merging_tokenizer() -> str:
    """A byte-level BPE with a few merges, so that a wrong cut gives other ids."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=DECODER_VOCAB, show_progress=False, initial_alphabet=alphabet)
    backend.train_from_iterator([TEXT], trainer)
    return backend.to_str()


@cache
def tiny(kind: str = "gpt2") -> TinyCheckpoint:
    if kind == "bert":
        return tiny_encoder("bert", seed=3, noise="all", num_mem_tokens=MEMORY)
    return tiny_decoder(kind, seed=5, noise="all", num_mem_tokens=MEMORY, layers=2)


@cache
def engine_of(kind: str = "gpt2", alignment: str = "left", **config: Any) -> Engine:
    tokenizer = Tokenizer(bert_tokenizer().to_str()) if kind == "bert" else IdTokenizer(merging_tokenizer())
    if kind != "bert":
        config = {"ask_template": TEMPLATE, **config}
    checkpoint = tiny(kind)
    settings = checkpoint.rmt_config(SEGMENT, alignment, **config)
    return Engine.from_weights(settings, checkpoint.weights(), tokenizer, device="cpu")


def reference(kind: str = "gpt2") -> ReferenceDecoder:
    found = tiny(kind).reference(SEGMENT)
    assert isinstance(found, ReferenceDecoder)
    return found


def random_ids(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, length]).integers(5, 97, length)


def fed(engine: Engine, *pieces: Any, **options: Any) -> Stream:
    stream = engine.stream(**options)
    for piece in pieces:
        stream.feed(piece)
    return stream


def finished(stream: Stream) -> Tensor:
    """The memory state after a fork's end; the stream stays."""
    fork = stream.fork()
    fork.finish()
    return fork.memory


def memory_of(engine: Engine, ids: np.ndarray) -> Tensor:
    return engine.forward(torch.from_numpy(ids)[None], output="none").memory_state[0]


def picture(stream: Stream) -> tuple[Any, ...]:
    """All that can be seen of a stream."""
    return stream.position, stream.segments, stream.rest.tolist(), stream.memory.tolist(), finished(stream).tolist()


def count_folds(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the segments that are folded from now on."""
    sizes: list[int] = []
    real = engine.executor.fold

    def fold(ids: Tensor, memory: Tensor) -> Tensor:
        sizes.append(ids.shape[1])
        return real(ids, memory)

    monkeypatch.setattr(engine.executor, "fold", fold)
    return sizes


# ----------------------------------------------------------------------------------------------- any pieces

RUNS = st.lists(
    st.one_of(
        st.lists(st.sampled_from([*TEXT.split(" "), " ", "\n", "  the", "é", "中", "1234"]), max_size=30).map(" ".join),
        st.lists(st.integers(0, DECODER_VOCAB - 1), max_size=50),
    ),
    max_size=5,
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(runs=RUNS, seed=st.integers(0, 2**32))
def test_any_pieces_of_text_and_ids_equal_the_whole(runs: list[str | list[int]], seed: int) -> None:
    """A text goes on, as str or as bytes cut anywhere, until ids come: those end it."""
    engine, generator = engine_of(), random.Random(seed)
    merged: list[str | list[int]] = []
    for run in runs:
        if isinstance(run, str) and merged and isinstance(merged[-1], str):
            merged[-1] += run
        else:
            merged.append(run)
    whole = [engine.tokenizer.encode(run) if isinstance(run, str) else np.array(run, dtype=np.int64) for run in merged]
    ids = np.concatenate([np.empty(0, dtype=np.int64), *whole])
    stream = engine.stream()
    for run in runs:
        left: Any = run.encode() if isinstance(run, str) and generator.random() < 0.4 else run
        while True:
            size = generator.choice([0, 1, 2, 7, 40])
            piece, left = left[:size], left[size:]
            stream.feed(generator.choice(AS_IDS)(piece) if isinstance(piece, list) else piece)
            if not left:
                break
    before = stream.position
    assert before <= len(ids) and stream.segments * SEGMENT + len(stream.rest) == before
    stream.finish()
    assert stream.position == len(ids) and len(stream.rest) == 0
    assert torch.equal(stream.memory, memory_of(engine, ids) if len(ids) else engine.initial_memory()[0])


AS_IDS: list[Callable[[list[int]], Any]] = [
    list,
    tuple,
    torch.tensor,
    lambda ids: np.array(ids, dtype=np.uint16),
    lambda ids: torch.tensor(ids, dtype=torch.int32),
]


def test_a_segment_is_folded_when_the_next_token_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, ids = engine_of(), random_ids(5 * SEGMENT)
    sizes = count_folds(engine, monkeypatch)
    stream = engine.stream()
    for fed_now, folded in ((SEGMENT - 1, 0), (1, 0), (0, 0), (1, 1), (SEGMENT - 1, 1), (2 * SEGMENT, 3), (1, 4)):
        start = stream.position
        stream.feed(ids[start : start + fed_now])
        assert len(sizes) == stream.segments == folded
        assert stream.position == start + fed_now == folded * SEGMENT + len(stream.rest)
        assert np.array_equal(stream.rest, ids[folded * SEGMENT : stream.position])
    stream.finish()
    assert sizes == [SEGMENT] * 4 + [1] and len(stream.rest) == 0 and stream.segments == 5
    stream.finish()
    assert len(sizes) == 5, "there is nothing left to fold"


def test_an_empty_stream_is_the_initial_memory() -> None:
    stream = engine_of().stream()
    for nothing in ("", [], np.empty(0), torch.empty(0, dtype=torch.int64)):
        stream.feed(nothing)
    stream.finish()
    assert stream.position == stream.segments == 0
    assert torch.equal(stream.memory, tiny().memory)


def test_what_was_fed_may_change_afterwards() -> None:
    ids = random_ids(3 * SEGMENT + 7)
    given_ids = torch.from_numpy(ids.copy())
    stream = fed(engine_of(), given_ids)
    given_ids.zero_()
    assert torch.equal(finished(stream), memory_of(engine_of(), ids))


def test_a_stream_goes_on_after_finish() -> None:
    """What comes then begins a new segment: a deliberate border."""
    engine, ids = engine_of(), random_ids(2 * SEGMENT + 5)
    stream = fed(engine, ids)
    stream.finish()
    stream.feed(ids[:7])
    assert stream.position == len(ids) + 7
    truth = reference()
    memory = truth.forward(ids)[1][-1]
    assert torch.allclose(finished(stream), truth.forward(ids[:7], memory)[1][-1], atol=1e-4)


def test_with_closes_nothing_that_is_needed_later() -> None:
    with engine_of().stream() as stream:
        stream.feed(TEXT)
    assert stream.ask("Where?", 2)


# ------------------------------------------------------------------------------------------------- forks


def test_forks_are_independent() -> None:
    engine = engine_of()
    stream = fed(engine, random_ids(SEGMENT + 3), "The milk is in the gar")
    before = picture(stream)
    one, two = stream.fork(), stream.fork()
    one.feed("den. ")
    two.feed("age.")
    three = one.fork()
    three.feed(random_ids(4 * SEGMENT))
    three.finish()
    assert picture(stream) == before
    start = random_ids(SEGMENT + 3)
    assert picture(one) == picture(fed(engine, start, "The milk is in the garden. "))
    assert picture(two) == picture(fed(engine, start, "The milk is in the garage."))
    stream.feed("den. ")
    assert picture(stream) == picture(one)


def test_a_question_does_not_move_the_stream() -> None:
    engine = engine_of()
    stream = fed(engine, random_ids(3 * SEGMENT), TEXT, "and the")  # text is held back
    before = picture(stream)
    answers = [stream.ask("Where?", 8, split) for split in ("fold", "reference") for _ in range(2)]
    assert answers[0] == answers[1] and answers[2] == answers[3]
    assert stream.ask("Where is the milk, where is the football, and where is Mary now?", 3, split="reference")
    stream.generate(5)
    assert picture(stream) == before
    stream.feed(" kitchen")
    assert picture(stream) == picture(fed(engine, random_ids(3 * SEGMENT), TEXT + "and the kitchen"))


# ------------------------------------------------------------------------------------------------ questions

QUESTION = "the hall?"


def question_ids(engine: Engine) -> np.ndarray:
    return engine.tokenizer.encode(TEMPLATE.replace("{question}", QUESTION))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_ask_equals_the_reference_where_the_question_fits(kind: str) -> None:
    engine, truth = engine_of(kind), reference(kind)
    question = question_ids(engine)
    room = SEGMENT - len(question)
    assert 0 < room < SEGMENT
    for length in (0, 1, room, SEGMENT + 1, 2 * SEGMENT + room, 3 * SEGMENT + room // 2):
        ids = random_ids(length)
        stream = fed(engine, ids)
        assert len(stream.rest) + len(question) <= SEGMENT
        expected = truth.generate(np.concatenate([ids, question]), 12)
        assert json.loads(stream.ask(QUESTION, 12)) == expected
        assert json.loads(stream.ask(QUESTION, 12, split="reference")) == expected


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_split_says_what_happens_where_the_question_does_not_fit(kind: str) -> None:
    engine, truth = engine_of(kind), reference(kind)
    question = question_ids(engine)
    for rest in (SEGMENT - len(question) + 1, SEGMENT - 1, SEGMENT):
        ids = random_ids(2 * SEGMENT + rest)
        stream = fed(engine, ids)
        assert len(stream.rest) == rest
        asked = np.concatenate([ids, question])
        assert json.loads(stream.ask(QUESTION, 12, split="reference")) == truth.generate(asked, 12)
        folded = truth.forward(ids)[1][-1]
        assert json.loads(stream.ask(QUESTION, 12, split="fold")) == truth.answer(question, folded, 12)
        assert stream.ask(QUESTION, 12) == stream.ask(QUESTION, 12, split="fold")


def test_a_question_longer_than_a_segment_is_cut_by_the_reference_alone() -> None:
    engine = engine_of()
    long = "Where is the milk, and where was it before that?"
    question = engine.tokenizer.encode(TEMPLATE.replace("{question}", long))
    assert len(question) > SEGMENT
    ids = random_ids(SEGMENT + 3)
    stream = fed(engine, ids)
    with pytest.raises(ValueError, match=f"^the question has {len(question)} tokens; a segment holds {SEGMENT}$"):
        stream.ask(long)
    expected = reference().generate(np.concatenate([ids, question]), 6)
    assert json.loads(stream.ask(long, 6, split="reference")) == expected


def test_text_that_is_held_back_is_part_of_what_was_read() -> None:
    engine = engine_of()
    stream = fed(engine, TEXT, "the garden")
    ids = engine.tokenizer.encode(TEXT + "the garden")
    assert stream.position < len(ids)
    assert json.loads(stream.generate(9)) == reference().generate(ids, 9)
    truth = reference().generate(np.concatenate([ids, question_ids(engine)]), 9)
    assert json.loads(stream.ask(QUESTION, 9, split="reference")) == truth


def test_generate_is_the_reference_without_a_question() -> None:
    engine, truth = engine_of(), reference()
    for length in (1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 3 * SEGMENT):
        ids = random_ids(length)
        assert json.loads(fed(engine, ids).generate(15)) == truth.generate(ids, 15)


def test_an_answer_ends_before_its_stop() -> None:
    ids = random_ids(SEGMENT + 4)
    free = reference().generate(ids, 10)
    stop = free[4]
    expected = reference().generate(ids, 10, eos_ids={stop})
    assert expected[-1] == stop and stop not in expected[:-1]
    engine = engine_of(stop_ids=(stop, 3))
    assert json.loads(fed(engine, ids).generate(10)) == expected[:-1]
    assert json.loads(fed(engine_of(stop_ids=(free[0],)), ids).generate(10)) == []


def test_the_longest_answer_that_fits() -> None:
    engine = engine_of()  # 128 positions, 4 of them memory
    stream = fed(engine, random_ids(SEGMENT + 9))
    room = 128 - MEMORY - 9
    assert len(json.loads(stream.generate(room))) == room
    words = (
        f"max_new_tokens={room + 1} does not fit: 4 memory tokens and 9 tokens of text and question leave {room} of 128"
    )
    with pytest.raises(ValueError, match=f"^{words} positions$"):
        stream.generate(room + 1)


def test_nothing_is_decoded_before_it_is_known_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    stream = fed(engine, random_ids(9))
    monkeypatch.setattr(engine.executor, "prefill", lambda *_: pytest.fail("decoded"))
    for wrong in (0, -1, 128):
        with pytest.raises(ValueError, match="max_new_tokens"):
            stream.ask("Where?", wrong)


@pytest.mark.parametrize(
    "ask, words",
    [
        (lambda s: s.generate(), "nothing was read and nothing was asked: feed a text first"),
        (lambda s: s.ask("x", split="left"), "split must be fold or reference; got 'left'"),
        (lambda s: s.ask("x", 0), "max_new_tokens must be at least 1; got 0"),
        (lambda s: s.classify(), "this checkpoint is a decoder: it has no labels; use ask or generate"),
    ],
)
def test_questions_that_cannot_be_asked(ask: Callable[[Stream], Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        ask(engine_of().stream())


def test_an_empty_stream_can_be_asked() -> None:
    """The initial memory and the question."""
    engine = engine_of()
    assert json.loads(engine.stream().ask(QUESTION, 5)) == reference().generate(question_ids(engine), 5)


def test_without_a_tokenizer_ids_still_flow() -> None:
    checkpoint = tiny()
    engine = Engine.from_weights(checkpoint.rmt_config(SEGMENT), checkpoint.weights(), device="cpu")
    stream = fed(engine, random_ids(SEGMENT + 3))
    words = "^this checkpoint has no tokenizer.json: give token ids, or convert it with --base DIR$"
    for use in (lambda: stream.feed("text"), lambda: stream.ask("Where?"), lambda: stream.generate(2)):
        with pytest.raises(TokenizerError, match=words):
            use()
    assert torch.equal(finished(stream), memory_of(engine, random_ids(SEGMENT + 3)))


# ------------------------------------------------------------------------------------------------ alignment

LENGTHS = (1, SEGMENT, SEGMENT + 1, 2 * SEGMENT + 7, 3 * SEGMENT)


@pytest.mark.parametrize("alignment", ["left", "right", "center"])
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_stream_of_known_length_aligns_as_forward(kind: str, alignment: str) -> None:
    engine = engine_of(kind, alignment)
    for length in LENGTHS:
        ids = random_ids(length)
        for stream in (fed(engine, ids, length=length), fed(engine, *ids[:, None], length=length)):
            assert torch.equal(finished(stream), memory_of(engine, ids))


@pytest.mark.parametrize("alignment", ["right", "center"])
def test_alignment_needs_the_length(alignment: str) -> None:
    words = (
        f"this checkpoint aligns segments {alignment}, which needs the length: "
        'use engine.stream(length=N), or engine.stream(alignment="left")'
    )
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        engine_of("bert", alignment).stream()
    ids = random_ids(2 * SEGMENT + 7)
    left = fed(engine_of("bert", alignment), ids, alignment="left")
    assert torch.equal(finished(left), memory_of(engine_of("bert", "left"), ids))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"alignment": "middle"}, "alignment must be one of left, right, center; got 'middle'"),
        ({"alignment": "middle", "length": 7}, "alignment must be one of left, right, center; got 'middle'"),
        ({"alignment": "right", "length": -1}, "length must be at least 0; got -1"),
    ],
)
def test_streams_that_cannot_be_made(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        engine_of().stream(**options)


def test_more_tokens_than_announced() -> None:
    engine = engine_of("gpt2", "right")
    stream = fed(engine, random_ids(SEGMENT + 3), length=SEGMENT + 9)
    before = picture_of_unfinished(stream)
    for piece, came in ((random_ids(7), SEGMENT + 10), (random_ids(50), SEGMENT + 53)):
        words = f"the stream was made for {SEGMENT + 9} tokens of content; {came} have come"
        with pytest.raises(ValueError, match=f"^{words}$"):
            stream.feed(piece)
        assert picture_of_unfinished(stream) == before
    stream.feed(random_ids(6))
    whole = np.concatenate([random_ids(SEGMENT + 3), random_ids(6)])
    assert torch.equal(finished(stream), memory_of(engine, whole))


def picture_of_unfinished(stream: Stream) -> tuple[Any, ...]:
    return stream.position, stream.segments, stream.rest.tolist(), stream.memory.tolist()


def test_fewer_tokens_than_announced_would_be_aligned_wrongly() -> None:
    stream = fed(engine_of("bert", "right"), random_ids(SEGMENT), length=SEGMENT + 9)
    words = f"^the stream was made for {SEGMENT + 9} tokens of content; only {SEGMENT} have come$"
    before = picture_of_unfinished(stream)
    for end in (stream.finish, stream.classify):
        with pytest.raises(ValueError, match=words):
            end()
        assert picture_of_unfinished(stream) == before


def test_the_announced_length_is_of_content() -> None:
    """Ids that the checkpoint drops do not count."""
    engine, ids = engine_of("bert", "right"), random_ids(SEGMENT + 5)
    special = np.array([SPECIAL.cls, SPECIAL.pad, SPECIAL.sep])
    mixed = np.concatenate([special, ids[:9], special, ids[9:], special])
    stream = fed(engine, mixed, length=len(ids))
    assert stream.position == len(ids)
    assert torch.equal(finished(stream), memory_of(engine, ids))


@pytest.mark.parametrize("alignment", ["right", "center"])
def test_a_question_in_a_stream_that_is_not_left_aligned(alignment: str) -> None:
    """Rest and question are the last segment where they fit; nothing of the question is folded."""
    engine, truth = engine_of("gpt2", alignment), reference()
    question = question_ids(engine)
    length = SEGMENT + 3
    ids = random_ids(length)
    first = 3 if alignment == "right" else -(-length // 2)
    for read in (0, 1, first, first + 2, length):
        stream = fed(engine, ids[:read], length=length)
        folded = first if read > first else 0
        memory = truth.segment(ids[:folded], truth.memory)[1] if folded else truth.memory
        rest = ids[folded:read]
        if len(rest) + len(question) > SEGMENT:
            memory, rest = truth.segment(rest, memory)[1], rest[:0]
        expected = truth.answer(np.concatenate([rest, question]), memory, 8)
        assert json.loads(stream.ask(QUESTION, 8)) == expected
    words = 'split="reference" needs a stream that is aligned left: the question moves every border'
    with pytest.raises(ValueError, match=f"^{words}$"):
        stream.ask(QUESTION, split="reference")


# ---------------------------------------------------------------------------------------------- classifiers


def test_classify_is_forward_as_words() -> None:
    engine = engine_of("bert", "left")
    for length in LENGTHS:
        ids = random_ids(length)
        scores = engine.forward(torch.from_numpy(ids)[None]).logits[0].softmax(-1).tolist()
        stream = fed(engine, ids)
        before = picture(stream)
        labels = stream.classify()
        assert labels == sorted(labels, key=lambda pair: -pair[1])
        by_number = [score for _, score in sorted(labels, key=lambda pair: int(pair[0].removeprefix("LABEL_")))]
        assert by_number == pytest.approx(scores, rel=1e-5)
        assert picture(stream) == before


def test_a_classifier_reads_text() -> None:
    engine = engine_of("bert", "left")
    text = "a cab, bad. what a fad? no jam. " * 5
    stream = fed(engine, *text)
    ids = engine.tokenizer.encode(text)
    assert stream.classify() == fed(engine, ids).classify() and len(ids) > 2 * SEGMENT


def test_what_a_classifier_cannot_do() -> None:
    stream = engine_of("bert", "left").stream()
    words = "^nothing stands in the last segment: classify before finish\\(\\), after feeding the input$"
    with pytest.raises(ValueError, match=words):
        stream.classify()
    stream.feed(random_ids(7))
    stream.classify()
    stream.finish()
    with pytest.raises(ValueError, match=words):
        stream.classify()
    for ask in (lambda: stream.ask("a?"), stream.generate):
        with pytest.raises(ValueError, match=r"^this checkpoint is a classifier: it generates no text; use classify$"):
            ask()


# --------------------------------------------------------------------------------- errors change nothing

WRONG = [
    ([0.5], "expected 1-D integer token ids, got float64 [1]"),
    ([[1, 2]], "expected 1-D integer token ids, got int64 [1, 2]"),
    (np.empty((0, 3), dtype=np.int64), "expected 1-D integer token ids, got int64 [0, 3]"),
    (np.int64(3), "expected 1-D integer token ids, got int64 []"),
    ([True, False], "expected 1-D integer token ids, got bool [2]"),
    (["a"], "expected 1-D integer token ids, got <U1 [1]"),
    (None, "expected 1-D integer token ids, got object []"),
    ([2**70], "expected 1-D integer token ids, got object [1]"),
    ([5, 271], "token id 271 at place 1 is outside 0..270 (vocab_size)"),
    ([5, 5, -1], "token id -1 at place 2 is outside 0..270 (vocab_size)"),
    (np.array([2**64 - 1], dtype=np.uint64), "token id 18446744073709551615 at place 0 is outside 0..270 (vocab_size)"),
]


@pytest.mark.parametrize("wrong, words", WRONG, ids=[words for _, words in WRONG])
def test_wrong_ids_leave_the_stream_as_it_was(wrong: Any, words: str) -> None:
    engine = engine_of()
    stream = fed(engine, random_ids(SEGMENT + 3), "the milk is in the gar")  # text is held back
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        stream.feed(wrong)
    stream.feed("den")
    assert picture(stream) == picture(fed(engine, random_ids(SEGMENT + 3), "the milk is in the garden"))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), RuntimeError("out of memory")])
def test_a_feed_that_is_interrupted_leaves_the_stream_as_it_was(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of()
    stream = fed(engine, random_ids(SEGMENT + 3), "the milk is in the gar")
    before = picture(stream)
    real, calls = engine.executor.fold, iter(range(100))

    def fold(ids: Tensor, memory: Tensor) -> Tensor:
        if next(calls) == 2:
            raise error
        return real(ids, memory)

    for piece in ("den and " * 60, random_ids(7 * SEGMENT)):
        calls = iter(range(100))
        with monkeypatch.context() as patch:
            patch.setattr(engine.executor, "fold", fold)
            with pytest.raises(type(error)):
                stream.feed(piece)
        assert picture(stream) == before
    stream.feed("den")
    assert picture(stream) == picture(fed(engine, random_ids(SEGMENT + 3), "the milk is in the garden"))


def test_a_lone_surrogate_leaves_the_stream_as_it_was() -> None:
    engine = engine_of()
    stream = fed(engine, "the milk is in the gar")
    with pytest.raises(InputError, match=r"^expected text, found the lone surrogate '\\ud800' at character "):
        stream.feed("den. " * 9 + "\ud800 end. " * 3)
    stream.feed("den")
    assert picture(stream) == picture(fed(engine, "the milk is in the garden"))


def test_bytes_that_are_not_utf8_leave_the_stream_as_it_was() -> None:
    engine = engine_of()
    stream = fed(engine, b"the milk is in the gar")
    for wrong in (b"den. \xff", b"\xa0", b"den. " * 20 + b"\xe4 "):
        with pytest.raises(InputError, match=r"^expected UTF-8, found 0x(ff|a0|e4) at byte \d+ "):
            stream.feed(wrong)
    stream.feed(b"den \xe4\xb8")
    for wrong_now in ("text", [1], b"x"):
        with pytest.raises(InputError, match=r"^expected UTF-8, found 0xe4 0xb8 at byte 26 "):
            stream.feed(wrong_now)
    stream.feed(b"\xad.")
    assert picture(stream) == picture(fed(engine, "the milk is in the garden 中."))


def test_a_text_that_is_too_long_leaves_the_stream_as_it_was() -> None:
    engine = engine_of("gpt2", "right")
    text = "the milk is in the garden"
    length = len(engine.tokenizer.encode(text))
    for too_much in ("den, or it is not there. ", random_ids(length)):
        stream = fed(engine, "the milk is in the gar", length=length)
        with pytest.raises(ValueError, match=f"^the stream was made for {length} tokens of content; "):
            stream.feed(too_much)
        stream.feed("den")
        assert torch.equal(finished(stream), memory_of(engine, engine.tokenizer.encode(text)))


def test_a_tokenizer_of_another_model_is_found_out() -> None:
    """It knows more tokens than the model: an error in words, not an index out of range."""
    checkpoint = tiny_decoder("gpt2", layers=1, vocab_size=222)
    config = checkpoint.rmt_config(SEGMENT)
    engine = Engine.from_weights(config, checkpoint.weights(), Tokenizer(byte_tokenizer().to_str()), device="cpu")
    stream = fed(engine, "plain words ")
    before = picture(stream)
    for use in (lambda: stream.feed("a 中 and more of it "), lambda: stream.ask("中 ?", 2)):
        with pytest.raises(ValueError, match=r"^token id 256 at place \d is outside 0\.\.221 \(vocab_size\)$"):
            use()
        assert picture(stream) == before
    stream.feed("中")  # held back, and found when it is read
    for use in (stream.finish, lambda: stream.feed([1]), lambda: stream.ask("?")):
        with pytest.raises(ValueError, match=r"^token id 256 at place \d is outside "):
            use()
        assert stream.position == before[0]


# ------------------------------------------------------------------------------------------------ precision


def test_bf16_streams_and_answers() -> None:
    checkpoint = tiny()
    tokenizer = IdTokenizer(merging_tokenizer())
    config = checkpoint.rmt_config(SEGMENT, ask_template=TEMPLATE)
    engine = Engine.from_weights(config, checkpoint.weights(), tokenizer, device="cpu", dtype="bfloat16")
    stream = fed(engine, TEXT)
    assert stream.memory.dtype == torch.bfloat16
    assert len(json.loads(stream.ask(QUESTION, 12))) == 12
