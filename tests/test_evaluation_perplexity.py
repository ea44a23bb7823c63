"""Perplexity over the segments read before: each column against a plain forward over the very text it reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints_for_tests import byte_tokenizer, tiny_decoder

from rmt_engine import Engine, InputError
from rmt_engine.evaluation import perplexity
from rmt_engine.evaluation.perplexity import measure, plan, read_targets
from rmt_engine.tokens import Tokenizer

SIZE = 12


@pytest.fixture(scope="module")
def engine() -> Engine:
    tiny = tiny_decoder("gpt2", seed=4, noise="all", layers=2)
    tokenizer = Tokenizer(byte_tokenizer().to_str())
    return Engine.from_weights(tiny.rmt_config(SIZE), tiny.weights(), tokenizer, device="cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Documents of 100, 10 and 50 segments; the second is too short."""
    rng = np.random.default_rng(0)
    for name, segments in (("a.txt", 100), ("b.txt", 10), ("c.txt", 50)):
        letters = rng.choice(list("abcdefgh \n"), SIZE * segments + 5)
        (tmp_path / name).write_text("x" + "".join(letters)[1:-1] + "x", encoding="utf-8")
    return tmp_path


def test_targets_are_spread_over_all_that_has_enough_text_before_it(engine: Engine, folder: Path) -> None:
    made = plan(engine, folder, (1, 16), 12)
    assert [path.name for path in made.sources] == ["a.txt", "b.txt", "c.txt"]
    first, second, third = made.wanted
    assert len(first) + len(third) == 12 and second == ()
    assert len(first) == pytest.approx(12 * 84 / (84 + 34), abs=1)
    assert min(first) >= 16 and max(first) < 100 and min(third) >= 16 and max(third) < 50
    assert set(np.diff(first)) <= {9, 10}
    targets = list(read_targets(engine, made))
    for target, (document, index) in zip(targets, [(d, i) for d, w in enumerate(made.wanted) for i in w], strict=True):
        ids = engine.tokenizer.encode(made.sources[document].read_text(encoding="utf-8"))
        assert target.document == document
        assert np.array_equal(target.ids, ids[(index - 16) * SIZE : (index + 1) * SIZE])


def test_more_targets_than_there_are_give_each_once(engine: Engine, folder: Path) -> None:
    made = plan(engine, folder / "c.txt", (1, 16), 1000)
    assert made.wanted == (tuple(range(16, 50)),)


def _forward_nll(engine: Engine, ids: np.ndarray) -> float:
    """Mean NLL of the last segment's tokens but the first, from the logits of `forward`."""
    logits = engine.forward(torch.from_numpy(ids)[None]).logits
    assert isinstance(logits, torch.Tensor)
    rows = logits[0, :-1].double().log_softmax(-1)
    return -float(rows.gather(1, torch.from_numpy(ids[-SIZE + 1 :])[:, None]).mean())


def test_columns_are_those_of_forward(engine: Engine, folder: Path) -> None:
    made = plan(engine, folder, (1, 2, 8), 7)
    steps: list[int] = []
    result = measure(engine, made, slots=3, on_step=steps.append)
    assert sum(steps) == sum(load.tokens for load in made.loads(engine, 3))
    targets = list(read_targets(engine, made))
    assert (result.targets, result.tokens, result.documents, result.unit) == (7, 7 * (SIZE - 1), 2, "target")
    alone = np.mean([_forward_nll(engine, target.ids[-SIZE:]) for target in targets])
    for column in result.columns:
        own = [_forward_nll(engine, target.ids[-(column.segments + 1) * SIZE :]) for target in targets]
        assert np.log(column.perplexity) == pytest.approx(np.mean(own), abs=1e-5)
        assert np.log(column.reset) == pytest.approx(alone, abs=1e-5)
        assert column.reset_change.percent == 0 and column.reset_change.interval == (0, 0)


def test_another_memory_is_that_of_another_target(engine: Engine, folder: Path) -> None:
    made = plan(engine, folder, (4,), 2)
    first, second = list(read_targets(engine, made))
    (column,) = measure(engine, made, slots=2).columns
    swapped = [
        _forward_nll(engine, np.concatenate([theirs.ids[:-SIZE], ours.ids[-SIZE:]]))
        for ours, theirs in ((first, second), (second, first))
    ]
    assert np.log(column.other) == pytest.approx(np.mean(swapped), abs=1e-5)
    lonely = measure(engine, plan(engine, folder, (4,), 1)).columns[0]
    assert np.isnan(lonely.other) and lonely.change.interval is None


def test_changes_are_paired(engine: Engine) -> None:
    """Losses that differ wildly between targets and little, but always, between columns."""
    rng = np.random.default_rng(0)
    first = rng.normal(4.0, 1.0, 50)
    losses = np.stack([first, first - 0.05 + rng.normal(0, 0.01, 50)], axis=1)[:, :, None].repeat(3, axis=2)
    result = perplexity._result(losses, [0] * 25 + [1] * 25, (1, 8), 11)
    _, column = result.columns
    assert column.change.percent == pytest.approx(100 * np.expm1(-0.05), abs=0.3)
    assert column.change.interval is not None
    low, high = column.change.interval
    assert -5.5 < low < column.change.percent < high < -4.4
    assert perplexity._result(losses, list(range(50)), (1, 8), 11).unit == "document"


def test_what_cannot_be_measured_is_told(engine: Engine, folder: Path, encoder_folder: Path) -> None:
    with pytest.raises(InputError, match=r"no document of .* has 201 full segments of 12 tokens"):
        plan(engine, folder, (1, 200))
    with pytest.raises(InputError, match="there is no text at"):
        plan(engine, folder / "none")
    with pytest.raises(ValueError, match="segments and targets must be at least 1"):
        plan(engine, folder, (0, 1))
    with pytest.raises(ValueError, match="this checkpoint is a classifier"):
        plan(Engine.from_pretrained(encoder_folder, device="cpu"), folder)


def test_records_are_read(engine: Engine, folder: Path) -> None:
    text = (folder / "a.txt").read_text(encoding="utf-8")
    (folder / "r.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    made = plan(engine, folder / "r.jsonl", (1, 2), 4, field="text")
    plain = plan(engine, folder / "a.txt", (1, 2), 4)
    assert measure(engine, made) == measure(engine, plain)
