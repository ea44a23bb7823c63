"""Text in pieces is the text of the whole, for every kind of decoder, and ends before a stop string."""

from __future__ import annotations

import random
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_zoo import ZOO, definition, random_text
from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from rmt_engine.detokenizer import WINDOW, AnswerText, Detokenizer, StopStrings
from rmt_engine.tokens import Tokenizer


@cache
def tokenizer_of(name: str) -> Tokenizer:
    backend = Backend.from_str(definition(name))
    if backend.decoder is None:  # Llama 2's: bytes that no token covers are tokens of their own
        replaced = decoders.Replace("\u2581", " ")
        backend.decoder = decoders.Sequence(
            [replaced, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    return Tokenizer(backend.to_str())


@cache
def bytes_of(tokenizer: Tokenizer) -> list[int]:
    """Tokens that are a single byte, or else any."""
    tokens = tokenizer.backend.get_vocab()
    return sorted(i for token, i in tokens.items() if len(token) == 1 or token.startswith("<0x")) or [*range(99)]


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*map(detokenizer.feed, ids), detokenizer.flush()]


@pytest.mark.parametrize("name", ZOO)
def test_pieces_are_the_whole(name: str) -> None:
    """Random ids, where bytes of characters stand alone, and ids of texts, long enough for the window to move."""
    tokenizer, rng = tokenizer_of(name), random.Random(name)
    for case in range(60):
        if case % 2:  # a few of the vocabulary, so that bytes that fall back come in runs
            some = rng.sample(range(tokenizer.vocab_size), 9) + rng.sample(bytes_of(tokenizer), min(9, case))
            ids = rng.choices(some, k=rng.randrange(8 * WINDOW))
        else:
            ids = tokenizer.encode(random_text(rng, rng.randrange(80))).tolist()
        assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids), ids


def test_a_character_comes_when_its_last_byte_has_come() -> None:
    tokenizer = tokenizer_of("gpt2")
    ids = tokenizer.encode("a 🦔 b").tolist()
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == "a 🦔 b" and any(piece.endswith("🦔") for piece in pieces)
    assert not any("\ufffd" in piece for piece in pieces) and "" in pieces[:-1]


def test_text_does_not_wait_for_the_end() -> None:
    tokenizer = tokenizer_of("gpt2")
    detokenizer = Detokenizer(tokenizer)
    words = tokenizer.encode("the milk is in the garden " * 20).tolist()
    given = [bool(detokenizer.feed(token)) for token in words]
    assert all(given) and len(detokenizer._ids) <= 2 * WINDOW


TEXTS = st.text(st.sampled_from("abc"), max_size=30)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    text=TEXTS,
    stops=st.lists(st.text(st.sampled_from("abc"), min_size=1, max_size=4), max_size=3),
    seed=st.integers(0, 99),
)
def test_stop_strings_are_found_in_any_pieces(text: str, stops: list[str], seed: int) -> None:
    rng, scanner = random.Random(seed), StopStrings(stops)
    found, left = "", text
    while left and not scanner.found:
        size = rng.randint(1, 3)
        found, left = found + scanner.feed(left[:size]), left[size:]
    found += scanner.flush()
    # The stop that is complete first ends the text; where several are, the one that began first.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert found == text and not scanner.found
    else:
        assert scanner.found and not any(stop in found for stop in stops) and text.startswith(found)
        assert any(text.startswith(stop, len(found)) for stop in stops)


def test_a_text_ends_before_its_stop_string() -> None:
    tokenizer = tokenizer_of("gpt2")
    text = AnswerText(tokenizer, ["\nQ:", "END"])
    pieces = []
    for token in tokenizer.encode("the kitchen\nQuick. EN or\nQ: more").tolist():
        pieces.append(text.feed(token))
        if text.stopped:
            break
    assert "".join(pieces) == "the kitchen\nQuick. EN or" and text.stopped and text.flush() == ""


def test_what_looks_like_a_stop_is_given_at_the_end() -> None:
    tokenizer = tokenizer_of("gpt2")
    text = AnswerText(tokenizer, ["garden."])
    pieces = [text.feed(token) for token in tokenizer.encode("in the gard").tolist()]
    assert not "".join(pieces).endswith("gard") and "".join([*pieces, text.flush()]) == "in the gard"
