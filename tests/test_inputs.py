"""Inputs of every kind: their places, containers, errors, and memory that stays the same."""

from __future__ import annotations

import io
import json
import random
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_zoo import ATOMS, definition

from rmt_engine import inputs
from rmt_engine.errors import InputError, StateError
from rmt_engine.inputs import InputPosition, open_input
from rmt_engine.layouts import Cut
from rmt_engine.tokens import Tokenizer

SEGMENT = 16
VOCABULARY = 5000


@cache
def tokenizer(name: str) -> Tokenizer:
    return Tokenizer(definition(name), name)


def engine(name: str = "gpt2", drop_ids: tuple[int, ...] = (), segment: int = SEGMENT) -> Any:
    """What an input needs of an engine."""
    return SimpleNamespace(
        tokenizer=tokenizer(name),
        config=SimpleNamespace(drop_ids=drop_ids, segment_size=segment),
        vocab_size=VOCABULARY,
    )


def read(opened: Any, stop: int | None = None) -> tuple[list[int], list[tuple[int, InputPosition]]]:
    """All tokens, and a place after each segment (and up to a segment before it); at most about `stop` tokens."""
    ids: list[int] = []
    places = []
    with opened as feed, feed.segments(Cut(SEGMENT, SEGMENT), VOCABULARY) as segments:
        for segment in feed.errors_of(segments):
            ids += segment.ids.tolist()
            places += [(n, feed.position_at(n)) for n in {len(ids), max(len(ids) - len(ids) % 7, 0)}]
            if stop is not None and len(ids) >= stop:
                break
    return ids, places


def restored(position: InputPosition) -> InputPosition:
    return InputPosition.from_dict(json.loads(json.dumps(position.to_dict())))


# ------------------------------------------------------------------------------------------------- places


@pytest.mark.parametrize("name", ["gpt2", "llama3", "llama2", "bert-uncased", "unigram-first"])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(atoms=st.lists(st.sampled_from(ATOMS), min_size=1, max_size=300), seed=st.integers(0, 2**32), drop=st.booleans())
def test_a_text_goes_on_from_any_place(
    name: str, atoms: list[str], seed: int, drop: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    generator = random.Random(seed)
    path = tmp_path_factory.getbasetemp() / "places.txt"
    text = "a" + "".join(atoms)
    path.write_bytes(text.encode("utf-8"))
    ids = tokenizer(name).encode(text).tolist()
    dropped = tuple(generator.sample(ids, min(len(ids), 3))) if drop else ()
    expected = [i for i in ids if i not in dropped]
    with pytest.MonkeyPatch.context() as patch:  # arrays of a few tokens, places at each
        patch.setattr(inputs, "PLACE_TOKENS", generator.choice([1, 8, 512]))
        patch.setattr(inputs, "READ_BYTES", generator.choice([1, 2, 7, 1 << 15]))
        whole, places = read(open_input(engine(name, dropped), path))
        assert whole == expected
        for count, place in generator.sample(places, min(len(places), 5)):
            rest, later = read(open_input(engine(name, dropped), path, start=restored(place)))
            assert rest == expected[count:]
            for more, place in later[:2]:
                rest, _ = read(open_input(engine(name, dropped), path, start=place))
                assert rest == expected[count + more :]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    ids=st.lists(st.integers(0, 20), min_size=1, max_size=300),
    drop=st.sets(st.integers(0, 22), max_size=4),
    kind=st.sampled_from(["npy", "uint16", "int64"]),
    seed=st.integers(0, 2**32),
)
def test_a_token_file_goes_on_from_any_place(
    ids: list[int], drop: set[int], kind: str, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / ("places.npy" if kind == "npy" else "places.bin")
    np.save(path, np.array(ids, np.uint16)) if kind == "npy" else np.array(ids, kind).tofile(path)
    options = {"token_dtype": None if kind == "npy" else kind}
    model = engine(drop_ids=tuple(drop))
    expected = [i for i in ids if i not in drop]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "COUNTED_TOKENS", 5)
        whole, places = read(open_input(model, path, **options))
        assert whole == expected
        random.Random(seed).shuffle(places)
        for count, place in places[:5]:
            assert place.skip == 0
            rest, later = read(open_input(model, path, start=restored(place), **options))
            assert rest == expected[count:]
            for more, place in later[:1]:
                assert read(open_input(model, path, start=place, **options))[0] == expected[count + more :]


def test_places_are_few_and_old_ones_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "AHEAD_TOKENS", 256)
    monkeypatch.setattr(inputs, "READER_TOKENS", 64)
    monkeypatch.setattr(inputs, "PLACE_TOKENS", 32)
    monkeypatch.setattr(inputs, "READ_BYTES", 64)
    path = tmp_path / "long.txt"
    path.write_text("one two three\n" * 5000)
    expected = tokenizer("gpt2").encode(path.read_text()).tolist()
    opened = open_input(engine(), path)
    ids, places = read(opened)
    assert ids == expected and len(opened._places) <= 2 * ((256 + 64 + 10 * SEGMENT) // 32) + 4
    for count, place in places[:: len(places) // 20]:
        assert read(open_input(engine(), path, start=place))[0] == expected[count:]
        assert place.skip < 200
    with pytest.raises(AssertionError, match="this place is forgotten"):
        opened.position_at(0)


def test_a_place_in_the_standard_input_reads_up_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "où est Mary ? " * 200

    def stdin(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    monkeypatch.setattr(inputs, "READ_BYTES", 33)
    stdin(text)
    ids, places = read(open_input(engine(), "-"))
    count, place = places[len(places) // 2]
    assert place.offset % 33 == 0 < place.offset and place.size is None
    stdin(text)
    assert read(open_input(engine(), "-", start=place))[0] == ids[count:]
    stdin(text[:10])
    with pytest.raises(InputError, match=rf"at least {place.offset:,} bytes in the standard input, found 11; the text"):
        read(open_input(engine(), "-", start=place))


def test_a_place_in_another_input_is_refused(tmp_path: Path) -> None:
    text, tokens = tmp_path / "a.txt", tmp_path / "a.npy"
    text.write_text("one two three " * 30)
    np.save(tokens, np.arange(50, dtype=np.uint16))
    _, (*_, (_, place)) = read(open_input(engine(), text))
    _, (*_, (_, token_place)) = read(open_input(engine(), tokens))
    text.write_text("one two three " * 31)
    with pytest.raises(InputError, match=r"expected 420 bytes in .*a\.txt, found 434; its place was saved in another"):
        open_input(engine(), text, start=place)
    with pytest.raises(InputError, match=r"a\.txt is opened as text, and was tokens of uint16 when its place"):
        open_input(engine(), text, start=token_place)
    np.save(tokens, np.arange(50, dtype=np.int64))
    with pytest.raises(InputError, match=r"a\.npy is opened as tokens of int64, and was tokens of uint16"):
        open_input(engine(), tokens, start=token_place)


def test_a_damaged_place_is_refused() -> None:
    good = InputPosition("text", 3, b"\xe4", "held", True, 2, "a.txt", 9).to_dict()
    assert InputPosition.from_dict(good).held_bytes == b"\xe4"
    changes: list[dict[str, Any]] = [
        {"offset": -1}, {"offset": "3"}, {"skip": True}, {"size": 1.5}, {"held_bytes": "e"}, {"held_bytes": None},
        {"kind": "other"}, {"held_text": None}, {"continued": 1}, {"name": None}, {"field": 3}, {"dtype": 3},
        {"new": 1},
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(StateError, match="the position of the input is damaged: "):
            InputPosition.from_dict(good | change)
    with pytest.raises(StateError):
        InputPosition.from_dict({"kind": "text"})
