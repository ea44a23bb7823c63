"""Qwen3: Llama with a norm of every head's queries and keys. Names are Qwen3ForCausalLM's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rmt_engine.backbones.common import Shapes
from rmt_engine.backbones.llama import IGNORED, TIED, Llama, llama_shapes

__all__ = ["IGNORED", "TIED", "build", "parameter_shapes"]


def parameter_shapes(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of a Qwen3ForCausalLM's parameters; a tied head is left out."""
    bias = config.get("attention_bias", False)
    return llama_shapes(config, qkv_bias=bias, out_bias=bias, head_norms=True)


build = Llama
