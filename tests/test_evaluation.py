"""Retrieval: facts stand exactly where they should, and many trials side by side answer as each would alone."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from rmt_engine import Engine, InputError
from rmt_engine.evaluation import retrieval, texts
from rmt_engine.evaluation import store as store_module
from rmt_engine.evaluation.answers import ANSWER_TOKENS
from rmt_engine.evaluation.facts import (
    DIRECTIONS,
    NAMES,
    OPPOSITE,
    ROOMS,
    Fact,
    Problem,
    furthest_question,
    line_problem,
    people_problem,
)
from rmt_engine.evaluation.intervals import bootstrap_mean, paired_difference, wilson
from rmt_engine.evaluation.noise import Noise, is_held_out, noise_text, python_sources, text_files
from rmt_engine.evaluation.reading import batches, last_border, read_and_ask, readings_of
from rmt_engine.evaluation.retrieval import Plan, Settings, evaluate
from rmt_engine.evaluation.store import Store
from rmt_engine.evaluation.texts import HiddenText, Patch, Trial, make_trial
from rmt_engine.layouts import Cut


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained(device="cpu")


@pytest.fixture(scope="module")
def noise(engine: Engine) -> Noise:
    text = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in (json, json.decoder, retrieval))
    return Noise(text, engine.tokenizer)


# ----------------------------------------------------------------------------------------------------------- problems


def test_each_person_has_a_room_of_their_own() -> None:
    for seed in range(50):
        problem = people_problem(np.random.default_rng(seed), 4)
        rooms = [sentence.split()[-1].rstrip(".") for sentence in problem.sentences]
        assert len(set(rooms)) == 4 and set(rooms) <= set(ROOMS)
        assert {sentence.split()[0] for sentence in problem.sentences} == set(NAMES)
        told = problem.sentences[problem.asked]
        assert problem.question == f"Where is {told.split()[0]}?" and told.endswith(f"the {problem.answer}.")
    with pytest.raises(ValueError, match="expected 1 to 4 facts, got 5"):
        people_problem(np.random.default_rng(0), 5)


def _order(problem: Problem) -> list[str]:
    """The rooms from one end to the other, towards the direction of the question: solved from the text alone."""
    asked = problem.question.split()[-1].rstrip("?")
    behind = {}
    for sentence in problem.sentences:
        _, room, _, direction, _, _, other = sentence.rstrip(".").split()
        assert direction in (asked, OPPOSITE[asked])
        behind[room if direction == asked else other] = other if direction == asked else room
    (first,) = set(behind) - set(behind.values())
    return [first, behind[first], behind[behind[first]]]


def test_the_line_is_solved_by_its_two_sentences() -> None:
    for seed in range(200):
        problem = line_problem(np.random.default_rng(seed))
        assert problem.answer == _order(problem)[0]


def test_one_relation_alone_leaves_two_answers_equally_likely() -> None:
    """Among all problems that begin with a given sentence and question, its own room is right half of the time."""
    right = Counter()
    for seed in range(4000):
        problem = line_problem(np.random.default_rng(seed))
        for sentence in problem.sentences:
            _, room, _, direction, _, _, other = sentence.rstrip(".").split()
            ahead = room if problem.question == furthest_question(direction) else other
            right[problem.answer == ahead] += 1
    low, high = wilson(right[True], right.total())
    assert low < 0.5 < high


def test_the_questions_ask_for_every_direction() -> None:
    problems = [line_problem(np.random.default_rng(seed)) for seed in range(100)]
    assert {problem.question for problem in problems} == {furthest_question(d) for d in DIRECTIONS}
    assert {problem.answer for problem in problems} == set(ROOMS)


def test_only_the_room_itself_is_right() -> None:
    fact = Fact("Mary", "went", "garden")
    assert fact.is_answered_by(" garden") and fact.is_answered_by("Garden.\n")
    assert not any(map(fact.is_answered_by, ["", "gardens", "the garden of", "office", "garden kitchen"]))


# -------------------------------------------------------------------------------------------------------------- texts


def test_noise_is_tokenized_as_a_whole(noise: Noise) -> None:
    assert len(noise.pieces) > 5
    assert np.array_equal(noise.ids, noise.tokenizer.encode("".join(noise.pieces)))


def test_noise_is_without_what_the_checkpoint_drops(noise: Noise) -> None:
    common = int(np.bincount(noise.ids).argmax())
    kept = Noise("".join(noise.pieces), noise.tokenizer, [common])
    assert np.array_equal(kept.ids, noise.ids[noise.ids != common])
    assert kept.starts[-1] == len(kept.ids) and kept.digest != noise.digest
    assert common not in make_trial("detect", 900, kept, np.random.default_rng(0)).text.read(0, 900)


def _is_exact(noise: Noise, text: HiddenText) -> bool:
    """Whether every patch holds the tokens of its own text."""
    patches = [ids for ids, _ in text._spans if ids is not None]
    return all(np.array_equal(noise.tokenizer.encode(noise.tokenizer.decode(ids)), ids) for ids in patches)


@pytest.mark.parametrize("facts", [1, 4])
@pytest.mark.parametrize("task", texts.TASKS)
def test_a_trial_is_the_tokens_of_its_text(noise: Noise, task: str, facts: int) -> None:
    length = 2 * len(noise)
    for seed in range(10):
        trial = make_trial(task, length, noise, np.random.default_rng(seed), facts)
        ids = trial.text.read(0, length)
        assert len(ids) == length
        text = noise.tokenizer.decode(ids)
        found = [text.index(sentence) for sentence in trial.problem.sentences]
        assert found == sorted(found)
        assert all(text.count(sentence) == 1 for sentence in trial.problem.sentences)
        assert (found[0] == 0) == (task == "memorize")
        assert _is_exact(noise, trial.text)
        for place, sentence in zip(trial.places, trial.problem.sentences, strict=True):
            told = noise.tokenizer.decode(trial.text.read(place, place + noise.longest_sentence))
            assert told.lstrip().startswith(sentence)


@pytest.mark.parametrize(("task", "facts"), [("detect", 1), ("detect", 4), ("reasoning", 2)])
@pytest.mark.parametrize("length", [60, 500, 1500, 5000])
def test_a_text_holds_all_its_facts(noise: Noise, task: str, facts: int, length: int) -> None:
    for seed in range(20):
        trial = make_trial(task, length, noise, np.random.default_rng(seed), facts)
        text = noise.tokenizer.decode(trial.text.read(0, length))
        assert all(sentence in text for sentence in trial.problem.sentences)


def test_a_trial_reads_the_same_in_any_pieces(noise: Noise) -> None:
    trial = make_trial("reasoning", 3000, noise, np.random.default_rng(3))
    cuts = sorted({0, 1, 112, 500, *trial.text._starts, *(start + 1 for start in trial.text._starts), 2999, 3000})
    pieces = [trial.text.read(a, b) for a, b in itertools.pairwise(cuts) if b <= 3000]
    assert np.array_equal(np.concatenate(pieces), trial.text.read(0, 3000))
    assert len(trial.text.read(5, 5)) == 0


def test_the_noise_begins_again_behind_its_end(noise: Noise) -> None:
    patch = Patch(4, 6, np.array([1, 1, 1]))
    text = HiddenText(noise, len(noise) - 2, [patch])
    expected = [*noise.ids[-2:], *noise.ids[:2], 1, 1, 1, *noise.ids[4:], *noise.ids, *noise.ids[:3]]
    assert np.array_equal(text.read(0, len(expected)), expected)


def test_places_of_a_shared_text_are_spread_as_those_of_a_text_made_for_the_length(noise: Noise) -> None:
    """Of texts made for a long length, those that serve a shorter one too: their draws are uniform below its bound."""
    short, long = 300, 600
    trials = [make_trial("detect", long, noise, np.random.default_rng(seed)) for seed in range(400)]
    shared = [trial for trial in trials if trial.holds_at(short)]
    bound = texts.room_for(short, noise, 1)
    low, high = wilson(len(shared), len(trials), z=4)
    assert low < bound / texts.room_for(long, noise, 1) < high
    for share in (0.25, 0.5, 0.75):
        low, high = wilson(sum(trial.drawn < share * bound for trial in shared), len(shared), z=4)
        assert low < share < high
    for trial in shared:
        assert trial.places[0] <= trial.drawn
        assert trial.problem.sentences[0] in noise.tokenizer.decode(trial.text.read(0, short))
    assert make_trial("memorize", long, noise, np.random.default_rng(0)).holds_at(200)


def test_facts_stand_everywhere(noise: Noise) -> None:
    """Up to the very end of the text, and close to the token that was drawn."""
    trials = [make_trial("detect", 1000, noise, np.random.default_rng(seed)) for seed in range(200)]
    places = np.array([trial.places[0] for trial in trials])
    assert np.histogram(places, 5, (0, 1000))[0].min() > 20
    assert places.min() < 30 and places.max() > 940
    away = np.array([trial.drawn for trial in trials]) - places
    assert away.min() >= 0 and np.median(away) < 10


def test_held_out_is_decided_by_content_alone() -> None:
    assert is_held_out(b"d") and not is_held_out(b"a")
    contents = list(python_sources())
    held_out = sum(len(content) for content in contents if is_held_out(content))
    assert 0.2 < held_out / sum(map(len, contents)) < 0.5


def test_noise_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second", encoding="utf-8")
    (tmp_path / "a.txt").write_text("first", encoding="utf-8")
    (tmp_path / "c.txt").write_text("first", encoding="utf-8")
    (tmp_path / "d.bin").write_bytes(b"\xff\xfe")
    assert [content.decode() for content in text_files(tmp_path)] == ["first", "second"]
    assert noise_text(tmp_path / "a.txt") == "first"
    with pytest.raises(InputError, match="there is no text at"):
        noise_text(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no UTF-8 text at"):
        noise_text(tmp_path / "empty")


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("alignment", ["left", "right", "center"])
@pytest.mark.parametrize("tail", [0, 3, 25])
def test_borders_are_those_of_the_cut(alignment: str, tail: int) -> None:
    for length in range(1, 90):
        cut = Cut.of(length + tail, 20, alignment)
        starts = [start for start, _ in cut.bounds(length + tail) if start <= length]
        assert last_border(cut, length, tail) == starts[-1]


def _readings(engine: Engine, trials: list[Trial], lengths: list[int]) -> list[retrieval.Reading]:
    return [r for i, trial in enumerate(trials) for r in readings_of(engine, ("detect", 1, 0, i), trial, lengths)]


def test_side_by_side_answers_as_each_alone(engine: Engine, noise: Noise) -> None:
    lengths = [600, 1000]
    trials = [make_trial("detect", 600, noise, np.random.default_rng(seed)) for seed in range(6)]
    (batch,) = batches(_readings(engine, trials, lengths), 100)
    answered = 0
    for reading, length, given in chain(*read_and_ask(engine, retrieval.answerer(engine, "generate"), batch)):
        stream = engine.stream()
        stream.feed(reading.trial.text.read(0, length))
        assert stream.ask(reading.trial.problem.question, ANSWER_TOKENS) == given
        answered += 1
    assert answered == 12


def test_batches_go_in_step(engine: Engine, noise: Noise) -> None:
    trials = [make_trial("detect", 600, noise, np.random.default_rng(seed)) for seed in range(5)]
    readings = _readings(engine, trials[:3], [600, 900]) + _readings(engine, trials[3:], [600])
    assert [[(r.length, r.asked_at) for r in batch] for batch in batches(readings, 2)] == [
        [(600, (600,))] * 2,
        [(900, (600, 900))] * 2,
        [(900, (600, 900))],
    ]


# --------------------------------------------------------------------------------------------------------------- cells


def _cells(engine: Engine, noise: Noise, store: Store | None = None, slots: int = 8, **settings: object) -> list:
    return list(evaluate(Plan(engine, noise, Settings(**settings)), store, slots=slots))  # type: ignore[arg-type]


def test_the_embedded_checkpoint_finds_facts(engine: Engine, noise: Noise) -> None:
    settings = {"lengths": [500, 2000], "trials": 5, "seed": 1}
    cells = _cells(engine, noise, slots=3, **settings)
    assert [(cell.task, cell.tokens, cell.segments) for cell in cells] == [
        ("memorize", 500, 5),
        ("memorize", 2000, 18),
        ("detect", 500, 5),
        ("detect", 2000, 18),
    ]
    assert all(cell.correct == cell.trials == 5 and not cell.wrong for cell in cells)
    assert cells[0].by_place[0] == (5, 5) and sum(n for n, _ in cells[3].by_place) == 5
    again = _cells(engine, noise, slots=5, **settings)
    assert again == cells


def test_every_cell_has_all_its_trials_and_shares_texts(engine: Engine, noise: Noise) -> None:
    plan = Plan(engine, noise, Settings(["detect"], [2000, 2400], trials=20))
    assert [sum(length in at for _, _, at in plan.asked) for length in (2000, 2400)] == [20, 20]
    both = sum(len(at) == 2 for _, _, at in plan.asked)
    assert 5 < both < 20 and len(plan.asked) == 40 - both
    read = sum(load.tokens for load in plan.loads(Store(), 8))
    assert read == 20 * 2400 + (20 - both) * 2000
    far = Plan(engine, noise, Settings(["memorize", "detect"], [500, 2001], trials=20))
    assert {key[0] for key, _, at in far.asked if len(at) == 2} == {"memorize"}
    assert [make_trial("detect", 2400, noise, np.random.default_rng([0, 1, 1, 2400, 7])).problem] == [
        trial.problem for key, trial, _ in plan.asked if key == ("detect", 1, 2400, 7)
    ]


def test_a_wrong_answer_is_counted(engine: Engine, noise: Noise, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        retrieval, "answerer", lambda *arguments: lambda rests, problems, memory: ["nowhere"] * len(problems)
    )
    (cell,) = _cells(engine, noise, tasks=["memorize"], lengths=[500], trials=4)
    assert (cell.correct, cell.accuracy, len(cell.wrong)) == (0, 0.0, 4)
    assert cell.wrong[0][2] == "nowhere" and cell.by_place[0] == (4, 0)


def test_what_is_answered_is_not_asked_again(engine: Engine, noise: Noise, tmp_path: Path) -> None:
    settings = {"tasks": ["detect"], "lengths": [500, 800], "trials": 6, "facts": 2}
    plan = Plan(engine, noise, Settings(**settings))  # type: ignore[arg-type]
    whole = _cells(engine, noise, **settings)

    first, left = Store(tmp_path, {"seed": 0}), [500 * 4]

    def cut_off(tokens: int) -> None:  # inside the third batch
        left[0] -= tokens
        if left[0] < 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(evaluate(plan, first, slots=2, on_step=cut_off))
    with open(tmp_path / "answers.jsonl", "ab") as file:
        file.write(b'[[["detect", 2, 800, 5], 8')  # and killed inside a write
    resumed = Store(tmp_path, {"seed": 0})
    assert 0 < len(resumed.answers) < 12
    read: list[int] = []
    assert list(evaluate(plan, resumed, slots=6, on_step=read.append)) == whole
    assert 0 < sum(read) <= sum(load.tokens for load in plan.loads(first, 6))
    done = Store(tmp_path, {"seed": 0})
    assert list(evaluate(plan, done, on_step=lambda tokens: pytest.fail("read again"))) == whole
    assert plan.loads(done, 6) == []
    with pytest.raises(ValueError, match=r"holds another measurement \(seed: 0 there, 1 now\)"):
        Store(tmp_path, {"seed": 1})


def test_a_text_is_read_on_from_where_it_stood(
    engine: Engine, noise: Noise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"tasks": ["memorize"], "lengths": [500, 2000], "trials": 3}
    plan = Plan(engine, noise, Settings(**settings))  # type: ignore[arg-type]
    whole = _cells(engine, noise, **settings)
    monkeypatch.setattr(store_module, "PLACE_SECONDS", 0.0)
    read: list[int] = []

    def cut_off(tokens: int) -> None:
        read.append(tokens)
        if sum(read) > 3 * 1500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(evaluate(plan, Store(tmp_path, {}), on_step=cut_off))
    folds = []
    fold = engine.executor.fold
    monkeypatch.setattr(engine.executor, "fold", lambda *a: folds.append(1) or fold(*a))
    again: list[int] = []
    assert list(evaluate(plan, Store(tmp_path, {}), on_step=again.append)) == whole
    assert again[0] == sum(read) == 3 * 14 * 112  # the place itself, then what was left
    assert sum(again) == 3 * 17 * 112 and len(folds) == len(again) - 1 == 3

    assert Store(tmp_path, {}).place_of("others") is None
    (tmp_path / "place.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"place\.safetensors is damaged"):
        Store(tmp_path, {}).place_of("others")


def test_a_damaged_store_is_told(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text('[[["detect", 1, 5, 0], 5, "x"]]\nnonsense\n')
    with pytest.raises(InputError, match=r"answers.jsonl, line 2, is damaged"):
        Store(tmp_path)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(InputError, match="is no settings file"):
        Store(tmp_path, {"seed": 1})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tasks": ["juggle"]}, "tasks must be of memorize, detect, reasoning; got juggle"),
        ({"tasks": []}, "tasks must be of memorize, detect, reasoning; got none"),
        ({"trials": 0}, "trials must be at least 1"),
        ({"facts": 5}, "facts must be 1 to 4, one for each name; got 5"),
        ({"lengths": [5]}, "lengths below that do not hold them"),
        ({"answer": "classify"}, "this checkpoint is a decoder: it answers by generate or score, not by classify"),
        ({"answer": "guess"}, "answer must be auto, generate, score, classify; got 'guess'"),
    ],
)
def test_mistakes_are_told_before_anything_is_read(
    engine: Engine, noise: Noise, settings: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        Plan(engine, noise, Settings(**settings))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- intervals


def test_wilson_intervals() -> None:
    low, high = wilson(99, 100)
    assert (round(low, 4), round(high, 4)) == (0.9455, 0.9982)  # Brown, Cai and DasGupta's formula, by hand
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == pytest.approx(1.0)


def test_paired_differences() -> None:
    # Newcombe (1998), table III: a = 36, b = 12, c = 2, d = 0 of 50, method 10
    low, high = paired_difference(36, 12, 2, 0)
    assert (round(low, 4), round(high, 4)) == (0.0569, 0.3404)
    low, high = paired_difference(30, 0, 0, 0)
    assert low == pytest.approx(-high) and 0 < high < 0.13


def test_bootstrap_draws_whole_units() -> None:
    values = np.random.default_rng(0).normal(1.0, 1.0, 400)
    low, high = bootstrap_mean(values, list(range(400)))
    assert low < values.mean() < high
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    repeated = bootstrap_mean(np.repeat(values[:40], 10), list(np.repeat(np.arange(40), 10)))
    assert repeated == pytest.approx(bootstrap_mean(values[:40], list(range(40))))
    with pytest.raises(ValueError, match="at least two independent units"):
        bootstrap_mean(values, [0] * 400)
