"""Text for the language-model recipe: documents with a long context, some of them held out by their content.

The default is the documentation that every Python installation carries: the docstrings of a package's source files, one
document a file. It is English prose about one subject at a time, so what was read earlier helps with what comes.
"""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from rmt_engine.evaluation.noise import is_held_out, text_files

DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
SHORTEST = 40  # characters; shorter docstrings say little
LONGEST = 200_000  # characters of a document; a generated file of millions would outweigh the rest


def docstrings(root: Path) -> Iterator[str]:
    """One document for each `.py` file under `root`, in a fixed order: its docstrings, each content once."""
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        found = DOCSTRING.findall(path.read_text(encoding="utf-8", errors="ignore"))
        texts = [cleandoc(text) for text in found if len(text) >= SHORTEST and text not in seen]
        seen.update(found)
        if texts:
            yield "\n\n".join(texts)[:LONGEST] + "\n"


def documents(text: Path | None) -> tuple[list[str], list[str]]:
    """(training, held out): the files at `text`, or the docstrings of the standard library and what is installed."""
    if text is None:
        roots = {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")}
        found = list(dict.fromkeys(document for root in sorted(roots) for document in docstrings(Path(root))))
    else:
        found = [content.decode() for content in text_files(text)]
    held_out = [document for document in found if is_held_out(document.encode())]
    return [document for document in found if not is_held_out(document.encode())], held_out


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], shortest: int) -> list[np.ndarray]:
    """Ids of each document that has at least `shortest`."""
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return [np.array(ids, dtype=np.int64) for ids in encoded if len(ids) >= shortest]


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
        """ids [B, segments · S + 1], one token beyond the last segment, and which rows begin anew, bool [B]."""
        length = segments * self.segment_size
        new = np.zeros(self.batch, dtype=bool)
        for row in range(self.batch):
            if self.read[row] + segments > horizon or len(self.left[row]) < length + 1:
                self.left[row], self.read[row], new[row] = self._draw(length, horizon), 0, True
        ids = np.stack([left[: length + 1] for left in self.left])
        self.left = [left[length:] for left in self.left]
        self.read = [read + segments for read in self.read]
        return ids, new

    def _draw(self, length: int, horizon: int) -> np.ndarray:
        """A document from a random place on, with as much as the horizon asks for where it has that."""
        while True:
            document = self.documents[int(np.searchsorted(self.cumulative, self.rng.random(), side="right"))]
            spare = len(document) - max(length, horizon * self.segment_size) - 1
            start = int(self.rng.integers(spare + 1)) if spare > 0 else 0
            if len(document) - start > length:
                return document[start:]
