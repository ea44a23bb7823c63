"""A context is a small file: read a text, save what was read, resume it, fork it, ask it.

python examples/contexts.py [TEXT]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import rmt_engine

STORY = "Mary went to the kitchen. " + "The rain went on and nobody spoke of it. " * 200


def main() -> None:
    engine = rmt_engine.Engine.from_pretrained()
    with tempfile.TemporaryDirectory() as folder, engine.stream() as stream:
        stream.feed(Path(sys.argv[1]).read_text(encoding="utf-8") if len(sys.argv) > 1 else STORY)
        print(f"read {stream.position:,} tokens in {stream.segments} segments and a rest of {len(stream.rest)}")

        state = Path(folder) / "story.state"
        stream.save(state)
        print(f"saved in {state.stat().st_size:,} bytes")

        later = engine.resume(state)  # next week, in another process: the same bits
        print("Where is Mary?", later.ask("Where is Mary?"))

        other = later.fork()  # both go on from the same place, and neither sees the other
        other.feed("Mary journeyed to the garden. " + "The rain went on. " * 50)
        print("in the fork:", *other.ask(["Where is Mary?", "Where is John?"]))
        print("in the story:", later.ask("Where is Mary?"))


if __name__ == "__main__":
    main()
