"""Text from tokens as they come: pieces that together are exactly the decoded whole, and the strings that end it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rmt_engine.tokens import Tokenizer

WINDOW = 16  # tokens decoded again with each new one; after twice as many the older half is let go
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_UNDECIDED = "\ufffd"  # at the end: perhaps the first bytes of a character


class Detokenizer:
    """Ids one by one, text out: joined exactly `Tokenizer.decode` of all ids.

    Text is held back while its last character may not be complete.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._ids: list[int] = []  # the window
        self._given = 0  # characters of its text that were given out

    def feed(self, token: int) -> str:
        """The text that is certain now."""
        self._ids.append(token)
        text = self.tokenizer.decode(self._ids)
        if text.endswith(_UNDECIDED) or self._is_byte(token):
            return ""
        piece, self._given = text[self._given :], len(text)
        if len(self._ids) > 2 * WINDOW:
            self._forget()
        return piece

    def flush(self) -> str:
        """The end of the text: all that was held back."""
        text = self.tokenizer.decode(self._ids)
        piece = text[self._given :]
        self._ids, self._given = [], 0
        return piece

    def _is_byte(self, token: int) -> bool:
        """Whether it is a byte of a vocabulary that falls back on bytes: a run of them is decoded as one."""
        return bool(_BYTE.fullmatch(self.tokenizer.backend.id_to_token(token) or ""))

    def _forget(self) -> None:
        """Keeps the later half: a decoder looks back no further than a token or the bytes of a character."""
        kept = self._ids[-WINDOW:]
        text = self.tokenizer.decode(kept)
        if text and not self._is_byte(kept[0]):  # without text the next token would stand at the beginning
            self._ids, self._given = kept, len(text)


class StopStrings:
    """Passes text on until one of `stops` appears in it; that one and what follows is left out."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.found = False
        self._held = ""

    def feed(self, text: str) -> str:
        """The text that no stop can begin in any more."""
        held = self._held + text
        places = [place for place in (held.find(stop) for stop in self.stops) if place >= 0]
        if places:
            self.found, self._held = True, ""
            return held[: min(places)]
        keep = max((self._begun(held, stop) for stop in self.stops), default=0)
        cut = len(held) - keep
        self._held = held[cut:]
        return held[:cut]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _begun(text: str, stop: str) -> int:
        """How many characters at the end of `text` are the beginning of `stop`."""
        return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class AnswerText:
    """The text of an answer, token by token, up to a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._detokenizer, self._stops = Detokenizer(tokenizer), StopStrings(stops)

    @property
    def stopped(self) -> bool:
        return self._stops.found

    def feed(self, token: int) -> str:
        return self._stops.feed(self._detokenizer.feed(token))

    def flush(self) -> str:
        if self.stopped:
            return ""
        text = self._stops.feed(self._detokenizer.flush())
        return text if self.stopped else text + self._stops.flush()
