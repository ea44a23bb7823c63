"""Text for the language-model recipe: documents with a long context, some of them held out by their content.

The default is the documentation that every Python installation carries: the docstrings of a package's source files, one
document a file. It is English prose about one subject at a time, so what was read earlier helps with what comes.
"""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterable, Iterator
from inspect import cleandoc
from pathlib import Path

import numpy as np
from rmt_training import RecipeError
from transformers import PreTrainedTokenizerBase

from rmt_engine.evaluation.noise import is_held_out, text_files

DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
SHORTEST = 40  # characters; shorter docstrings say little
LONGEST = 200_000  # characters of a document; a generated file of millions would outweigh the rest


def docstrings(roots: Iterable[Path]) -> Iterator[str]:
    """One document for each `.py` file under the roots, in a fixed order: its docstrings, each content once."""
    seen: set[str] = set()
    for path in sorted({path for root in roots for path in root.rglob("*.py")}):
        found = DOCSTRING.findall(path.read_text(encoding="utf-8", errors="ignore"))
        texts = [cleandoc(text) for text in found if len(text) >= SHORTEST and text not in seen]
        seen.update(found)
        if texts:
            yield "\n\n".join(texts)[:LONGEST] + "\n"


def documents(text: Path | None) -> tuple[list[str], list[str]]:
    """(training, held out): the files at `text`, or the docstrings of the standard library and what is installed.

    Of one file alone the last tenth is held out. Raises InputError where there is no file.
    """
    if text is None:
        found = list(docstrings(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")))
    elif text.is_file():
        whole = "".join(content.decode() for content in text_files(text))
        most = len(whole) * 9 // 10
        cut = whole.rfind("\n", 0, most) + 1 or most
        return [whole[:cut]], [whole[cut:]]
    else:
        found = [content.decode() for content in text_files(text)]
    held_out = [document for document in found if is_held_out(document.encode())]
    return [document for document in found if not is_held_out(document.encode())], held_out


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], shortest: int, use: str) -> list[np.ndarray]:
    """Ids of each document that has at least `shortest`. use: what they are for, for the error where none has.

    Raises RecipeError.
    """
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    long = [np.array(ids, dtype=np.int64) for ids in encoded if len(ids) >= shortest]
    if not long:
        most = max(map(len, encoded), default=0)
        raise RecipeError(
            f"none of {len(texts)} texts {use} has {shortest} tokens, the longest {most}: give --text longer ones, or "
            "more of them, or a smaller --segment-size"
        )
    return long


class DocumentStreams:
    """`batch` documents read side by side, a few segments at a time; each starts anew after `horizon` segments.

    A document is drawn in proportion to its length and begins at a random place.
    """

    def __init__(self, documents: list[np.ndarray], batch: int, segment_size: int, seed: int) -> None:
        self.documents, self.batch, self.segment_size = documents, batch, segment_size
        self.rng = np.random.default_rng(seed)
        lengths = np.array([len(document) for document in documents], dtype=np.float64)
        self.cumulative = np.cumsum(lengths) / lengths.sum()
        self.left = [np.zeros(0, dtype=np.int64)] * batch
        self.read = [0] * batch

    def next(self, segments: int, horizon: int) -> tuple[np.ndarray, np.ndarray]:
        """ids [B, segments · S], and which rows begin anew, bool [B]."""
        length = segments * self.segment_size
        new = np.zeros(self.batch, dtype=bool)
        for row in range(self.batch):
            if self.read[row] + segments > horizon or len(self.left[row]) < length:
                self.left[row], self.read[row], new[row] = self._draw(length, horizon), 0, True
        ids = np.stack([left[:length] for left in self.left])
        self.left = [left[length:] for left in self.left]
        self.read = [read + segments for read in self.read]
        return ids, new

    def _draw(self, length: int, horizon: int) -> np.ndarray:
        """A document from a random place on, with as much as the horizon asks for where it has that."""
        while True:
            document = self.documents[int(np.searchsorted(self.cumulative, self.rng.random(), side="right"))]
            spare = len(document) - max(length, horizon * self.segment_size)
            start = int(self.rng.integers(spare + 1)) if spare > 0 else 0
            if len(document) - start >= length:
                return document[start:]
