"""The transformers that can carry a recurrent memory: one file each, named by its Hugging Face `model_type`."""

from __future__ import annotations

import importlib
from types import ModuleType

from rmt_engine.errors import CheckpointError

MODEL_TYPES = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "bert", "roberta")


def module_of(model_type: str) -> ModuleType:
    """The backbone's module: `parameter_shapes`, `TIED`, `IGNORED` and `build`."""
    if model_type not in MODEL_TYPES:
        raise CheckpointError(f"no backbone for model_type {model_type!r}; this engine runs {', '.join(MODEL_TYPES)}")
    return importlib.import_module(f"rmt_engine.backbones.{model_type}")
