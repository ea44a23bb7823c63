"""Where a text may be cut so that tokens(left) + tokens(right) == tokens(whole).

The answer is read from `tokenizer.json` by an allow-list: a tokenizer is cut only where every part of its pipeline
(added tokens, normalizer, pre-tokenizer, model) is known to work on both sides alone. All else is refused.

* byte-level BPE (GPT-2, Llama 3, Qwen, ...): a letter or digit, then white space or a CJK full stop or comma. No
  alternative of the known patterns matches across such a place or looks across it.
* words (BERT's and other pre-tokenizers that drop white space): any character, then space, tab, \\n or \\r. Other white
  space does not do: BERT's normalizer deletes a form feed and joins its neighbours.
* Metaspace (SentencePiece): letter or digit, one U+0020, letter or digit. A piece that begins with a space gets no
  second prefix; without a splitting pre-tokenizer the vocabulary must hold no token that continues over a space.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

_WHITE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode White_Space
# Ideographic and full-width , . ! ? : ; since Chinese and Japanese texts have hardly any white space after a letter.
_CJK_STOPS = "\u3001\u3002\uff0c\uff0e\uff01\uff1f\uff1a\uff1b"
_LETTER = r"[^\W_]"


class Uncuttable(Exception):
    """The reason why a tokenizer is not known to be cut safely."""


@dataclass(frozen=True)
class CutRule:
    """Where a text may be cut, for one tokenizer.

    `pattern` matches the character before a cut and looks ahead at what follows; `steps` are the normalizations that
    must leave the letters around a cut letters; `drop_space` says that the tokenizer prepends to each piece what the
    piece's own first space would have become.
    """

    kind: str
    pattern: re.Pattern[str]
    lookahead: int  # characters beyond the cut's own that must be seen before a cut is certain
    steps: tuple[str, ...] = ()
    drop_space: bool = False

    def cuts(self, text: str, start: int = 0, stop: int | None = None) -> Iterator[int]:
        """The places c (start < c <= stop) where text[:c] | text[c:] may be cut, in order."""
        end = len(text) if stop is None else min(len(text), stop + 1 + self.lookahead)
        for match in self.pattern.finditer(text, start, end):
            if self._letters_stay(text, match.end()):
                yield match.end()

    def next_cut(self, text: str, start: int) -> int:
        """The first cut after `start`, or len(text)."""
        return next(self.cuts(text, start), len(text))

    def last_cut(self, text: str) -> int:
        """The last cut in `text`, or 0. Looks backwards, so that the cost is the distance to that cut."""
        stop, size = len(text), 64
        while stop > 0:
            start = max(0, stop - size)
            found = max(self.cuts(text, start, stop), default=0)
            if found:
                return found
            stop, size = start, size * 2
        return 0

    def _letters_stay(self, text: str, cut: int) -> bool:
        if self.kind == "words":
            return True
        return _stays_letter(text[cut - 1], self.steps) and (
            not self.lookahead or _stays_letter(text[cut + 1], self.steps)
        )


_STEPS: dict[str, Callable[[str], str]] = {
    "NFC": lambda s: unicodedata.normalize("NFC", s),
    "NFD": lambda s: unicodedata.normalize("NFD", s),
    "NFKC": lambda s: unicodedata.normalize("NFKC", s),
    "NFKD": lambda s: unicodedata.normalize("NFKD", s),
    "Lowercase": str.lower,
}


@lru_cache(maxsize=65536)
def _stays_letter(char: str, steps: tuple[str, ...]) -> bool:
    """Whether `char` is a letter or digit in every Unicode version, and begins and ends in one after each step.

    The regex engines of tokenizers and Python know different Unicode versions; both agree on what 3.2 had. And a letter
    may be normalized to something that ends in a mark or a bracket (é under NFD, ㈠ under NFKC).
    """
    if char.isascii():
        return True
    if unicodedata.ucd_3_2_0.category(char)[0] not in "LN":
        return False
    text = char
    for step in steps:
        text = _STEPS[step](text)
        if any(unicodedata.category(end)[0] not in "LN" for end in (text[0], text[-1])):
            return False
    return unicodedata.category(char)[0] in "LN"


def rule_for(definition: dict[str, Any], normalize: Callable[[str], str]) -> CutRule:
    """The cut rule of a tokenizer, from its parsed tokenizer.json and its normalizer as a function.

    Raises Uncuttable with the reason.
    """
    model = definition["model"]
    if model.get("dropout"):
        raise Uncuttable(f"its BPE model has dropout={model['dropout']}, so that its tokens are random")
    normalizers = _flatten(definition.get("normalizer"), "normalizers")
    pre_tokenizers = _flatten(definition.get("pre_tokenizer"), "pretokenizers")
    space = _what_a_space_becomes(normalizers)
    if space != " ":  # a split at spaces (Gemma's) then finds none
        pre_tokenizers = [part for part in pre_tokenizers if part.get("pattern") != {"String": " "}]
    kind, proven = _read_pre_tokenizers(pre_tokenizers, space)
    steps = _read_normalizers(normalizers, kind, proven, space)
    if not proven:
        _prove_from_vocabulary(model, pre_tokenizers[-1]["replacement"] if pre_tokenizers else space)
    drop_space = any(part["type"] == "Prepend" for part in normalizers)
    rule = _make_rule(kind, steps, drop_space)
    for token in definition.get("added_tokens") or []:
        contents = {token["content"], normalize(token["content"])} if token.get("normalized") else {token["content"]}
        for content in contents:
            _check_added_token(token, content, rule)
    return rule


def _make_rule(kind: str, steps: tuple[str, ...], drop_space: bool) -> CutRule:
    pattern, lookahead = {
        "byte-level": (f"{_LETTER}(?=[{_WHITE}{_CJK_STOPS}])", 0),
        "byte-level, prefix space": (f"{_LETTER}(?= )", 0),
        "words": (r"[^ \t\n\r](?=[ \t\n\r])", 0),
        "metaspace": (f"{_LETTER}(?= {_LETTER})", 1),
    }[kind]
    return CutRule(kind, re.compile(pattern), lookahead, steps, drop_space)


def _flatten(component: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The parts of a normalizer or pre-tokenizer, nested sequences opened."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    return [part for inner in component[key] for part in _flatten(inner, key)]


# ---------------------------------------------------------------------------------------------- pre-tokenizers

_DROP_WHITE_SPACE = ("BertPreTokenizer", "Whitespace", "WhitespaceSplit")
# These look at no more than what an earlier part has split off.
_LOCAL = (*_DROP_WHITE_SPACE, "ByteLevel", "Digits", "Punctuation", "Split", "CharDelimiterSplit", "UnicodeScripts")


def _read_pre_tokenizers(parts: Sequence[dict[str, Any]], space: str) -> tuple[str, bool]:
    """The kind of rule, and whether a pre-tokenizer splits at every such place (else the vocabulary must prove it).

    The first part that always splits at a cut is the guard: what comes after it sees one side only. What comes before
    it must work on both sides alone.
    """
    for index, part in enumerate(parts):
        kind = _guard(part, space)
        if kind is not None:
            for later in parts[index + 1 :]:
                _check_after_guard(later)
            return kind, True
        if part["type"] == "Metaspace" and not part.get("split", True) and len(parts) == 1 and space == " ":
            break
        if not _is_harmless(part):
            raise Uncuttable(f"its pre-tokenizer {_describe(part)} is not known to split at white space")
    if parts and parts[-1]["type"] != "Metaspace":
        raise Uncuttable("no pre-tokenizer splits its text at white space")
    return "metaspace", False


def _guard(part: dict[str, Any], space: str) -> str | None:
    kind = part["type"]
    if kind == "ByteLevel" and part.get("use_regex", True):
        return "byte-level, prefix space" if part.get("add_prefix_space", True) else "byte-level"
    if kind in _DROP_WHITE_SPACE:
        return "words"
    if kind == "Metaspace" and part.get("split", True) and space in (" ", part["replacement"]):
        return "metaspace"
    if kind == "Split" and _known_alternatives(part) >= {"upper", "lower", "digit"}:
        return "byte-level"
    return None


def _check_after_guard(part: dict[str, Any]) -> None:
    if part["type"] in _LOCAL:
        return
    # "first" means the first of the piece, which is not the first of the text.
    if part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "first":
        return
    raise Uncuttable(f"its pre-tokenizer {_describe(part)} may depend on where the text begins")


def _is_harmless(part: dict[str, Any]) -> bool:
    """Whether a part splits the two sides of a cut as it would alone, though perhaps not at the cut."""
    kind = part["type"]
    if kind == "Digits":
        return True
    if kind == "Punctuation":
        return part.get("behavior", "Isolated") in ("Isolated", "Contiguous", "Removed")
    return kind == "Split" and bool(_known_alternatives(part))


_ANY_LETTER = frozenset({"upper", "lower"})
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PREFIX = r"[^\r\n\p{L}\p{N}]?"

# Alternatives of a Split pattern, each with what it covers. None matches a letter or digit followed by white space or
# a CJK stop, looks behind, or looks ahead from a letter or digit.
_ALTERNATIVES: dict[str, frozenset[str]] = {
    **dict.fromkeys((r"\p{L}+", r" ?\p{L}+", _PREFIX + r"\p{L}+"), _ANY_LETTER),
    **dict.fromkeys((_PREFIX + r"+\p{L}+", _PREFIX + r"+\p{L}++"), _ANY_LETTER),
    **dict.fromkeys((r"[\p{L}\p{M}]+", r" ?[\p{L}\p{M}]+", _PREFIX + r"[\p{L}\p{M}]+"), _ANY_LETTER),
    **{
        _PREFIX + upper + lower + tail: frozenset({covers})
        for upper, lower, covers in (
            (_CASED[0] + "*", _CASED[1] + "+", "lower"),
            (_CASED[0] + "+", _CASED[1] + "*", "upper"),
        )
        for tail in ("", _CONTRACTIONS + "?")
    },
    **dict.fromkeys(
        (r"\p{N}", r"\p{N}+", r" ?\p{N}", r" ?\p{N}+", r"\p{N}{1,3}", r"\p{N}{1,3}+", r" ?\p{N}{1,3}"),
        frozenset({"digit"}),
    ),
    **dict.fromkeys(
        (
            *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"),
            r"'(?:[sdmt]|ll|ve|re)",
            r"'(?i:[sdmt]|ll|ve|re)",
            _CONTRACTIONS,
            r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
            *(
                f" ?[^\\s\\p{{L}}{mark}\\p{{N}}]+{tail}"
                for mark in ("", r"\p{M}")
                for tail in ("", r"[\r\n]*", "[\\r\\n/]*", r"+[\r\n]*", r"+[\r\n]*+")
            ),
            *(r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)", r"\s+", r"\s++", r"\s", r"\s+$", r"\s++$"),
        ),
        frozenset({"other"}),
    ),
}


def _known_alternatives(part: dict[str, Any]) -> set[str]:
    """What a Split's pattern covers, or the empty set where an alternative of it is not on the list."""
    kept_as_they_are = (part.get("behavior"), part.get("invert", False)) in (("Isolated", False), ("Removed", True))
    pattern = part["pattern"].get("Regex")
    if not kept_as_they_are or pattern is None:
        return set()
    covered: set[str] = set()
    for alternative in _top_level_alternatives(pattern):
        if alternative not in _ALTERNATIVES:
            return set()
        covered |= _ALTERNATIVES[alternative]
    if part.get("invert", False) and not covered >= {"upper", "lower", "digit"}:
        return set()  # it would throw away what it does not cover
    return covered


def _top_level_alternatives(pattern: str) -> list[str]:
    """Split a regular expression at the `|` that stand in no group and no class."""
    alternatives, depth, in_class, start, index = [], 0, False, 0, 0
    while index < len(pattern):
        char = pattern[index]
        if char == "\\":
            index += 1
        elif in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
        elif char in "()":
            depth += 1 if char == "(" else -1
        elif char == "|" and depth == 0:
            alternatives.append(pattern[start:index])
            start = index + 1
        index += 1
    return [*alternatives, pattern[start:]]


# ------------------------------------------------------------------------------------------------- normalizers


def _what_a_space_becomes(normalizers: Sequence[dict[str, Any]]) -> str:
    for part in normalizers:
        if part["type"] == "Replace" and part["pattern"].get("String") == " ":
            return str(part["content"])
    return " "


def _read_normalizers(parts: Sequence[dict[str, Any]], kind: str, proven: bool, space: str) -> tuple[str, ...]:
    """The steps that letters around a cut go through. Refuses a normalizer that may look across a cut."""
    steps: list[str] = []
    for part in parts:
        name = part["type"]
        if name in _STEPS:
            steps.append(name)
        elif name == "Precompiled" and kind == "metaspace":
            steps.append("NFKC")  # SentencePiece's map: one grapheme at a time, NFKC and a little more
        elif not _is_local_normalizer(part, kind, proven):
            raise Uncuttable(f"its normalizer {_describe(part)} may look across a cut")
        elif name == "Prepend" and part["prepend"] != space:
            raise Uncuttable(f"its normalizer prepends {part['prepend']!r}, and a space becomes {space!r}")
    return tuple(steps)


def _is_local_normalizer(part: dict[str, Any], kind: str, proven: bool) -> bool:
    name = part["type"]
    if name == "StripAccents":
        return True
    if name == "BertNormalizer":
        return kind == "words"
    if name == "Strip":  # a piece begins with white space, which is not the white space at the text's begin
        return kind == "words" or not part.get("strip_left", True)
    if name == "Prepend":
        return kind == "metaspace" and not proven
    if name == "Replace":
        literal = part["pattern"].get("String")
        if literal is None:  # runs of spaces made one: a cut has exactly one, between letters
            return kind == "metaspace" and part["pattern"].get("Regex") == " {2,}"
        if literal == " ":
            return kind == "metaspace"
        return bool(literal) and not re.search(rf"[\w\s\u2581{_CJK_STOPS}]", literal)
    return False


# ----------------------------------------------------------------------------------------- model, added tokens


def _prove_from_vocabulary(model: dict[str, Any], space: str) -> None:
    """A BPE without a splitting pre-tokenizer is cut before a space if no token continues over one."""
    if model["type"] != "BPE" or model.get("ignore_merges"):
        raise Uncuttable("no pre-tokenizer splits its text, and it is no plain BPE, whose vocabulary could do instead")
    if space not in model["vocab"]:
        raise Uncuttable(f"no pre-tokenizer splits its text, and {space!r} is not in its vocabulary")
    across = re.compile(f"{_LETTER}{re.escape(space)}")
    for token in model["vocab"]:
        if across.search(token):
            raise Uncuttable(f"no pre-tokenizer splits its text, and its token {token!r} continues over a space")


def _check_added_token(token: dict[str, Any], content: str, rule: CutRule) -> None:
    """Refuse an added token that could lie across a cut, or that looks at white space across one."""
    name = f"its added token {token['content']!r}"
    if not content:
        raise Uncuttable(f"{name} is normalized to nothing, which tokenizers cannot split at")
    letter = r"\S" if rule.kind == "words" else _LETTER
    if re.search(rf"{letter}[\s\u2581{_CJK_STOPS}]", content):
        raise Uncuttable(f"{name} contains a place where texts are cut")
    if token.get("single_word") and re.match(rf"[\s\u2581{_CJK_STOPS}]", content):
        raise Uncuttable(f"{name} is single_word, and looks at the character before a cut")
    ends_in_letter = re.search(rf"{letter}\Z", content)
    if token.get("rstrip") and ends_in_letter and rule.kind != "words":
        raise Uncuttable(f"{name} takes the white space after it (rstrip), where texts are cut")
    if rule.drop_space and (ends_in_letter or re.match(letter, content)):
        raise Uncuttable(f"{name} begins or ends with a letter, next to a space that the normalizer prepends")


def _describe(part: dict[str, Any]) -> str:
    """A component with its settings, short enough for one line."""
    settings = ", ".join(f"{key}={value!r}" for key, value in part.items() if key != "type")
    text = f"{part['type']}({settings})"
    return text if len(text) <= 200 else text[:197] + "..."
