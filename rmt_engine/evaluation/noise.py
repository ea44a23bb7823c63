"""Unrelated text to hide facts in: files of the user's, or the sources of the running Python."""

from __future__ import annotations

import hashlib
import sysconfig
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from rmt_engine.errors import InputError
from rmt_engine.evaluation.facts import all_facts, all_relations
from rmt_engine.tokens import PIECE_CHARS, Tokenizer

HELD_OUT_BELOW = 84  # of the 256 values of a hash's first byte: about a third of the files


def is_held_out(content: bytes) -> bool:
    """Whether a file with this content was kept out of the embedded checkpoint's training: by the content alone."""
    return hashlib.sha256(content).digest()[0] < HELD_OUT_BELOW


def python_sources(root: Path | None = None) -> Iterator[bytes]:
    """Contents of the standard library's UTF-8 `.py` files (or of those under `root`), in a fixed order."""
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        if not skipped.intersection(path.relative_to(root).parts):
            content = path.read_bytes()
            if content and _is_utf8(content):
                yield content


def text_files(path: Path) -> Iterator[bytes]:
    """The UTF-8 file `path`, or those under the folder `path`, in a fixed order, each content once."""
    if not path.exists():
        raise InputError(f"there is no text at {path}; give a text file or a folder of them")
    seen = set()
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file():
            content = file.read_bytes()
            digest = hashlib.sha256(content).digest()
            if content and digest not in seen and _is_utf8(content):
                seen.add(digest)
                yield content


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def noise_text(path: str | Path | None = None) -> str:
    """The noise of `path`, or the held-out sources of the running Python. Raises InputError where there is none."""
    files: Iterable[bytes]
    if path is None:
        files = (content for content in python_sources() if is_held_out(content))
    else:
        files = text_files(Path(path))
    text = "\n".join(content.decode() for content in files)
    if not text:
        raise InputError(f"no UTF-8 text at {path or 'the standard library'}: give --noise a text file or folder")
    return text


class Noise:
    """Tokenized noise, cut into pieces of text at which sentences may be put in exactly.

    ids: int64 [N], without those that the checkpoint drops; starts: int64 [pieces + 1], where each piece's ids begin.
    longest_sentence: tokens that one fact or relation takes at most.
    """

    def __init__(self, text: str, tokenizer: Tokenizer, drop_ids: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.drop_ids = tuple(drop_ids)
        self.pieces = list(_split(text, tokenizer))
        encoded = [self._encode(piece) for piece in self.pieces]
        self.starts = np.cumsum([0, *(len(ids) for ids in encoded)])
        self.ids = np.concatenate(encoded)
        if not len(self.ids):
            raise InputError("the noise has no tokens: give --noise a text file or folder")
        sentences = [*(fact.sentence for fact in all_facts()), *(relation.sentence for relation in all_relations())]
        self.longest_sentence = max(len(self.whole(f"\n{sentence}")) for sentence in sentences) + 1

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def digest(self) -> str:
        """SHA-256 of the ids: which noise this is."""
        return hashlib.sha256(self.ids.astype("<i8").tobytes()).hexdigest()

    def whole(self, text: str) -> np.ndarray:
        """The ids of a text by itself, int64 [L]."""
        return self._content(self.tokenizer.encode(text))

    def _encode(self, piece: str) -> np.ndarray:
        """The ids of a piece in the middle of a text."""
        return self._content(self.tokenizer.incremental(piece, continued=True).flush())

    def _content(self, ids: np.ndarray) -> np.ndarray:
        return ids[~np.isin(ids, self.drop_ids)] if self.drop_ids else ids

    def with_sentences(
        self, piece: int, told: Sequence[tuple[int, str]], rng: np.random.Generator
    ) -> tuple[np.ndarray, list[int]]:
        """The ids of a piece with sentences put in, and where each begins.

        told: a token of the piece (ascending) and the sentence that stands before it, at the last place where one may,
        on a new line or in the line.
        """
        text = self.pieces[piece]
        places = list(self.tokenizer.cut_rule.cuts(text))
        joined, begun, done = "", [], 0
        for token, sentence in told:
            before = bisect_right(places, token, key=lambda cut: len(self._encode(text[:cut])))
            cut = places[before - 1] if before else 0
            joined += text[done:cut]
            begun.append(len(self._encode(joined)) if joined else 0)
            joined += f"{self._glue(rng)}{sentence}"
            done = cut
        return self._encode(joined + text[done:]), begun

    @staticmethod
    def _glue(rng: np.random.Generator) -> str:
        return "\n" if rng.random() < 0.5 else " "

    def opened_by(self, piece: int, sentences: Sequence[str]) -> np.ndarray:
        """The ids of a text that begins with sentences, a line each, and goes on with a piece."""
        lines = "\n".join(sentences)
        return self.whole(f"{lines}\n{self.pieces[piece]}")


def _split(text: str, tokenizer: Tokenizer) -> Iterator[str]:
    start = 0
    while start < len(text):
        stop = tokenizer.cut_rule.next_cut(text, start + PIECE_CHARS)
        yield text[start:stop]
        start = stop
