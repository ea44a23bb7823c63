"""State files damaged at random: every one is refused. Those whose checksum was made right again, as only a hand could:
refused, or a stream that goes on."""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from pathlib import Path

from campaign.engines import text, tiny_folder
from campaign.mutations import mutated
from campaign.watched import Report, Target
from campaign.watched import run as watch
from rmt_engine import Engine
from rmt_engine.errors import RMTError, StateError
from rmt_engine.memory import HEADER, MAGIC, VERSION

SEALED_SHARE = 3  # one of so many has its checksum made right again
ODD_VALUES = [None, -1, 0, 2**63, 1.5, True, "", "ff", "x", [], {}, [1], float("nan")]


def run(count: int, seed: int) -> Report:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        engine = Engine.from_pretrained(tiny_folder(folder), device="cpu")
        goods = [_save(engine, folder / "good.state", size, score) for size in (0, 7, 900) for score in (False, True)]

        def prepare(index: int) -> Path:
            rng = random.Random(f"states {seed} {index}")
            sealed = rng.randrange(SEALED_SHARE) == 0
            path = folder / ("sealed.state" if sealed else "damaged.state")
            path.write_bytes((_sealed if sealed else mutated)(rng.choice(goods), rng))
            return path

        return watch("states", Target(prepare, lambda path: _attempt(engine, path)), count)


def _save(engine: Engine, path: Path, size: int, score: bool) -> bytes:
    with engine.stream(score=score) as stream:
        stream.feed(text(size, seed=size)[:-1])
        stream.save(path)
    engine.resume(path)
    return path.read_bytes()


def _attempt(engine: Engine, path: Path) -> str:
    try:
        stream = engine.resume(path)
    except StateError as error:
        assert str(error), "an error without words"
        return "refused"
    assert path.name == "sealed.state", "a damaged file was read"
    try:
        stream.feed("and so on, further than a segment")
        stream.save(path)
    except (RMTError, ValueError):
        return "sealed by hand and stopped later"
    return "sealed by hand and read"


def _sealed(good: bytes, rng: random.Random) -> bytes:
    payload = good[HEADER.size :]
    payload = mutated(payload, rng) if rng.randrange(3) == 0 else _with_odd_value(payload, rng)
    return HEADER.pack(MAGIC, VERSION, len(payload), hashlib.sha256(payload).digest()) + payload


def _with_odd_value(payload: bytes, rng: random.Random) -> bytes:
    """One thing that the state says of itself is something else, or is not there."""
    end = 8 + int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8:end])
    about = json.loads(header["__metadata__"]["rmt_state"])
    place = about if rng.randrange(4) == 0 else about[rng.choice(["state", "state", "origin", "scores"])] or about
    key = rng.choice(sorted(place))
    if rng.randrange(4):
        place[key] = rng.choice(ODD_VALUES)
    else:
        del place[key]
    header["__metadata__"]["rmt_state"] = json.dumps(about)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + payload[end:]
