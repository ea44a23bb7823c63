"""Incremental tokenization equals tokenization of the whole, or the tokenizer is refused."""

import json
import random
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_zoo import ATOMS, ZOO, corpus, definition, random_text

from rmt_engine import cut_rules, tokens
from rmt_engine.cut_rules import CutRule
from rmt_engine.errors import InputError, TokenizerError
from rmt_engine.tokens import IncrementalTokenizer, Tokenizer

LOADED: dict[str, Tokenizer] = {}


def load(name: str) -> Tokenizer:
    if name not in LOADED:
        LOADED[name] = Tokenizer(definition(name), name)
    return LOADED[name]


def whole(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.backend.encode(text, add_special_tokens=False).ids
    return ids


def in_pieces(text_tokens: IncrementalTokenizer, pieces: list[str]) -> list[int]:
    ids = [i for piece in pieces for i in text_tokens.feed(piece).tolist()]
    return ids + text_tokens.flush().tolist()


def cut_randomly(text: str, generator: random.Random, longest: int = 12) -> list[str]:
    pieces, start = [], 0
    while start < len(text):
        stop = start + generator.randint(1, longest)
        pieces.append(text[start:stop])
        start = stop
    return pieces


texts = st.lists(st.one_of(st.sampled_from(ATOMS), st.characters(exclude_categories=["Cs"])), max_size=25).map("".join)


@pytest.mark.parametrize("name", ZOO)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=texts, seed=st.integers(0, 2**32))
def test_any_feeds_give_the_ids_of_the_whole(name: str, text: str, seed: int) -> None:
    tokenizer = load(name)
    pieces = cut_randomly(text, random.Random(seed))
    assert in_pieces(tokenizer.incremental(), pieces) == whole(tokenizer, text)


@pytest.mark.parametrize("name", ZOO)
def test_long_texts_cut_at_every_place_the_rule_allows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "PIECE_CHARS", 0)
    tokenizer = load(name)
    generator = random.Random(7)
    for text in [corpus()[0][:8000], *(random_text(generator, 60) for _ in range(100))]:
        assert in_pieces(tokenizer.incremental(), [text]) == whole(tokenizer, text)


@pytest.mark.parametrize("name", ZOO)
def test_python_source_is_given_out_as_it_comes(name: str) -> None:
    text_tokens = load(name).incremental()
    longest = 0
    for start in range(0, 8000, 10):
        text_tokens.feed(corpus()[0][start : start + 10])
        longest = max(longest, len(text_tokens.held))
    assert longest < 1000


# ------------------------------------------------------------------------------- the property is shown to bite


def wrong_cuts(name: str, pattern: str | None, texts: int = 1500) -> int:
    """How many random texts tokenize differently when cut wherever `pattern` (None: the rule's own) matches."""
    tokenizer, generator = load(name), random.Random(1)
    rule = tokenizer.cut_rule
    if pattern is not None:
        rule = CutRule("words", cut_rules.re.compile(pattern), 0)
    wrong = 0
    for _ in range(texts):
        text = random_text(generator, 12)
        cuts = [0, *rule.cuts(text), len(text)]
        pieces = [text[a:b] for a, b in pairwise(cuts)]
        wrong += tokenizer.encode_pieces(pieces).tolist() != whole(tokenizer, text)
    return wrong


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("gpt2", "(?s:.)(?=.)"),  # anywhere
        ("llama3", r"\n(?=.)"),  # after a newline
        ("llama3", r"\S(?=\s)"),  # before white space, whatever comes before it: ").\n" is one token
        ("o200k", r"[^\W_](?=\W)"),  # after a letter: "don't" is one word
        ("bert-uncased", r"[^\W_](?=\s)"),  # before any white space: BERT deletes a form feed
        ("unigram-first", r"[^\W_](?=\s)"),  # before any white space: a newline gets a prefix space
        ("roberta", r"[^\W_](?=\s)"),
    ],
)
def test_a_looser_rule_gives_other_tokens(name: str, pattern: str) -> None:
    assert wrong_cuts(name, None, 300) == 0
    assert wrong_cuts(name, pattern) > 5


def test_a_letter_that_is_normalized_to_a_mark_is_no_place_to_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrong_cuts("llama3-nfd", None) == 0
    monkeypatch.setattr(cut_rules, "_stays_letter", lambda char, steps: True)
    assert wrong_cuts("llama3-nfd", None) > 5
    with pytest.raises(TokenizerError, match="cut at places that should be safe"):
        Tokenizer(definition("llama3-nfd")).cut_rule  # noqa: B018 - the self-test is the second net


# ------------------------------------------------------------------------------------------------- refusals


def changed(name: str, change: Callable[[dict[str, Any]], None]) -> Tokenizer:
    parsed = json.loads(definition(name))
    change(parsed)
    return Tokenizer(json.dumps(parsed), "t.json")


def added(content: str, **flags: bool) -> Callable[[dict[str, Any]], None]:
    token = {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}

    def change(parsed: dict[str, Any]) -> None:
        ids = [entry["id"] for entry in parsed["added_tokens"]] + list(parsed["model"]["vocab"].values())
        parsed["added_tokens"].append({"id": max(ids) + 1, "special": False, **token, **flags})

    return change


def put(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda parsed: parsed.update(values)


SPLIT_ODD = {"type": "Split", "pattern": {"Regex": r"(?<=a)\s|\p{L}+"}, "behavior": "Isolated", "invert": False}
WHOLE_TEXT = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
FIRST = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
BYTES_ONLY = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
REFUSED = {
    "dropout": (
        "gpt2",
        lambda parsed: parsed["model"].update(dropout=0.1),
        "dropout=0.1, so that its tokens are random",
    ),
    "normalizer": ("gpt2", put(normalizer={"type": "Nmt"}), r"its normalizer Nmt\(\) may look across a cut"),
    "strip": (
        "gpt2",
        put(normalizer={"type": "Strip", "strip_left": True, "strip_right": True}),
        r"its normalizer Strip\(strip_left=True, strip_right=True\) may look across a cut",
    ),
    "replace": (
        "gpt2",
        put(normalizer={"type": "Replace", "pattern": {"String": "a b"}, "content": "c"}),
        "its normalizer Replace",
    ),
    "prepend": ("gpt2", put(normalizer={"type": "Prepend", "prepend": "x"}), "its normalizer Prepend"),
    "other prepend": (
        "llama2-metaspace",
        put(pre_tokenizer=None, normalizer={"type": "Prepend", "prepend": "x"}),
        "its normalizer prepends 'x', and a space becomes ' '",
    ),
    "pattern": (
        "gpt2",
        put(pre_tokenizer=SPLIT_ODD),
        r"its pre-tokenizer Split\(.*is not known to split at white space",
    ),
    "bytes only": ("gpt2", put(pre_tokenizer=BYTES_ONLY), "ByteLevel.*is not known to split at white space"),
    "no pre-tokenizer": (
        "gpt2",
        put(pre_tokenizer=None),
        "no pre-tokenizer splits its text, and ' ' is not in its voc",
    ),
    "unigram over spaces": ("unigram-first", put(pre_tokenizer=WHOLE_TEXT), "and it is no plain BPE"),
    "vocabulary over spaces": (
        "llama2-metaspace",
        lambda parsed: parsed["model"]["vocab"].update({"a▁b": 1500}),
        "its token 'a▁b' continues over a space",
    ),
    "first of each": (
        "bert-cased",
        put(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, FIRST]}),
        "may depend on where the text begins",
    ),
    "added, with a space": (
        "gpt2",
        added("New York"),
        "its added token 'New York' contains a place where texts are cut",
    ),
    "added, normalized": (
        "llama3-nfkc-lower",
        added("X\u3000Y", normalized=True),
        "contains a place where texts are cut",
    ),
    "added, stripped away": (
        "gpt2",
        put(normalizer={"type": "Strip", "strip_left": False, "strip_right": True}),
        "its added token '  ' is normalized to nothing",
    ),
    "added, rstrip": ("gpt2", added("EOT", rstrip=True), r"takes the white space after it \(rstrip\)"),
    "added, single word": ("gpt2", added("   ", single_word=True), "is single_word, and looks at the character before"),
    "added, prepended": ("llama2", added("foo"), "begins or ends with a letter, next to a space that the normalizer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_cut_exactly_is_refused_with_the_reason(case: str) -> None:
    name, change, reason = REFUSED[case]
    tokenizer = changed(name, change)
    assert tokenizer.encode("one two").size > 0  # still good for whole texts
    with pytest.raises(TokenizerError, match=r"the tokenizer t\.json cannot be run over a stream exactly: .*" + reason):
        tokenizer.incremental()
    with pytest.raises(TokenizerError, match=r"; tokenize the text yourself into a token file \(.npy or .bin\)"):
        tokenizer.incremental()


def test_added_tokens_that_are_safe_are_taken() -> None:
    for change in (added("\n\n"), added("<x>", rstrip=True, lstrip=True), added("<y>", single_word=True), added("foo")):
        tokenizer = changed("gpt2", change)
        generator = random.Random(3)
        for _ in range(200):
            atoms = generator.choices(["<x>", "<y>", "foo", " ", "\n", "a", ".", "\u3002"], k=10)
            assert in_pieces(tokenizer.incremental(), atoms) == whole(tokenizer, "".join(atoms))


def test_a_panic_of_the_library_is_a_tokenizer_error() -> None:
    class PanicException(BaseException):  # what pyo3 raises, by name
        pass

    class Backend:
        def encode_batch_fast(self, pieces: list[str], add_special_tokens: bool) -> None:
            raise PanicException("bad split")

    tokenizer = changed("gpt2", put())
    tokenizer.backend = Backend()
    with pytest.raises(TokenizerError, match=r"the tokenizers library failed with the tokenizer t\.json: bad split"):
        tokenizer.encode("a b")


# ------------------------------------------------------------------------------------- held text, its cap, state


def test_held_and_continued_carry_a_stream_on() -> None:
    for name in ("llama3", "llama2"):
        tokenizer, generator = load(name), random.Random(5)
        for _ in range(100):
            text = " " + random_text(generator, 20)
            middle = generator.randrange(len(text))
            first = tokenizer.incremental()
            ids = first.feed(text[:middle]).tolist()
            copy, restored = first.clone(), tokenizer.incremental(first.held, first.continued)
            assert in_pieces(first, [text[middle:]]) == in_pieces(copy, [text[middle:]])
            assert ids + in_pieces(restored, [text[middle:]]) == whole(tokenizer, text)
            assert (first.held, first.continued) == ("", False)


def test_a_text_without_a_place_to_cut_is_refused_at_the_cap_however_it_comes() -> None:
    tokenizer = load("gpt2")
    words = r"expected a place to cut the text .* at least every 100 characters, found none in 101; .*token file"
    for pieces in (["x" * 101 + " "], ["x" * 100, "x y"], ["x"] * 101, ["ab " + "x" * 100 + " "]):
        text = IncrementalTokenizer(tokenizer, held_cap=100)
        with pytest.raises(InputError, match=words):
            in_pieces(text, pieces)
    for pieces in (["x" * 100 + " "], ["x"] * 100, ["x" * 99, "x y"]):
        in_pieces(IncrementalTokenizer(tokenizer, held_cap=100), pieces)
    text = IncrementalTokenizer(tokenizer, held_cap=100)
    text.feed("x" * 60)
    with pytest.raises(InputError):
        text.feed("x" * 60)
    assert text.held == "x" * 60  # as it was


def test_held_text_costs_no_more_than_its_length() -> None:
    def seconds(chars: int) -> float:
        text, start = load("llama3").incremental(), time.perf_counter()
        for _ in range(chars // 4):
            text.feed("....")
        return time.perf_counter() - start

    seconds(1000)
    assert seconds(160_000) < 30 * max(seconds(16_000), 0.002)  # linear: 10; quadratic: 100


def test_the_cap_is_a_megabyte_of_letters() -> None:
    text = load("gpt2").incremental()
    text.feed("x" * (1 << 20))
    with pytest.raises(InputError, match="at least every 1,048,576 characters"):
        text.feed("x")


def test_a_lone_surrogate_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"found the lone surrogate '\\ud800' at character 1 of this piece; decode"):
        load("gpt2").encode("a\ud800")


# ------------------------------------------------------------------------------------------------- the tokenizer


def test_encode_adds_cuts_and_pads_nothing() -> None:
    def change(parsed: dict[str, Any]) -> None:
        parsed["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        parsed["padding"] = {
            "strategy": {"Fixed": 64},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[PAD]",
        }

    limited, plain = changed("bert-uncased", change), load("bert-uncased")
    ids = limited.encode("the the the the the the")
    assert ids.dtype == np.int64 and ids.shape == (6,)
    assert limited.hash == plain.hash  # neither is used
    assert plain.decode(ids) == "the the the the the the"
    assert plain.encode("").shape == (0,) and plain.encode("").dtype == np.int64


def test_hash_is_of_the_content_alone(tmp_path: Any) -> None:
    parsed = json.loads(definition("gpt2"))
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(dict(reversed(parsed.items())), indent=3))
    assert Tokenizer.from_folder(tmp_path).hash == load("gpt2").hash
    assert Tokenizer.from_file(path).vocab_size == load("gpt2").vocab_size == 1504
    assert changed("gpt2", added("<new>")).hash != load("gpt2").hash


def test_decode_and_token_to_id() -> None:
    tokenizer = load("gpt2")
    ids = tokenizer.encode("<s>Zürich don't")
    assert tokenizer.decode(ids) == "Zürich don't"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>Zürich don't"
    assert tokenizer.token_to_id("<s>") == ids[0] and tokenizer.token_to_id("no such") is None


def test_folders_without_a_tokenizer_are_refused(tmp_path: Any) -> None:
    with pytest.raises(
        TokenizerError, match=r"expected a model folder with a tokenizer\.json, found no folder at .*gone"
    ):
        Tokenizer.from_folder(tmp_path / "gone")
    with pytest.raises(TokenizerError, match=r"expected tokenizer\.json \(or vocab\.json, .*found nothing; copy"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(TokenizerError, match=r"cannot read the tokenizer .*No such file"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a tokenizer\.json that tokenizers can read"):
        Tokenizer.from_folder(tmp_path)


def test_slow_files_go_through_transformers(tmp_path: Any) -> None:
    vocabulary = json.loads(definition("bert-uncased"))["model"]["vocab"]
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in sorted(vocabulary, key=vocabulary.get)))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("don't").tolist() == load("bert-uncased").encode("don't").tolist()
    assert tokenizer.cut_rule.kind == "words"


def test_the_rule_is_made_in_a_moment() -> None:
    tokenizer = Tokenizer(definition("llama3"))
    start = time.process_time()
    assert tokenizer.cut_rule.kind == "byte-level"
    assert time.process_time() - start < 0.2
