"""What is measured: a checkpoint, or one of a few well-known shapes with random weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmt_engine import checkpoint
from rmt_engine.backbones import module_of
from rmt_engine.checkpoint.conversion import write_folder
from rmt_engine.config import RMTConfig
from rmt_engine.engine import EMBEDDED, Engine
from rmt_engine.tokens import Tokenizer

ROWS, MEMORY = 512, 16  # rows of a segment, 16 memory tokens among them (a decoder: twice): the papers' input size
NORM = re.compile(r"(ln_\w+|[Nn]orm|layernorm)\.weight$")

_GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
    "tie_word_embeddings": True,
}
BACKBONES: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "gpt2-medium": {**_GPT2, "n_embd": 1024, "n_layer": 24, "n_head": 16},
    "bert-base": {
        "model_type": "bert",
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True)
class Loaded:
    """Left-aligned, whatever the checkpoint says: a stream needs no length then, and each baseline cuts alike."""

    config: RMTConfig
    weights: Mapping[str, Tensor]
    tokenizer: Tokenizer | None


@dataclass(frozen=True)
class Setup:
    """Plain values, so that another process can be given them. model: a folder or hub id; None: the embedded one."""

    model: str | None = None
    segment_size: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    backend: str = "auto"
    threads: int | None = None

    def load(self) -> Loaded:
        """Raises CheckpointError, ValueError."""
        path = self.model or EMBEDDED
        config, weights = checkpoint.load(path)
        if self.segment_size is not None:
            config = replace(config, segment_size=self.segment_size)
        folder = checkpoint.tokenizer_folder(path, None)
        tokenizer = None if folder is None else Tokenizer.from_folder(folder)
        return Loaded(replace(config, alignment="left"), weights, tokenizer)

    def engine(self, loaded: Loaded) -> Engine:
        """Raises BackendError, ValueError."""
        return Engine.from_weights(
            loaded.config,
            loaded.weights,
            loaded.tokenizer,
            device=self.device,
            dtype=self.dtype,
            backend=self.backend,
        )


def write_random(name: str, folder: Path) -> None:
    """A converted checkpoint of a known shape: from here on it is measured as any other, mapped from its file."""
    config = named_config(name)
    write_folder(folder, config, random_weights(config))


def named_config(name: str) -> RMTConfig:
    """A shape of `BACKBONES` around `MEMORY` memory tokens, in segments of `ROWS` rows."""
    backbone = BACKBONES[name]
    if backbone["model_type"] == "bert":
        ids = {"cls_id": 101, "sep_id": 102}
        return RMTConfig("encoder_classifier", backbone, MEMORY, ROWS - MEMORY - 3, "left", **ids)  # type: ignore[arg-type]
    return RMTConfig("decoder", backbone, MEMORY, ROWS - 2 * MEMORY)


def random_weights(config: RMTConfig) -> dict[str, Tensor]:
    """fp32 weights as a fresh model has them: norms 1, biases 0, matrices and memory tokens N(0, 0.02)."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: _random(name, shape, generator)
        for name, shape in module_of(config.model_type).parameter_shapes(config.backbone).items()
    }
    width = int(config.backbone.get("n_embd") or config.backbone["hidden_size"])
    return {**weights, "memory": _random("memory", (config.num_mem_tokens, width), generator)}


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape) if NORM.search(name) else torch.zeros(shape)
    return torch.empty(shape).normal_(0, 0.02, generator=generator)
