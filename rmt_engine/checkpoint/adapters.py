"""LoRA pairs, as peft leaves them in a state dict, merged into the weights they adapt.

A linear W with a pair A [r, in], B [out, r] computes (W + s·B·A) x, where s = lora_alpha / r (rank-stabilised:
lora_alpha / √r). The merged weight is the same layer, at no cost when it runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rmt_engine.checkpoint.containers import read_json
from rmt_engine.errors import CheckpointError

SETTINGS = "adapter_config.json"
WRAPPED = "base_model.model."  # what get_peft_model puts before every name
PAIR = re.compile(r"(?P<layer>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])\.(?P<adapter>[^.]+)(\.weight)?")
SAVED = re.compile(r"(?P<layer>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<rest>.+)")
ORIGINAL = ".original_module."  # what a module to save replaces: no longer used
CONV1D = re.compile(r"(.*\.)?transformer\.h\.\d+\.(attn|mlp)\.c_\w+")  # GPT-2's linears are [in, out]
# Settings under which a merged weight is something else than W + s·B·A, or s differs from layer to layer.
REFUSED_SETTINGS = ("use_dora", "lora_bias", "alpha_pattern", "layer_replication", "target_parameters", "use_qalora")
OTHER_ADAPTERS = re.compile(
    r"\.(lora_\w+|ia3_\w+|ada_ia3_\w+|loha_\w+|hada_\w+|lokr_\w+|vera_\w+|oft_\w+|boft_\w+|prompt_encoder|"
    r"trainable_tokens_\w+|ranknum)(\.|$)"
)


@dataclass(frozen=True)
class Pair:
    """A [r, in] and B [out, r] of one layer; for an embedding W [V, E] they are [r, V] and [E, r]."""

    a: Tensor
    b: Tensor
    embedding: bool


def merge_lora(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Tensors under the names of the model without peft, and how many LoRA pairs were merged into them.

    tensors: of the weights file `path`; without peft's names in it they come back as they are. The scale is read from
    adapter_config.json beside `path`. Raises CheckpointError when that is absent, when another method than plain LoRA
    was used, when there are several adapters, or when a pair does not fit its weight.
    """
    if not any(WRAPPED in name or OTHER_ADAPTERS.search(name) for name in tensors):
        return dict(tensors), 0
    pairs, plain = _pairs(path, tensors)
    merged = _plain_names(path, plain)
    if pairs:
        alpha, root = _settings(path)
        for layer, pair in pairs.items():
            name = f"{layer}.weight"
            if name not in merged:
                raise CheckpointError(f"{path} has a LoRA pair for {layer}, but no {name} to merge it into")
            rank = pair.a.shape[0]
            scale = alpha / (math.sqrt(rank) if root else rank)
            merged[name] = _merge(path, name, merged[name], pair, scale)
    return merged, len(pairs)


def _pairs(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """The LoRA pairs by the layer they adapt, and all other tensors."""
    sides: dict[str, dict[str, Tensor]] = {}
    embeddings: set[str] = set()
    adapters: set[str] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = PAIR.fullmatch(name)
        if match is None:
            plain[name] = tensor
            continue
        layer = _clean(match["layer"])
        sides.setdefault(layer, {})[match["side"]] = tensor
        adapters.add(match["adapter"])
        if match["embedding"]:
            embeddings.add(layer)
    other = [name for name in plain if OTHER_ADAPTERS.search(name)]
    if other:
        raise CheckpointError(
            f"{path} holds adapters that are not plain LoRA: {', '.join(sorted(other)[:3])}, …; "
            "merge them where they were trained (merge_and_unload), then save the model again"
        )
    if len(adapters) > 1:
        raise CheckpointError(
            f"{path} holds several adapters ({', '.join(sorted(adapters))}): save the model with the one to run"
        )
    torn = sorted(layer for layer, found in sides.items() if len(found) != 2)
    if torn:
        raise CheckpointError(f"{path} holds half a LoRA pair, lora_A without lora_B or the reverse: {', '.join(torn)}")
    return {layer: Pair(found["A"], found["B"], layer in embeddings) for layer, found in sides.items()}, plain


def _plain_names(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without peft's marks; a module that was trained whole stands in place of its original."""
    plain: dict[str, Tensor] = {}
    saved: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = SAVED.fullmatch(name)
        if match is not None:
            target, key = saved, f"{match['layer']}.{match['rest']}"
        else:
            target, key = plain, name
        if ORIGINAL in key:
            continue
        key = _clean(key)
        if key in target:
            raise CheckpointError(f"{path} holds {key!r} twice, with and without peft's prefix")
        target[key] = tensor
    return plain | saved


def _clean(name: str) -> str:
    return name.replace(WRAPPED, "", 1).replace(".base_layer.", ".").removesuffix(".base_layer")


def _settings(path: Path) -> tuple[float, bool]:
    """lora_alpha, and whether it is divided by √r."""
    place = path.parent / SETTINGS
    if not place.is_file():
        raise CheckpointError(
            f"{path} holds LoRA pairs, but their scale stands in no weights file: put peft's {SETTINGS} beside it, or "
            f'write {place} with {{"peft_type": "LORA", "lora_alpha": N}}, the lora_alpha of the training'
        )
    settings = read_json(place)
    kind, alpha = settings.get("peft_type", "LORA"), settings.get("lora_alpha")
    refused = [key for key in REFUSED_SETTINGS if settings.get(key)]
    if kind != "LORA" or refused:
        what = ", ".join(refused) if kind == "LORA" else f"peft_type={kind!r}"
        raise CheckpointError(
            f"{place} has {what}: this engine merges plain LoRA only; merge it where it was trained "
            "(merge_and_unload), then save the model again"
        )
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(f"{place} has lora_alpha={alpha!r}; expected a number")
    root = settings.get("use_rslora") or False
    if not isinstance(root, bool):
        raise CheckpointError(f"{place} has use_rslora={root!r}; expected true or false")
    return float(alpha), root


def _merge(path: Path, name: str, weight: Tensor, pair: Pair, scale: float) -> Tensor:
    """W + s·B·A in W's dtype, summed in fp32; transposed where W is [in, out]."""
    a, b = pair.a, pair.b
    fits = a.ndim == b.ndim == weight.ndim == 2 and a.shape[0] == b.shape[1] >= 1
    turned = pair.embedding or CONV1D.fullmatch(name.removesuffix(".weight")) is not None
    if fits:
        shape = (a.shape[1], b.shape[0]) if turned else (b.shape[0], a.shape[1])
        fits = tuple(weight.shape) == shape
    if not fits or not all(t.is_floating_point() for t in (a, b, weight)):
        raise CheckpointError(
            f"{path}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit {name} {list(weight.shape)} "
            f"({weight.dtype})"
        )
    change = b.float() @ a.float()
    return weight.float().add(change.t() if turned else change, alpha=scale).to(weight.dtype)
