"""Answers as they come: in pieces, sampled, awaited together, and through transformers' streamer.

python examples/answers.py
"""

from __future__ import annotations

import asyncio
import threading

import torch
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer

import rmt_engine
from rmt_engine.engine import EMBEDDED

STORY = "John journeyed to the office. Then nothing happened for a while. " * 20


async def together(stream: rmt_engine.Stream) -> None:
    """Answers that are awaited take turns, a piece at a time."""
    print("awaited:", *await asyncio.gather(stream.aask("Where is John?"), stream.aask("Where is Mary?")))
    async for piece in stream.aask("Where is John?", stream=True):
        print("a piece:", piece)


def main() -> None:
    engine = rmt_engine.Engine.from_pretrained()
    stream = engine.stream()
    stream.feed(STORY)

    for piece in stream.ask("Where is John?", stream=True):
        print(piece, end="", flush=True)
    print()
    print("sampled:", [stream.ask("Where is John?", temperature=1.5, top_p=0.9, seed=seed) for seed in range(3)])
    asyncio.run(together(stream))

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(EMBEDDED / "tokenizer.json"))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = torch.tensor([tokenizer.encode(STORY + "\nQuestion: Where is John?\nAnswer:")])
    options = {"streamer": streamer, "max_new_tokens": 8}
    thread = threading.Thread(target=engine.as_generator().generate, args=(ids,), kwargs=options)
    thread.start()
    print("transformers' streamer:", "".join(streamer))
    thread.join()


if __name__ == "__main__":
    main()
