"""Exact incremental tokenization: text in any number of pieces gives the tokens of the whole.

`IncrementalTokenizer.feed` gives the ids that no later text can change and holds back the rest; where a text may be cut
stands in `cut_rules.py`. Text comes from files through `text_input.py`.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from rmt_engine.cut_rules import CutRule, Uncuttable, rule_for
from rmt_engine.errors import InputError, TokenizerError

PIECE_CHARS = 2048  # measured: from 16,000 on speed falls and memory grows, below 1,000 nothing is gained
HELD_CAP = 1 << 20

_SLOW_FILES = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


class Tokenizer:
    """A Hugging Face fast tokenizer, without the special tokens, truncation and padding that it may be set to add.

    It holds what `tokenizer.json` says and nothing of `tokenizer_config.json`. Every tokenizer can `encode`; only one
    that can be cut exactly (see `cut_rules.py`) gives an `incremental` one.
    """

    def __init__(self, definition: str, origin: str = "the given definition") -> None:
        """From the text of a tokenizer.json; `origin` names it in errors. Raises TokenizerError."""
        self.origin = origin
        try:
            self.backend = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # tokenizers raises bare Exception
            raise TokenizerError(f"{origin} is not a tokenizer.json that tokenizers can read: {error}") from error
        self._definition = definition  # as text: parsed, a large vocabulary takes a hundred MB
        self.backend.no_truncation()
        self.backend.no_padding()
        self.vocab_size: int = self.backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def from_file(cls, tokenizer_json: str | Path) -> "Tokenizer":
        """From a tokenizer.json. Raises TokenizerError."""
        path = Path(tokenizer_json)
        try:
            return cls(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"cannot read the tokenizer {path}: {error}") from error

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """From a model folder: its tokenizer.json, or else its slow files as transformers converts them.

        Raises TokenizerError where neither is there.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise TokenizerError(f"expected a model folder with a tokenizer.json, found no folder at {folder}")
        if (folder / "tokenizer.json").is_file():
            return cls.from_file(folder / "tokenizer.json")
        if not any((folder / name).is_file() for name in _SLOW_FILES):
            found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
            raise TokenizerError(
                f"expected tokenizer.json (or {', '.join(_SLOW_FILES)}) in {folder}, found {found}; "
                "copy the tokenizer files of the base model there"
            )
        return cls(_convert_slow_files(folder), str(folder))

    @cached_property
    def hash(self) -> str:
        """sha256 of the canonical tokenizer.json: keys sorted; without truncation and padding, which are not used."""
        definition = json.loads(self._definition)
        kept = {key: value for key, value in definition.items() if key not in ("truncation", "padding")}
        canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    @cached_property
    def cut_rule(self) -> CutRule:
        """Where texts may be cut. Raises TokenizerError, with the reason, where exactness is not certain."""
        try:
            definition = json.loads(self._definition)
            rule = rule_for(definition, self._normalize)
            _self_test(self, rule, definition.get("added_tokens") or [])
        except Uncuttable as reason:
            raise TokenizerError(
                f"the tokenizer {self.origin} cannot be run over a stream exactly: {reason}; "
                "tokenize the text yourself into a token file (.npy or .bin) and give that"
            ) from None
        return rule

    def encode(self, text: str) -> np.ndarray:
        """The ids of the whole text, int64 [N]; no special tokens added.

        Raises InputError for a lone surrogate, TokenizerError where the tokenizers library itself fails.
        """
        return self.encode_pieces([text])

    def encode_pieces(self, pieces: Sequence[str]) -> np.ndarray:
        """The ids of each piece by itself, in parallel, joined: int64 [N]."""
        try:
            encodings = self.backend.encode_batch_fast(pieces, add_special_tokens=False)
        except TypeError:
            raise InputError(_lone_surrogate("".join(pieces))) from None
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # a Rust panic, which is no Exception
                raise
            raise TokenizerError(f"the tokenizers library failed with the tokenizer {self.origin}: {error}") from error
        if not encodings:
            return np.empty(0, dtype=np.int64)
        return np.concatenate([np.array(encoding.ids, dtype=np.int64) for encoding in encodings])

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = True) -> str:
        """The text of `ids`, any integer dtype, [N]."""
        return str(self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens))

    def token_to_id(self, token: str) -> int | None:
        """The id of one token, or None."""
        id_: int | None = self.backend.token_to_id(token)
        return id_

    def incremental(self, held: str = "", continued: bool = False) -> "IncrementalTokenizer":
        """A new stream of text, or the continuation of one whose `held` and `continued` were kept.

        Raises TokenizerError where this tokenizer cannot be cut exactly.
        """
        return IncrementalTokenizer(self, held, continued)

    def _normalize(self, text: str) -> str:
        normalizer = self.backend.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))


class IncrementalTokenizer:
    """Text in pieces of any size, ids out: together exactly `Tokenizer.encode` of the joined text.

    Text after the last safe cut is held back; each character is searched for a cut once. Not for two threads at a time.
    """

    def __init__(self, tokenizer: Tokenizer, held: str = "", continued: bool = False, held_cap: int = HELD_CAP) -> None:
        self.tokenizer = tokenizer
        self.rule = tokenizer.cut_rule
        self.held_cap = held_cap
        self.continued = continued  # ids have been given out: the held text does not begin the text
        self._parts = [held] if held else []
        self._held_chars = len(held)

    @property
    def held(self) -> str:
        """The text held back; with `continued` all there is to keep of this object."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def clone(self) -> "IncrementalTokenizer":
        """An independent copy."""
        return IncrementalTokenizer(self.tokenizer, self.held, self.continued, self.held_cap)

    def feed(self, text: str) -> np.ndarray:
        """Take more text; the ids that are certain now, int64 [N].

        Raises InputError, and stays as it was, for a lone surrogate and where more than `held_cap` characters have no
        safe cut: holding on would let memory grow without bound, cutting anywhere would give other tokens in silence.
        """
        try:
            text.encode()
        except UnicodeEncodeError:  # now, and not when it is no longer held back
            raise InputError(_lone_surrogate(text)) from None
        tail = self._tail(self.rule.lookahead + 1)
        cut = self.rule.last_cut(tail + text) - len(tail)
        if cut <= -len(tail):
            self._check_held(self._held_chars + len(text), self.rule.lookahead)
            self._hold(text)
            return np.empty(0, dtype=np.int64)
        whole = self.held + text
        cut += self._held_chars
        self._check_held(len(whole) - cut, self.rule.lookahead)
        ids = self._encode(self._split(whole[:cut]))
        self.continued = True
        self._parts, self._held_chars = [whole[cut:]], len(whole) - cut
        return ids

    def flush(self) -> np.ndarray:
        """The ids of the held text as the text's end, int64 [N]. Text fed afterwards begins anew."""
        ids = self._encode([self.held]) if self._held_chars else np.empty(0, dtype=np.int64)
        self._parts, self._held_chars, self.continued = [], 0, False
        return ids

    def _tail(self, chars: int) -> str:
        """The last characters held: a cut may lie between them and what comes."""
        tail = ""
        for part in reversed(self._parts):
            tail = part[-chars:] + tail
            if len(tail) >= chars:
                break
        return tail[-chars:]

    def _hold(self, text: str) -> None:
        if text:
            self._parts.append(text)
            self._held_chars += len(text)

    def _split(self, text: str) -> list[str]:
        """Pieces of about PIECE_CHARS, cut at safe places."""
        pieces, start = [], 0
        while start < len(text):
            stop = self.rule.next_cut(text, start + PIECE_CHARS)
            if stop - start > self.held_cap:  # refused in one feed as it would be in many
                self._check_held(stop - start - self.rule.last_cut(text[start:stop]))
            pieces.append(text[start:stop])
            start = stop
        return pieces

    def _encode(self, pieces: list[str]) -> np.ndarray:
        if self.rule.drop_space:  # the tokenizer prepends a space of its own to each
            pieces = [piece[1:] if i or self.continued else piece for i, piece in enumerate(pieces)]
        return self.tokenizer.encode_pieces(pieces)

    def _check_held(self, chars: int, undecided: int = 0) -> None:
        if chars > self.held_cap + undecided:
            raise InputError(
                "expected a place to cut the text (a letter or digit, then white space) at least every "
                f"{self.held_cap:,} characters, found none in {chars:,}; the tokens of such a text depend on all of "
                "it: break its lines, or tokenize it yourself into a token file (.npy or .bin)"
            )


def _convert_slow_files(folder: Path) -> str:
    """The tokenizer.json that transformers makes of vocab.json and merges.txt, vocab.txt and the like."""
    from transformers import AutoTokenizer  # seconds: only where it is needed

    try:
        return str(AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer.to_str())
    except Exception as error:  # whatever a converter raises, the remedy is the same
        words = " ".join(str(error).split())
        raise TokenizerError(
            f"transformers cannot convert the tokenizer files in {folder}: {words}; save a tokenizer.json there"
        ) from error


def _lone_surrogate(text: str) -> str:
    found = re.search("[\ud800-\udfff]", text)
    if found is None:
        return "the text is not a str that tokenizers can read"
    return (
        f"expected text, found the lone surrogate {found.group()!r} at character {found.start():,} of this piece; "
        "decode the bytes with errors='replace' first"
    )


# ------------------------------------------------------------------------------------------------- second net

_WHITE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2003\u2028\u202f\u3000"
_PROBES = (
    "It's 3.14 o'clock, don't DON'T we've they'll I'm  you're\n\n\tdef f(x1,  y_2):\r\n    return x1+y_2  # 100% !!\n ",
    "na\u00efve caf\u00e9 cafe\u0301 \u0130 \u00c9\n\u0915\u093c \u0958\n \u3220\n \u00bd \u2167 x\n\u0301y a \u0301b",
    "\u4e2d\u6587\u3002\u4e2d\u6587\uff0c\u4e2d 12\u3002\n\ud55c\uad6d\uc5b4 \u0441\u043b\u043e \u0627\u0644 .",
    "hi \U0001f600 \U0001f468\u200d\U0001f469 a\ufe0f b\u200b c\n\u0130\n\u00e9\n\u00aa\n\u2460\n\u0958\n\u2474\n !",
    "a b  c   d    e\tf\t\tg\nh\n\ni\r\nj /\nk, \nl. m) n_ o\u2581p \u2581q - x'\n's 't \x00 z\x0c\x1cy",
    "".join(f"ab{white}cd1{white}{white}ef {white}g{white} h.{white}" for white in _WHITE),
)


def _self_test(tokenizer: Tokenizer, rule: CutRule, added_tokens: Sequence[dict[str, Any]]) -> None:
    """Cut hard texts at every place that the rule allows and compare. Raises Uncuttable."""
    contents = [token["content"] for token in added_tokens]
    for content in contents[:16] + contents[16::16]:
        _compare(tokenizer, rule, f"ab{content}cd {content} e1  {content}\n{content} f\n {content}  {content}. g h")
    for probe in _PROBES:
        _compare(tokenizer, rule, probe)


def _compare(tokenizer: Tokenizer, rule: CutRule, text: str) -> None:
    pieces = [text[a:b] for a, b in pairwise([0, *rule.cuts(text), len(text)])]
    if rule.drop_space:
        pieces[1:] = [piece[1:] for piece in pieces[1:]]
    if not np.array_equal(tokenizer.encode_pieces(pieces), tokenizer.encode(text)):
        raise Uncuttable(f"cut at places that should be safe, {text[:40]!r}... gives other tokens than whole")
