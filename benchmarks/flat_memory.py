"""Reads a long input from end to end and watches the process's own memory: it must not grow.

    python benchmarks/flat_memory.py --bytes 1G                   a text, tokenized and cut into segments
    python benchmarks/flat_memory.py --bytes 1G --kind tokens     a token file; and gz, zst, jsonl, parquet
    python benchmarks/flat_memory.py --bytes 5M --engine          through the model too

The text is made of the running Python's own sources, shuffled anew in each pass, with words between that never come
again. What is measured is RssAnon + VmSwap: where its maximum after the warm-up is over the one before by more than
`--bound`, the exit code is 1.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import itertools
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from common import about, count

from rmt_engine.engine import Engine
from rmt_engine.evaluation.noise import python_sources
from rmt_engine.inputs import open_input
from rmt_engine.layouts import Cut

NAMES = {
    "text": "input.txt",
    "tokens": "input.npy",
    "gz": "input.txt.gz",
    "zst": "input.txt.zst",
    "jsonl": "input.jsonl",
    "parquet": "input.parquet",
}
FIELD = "text"  # of the records
TEXT_BOUND, TOKENS_BOUND = 8 << 20, 1 << 20  # bytes after the warm-up
WARM_UP = 2_000_000  # tokens
SAMPLES, WARM_SAMPLES = 100, 20


def main() -> int:
    options = arguments()
    made_by = about()  # now: the run is long, and others may commit
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / NAMES[options.kind]
        print(f"writing {options.bytes:,} bytes", file=sys.stderr)
        # In a process of its own: what it frees would hide what the reader takes.
        writer = multiprocessing.get_context("spawn").Process(target=write, args=(path, options.kind, options.bytes))
        writer.start()
        writer.join()
        if writer.exitcode != 0:
            return 1
        result = {**watch(path, options), **made_by}
    print(json.dumps({key: value for key, value in result.items() if key != "samples"}, indent=1))
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if result["passed"] else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=count, default=count("100M"), metavar="N", help="100M, 1G (default: 100M)")
    parser.add_argument("--kind", choices=tuple(NAMES), default="text")
    parser.add_argument("--engine", action="store_true", help="fold every segment with the model")
    parser.add_argument("--model", metavar="DIR", help="checkpoint (default: the embedded one)")
    parser.add_argument(
        "--bound", type=count, metavar="N", help="growth that is allowed (default: 8 MiB; tokens: 1 MiB)"
    )
    parser.add_argument("--warm-up", type=count, default=WARM_UP, metavar="N", help=f"tokens (default: {WARM_UP:,})")
    parser.add_argument("--folder", metavar="DIR", help="where the input is written, for as long as it is read")
    parser.add_argument("--out", metavar="FILE", help="write the result here, every sample of it, as JSON")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------- the input


def write(path: Path, kind: str, limit: int) -> None:
    if kind == "tokens":
        write_tokens(path, limit)
    elif kind == "parquet":
        write_table(path, limit)
    elif kind == "jsonl":
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps({FIELD: piece.decode()}) + "\n" for piece in pieces(limit))
    else:
        with compressed(path) as file:
            file.writelines(pieces(limit))


def compressed(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "wb", compresslevel=1))
    return open_zst(path) if path.suffix == ".zst" else open(path, "wb")


def open_zst(path: Path) -> BinaryIO:
    zstd = importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    return cast(BinaryIO, zstd.open(path, "wb"))


def write_table(path: Path, limit: int) -> None:
    import pyarrow
    from pyarrow import parquet

    with parquet.ParquetWriter(path, pyarrow.schema([(FIELD, pyarrow.string())])) as writer:
        texts = (piece.decode() for piece in pieces(limit))
        while rows := list(itertools.islice(texts, 2000)):
            writer.write_table(pyarrow.table({FIELD: rows}))  # a row group


def pieces(limit: int) -> Iterator[bytes]:
    """Files and lines between them, `limit` bytes in all."""
    sources = list(python_sources())
    generator = random.Random(0)
    while True:
        generator.shuffle(sources)
        for content in sources:
            piece = b"\n# %x %x\n" % (generator.getrandbits(64), generator.getrandbits(40)) + content
            if len(piece) >= limit:
                yield b"#" * limit  # no character is cut
                return
            limit -= len(piece)
            yield piece


def write_tokens(path: Path, limit: int) -> None:
    tokens = np.lib.format.open_memmap(path, "w+", np.uint16, (limit // 2,))
    generator = np.random.default_rng(0)
    for start in range(0, len(tokens), 1 << 20):
        part = tokens[start : start + (1 << 20)]
        part[:] = generator.integers(0, 256, len(part))


# ------------------------------------------------------------------------------------------------- the watch


def watch(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    engine = Engine.from_pretrained(options.model)
    samples: list[dict[str, Any]] = []
    start, tokens, due = time.perf_counter(), 0, 0.0
    reader = through_engine if options.engine else through_segments
    for tokens, fraction in reader(engine, path):
        warming = tokens <= options.warm_up and tokens >= len(samples) * options.warm_up / WARM_SAMPLES
        if fraction >= due or warming:
            due = fraction + 1 / SAMPLES
            samples.append(sample(tokens, time.perf_counter() - start))
    samples.append(sample(tokens, time.perf_counter() - start))
    early = [s["bytes"] for s in samples if s["tokens"] <= options.warm_up]
    late = [s["bytes"] for s in samples if s["tokens"] > options.warm_up]
    if not late:
        raise SystemExit(
            f"the input ended at {tokens:,} tokens, within the warm-up: give more --bytes or less --warm-up"
        )
    growth = max(late) - max(early)
    bound = options.bound or (TOKENS_BOUND if options.kind == "tokens" else TEXT_BOUND)
    return {
        "what": f"RssAnon + VmSwap while reading {options.kind}, a file of {path.stat().st_size:,} bytes",
        "passed": growth <= bound,
        "growth_bytes": growth,
        "bound_bytes": bound,
        "warm_up_tokens": options.warm_up,
        "bytes_in_warm_up": max(early),
        "bytes_after_warm_up": max(late),
        "bytes_at_end": samples[-1]["bytes"],
        "tokens": tokens,
        "seconds": round(samples[-1]["seconds"], 1),
        "tokens_per_second": round(tokens / samples[-1]["seconds"]),
        "samples": samples,
    }


def through_segments(engine: Engine, path: Path) -> Iterator[tuple[int, float]]:
    """(tokens, fraction) after each segment, which nobody folds."""
    cut = Cut.of(0, engine.config.segment_size, "left")
    field = FIELD if path.suffix in (".jsonl", ".parquet") else None
    with open_input(engine, path, field=field) as opened, opened.segments(cut, engine.vocab_size) as segments:
        for segment in opened.errors_of(segments):
            end = segment.position + len(segment)
            yield end, opened.fraction(end) or 0.0


def through_engine(engine: Engine, path: Path) -> Iterator[tuple[int, float]]:
    for event in engine.run(path, field=FIELD if path.suffix in (".jsonl", ".parquet") else None):
        if hasattr(event, "fraction"):
            yield event.position, event.fraction or 0.0
        else:
            yield event.tokens, 1.0


def sample(tokens: int, seconds: float) -> dict[str, Any]:
    with open("/proc/self/status", encoding="ascii") as status:
        kib = dict(line.split()[:2] for line in status if line.startswith(("RssAnon", "VmSwap")))
    anonymous, swapped = (int(kib.get(key, 0)) << 10 for key in ("RssAnon:", "VmSwap:"))
    return {"tokens": tokens, "seconds": round(seconds, 2), "bytes": anonymous + swapped, "swapped": swapped}


if __name__ == "__main__":
    sys.exit(main())
