"""Times the authors' own code beside the engine, in turns, on the same weights and ids.

    git clone --branch aaai24 https://github.com/booydar/recurrent-memory-transformer
    python benchmarks/peers/authors.py recurrent-memory-transformer --lengths 2k,4k

Their `MemoryCell` and `RecurrentWrapper` are imported from the clone as they are. Before anything is timed, the logits
that they give for the last segment are compared with ours.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from baselines import causal_lm  # noqa: E402 - a script's neighbours

from rmt_engine import Engine  # noqa: E402
from rmt_engine.bench.record import about  # noqa: E402
from rmt_engine.bench.session import relative_error  # noqa: E402
from rmt_engine.bench.setup import Setup, named_config, random_weights  # noqa: E402
from rmt_engine.bench.timing import OnStep, interleaved  # noqa: E402
from rmt_engine.cli import counts  # noqa: E402
from rmt_engine.config import RMTConfig  # noqa: E402

TOLERANCE = 1e-3  # of logits, relative


def authors(clone: Path, config: RMTConfig, weights: dict[str, Tensor], device: str) -> torch.nn.Module:
    """Their wrapper around a Hugging Face model with these weights."""
    sys.path.insert(0, str(clone))
    from modeling_rmt.language_modeling import MemoryCell, RecurrentWrapper

    cell = MemoryCell(causal_lm(config, weights), config.num_mem_tokens)
    cell.memory.data = weights["memory"].clone()
    return RecurrentWrapper(cell, segment_size=config.segment_size).to(device).eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help="the authors' repository, branch aaai24")
    parser.add_argument(
        "--config", choices=("gpt2", "gpt2-medium", "llama-3.2-1b"), help="(default: embedded checkpoint)"
    )
    parser.add_argument("--lengths", type=counts, default=[2_000, 4_000])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.config:
        config = named_config(options.config)
        weights = random_weights(config)
    else:
        loaded = Setup().load()
        config, weights = loaded.config, dict(loaded.weights)
    engine = Engine.from_weights(config, weights, device=options.device, dtype="float32")
    theirs = authors(options.clone, config, weights, options.device)
    print(about())
    for tokens in options.lengths:
        ids = torch.randint(engine.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0)).to(
            options.device
        )
        print(measured(engine, theirs, ids, options.repetitions))
    return 0


@torch.no_grad()
def measured(engine: Engine, theirs: torch.nn.Module, ids: Tensor, repetitions: int) -> str:
    last = (ids.shape[1] - 1) % engine.config.segment_size + 1
    ours = engine.forward(ids).logits
    assert isinstance(ours, Tensor)
    error = relative_error(theirs(ids).logits[:, -last:], ours)
    if not error <= TOLERANCE:
        return f"{ids.shape[1]:,} tokens: failed, the logits differ by {error:.2g}"

    def run_theirs(on_step: OnStep) -> None:
        theirs(ids)

    def run_ours(on_step: OnStep) -> None:
        engine.forward(ids)

    timings = interleaved({"ours": run_ours, "theirs": run_theirs}, repetitions, ids.device)
    medians = {name: statistics.median(timing.seconds) for name, timing in timings.items()}
    speeds = ", ".join(f"{name} {ids.shape[1] / seconds:,.0f} tokens/s" for name, seconds in medians.items())
    return f"{ids.shape[1]:,} tokens: {speeds}, × {medians['theirs'] / medians['ours']:.2f}"


if __name__ == "__main__":
    raise SystemExit(main())
