"""Unrelated text to hide facts in: files of the user's, or the sources of the running Python."""

from __future__ import annotations

import hashlib
import sysconfig
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from rmt_engine.errors import InputError
from rmt_engine.evaluation.facts import all_facts
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
        raise InputError(f"there is no noise at {path}; give a text file or a folder of them")
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
    """Tokenized noise, cut into pieces of text at which a sentence may be put in exactly.

    ids: int64 [N]; starts: int64 [pieces + 1], where each piece's ids begin.
    """

    def __init__(self, text: str, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.pieces = list(_split(text, tokenizer))
        encoded = [self._encode(piece) for piece in self.pieces]
        self.starts = np.cumsum([0, *(len(ids) for ids in encoded)])
        self.ids = np.concatenate(encoded)
        self.longest_piece = int(np.diff(self.starts).max())
        self.longest_fact = max(len(tokenizer.encode(f"\n{fact.sentence}")) for fact in all_facts()) + 1

    def _encode(self, piece: str) -> np.ndarray:
        """The ids of a piece in the middle of a text."""
        return self.tokenizer.incremental(piece, continued=True).flush()

    def __len__(self) -> int:
        return len(self.ids)

    def with_sentence(self, piece: int, sentence: str, rng: np.random.Generator, room: int) -> np.ndarray:
        """The ids of a piece with a sentence put in at a random place of it, on a new line or in the line.

        The sentence ends within the first `room` tokens, as far as a place for that is there.
        """
        text = self.pieces[piece]
        places = list(self.tokenizer.cut_rule.cuts(text))
        if room < self.starts[piece + 1] - self.starts[piece] + self.longest_fact:
            fits = room - self.longest_fact
            places = places[: bisect_right(places, fits, key=lambda cut: len(self._encode(text[:cut])))]
        cut = places[int(rng.integers(len(places)))] if places else 0
        glue = "\n" if rng.random() < 0.5 else " "
        return self._encode(f"{text[:cut]}{glue}{sentence}{text[cut:]}")

    def opened_by(self, piece: int, sentence: str) -> np.ndarray:
        """The ids of a text that begins with a sentence and goes on with a piece."""
        return self.tokenizer.encode(f"{sentence}\n{self.pieces[piece]}")


def _split(text: str, tokenizer: Tokenizer) -> Iterator[str]:
    start = 0
    while start < len(text):
        stop = tokenizer.cut_rule.next_cut(text, start + PIECE_CHARS)
        yield text[start:stop]
        start = stop
