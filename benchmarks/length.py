"""Time and memory of one stream over its length, each length in a process of its own.

    python benchmarks/length.py --lengths 10k,100k,1M,10M --output benchmarks/results/length_cpu.json

The input is a token file of ids of the checkpoint's vocabulary, drawn with a fixed seed. Before anything is timed the
memory state of the shortest length is compared with `Engine.forward` over the same ids.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path

import numpy as np
import torch
from common import about

from rmt_engine import Engine, Summary
from rmt_engine.cli import counts


def one(path: Path, threads: int, dtype: str) -> dict[str, float | int | None]:
    """Reads a token file in this process."""
    torch.set_num_threads(threads)
    engine = Engine.from_pretrained(dtype=dtype)
    # The events are not collected: those of a long run would be the growth that is measured.
    summary = deque(engine.run(path), maxlen=1).pop()
    assert isinstance(summary, Summary)
    return {
        "tokens": summary.tokens,
        "segments": summary.segments,
        "seconds": summary.seconds,
        "tokens_per_second": summary.tokens_per_second,
        "segment_ms_early": summary.ms_early,
        "segment_ms_late": summary.ms_late,
        "rss_anon_late": summary.memory_late,
    }


def check(path: Path, dtype: str) -> None:
    """The streamed memory state is that of a plain forward over the same ids."""
    engine = Engine.from_pretrained(dtype=dtype)
    *_, summary = engine.run(path)
    assert isinstance(summary, Summary)
    summary.stream.finish()
    ids = torch.from_numpy(np.load(path).astype(np.int64))
    expected = engine.forward(ids[None], output="none").memory_state[0]
    if not torch.equal(summary.stream.memory, expected):
        raise SystemExit("the streamed memory state differs from that of forward: nothing is timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=counts, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one, arguments.threads, arguments.dtype)))
        return
    torch.set_num_threads(arguments.threads)
    made_by = {**about(), "threads": arguments.threads, "dtype": arguments.dtype}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ids.npy"
        for length in sorted(arguments.lengths):
            ids = np.random.default_rng(0).integers(1, 2048, size=length, dtype=np.uint16)
            np.save(path, ids)
            if not rows:
                check(path, arguments.dtype)
            command = [sys.executable, __file__, "--one", str(path), "--threads", str(arguments.threads)]
            output = subprocess.run([*command, "--dtype", arguments.dtype], check=True, capture_output=True, text=True)
            rows.append(json.loads(output.stdout))
            print(rows[-1], flush=True)
    if arguments.output:
        text = json.dumps({**made_by, "rows": rows}, indent=1) + "\n"
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
