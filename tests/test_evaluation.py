"""Retrieval: facts stand exactly where they should, and many trials side by side answer as each would alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rmt_engine import Engine, InputError
from rmt_engine.cli import main
from rmt_engine.evaluation import retrieval
from rmt_engine.evaluation.facts import Fact
from rmt_engine.evaluation.noise import Noise, is_held_out, noise_text, python_sources, text_files
from rmt_engine.evaluation.retrieval import evaluate, make_trial, total_tokens, wilson


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained(device="cpu")


@pytest.fixture(scope="module")
def noise(engine: Engine) -> Noise:
    text = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in (json, json.decoder, retrieval))
    return Noise(text, engine.tokenizer)


def test_noise_is_tokenized_as_a_whole(noise: Noise) -> None:
    assert len(noise.pieces) > 5
    assert np.array_equal(noise.ids, noise.tokenizer.encode("".join(noise.pieces)))


@pytest.mark.parametrize("task", ["memorize", "detect"])
def test_a_trial_is_the_tokens_of_its_text(noise: Noise, task: str) -> None:
    length = 2 * len(noise)
    for seed in range(20):
        trial = make_trial(task, length, noise, np.random.default_rng(seed))
        ids = trial.read(0, length)
        assert len(ids) == length
        text = noise.tokenizer.decode(ids)
        assert text.count(trial.fact.sentence) == 1
        assert (text.index(trial.fact.sentence) == 0) == (task == "memorize")
        head = ids[: trial.gap + len(trial.ids)] if task == "memorize" else ids[trial.gap : trial.gap + len(trial.ids)]
        assert np.array_equal(noise.tokenizer.encode(noise.tokenizer.decode(head)), head)


@pytest.mark.parametrize("length", [20, 60, 500, 1500])
def test_a_short_text_holds_the_whole_fact(noise: Noise, length: int) -> None:
    for seed in range(40):
        trial = make_trial("detect", length, noise, np.random.default_rng(seed))
        assert trial.fact.sentence in noise.tokenizer.decode(trial.read(0, length))


def test_a_trial_reads_the_same_in_any_pieces(noise: Noise) -> None:
    trial = make_trial("detect", 3000, noise, np.random.default_rng(3))
    cuts = [0, 1, 112, 500, trial.gap, trial.gap + 1, trial.gap + len(trial.ids), 2999, 3000]
    pieces = [trial.read(a, b) for a, b in zip(sorted(cuts), sorted(cuts)[1:], strict=False)]
    assert np.array_equal(np.concatenate(pieces), trial.read(0, 3000))


def test_side_by_side_answers_as_each_alone(engine: Engine, noise: Noise) -> None:
    length = 1000
    trials = [make_trial("detect", length, noise, np.random.default_rng(seed)) for seed in range(6)]
    ((_, answers),) = retrieval._read_and_ask(engine, trials, [length], lambda tokens: None)
    for trial, answer in zip(trials, answers, strict=True):
        stream = engine.stream()
        stream.feed(trial.read(0, length))
        assert stream.ask(trial.fact.question, retrieval.ANSWER_TOKENS) == answer


def test_the_embedded_checkpoint_finds_facts(engine: Engine, noise: Noise) -> None:
    cells = list(evaluate(engine, noise, lengths=[500, 4000], trials=8, slots=3, seed=1))
    assert [(cell.task, cell.tokens) for cell in cells] == [
        ("memorize", 500),
        ("memorize", 4000),
        ("detect", 500),
        ("detect", 4000),
    ]
    assert all(cell.correct == 8 and not cell.wrong for cell in cells)
    again = list(evaluate(engine, noise, lengths=[500, 4000], trials=8, slots=8, seed=1))
    assert [cell.correct for cell in again] == [cell.correct for cell in cells]


def test_a_wrong_answer_is_counted(engine: Engine, noise: Noise, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "_ask", lambda engine, trials, *place: ["nowhere"] * len(trials))
    (cell,) = evaluate(engine, noise, tasks=["memorize"], lengths=[500], trials=4)
    assert (cell.correct, cell.accuracy, len(cell.wrong)) == (0, 0.0, 4)
    assert cell.wrong[0][2] == "nowhere"


def test_only_the_room_itself_is_right() -> None:
    fact = Fact("Mary", "went", "garden")
    assert fact.is_answered_by(" garden") and fact.is_answered_by("Garden.\n")
    assert not any(map(fact.is_answered_by, ["", "gardens", "the garden of", "office", "garden kitchen"]))


def test_wilson_intervals() -> None:
    low, high = wilson(99, 100)
    assert (round(low, 4), round(high, 4)) == (0.9455, 0.9982)  # Brown, Cai and DasGupta's formula, by hand
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == 1.0


def test_the_cost_is_known_before() -> None:
    assert total_tokens(["memorize", "detect"], [100, 1000], 5) == 5 * (1000 + 1100)


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
    with pytest.raises(InputError, match="there is no noise at"):
        noise_text(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no UTF-8 text at"):
        noise_text(tmp_path / "empty")


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "noise.txt").write_text(Path(json.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    command = ["eval", "retrieval", "--noise", str(tmp_path), "--lengths", "1k", "--trials", "2"]
    assert main([*command, "--tasks", "memorize"]) == 0
    assert "2/2 = 100.0 %" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    assert [cell["correct"] for cell in json.loads(capsys.readouterr().out)["cells"]] == [2, 2]
    assert main([*command, "--tasks", "juggle"]) == 2
    assert "tasks must be of memorize, detect; got juggle" in capsys.readouterr().err
