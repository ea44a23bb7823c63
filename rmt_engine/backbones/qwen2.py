"""Qwen2: Llama with biases of queries, keys and values. Names are Qwen2ForCausalLM's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rmt_engine.backbones.common import Shapes
from rmt_engine.backbones.llama import IGNORED, TIED, Llama, llama_shapes

__all__ = ["IGNORED", "TIED", "build", "parameter_shapes"]


def parameter_shapes(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of a Qwen2ForCausalLM's parameters; a tied head is left out."""
    return llama_shapes(config, qkv_bias=True)


build = Llama
