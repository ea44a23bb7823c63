"""Launch configurations as data: defaults whose compilation is checked, and what `make tune` measured on a card.

A configuration is picked by the rows of one slot, never by the number of slots: a row is summed in the same order
whatever stands beside it. The tuned ones lie in tuned/<architecture>.json, which says on which card, when and how;
what they do not name gets the default. `provenance` says which architectures have one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

Arch = Literal["sm_80", "sm_90", "sm_100"]
Width = Literal["half", "full"]  # bytes of an element: 2 (bf16, fp16) or 4 (fp32)

ARCHS: tuple[Arch, ...] = ("sm_80", "sm_90", "sm_100")
# Bytes of shared memory of one program. "sm_80" also serves its smaller relatives (8.6, 8.9, 12.0), hence 99 KB.
SHARED_LIMIT: dict[Arch, int] = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
PROGRAMS_WANTED: dict[Arch, int] = {"sm_80": 108, "sm_90": 132, "sm_100": 148}  # multiprocessors of the usual card
FEW_ROWS = 16  # of one slot: the write memory's rows, a decoded row
KEYS_APART = 256  # a few query rows over more keys than this share them among programs
WIDEST_ROW = 16384  # elements that one program normalizes


def _power_of_two(name: str, value: int, low: int, high: int) -> None:
    if value < low or value > high or value & (value - 1):
        raise ValueError(f"{name}={value}: expected a power of two in {low}..{high}")


@dataclass(frozen=True)
class LinearConfig:
    """Tile of x Wᵀ: block_m rows by block_n outputs, block_k inputs at a time, `stages` tiles in flight.

    tma: tiles come through TMA descriptors (sm_90 and newer), where rows start at multiples of 16 bytes.
    splits: programs that share a tile's inputs where parts may be added up afterwards; 0: as `split_k` says.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    tma: bool = False
    splits: int = 0

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k"):
            _power_of_two(name, getattr(self, name), 16, 256)
        _power_of_two("warps", self.warps, 1, 16)
        if not 1 <= self.stages <= 8:
            raise ValueError(f"stages={self.stages}: expected 1..8")
        if self.splits:
            _power_of_two("splits", self.splits, 1, 64)

    def shared_bytes(self, width: Width) -> int:
        """What the tiles in flight take."""
        return (self.block_m + self.block_n) * self.block_k * self.stages * element_bytes(width)


@dataclass(frozen=True)
class AttentionConfig:
    """block_q packed query rows (rows × grouped heads) against block_kv keys at a time."""

    block_q: int
    block_kv: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        _power_of_two("block_q", self.block_q, 16, 128)
        _power_of_two("block_kv", self.block_kv, 16, 128)
        _power_of_two("warps", self.warps, 1, 8)
        if not 1 <= self.stages <= 4:
            raise ValueError(f"stages={self.stages}: expected 1..4")


@dataclass(frozen=True)
class LinearCase:
    """What a configuration of x Wᵀ is tuned for. rows: of one slot, as `rows_of` says; gated: gate and up together."""

    width: Width
    rows: int
    outputs: int
    inputs: int
    gated: bool


@dataclass(frozen=True)
class AttentionCase:
    """What a configuration of attention is tuned for. rows: packed query rows, as `rows_of` says; head_dim: padded."""

    width: Width
    rows: int
    head_dim: int
    causal: bool


@dataclass(frozen=True)
class Tuned:
    """What `make tune` found on a card, and how it was found. Times are medians."""

    arch: Arch
    device: str
    versions: str
    date: str
    command: str
    linear: dict[LinearCase, LinearConfig]
    attention: dict[AttentionCase, AttentionConfig]
    microseconds: dict[LinearCase | AttentionCase, tuple[float, float]]  # of the configuration, and of the default


def element_bytes(width: Width) -> int:
    return 2 if width == "half" else 4


# For `swiglu`, block_n counts gate and up together.
LINEAR: dict[tuple[Arch, Width, bool], LinearConfig] = {  # (arch, width, few rows)
    ("sm_80", "half", False): LinearConfig(64, 128, 32, warps=4, stages=4),
    ("sm_80", "half", True): LinearConfig(16, 64, 64, warps=4, stages=5),
    ("sm_80", "full", False): LinearConfig(64, 64, 16, warps=8, stages=3),
    ("sm_80", "full", True): LinearConfig(16, 64, 32, warps=4, stages=4),
    ("sm_90", "half", False): LinearConfig(64, 128, 64, warps=4, stages=4, tma=True),
    ("sm_90", "half", True): LinearConfig(16, 64, 64, warps=4, stages=6, tma=True),
    ("sm_90", "full", False): LinearConfig(64, 64, 16, warps=4, stages=3),
    ("sm_90", "full", True): LinearConfig(16, 64, 32, warps=4, stages=4),
    ("sm_100", "half", False): LinearConfig(128, 128, 64, warps=8, stages=4, tma=True),
    ("sm_100", "half", True): LinearConfig(16, 64, 64, warps=4, stages=6, tma=True),
    ("sm_100", "full", False): LinearConfig(64, 64, 16, warps=4, stages=3),
    ("sm_100", "full", True): LinearConfig(16, 64, 32, warps=4, stages=4),
}

# (width, few packed rows, heads wider than 64). Alike on all three until somebody tunes them, but for what follows.
_ATTENTION: dict[tuple[Width, bool, bool], AttentionConfig] = {
    ("half", False, False): AttentionConfig(64, 64, warps=4, stages=2),
    ("half", False, True): AttentionConfig(64, 32, warps=4, stages=2),
    ("half", True, False): AttentionConfig(16, 64, warps=2, stages=2),
    ("half", True, True): AttentionConfig(16, 64, warps=4, stages=2),
    ("full", False, False): AttentionConfig(32, 32, warps=8, stages=1),
    ("full", False, True): AttentionConfig(32, 16, warps=4, stages=1),
    ("full", True, False): AttentionConfig(16, 32, warps=4, stages=1),
    ("full", True, True): AttentionConfig(16, 32, warps=4, stages=1),
}
ATTENTION: dict[Arch, dict[tuple[Width, bool, bool], AttentionConfig]] = {arch: dict(_ATTENTION) for arch in ARCHS}
# (arch, width, few packed rows, padded head), where the above would spill.
ATTENTION_OF_HEADS: dict[tuple[Arch, Width, bool, int], AttentionConfig] = {
    ("sm_80", "half", True, 32): AttentionConfig(16, 64, warps=4, stages=2),
}

TUNED = Path(__file__).parent / "tuned"

_ASSUMED: ContextVar[Arch | None] = ContextVar("assumed architecture", default=None)
_FORCED: ContextVar[LinearConfig | AttentionConfig | None] = ContextVar("forced configuration", default=None)


@contextmanager
def assume(arch: Arch) -> Iterator[None]:
    """Inside, configurations are those of `arch`, whatever the device: for compiling where there is none."""
    token = _ASSUMED.set(arch)
    try:
        yield
    finally:
        _ASSUMED.reset(token)


@contextmanager
def forced(config: LinearConfig | AttentionConfig) -> Iterator[None]:
    """Inside, every launch of its kind takes this configuration: for tuning."""
    token = _FORCED.set(config)
    try:
        yield
    finally:
        _FORCED.reset(token)


def arch_of(device: torch.device) -> Arch:
    """The architecture whose configurations serve a device; the interpreter takes those of sm_80."""
    return _ASSUMED.get() or _arch_of(device)


@lru_cache
def _arch_of(device: torch.device) -> Arch:
    if device.type != "cuda":
        return "sm_80"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm_90" if major == 9 else "sm_100" if major == 10 else "sm_80"


def width_of(dtype: torch.dtype) -> Width:
    return "full" if dtype == torch.float32 else "half"


def few(slot_rows: int) -> bool:
    return slot_rows <= FEW_ROWS


def rows_of(slot_rows: int) -> int:
    """Rows that share a tuned configuration: the next power of two, from 16 on."""
    return max(FEW_ROWS, 1 << (slot_rows - 1).bit_length())


def default_linear_config(arch: Arch, dtype: torch.dtype, slot_rows: int) -> LinearConfig:
    return LINEAR[arch, width_of(dtype), few(slot_rows)]


def linear_config(
    arch: Arch, dtype: torch.dtype, slot_rows: int, outputs: int, inputs: int, gated: bool
) -> LinearConfig:
    if isinstance(config := _FORCED.get(), LinearConfig):
        return config
    default = default_linear_config(arch, dtype, slot_rows)
    if (found := tuned(arch)) is None:
        return default
    return found.linear.get(LinearCase(width_of(dtype), rows_of(slot_rows), outputs, inputs, gated), default)


def default_attention_config(arch: Arch, dtype: torch.dtype, packed_rows: int, block_d: int) -> AttentionConfig:
    width, is_few = width_of(dtype), few(packed_rows)
    return ATTENTION_OF_HEADS.get((arch, width, is_few, block_d)) or ATTENTION[arch][width, is_few, block_d > 64]


def attention_config(arch: Arch, dtype: torch.dtype, packed_rows: int, block_d: int, causal: bool) -> AttentionConfig:
    if isinstance(config := _FORCED.get(), AttentionConfig):
        return config
    default = default_attention_config(arch, dtype, packed_rows, block_d)
    if (found := tuned(arch)) is None:
        return default
    return found.attention.get(AttentionCase(width_of(dtype), rows_of(packed_rows), block_d, causal), default)


def split_k(arch: Arch, config: LinearConfig, slot_rows: int, outputs: int, inputs: int) -> int:
    """Programs that share one tile's inputs, so that one slot alone fills the card; each takes at least 256 inputs."""
    if config.splits:
        return config.splits
    tiles = -(-slot_rows // config.block_m) * -(-outputs // config.block_n)
    splits = 1
    while tiles * splits * 2 <= PROGRAMS_WANTED[arch] and splits * 2 * 256 <= inputs:
        splits *= 2
    return splits


@lru_cache
def tuned(arch: Arch) -> Tuned | None:
    """What was tuned for an architecture; None where nobody did. Read once."""
    path = TUNED / f"{arch}.json"
    return read_tuned(path) if path.exists() else None


def read_tuned(path: Path) -> Tuned:
    """A file that `tuning.write` wrote. Raises ValueError for one that does not hold what it should."""
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
        linear = [(LinearCase(**e["case"]), LinearConfig(**e["config"]), e) for e in facts["linear"]]
        attention = [(AttentionCase(**e["case"]), AttentionConfig(**e["config"]), e) for e in facts["attention"]]
        times: dict[LinearCase | AttentionCase, tuple[float, float]] = {}
        times |= {case: (e["microseconds"], e["default_microseconds"]) for case, _, e in linear}
        times |= {case: (e["microseconds"], e["default_microseconds"]) for case, _, e in attention}
        return Tuned(
            facts["arch"],
            facts["device"],
            facts["versions"],
            facts["date"],
            facts["command"],
            {case: config for case, config, _ in linear},
            {case: config for case, config, _ in attention},
            times,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: not a file of tuned configurations: {error!r}; delete it, or run make tune"
        ) from error


def provenance() -> str:
    """Which configurations are tuned and which are defaults, in words."""
    words = [f"{arch}: tuned on {found.device}, {found.date}" for arch in ARCHS if (found := tuned(arch))]
    defaults = [arch for arch in ARCHS if not tuned(arch)]
    if defaults:
        words.append(f"{', '.join(defaults)}: defaults whose compilation is checked, not tuned on a card")
    return "; ".join(words) + "."


def row_warps(width: int) -> int:
    """Warps of a program that holds one row of `width` elements."""
    return 1 if width <= 512 else 4 if width <= 4096 else 8
