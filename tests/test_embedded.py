"""The checkpoints that ship inside the package: described, small, and doing what they are for."""

from __future__ import annotations

from pathlib import Path

import pytest

from rmt_engine import Engine
from rmt_engine.engine import EMBEDDED
from rmt_engine.evaluation import retrieval, texts
from rmt_engine.evaluation.noise import Noise
from rmt_engine.evaluation.retrieval import Plan, Settings, evaluate

FOLDERS = sorted(path for path in EMBEDDED.parent.iterdir() if path.is_dir())
MOST_BYTES = 20_000_000


def test_they_are_small_together() -> None:
    files = [file for folder in FOLDERS for file in folder.rglob("*") if file.is_file()]
    assert 0 < sum(file.stat().st_size for file in files) < MOST_BYTES


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_each_has_a_card_that_says_how_it_was_made_and_measured(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    for word in ("| data |", "| recipe |", "seed", "rmt-engine eval", "Limits:"):
        assert word in card, word


def test_the_embedded_encoder_classifies() -> None:
    engine = Engine.from_pretrained(EMBEDDED.parent / "encoder", device="cpu", dtype="float32")
    unseen = "".join(Path(str(module.__file__)).read_text() for module in (retrieval, texts))
    noise = Noise(unseen, engine.tokenizer)
    settings = Settings(lengths=[117, 2340], trials=6, seed=1)
    cells = list(evaluate(Plan(engine, noise, settings), slots=6))
    assert [(cell.task, cell.segments) for cell in cells] == [
        ("memorize", 1),
        ("memorize", 20),
        ("detect", 1),
        ("detect", 20),
    ]
    assert sum(cell.correct for cell in cells) == 24, [cell.wrong for cell in cells]
