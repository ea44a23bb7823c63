"""What the engine is compared with, on Hugging Face modules; `build` makes one by its name.

hf: `AuthorsLoop` does what the authors' `forward` does (MemoryCell in a RecurrentWrapper): every segment's embeddings
are concatenated with the memory on both sides, the model is called with `output_hidden_states=True`, the logits of all
rows are computed, and logits and hidden states of all segments are kept to the end. There the logits are concatenated;
theirs does so with the hidden states too.
fair: `LeanLoop` is the same model without that waste: no logits but those asked for, no hidden states, no KV cache.
compile: the lean loop over a body under `torch.compile`, with CUDA graphs on a GPU.
full-attention: `FullAttention` has no memory tokens, but a KV cache over the whole text.
An encoder has `EncoderLoop` for the first three.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    PreTrainedModel,
)

from rmt_engine.config import RMTConfig

NAMES = ("hf", "fair", "compile", "full-attention")
Body = Callable[..., Any]


@dataclass(frozen=True)
class LoopOutput:
    """logits [B, N, V] of the whole text (`LeanLoop`: [B, L, V] of the last segment); memory_state [B, M, E]."""

    logits: Tensor
    memory_state: Tensor


def build(
    name: str,
    config: RMTConfig,
    weights: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    longest: int = 0,
) -> AuthorsLoop | LeanLoop | EncoderLoop | FullAttention:
    """The baseline of that name. longest: tokens that full attention must have positions for. Raises ValueError."""
    if name not in NAMES:
        raise ValueError(f"expected a baseline of {', '.join(NAMES)}; got {name!r}")
    decoder = config.family == "decoder"
    if name == "full-attention":
        if not decoder:
            raise ValueError("full attention with a KV cache needs a decoder: an encoder reads all rows at once")
        config, weights = with_positions(config, weights, longest)
    model = (causal_lm if decoder else classifier)(config, weights, dtype).to(device)
    size, memory = config.segment_size, weights["memory"]
    if name == "full-attention":
        return FullAttention(model, size)
    body = compiled(model.base_model) if name == "compile" else None
    if not decoder:
        return EncoderLoop(model, memory, config, as_authors=name == "hf", body=body)
    return AuthorsLoop(model, memory, size) if name == "hf" else LeanLoop(model, memory, size, body)


def causal_lm(config: RMTConfig, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The backbone as a Hugging Face model with its default attention, in eval mode."""
    settings = AutoConfig.for_model(**dict(config.backbone))
    model = AutoModelForCausalLM.from_config(settings, dtype=dtype)
    return _filled(model, weights, {"lm_head.weight"} if settings.tie_word_embeddings else set())


def classifier(config: RMTConfig, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The encoder with its classifier, as `causal_lm`."""
    settings = AutoConfig.for_model(**dict(config.backbone))
    return _filled(AutoModelForSequenceClassification.from_config(settings, dtype=dtype), weights, set())


def _filled(model: PreTrainedModel, weights: Mapping[str, Tensor], tied: set[str]) -> PreTrainedModel:
    names = {name: tensor for name, tensor in weights.items() if name != "memory"}
    missing, unexpected = model.load_state_dict(names, strict=False)
    if unexpected or set(missing) - tied:
        raise ValueError(f"the weights do not fit the model: missing {missing}, unexpected {unexpected}")
    return model.eval()


def with_positions(
    config: RMTConfig, weights: Mapping[str, Tensor], tokens: int
) -> tuple[RMTConfig, Mapping[str, Tensor]]:
    """A backbone of `tokens` positions at least. Learned ones are repeated: they cost the same and mean nothing."""
    key = "n_positions" if "n_positions" in config.backbone else "max_position_embeddings"
    if tokens <= config.backbone[key]:
        return config, weights
    longer, table = dict(weights), weights.get("transformer.wpe.weight")
    if table is not None:
        longer["transformer.wpe.weight"] = table.repeat(-(-tokens // len(table)), 1)[:tokens]
    return replace(config, backbone={**config.backbone, key: tokens}), longer


def compiled(body: Body, mode: str | None = None) -> Body:
    """The body under `torch.compile`, every shape by itself, as a CUDA graph on a GPU. mode: instead of the default for
    the device; "max-autotune" compiles for minutes."""
    on_gpu = next(body.parameters()).is_cuda  # type: ignore[attr-defined]
    fast = torch.compile(body, dynamic=False, mode=mode or ("reduce-overhead" if on_gpu else "default"))

    def run(**inputs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # the last step's outputs may be overwritten
        return fast(**inputs)

    return run


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

    @torch.no_grad()
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

    def __init__(self, model: PreTrainedModel, memory: Tensor, segment_size: int, body: Body | None = None):
        self.model = model
        self.memory = memory.to(model.device, model.dtype)
        self.segment_size = segment_size
        self.body = body or model.base_model

    @torch.inference_mode()
    def __call__(self, ids: Tensor) -> LoopOutput:
        memory = self.memory.expand(len(ids), *self.memory.shape)
        for segment in ids.split(self.segment_size, dim=1):
            hidden, memory = self.segment(segment, memory)
        count = self.memory.shape[0]
        return LoopOutput(self.model.get_output_embeddings()(hidden[:, count:-count]), memory)

    @torch.inference_mode()
    def segment(self, ids: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """One cell: ids [B, L], memory [B, M, E] -> hidden states of all rows, the new memory state."""
        rows = torch.cat([memory, self.model.get_input_embeddings()(ids), memory], dim=1)
        hidden = self.body(inputs_embeds=rows, use_cache=False).last_hidden_state
        return hidden, hidden[:, -memory.shape[1] :].clone()


class EncoderLoop:
    """Segments [CLS][memory][SEP][text][SEP] of an encoder with a classifier; its logits [B, C] are the last segment's.

    as_authors: every segment padded to its full length under a mask, hidden states kept, and classified. Otherwise
    the body alone, and the classifier once.
    """

    def __init__(
        self, model: PreTrainedModel, memory: Tensor, config: RMTConfig, as_authors: bool, body: Body | None = None
    ):
        self.model = model
        self.memory = memory.to(model.device, model.dtype)
        self.segment_size = config.segment_size
        self.as_authors = as_authors
        self.body = body or model.base_model
        self.frame = torch.tensor([config.cls_id, *[config.sep_id] * (len(memory) + 1)], device=model.device)

    @torch.inference_mode()
    def __call__(self, ids: Tensor) -> LoopOutput:
        memory = self.memory.expand(len(ids), *self.memory.shape)
        outputs: list[Any] = []
        for segment in ids.split(self.segment_size, dim=1):
            output, memory = self.segment(segment, memory)
            outputs.append(output)
            if not self.as_authors:
                del outputs[:-1]
        if self.as_authors:
            return LoopOutput(outputs[-1].logits, memory)
        pooler = self.model.base_model.pooler
        return LoopOutput(self.model.classifier(pooler(outputs[-1]) if pooler else outputs[-1]), memory)

    @torch.inference_mode()
    def segment(self, ids: Tensor, memory: Tensor) -> tuple[Any, Tensor]:
        """One cell: ids [B, L], memory [B, M, E] -> the model's outputs (lean: hidden states), the new memory state."""
        count = memory.shape[1]
        before, after = (part.expand(len(ids), -1) for part in (self.frame, self.frame[-1:]))
        embeds = self.model.get_input_embeddings()(torch.cat([before, ids, after], dim=1))
        embeds[:, 1 : 1 + count] = memory
        if not self.as_authors:
            hidden = self.body(inputs_embeds=embeds).last_hidden_state
            return hidden, hidden[:, 1 : 1 + count].clone()
        missing = self.segment_size - ids.shape[1]
        mask = torch.nn.functional.pad(embeds.new_ones(embeds.shape[:2], dtype=torch.int64), (0, missing))
        embeds = torch.nn.functional.pad(embeds, (0, 0, 0, missing))
        out = self.model(inputs_embeds=embeds, attention_mask=mask, output_hidden_states=True)
        return out, out.hidden_states[-1][:, 1 : 1 + count]


class FullAttention:
    """The model as it is: every token sees all before it, through a KV cache that grows with the text.

    ids [B, N] are read `segment_size` at a time; the logits [B, L, V] are those of the last part.
    """

    def __init__(self, model: PreTrainedModel, segment_size: int):
        self.model = model
        self.segment_size = segment_size

    @torch.inference_mode()
    def __call__(self, ids: Tensor, on_part: Callable[[], None] = lambda: None) -> Tensor:
        cache = DynamicCache(config=self.model.config)
        for part in ids.split(self.segment_size, dim=1):
            hidden = self.model.base_model(input_ids=part, past_key_values=cache, use_cache=True).last_hidden_state
            on_part()
        return self.model.get_output_embeddings()(hidden)
