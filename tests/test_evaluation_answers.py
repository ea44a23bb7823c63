"""Scoring and classifying: the same as a plain forward over the whole text and question."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from checkpoints_for_tests import bert_tokenizer, byte_tokenizer, tiny_decoder, tiny_encoder

from rmt_engine import Engine
from rmt_engine.evaluation.answers import answerer, question_ids, way_of
from rmt_engine.evaluation.facts import ROOMS, Problem
from rmt_engine.evaluation.noise import Noise
from rmt_engine.evaluation.reading import batches, read_and_ask, readings_of
from rmt_engine.evaluation.retrieval import Plan, Settings, evaluate
from rmt_engine.evaluation.texts import make_trial
from rmt_engine.tokens import Tokenizer

NOISE = "the cat sat on a mat and saw what it was. then it ran, and ran on until night came over the wide land. " * 20
SEGMENT = 60


@pytest.fixture(scope="module")
def decoder() -> Engine:
    tiny = tiny_decoder("gpt2", seed=1, noise="all", layers=2)
    config = tiny.rmt_config(SEGMENT, ask_template=" Q: {question} A:", stop_ids=(0,))
    return Engine.from_weights(config, tiny.weights(), Tokenizer(byte_tokenizer().to_str()), device="cpu")


def encoder_engine(alignment: str = "right", size: int = 40) -> Engine:
    tiny = tiny_encoder("bert", seed=2, noise="all", layers=2)
    tiny.backbone["id2label"] = {str(i): room for i, room in enumerate(ROOMS)}
    rmt = tiny.rmt_config(size, alignment)
    return Engine.from_weights(rmt, tiny.weights(), Tokenizer(bert_tokenizer().to_str()), device="cpu")


def _by_hand(engine: Engine, ids: np.ndarray, problem: Problem) -> dict[str, float]:
    """Log-probability of each possible answer after ids and question, from the logits of a whole forward."""
    asked = engine.tokenizer.encode(f" Q: {problem.question} A:")
    size = engine.config.segment_size
    start = (len(ids) - 1) // size * size
    memory = engine.initial_memory()
    for at in range(0, start, size):
        memory = engine.executor.fold(torch.from_numpy(ids[None, at : at + size]), memory)
    rest = ids[start:]
    if len(rest) + len(asked) > size:
        memory, rest = engine.executor.fold(torch.from_numpy(rest[None]), memory), rest[:0]
    found = {}
    for choice in problem.choices:
        answer = engine.tokenizer.encode(f" {choice}")
        whole = torch.from_numpy(np.concatenate([rest, asked, answer]))[None]
        _, logits = engine.executor.fold_with_logits(whole, memory)
        rows = logits[0].log_softmax(-1)[-len(answer) - 1 : -1]
        found[choice] = float(rows.gather(1, torch.from_numpy(answer)[:, None]).sum())
    return found


@pytest.mark.parametrize("length", [70, 75, 140, 180])
def test_the_likeliest_answer_is_given(decoder: Engine, length: int) -> None:
    """The rest of the text is 10 to 60 tokens long: with the question it fits a segment or does not."""
    noise = Noise(NOISE, decoder.tokenizer)
    trials = [make_trial("detect", length, noise, np.random.default_rng(seed)) for seed in range(4)]
    readings = [r for i, trial in enumerate(trials) for r in readings_of(decoder, ("detect", 1, 0, i), trial, [length])]
    (batch,) = batches(readings, 8)
    for reading, _, given in chain(*read_and_ask(decoder, answerer(decoder, "score"), batch)):
        expected = _by_hand(decoder, reading.trial.text.read(0, length), reading.trial.problem)
        best, second = sorted(expected.values(), reverse=True)[:2]
        assert best - second > 1e-4, "too close for this test"
        assert expected[given] == best


def test_an_answer_is_scored_behind_a_template_that_ends_in_white_space() -> None:
    tiny = tiny_decoder("gpt2", seed=1, layers=1)
    config = tiny.rmt_config(SEGMENT, ask_template="{question} ")
    engine = Engine.from_weights(config, tiny.weights(), Tokenizer(byte_tokenizer().to_str()), device="cpu")
    scorer = answerer(engine, "score")
    assert scorer._tokens(Problem((), "Who?", "garden"), "garden") == engine.tokenizer.encode("garden").tolist()  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [40, 12])
@pytest.mark.parametrize("alignment", ["left", "right", "center"])
def test_a_classifier_answers_as_forward_does(alignment: str, size: int) -> None:
    """A question of 12 letters or more crosses the borders of segments of 12."""
    engine = encoder_engine(alignment, size)
    assert way_of(engine, "auto") == "classify"
    noise = Noise(NOISE, engine.tokenizer, engine.config.drop_ids)
    lengths = [90, 160, 170, 185]
    for seed in range(3):
        trial = make_trial("memorize", 200, noise, np.random.default_rng(seed))
        question = question_ids(engine, trial.problem)
        answers = {}
        for reading in readings_of(engine, ("memorize", 1, 200, seed), trial, lengths):
            for _, length, given in chain(*read_and_ask(engine, answerer(engine, "classify"), [reading])):
                answers[length] = given
        assert sorted(answers) == lengths
        for length, given in answers.items():
            whole = np.concatenate([trial.text.read(0, length), question])
            logits = engine.forward(torch.from_numpy(whole)[None]).logits
            assert isinstance(logits, torch.Tensor)
            assert given == ROOMS[int(logits[0].argmax())]


def test_lengths_of_whole_segments_share_one_reading() -> None:
    engine = encoder_engine()
    noise = Noise(NOISE, engine.tokenizer, engine.config.drop_ids)
    trial = make_trial("memorize", 200, noise, np.random.default_rng(0))
    assert [r.asked_at for r in readings_of(engine, ("memorize", 1, 0, 0), trial, [80, 120, 160])] == [(80, 120, 160)]
    assert [r.asked_at for r in readings_of(engine, ("memorize", 1, 0, 0), trial, [80, 121])] == [(80,), (121,)]


def test_a_classifier_is_measured() -> None:
    engine = encoder_engine()
    noise = Noise(NOISE, engine.tokenizer, engine.config.drop_ids)
    settings = Settings(["memorize", "detect", "reasoning"], [120, 200], trials=4)
    cells = list(evaluate(Plan(engine, noise, settings), slots=3))
    assert [(cell.task, cell.tokens, cell.trials) for cell in cells] == [
        (task, length, 4) for task in settings.tasks for length in settings.lengths
    ]
    assert all(given in ROOMS for cell in cells for _, _, given in cell.wrong)


def test_a_classifier_must_have_a_class_for_each_answer() -> None:
    engine = encoder_engine()
    noise = Noise(NOISE, engine.tokenizer)
    with pytest.raises(ValueError, match="none for hallway, garden, office, bedroom, kitchen; name the answers"):
        Plan(engine, noise, Settings(lengths=[200], labels=["bathroom", *"bcdef"]))
    with pytest.raises(ValueError, match="this checkpoint is a classifier: it answers by classify, not by generate"):
        Plan(engine, noise, Settings(lengths=[200], answer="generate"))
    too_many = Plan(engine, noise, Settings(lengths=[200], trials=1, labels=[*ROOMS, "attic"]))
    with pytest.raises(ValueError, match="has 6 classes: --labels must name as many"):
        list(evaluate(too_many))


def test_a_question_longer_than_a_segment_is_told(decoder: Engine) -> None:
    tiny = tiny_decoder("gpt2", seed=1, layers=1)
    engine = Engine.from_weights(tiny.rmt_config(10), tiny.weights(), decoder.tokenizer, device="cpu")
    with pytest.raises(ValueError, match=r"has 1\d tokens; a segment holds 10"):
        Plan(engine, Noise(NOISE, engine.tokenizer), Settings(lengths=[500], trials=1))
