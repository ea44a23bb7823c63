"""Many documents side by side: each is asked, a broken one is told, and all memory states become features.

python examples/many_documents.py [FOLDER]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import rmt_engine
from rmt_engine.document_lists import documents_in

ROOMS = ("kitchen", "garden", "office", "bedroom")


def stories() -> Iterator[rmt_engine.Document]:
    """Made one by one, as slots become free: there may be millions."""
    for number, room in enumerate(ROOMS):
        filler = "It was a long day and a longer evening. " * (10 + 30 * number)
        yield rmt_engine.Document(f"story {number}", f"Sandra went to the {room}. {filler}")
    yield rmt_engine.Document("broken", b"caf\xe9")


def main() -> None:
    engine = rmt_engine.Engine.from_pretrained()
    documents = documents_in(sys.argv[1]) if len(sys.argv) > 1 else stories()
    for result in engine.run_many(documents, ask="Where is Sandra?", slots=4):
        if result.error is not None:
            print(f"{result.id}: {result.error}")
        else:
            print(f"{result.id}: {result.tokens:,} tokens, Sandra is in the{result.answers[0]}")
    features = engine.encode([story.source for story in stories() if story.id != "broken"], slots=4, pooling="mean")
    print("features:", list(features.shape))


if __name__ == "__main__":
    main()
