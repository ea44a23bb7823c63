"""Offline tuning without a card: what is tried, what cannot run, who wins, and the file that keeps it.

`kernels/tune.py` (`make tune`) brings the card: it checks a candidate's result before it is timed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Generic, TypeVar

from rmt_kernels.configs import (
    SHARED_LIMIT,
    Arch,
    AttentionCase,
    AttentionConfig,
    LinearCase,
    LinearConfig,
    Tuned,
    element_bytes,
    few,
)

Config = TypeVar("Config", bound=LinearConfig | AttentionConfig)

ACCUMULATORS = 128  # fp32 registers of a thread that may hold sums; a thread has 255 for everything
FEWEST_SHARED_INPUTS = 256  # of one program among those that share a tile
MARGIN = 0.02  # a default stays unless it is beaten by more: less is noise
FINALISTS = 8  # of the first round


def linear_candidates(arch: Arch, case: LinearCase) -> list[LinearConfig]:
    """Every configuration of x Wᵀ that may run: within the constraints, the registers and the shared memory."""
    tma = (False, True) if arch != "sm_80" and case.width == "half" else (False,)
    inputs = (16, 32) if case.width == "full" else (32, 64, 128)
    if few(case.rows):
        shapes = product((16,), (32, 64, 128), inputs, (4,), (3, 4, 5, 6), tma, splits_of(case))
    else:
        shapes = product((64, 128), (64, 128, 256), inputs, (4, 8), (3, 4, 5), tma, splits_of(case)[:2])
    made = (LinearConfig(m, n, k, warps, stages, by, parts) for m, n, k, warps, stages, by, parts in shapes)
    return [config for config in made if linear_runs(arch, case, config)]


def splits_of(case: LinearCase) -> tuple[int, ...]:
    """Programs that may share one tile's inputs."""
    return tuple(splits for splits in (1, 2, 4, 8, 16) if splits == 1 or case.inputs // splits >= FEWEST_SHARED_INPUTS)


def linear_runs(arch: Arch, case: LinearCase, config: LinearConfig) -> bool:
    """Whether a configuration fits registers and shared memory, and has a tile of matrix instructions a warp."""
    threads = 32 * config.warps
    sums = config.block_m * config.block_n
    fits = config.shared_bytes(case.width) <= SHARED_LIMIT[arch] and sums <= ACCUMULATORS * threads
    busy = sums >= 8 * threads and config.block_k <= case.inputs
    return fits and busy and (not case.gated or config.block_n >= 64)


def attention_candidates(arch: Arch, case: AttentionCase) -> list[AttentionConfig]:
    """Every configuration of attention that may run."""
    rows = (16,) if few(case.rows) else (32, 64, 128)
    shapes = product(rows, (16, 32, 64, 128), (2, 4, 8), (1, 2, 3, 4))
    return [config for shape in shapes if attention_runs(arch, case, config := AttentionConfig(*shape))]


def attention_runs(arch: Arch, case: AttentionCase, config: AttentionConfig) -> bool:
    threads = 32 * config.warps
    held = config.block_q * (case.head_dim + config.block_kv)  # outputs and scores
    tiles = 2 * config.stages * config.block_kv + config.block_q
    fits = tiles * case.head_dim * element_bytes(case.width) <= SHARED_LIMIT[arch] and held <= ACCUMULATORS * threads
    return fits and config.block_q * config.block_kv >= 8 * threads


@dataclass(frozen=True)
class Race(Generic[Config]):
    """microseconds: medians of those that ran; refused: why the others did not."""

    microseconds: dict[Config, float]
    refused: dict[Config, str]

    def winner(self, default: Config) -> Config:
        """The fastest; the default unless it is beaten by more than MARGIN."""
        fastest = min(self.microseconds, key=self.microseconds.__getitem__)
        bar = self.microseconds[default] * (1 - MARGIN)
        return fastest if self.microseconds[fastest] < bar else default


def race(
    default: Config,
    candidates: Sequence[Config],
    check: Callable[[Config], str | None],
    timer: Callable[[Config], float],
    rounds: int = 7,
) -> Race[Config]:
    """Times what passes `check` (None, or why not): all once, then the FINALISTS `rounds` times, one after the other.

    Interleaved, so that a card that grows warm slows all alike. The default is always among the finalists. Raises
    RuntimeError where the default itself does not pass.
    """
    refused: dict[Config, str] = {}
    first: dict[Config, float] = {}
    everything: list[Config] = list(dict.fromkeys([default, *candidates]))
    for config in everything:
        reason = check(config)
        if reason is None:
            first[config] = timer(config)
        else:
            refused[config] = reason
    if default in refused:
        raise RuntimeError(f"the default {default} does not pass its check: {refused[default]}")
    challengers = [config for config in everything if config in first and config != default]
    challengers.sort(key=first.__getitem__)
    times: dict[Config, list[float]] = {config: [] for config in [default, *challengers[:FINALISTS]]}
    for _ in range(rounds):
        for config, samples in times.items():
            samples.append(timer(config))
    return Race({config: median(samples) for config, samples in times.items()}, refused)


def write(path: Path, tuned: Tuned) -> None:
    """The file that `configs.read_tuned` reads."""
    facts = {name: getattr(tuned, name) for name in ("arch", "device", "versions", "date", "command")}
    parts = {"linear": list(_entries(tuned, tuned.linear)), "attention": list(_entries(tuned, tuned.attention))}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**facts, **parts}, indent=1) + "\n")


def _entries(
    tuned: Tuned, configs: dict[LinearCase, LinearConfig] | dict[AttentionCase, AttentionConfig]
) -> Iterator[dict[str, object]]:
    for case, config in configs.items():
        ours, default = tuned.microseconds[case]
        yield {
            "case": asdict(case),
            "config": asdict(config),
            "microseconds": round(ours, 3),
            "default_microseconds": round(default, 3),
        }
