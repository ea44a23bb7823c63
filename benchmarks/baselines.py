"""The recurrence on Hugging Face modules: what the engine is compared with.

`AuthorsLoop` does what the authors' `forward` (MemoryCell in a RecurrentWrapper) does: every segment's embeddings are
concatenated with the memory on both sides, the model is called with `output_hidden_states=True`, the logits of all rows
are computed, and the outputs of all segments are kept and concatenated at the end. `LeanLoop` is the same model without
that waste: no logits but those asked for, no hidden states kept, no KV cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rmt_engine.config import RMTConfig


@dataclass(frozen=True)
class LoopOutput:
    """logits [B, N, V] of the whole text (`LeanLoop`: [B, L, V] of the last segment); memory_state [B, M, E]."""

    logits: Tensor
    memory_state: Tensor


def causal_lm(config: RMTConfig, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The backbone as a Hugging Face model with its default attention, in eval mode."""
    settings = AutoConfig.for_model(**dict(config.backbone))
    model = AutoModelForCausalLM.from_config(settings, dtype=dtype)
    names = {name: tensor for name, tensor in weights.items() if name != "memory"}
    missing, unexpected = model.load_state_dict(names, strict=False)
    tied = {"lm_head.weight"} if settings.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        raise ValueError(f"the weights do not fit the model: missing {missing}, unexpected {unexpected}")
    return model.eval()


class AuthorsLoop:
    """ids [B, N] -> what the authors' `forward` gives for them, left-aligned."""

    def __init__(self, model: PreTrainedModel, memory: Tensor, segment_size: int):
        self.model = model
        self.memory = memory.to(model.device, model.dtype)  # [M, E]
        self.segment_size = segment_size

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> LoopOutput:
        memory = self.memory.repeat(len(ids), 1, 1)
        outputs = []
        for segment in ids.split(self.segment_size, dim=1):
            output, memory = self.segment(segment, memory)
            outputs.append(output)
        return LoopOutput(torch.cat([output["logits"] for output in outputs], dim=1), memory)

    def segment(self, ids: Tensor, memory: Tensor) -> tuple[dict[str, Any], Tensor]:
        """One cell: ids [B, L], memory [B, M, E] -> the model's outputs cut to the text, the new memory state."""
        count = memory.shape[1]
        embeds = self.model.get_input_embeddings()(ids)
        out = self.model(inputs_embeds=torch.cat([memory, embeds, memory], dim=1), output_hidden_states=True)
        kept = {
            "logits": out.logits[:, count:-count],
            "hidden_states": [layer[:, count:-count] for layer in out.hidden_states],
        }
        return kept, out.hidden_states[-1][:, -count:]


class LeanLoop:
    """The same modules without waste: the body alone for every segment, the head once, for the last segment's text."""

    def __init__(self, model: PreTrainedModel, memory: Tensor, segment_size: int):
        self.model = model
        self.memory = memory.to(model.device, model.dtype)
        self.segment_size = segment_size

    @torch.inference_mode()
    def __call__(self, ids: Tensor) -> LoopOutput:
        memory = self.memory.expand(len(ids), *self.memory.shape)
        embed, count = self.model.get_input_embeddings(), self.memory.shape[0]
        for segment in ids.split(self.segment_size, dim=1):
            rows = torch.cat([memory, embed(segment), memory], dim=1)
            hidden = self.model.base_model(inputs_embeds=rows, use_cache=False).last_hidden_state
            memory = hidden[:, -count:]
        return LoopOutput(self.model.get_output_embeddings()(hidden[:, count:-count]), memory.clone())
