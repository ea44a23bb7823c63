"""Rotary positions: the frequencies that a config asks for, and their table over all positions.

Pairs of a head's elements are turned: element i with i + D/2, as the ops do it. A backbone that turns only the first
`dims` elements of a head, i with i + dims/2, orders its elements by `halves_order`; the rest has angle 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rmt_engine.backbones.common import pad_table, require


def inverse_frequencies(config: Mapping[str, Any], dims: int) -> Tensor:
    """Frequencies [dims / 2] in fp32, with Llama 3's or the linear scaling where the config asks for it."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    rope.setdefault("rope_type", rope.get("type", "default"))
    kind = require(rope, "rope_type", "default", "linear", "llama3")
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    frequencies = 1.0 / theta ** (torch.arange(0, dims, 2, dtype=torch.int64).float() / dims)
    if kind == "linear":
        return frequencies / rope["factor"]
    return _llama3_scaling(frequencies, rope) if kind == "llama3" else frequencies


def _llama3_scaling(frequencies: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Long waves are stretched by `factor`, short ones kept, those between are blended."""
    original = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    wavelengths = 2 * math.pi / frequencies
    stretched = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
    blend = (original / wavelengths - low) / (high - low)
    blended = (1 - blend) * stretched / factor + blend * stretched
    between = (wavelengths >= original / high) & (wavelengths <= original / low)
    return torch.where(between, blended, stretched)


def rope_table(config: Mapping[str, Any], head_dim: int, dims: int | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin [P, D] in fp32 of every position; `dims` elements of a head turn, by default all."""
    frequencies = inverse_frequencies(config, head_dim if dims is None else dims)
    angles = torch.outer(torch.arange(config["max_position_embeddings"]).float(), frequencies)
    angles = F.pad(angles, (0, head_dim // 2 - angles.shape[1]))
    angles = pad_table(torch.cat([angles, angles], dim=-1))
    return angles.cos(), angles.sin()


def halves_order(head_dim: int, dims: int) -> Tensor:
    """Places [D] of a head's elements, such that i and i + D/2 are a pair. The same order of queries and keys leaves
    their products alone."""
    turned, still = torch.arange(dims), torch.arange(dims, head_dim)
    return torch.cat(
        [half for pair in zip(turned.tensor_split(2), still.tensor_split(2), strict=True) for half in pair]
    )
