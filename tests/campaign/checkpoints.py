"""Checkpoints damaged at random: each loads to finite weights, or a typed error says what is wrong."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

import torch
from checkpoints_for_tests import (
    TinyCheckpoint,
    save_base,
    save_safetensors,
    save_sharded,
    save_trainer_dict,
    tiny_decoder,
    tiny_encoder,
)

from campaign.mutations import mutated
from campaign.watched import Report, Target
from campaign.watched import run as watch
from rmt_engine.checkpoint import convert, inspect, load
from rmt_engine.errors import CheckpointError

SEGMENT_SIZE = 12


class Case:
    """A file of a checkpoint, and how the checkpoint is loaded."""

    def __init__(self, target: Path, source: Path, base: Path | None):
        self.target, self.source, self.base = target, source, base
        self.good = target.read_bytes()

    def load(self) -> dict[str, torch.Tensor]:
        more = {} if self.base is None else {"base": self.base, "segment_size": SEGMENT_SIZE}
        return load(self.source, **more)[1]


def run(count: int, seed: int) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        cases = _cases(Path(folder))
        for case in cases:
            case.load()
        here: list[Case] = []

        def prepare(index: int) -> Path:
            rng = random.Random(f"checkpoints {seed} {index}")
            for before in here:
                before.target.write_bytes(before.good)
            here[:] = [rng.choice(cases)]
            here[0].target.write_bytes(mutated(here[0].good, rng))
            return here[0].target

        return watch("checkpoints", Target(prepare, lambda path: _attempt(here[0])), count)


def _attempt(case: Case) -> str:
    outcome = "loaded"
    try:
        weights = case.load()
        assert all(bool(tensor.isfinite().all()) for tensor in weights.values()), "weights that are not finite"
    except CheckpointError as error:
        assert str(error), "an error without words"
        outcome = "refused"
    except ValueError as error:
        # A config that lost its `rmt` section is a backbone's: then the user is asked for more.
        if case.target.name != "config.json" or "--" not in str(error):
            raise
        outcome = "refused"
    json.dumps(inspect(case.source))
    return outcome


def _cases(folder: Path) -> list[Case]:
    cases = []
    for tiny in (tiny_decoder("gpt2", layers=2), tiny_decoder("llama", layers=2), tiny_encoder("bert", layers=2)):
        cases += _cases_of(tiny, folder / tiny.model_type)
    return cases


def _cases_of(tiny: TinyCheckpoint, folder: Path) -> list[Case]:
    base, state = save_base(folder / "base", tiny), tiny.state_dict()
    trainer = save_trainer_dict(folder / "model_best.pth", state)
    plain = save_safetensors(folder / "plain" / "model.safetensors", state)
    shards = save_sharded(folder / "shards", state)
    out = folder / "out"
    convert(trainer, out, base, segment_size=SEGMENT_SIZE)
    return [
        Case(trainer, trainer, base),
        Case(plain, plain, base),
        Case(shards / "model.safetensors.index.json", shards, base),
        Case(shards / "model-00002-of-00003.safetensors", shards, base),
        Case(out / "model.safetensors", out, None),
        Case(out / "config.json", out, None),
    ]
