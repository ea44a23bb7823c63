"""Whose checkpoint is this? Named tensors -> the parts of one that runs, or a clear word why it does not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from rmt_engine.backbones import MODEL_TYPES
from rmt_engine.checkpoint.adapters import merge_lora
from rmt_engine.checkpoint.containers import Container
from rmt_engine.config import Family
from rmt_engine.errors import CheckpointError

SPECIAL_BUFFERS = ("cls_token", "sep_token", "eos_token", "bos_token")

# What is recognised and refused: a pattern that some name matches, what it is, what to do. The first that fits counts.
REFUSED = (
    (r"(^|\.)W_m[qkvb](\.|$)", "an ARMT checkpoint (associative memory per layer)", "this version runs RMT only"),
    (
        r"^(model\.|memory_cell\.model\.)?((encoder|decoder)\.block\.|shared\.weight)",
        "a T5 encoder-decoder",
        "this version runs decoders and encoder classifiers",
    ),
)
ENCODERS = ("bert", "roberta")
# The model types whose names these are, the likelier first. The first mark that a name bears counts.
BACKBONE_MARKS = (
    (("gpt2",), r"transformer\.h\.\d+\.attn\.c_attn\."),
    (("gpt_neox",), r"gpt_neox\.layers\.\d+\.attention\.query_key_value\."),
    (("qwen3",), r"model\.layers\.\d+\.self_attn\.q_norm\."),
    (("qwen2", "llama"), r"model\.layers\.\d+\.self_attn\.q_proj\.bias$"),
    (("llama", "mistral"), r"model\.layers\.\d+\.self_attn\.q_proj\."),
    (("bert",), r"bert\.encoder\.layer\."),
    (("roberta",), r"roberta\.encoder\.layer\."),
)
PLAIN_MARK = r"(^|\.)(wte|embed_tokens|word_embeddings|embed_in)\.weight$"


class PlainBackboneError(CheckpointError):
    """Weights of a backbone that was never wrapped in recurrent memory."""


@dataclass(frozen=True)
class Parts:
    """A recognised checkpoint.

    model_types: those with these names, the likelier first; the backbone's config has the last word. tensors: canonical
    Hugging Face names; for a decoder also `memory` [M, E]; for an encoder the word embeddings still have V + M rows.
    num_mem_tokens: M. special: the encoder's own token ids (cls_token, ...). memory_start: V, the first memory row of
    its embeddings. stray: names outside every known place. lora_pairs: how many were merged.
    """

    path: Path
    family: Family
    model_types: tuple[str, ...]
    num_mem_tokens: int
    tensors: dict[str, Tensor]
    special: dict[str, int] = field(default_factory=dict)
    memory_start: int | None = None
    stray: tuple[str, ...] = ()
    lora_pairs: int = 0


def unwrap(container: Container) -> Parts:
    """Recognise a checkpoint, merge its LoRA pairs and strip the authors' prefixes. Raises CheckpointError for every
    other family."""
    path, named = container.path, _without_wrappers(container)
    for pattern, what, advice in REFUSED:
        if _any(pattern, named):
            raise CheckpointError(f"{path} is {what}: {advice}")
    tensors, lora_pairs = merge_lora(path, named)
    parts = _decoder(path, tensors) if _family(path, tensors) == "decoder" else _encoder(path, tensors)
    return replace(parts, lora_pairs=lora_pairs)


def label_layer(model_type: str) -> str:
    """The encoder's last linear, with a row for each label."""
    return "classifier.out_proj.weight" if model_type == "roberta" else "classifier.weight"


def word_embeddings(model_type: str) -> str:
    """The encoder's word embeddings, whose last M rows are the memory."""
    return f"{model_type}.embeddings.word_embeddings.weight"


def _without_wrappers(container: Container) -> dict[str, Tensor]:
    """Names without the marks of DistributedDataParallel and torch.compile, and the tied ones that safetensors'
    save_model dropped, as its metadata notes them (dropped name -> kept name)."""
    tensors = dict(container.tensors)
    for dropped, kept in container.metadata.items():
        if kept in tensors:
            tensors.setdefault(dropped, tensors[kept])
    cleaned: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        clean = name.replace("_orig_mod.", "").removeprefix("module.")
        if clean in cleaned:
            raise CheckpointError(f"{container.path} holds {clean!r} twice, with and without a wrapper's prefix")
        cleaned[clean] = tensor
    return cleaned


def _family(path: Path, tensors: Mapping[str, Tensor]) -> Family:
    if "memory_cell.memory" in tensors:
        return "decoder"
    if _any(r"^memory_cell\.", tensors):
        raise CheckpointError(f"{path} has a memory cell but no memory_cell.memory: it is not a whole checkpoint")
    if "mem_token_ids" in tensors:
        return _encoder_family(path, tensors)
    if "memory" in tensors and _any(r"^model\.", tensors):
        raise CheckpointError(
            f"{path} is of the legacy RMTDecoderLMHead (`memory` and `model.*`): its segments are assembled "
            "differently, and this engine runs MemoryCell checkpoints only"
        )
    if _any(PLAIN_MARK, tensors):
        raise PlainBackboneError(
            f"{path} is a plain backbone without memory tokens (no memory_cell.memory, no mem_token_ids): "
            "give the fine-tuned recurrent checkpoint; the backbone goes into --base"
        )
    some = ", ".join(sorted(tensors)[:6])
    raise CheckpointError(f"{path} is of no family this engine knows; its names begin with {some}")


def _encoder_family(path: Path, tensors: Mapping[str, Tensor]) -> Family:
    model_type = next((kind for kind in ENCODERS if _any(rf"^model\.{kind}\.", tensors)), None)
    if model_type is None:
        raise CheckpointError(
            f"{path} is an encoder RMT, but not on {' or '.join(ENCODERS)}, the encoders this engine runs"
        )
    pooled = "model.bert.pooler.dense.weight" in tensors
    if "model.classifier.weight" in tensors and not pooled:
        raise CheckpointError(
            f"{path} is an RMT for token classification (a classifier of every row): "
            "this engine runs sequence classification only"
        )
    head = f"model.{label_layer(model_type)}"
    if head not in tensors:
        raise CheckpointError(f"{path} is an encoder RMT without a sequence classifier (no {head})")
    return "encoder_classifier"


def _decoder(path: Path, tensors: Mapping[str, Tensor]) -> Parts:
    inner, stray = _strip(tensors, "memory_cell.model.", keep={"memory_cell.memory"})
    memory = tensors["memory_cell.memory"]
    if memory.ndim != 2 or 0 in memory.shape:
        raise CheckpointError(f"{path}: memory_cell.memory has shape {list(memory.shape)}; expected [M, E] with M ≥ 1")
    return Parts(path, "decoder", _backbones(path, inner), len(memory), {**inner, "memory": memory}, stray=stray)


def _encoder(path: Path, tensors: Mapping[str, Tensor]) -> Parts:
    buffers = {"mem_token_ids", *SPECIAL_BUFFERS}
    inner, stray = _strip(tensors, "model.", keep=buffers)
    special = {name: _ids(path, name, tensors[name])[0] for name in SPECIAL_BUFFERS if name in tensors}
    absent = [name for name in ("cls_token", "sep_token") if name not in special]
    if absent:
        raise CheckpointError(f"{path} lacks the buffers {', '.join(absent)}, the tokens that frame every segment")
    ids = _ids(path, "mem_token_ids", tensors["mem_token_ids"])
    start, size = ids[0], len(ids)
    if ids != list(range(start, start + size)):
        raise CheckpointError(f"{path}: mem_token_ids are {ids}; expected the rows after the vocabulary, in order")
    return Parts(path, "encoder_classifier", _backbones(path, inner), size, inner, special, start, stray)


def _strip(
    tensors: Mapping[str, Tensor], prefix: str, keep: Iterable[str]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors under `prefix` by their inner names, and the names of those that are neither there nor in `keep`."""
    inner = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    stray = tuple(name for name in tensors if not name.startswith(prefix) and name not in keep)
    return inner, stray


def _ids(path: Path, name: str, tensor: Tensor) -> list[int]:
    if tensor.ndim != 1 or not 0 < len(tensor) < 2**20 or tensor.is_floating_point() or tensor.is_complex():
        raise CheckpointError(f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}; expected a row of token ids")
    ids = [int(i) for i in tensor.tolist()]
    if min(ids) < 0:
        raise CheckpointError(f"{path}: {name} holds a negative token id: {min(ids)}")
    return ids


def _backbones(path: Path, names: Iterable[str]) -> tuple[str, ...]:
    names = list(names)
    for model_types, pattern in BACKBONE_MARKS:
        if _any("^" + pattern, names):
            return model_types
    some = ", ".join(sorted(names)[:6]) or "nothing"
    raise CheckpointError(
        f"{path} wraps a backbone that is none of {', '.join(MODEL_TYPES)}; its names begin with {some}"
    )


def _any(pattern: str, names: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for name in names)
