"""A tiny engine and its input, for the campaigns that run one."""

from __future__ import annotations

import random
from pathlib import Path

from checkpoints_for_tests import save_base, save_trainer_dict, tiny_decoder

from rmt_engine.checkpoint import convert


def tiny_folder(folder: Path) -> Path:
    """A converted checkpoint with a byte-level tokenizer."""
    tiny = tiny_decoder("gpt2", layers=2)
    weights = save_trainer_dict(folder / "model_best.pth", tiny.state_dict())
    convert(weights, folder / "model", save_base(folder / "base", tiny), segment_size=12)
    return folder / "model"


def text(size: int, seed: int) -> bytes:
    """UTF-8 with characters of one to four bytes, so that cuts fall inside some."""
    rng = random.Random(seed)
    return "".join(rng.choice("aab  \nžчя語😀") for _ in range(size)).encode()
