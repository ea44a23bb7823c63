"""What is this file? An answer for anything, as plain JSON values."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rmt_engine.backbones import module_of
from rmt_engine.checkpoint import base as hf
from rmt_engine.checkpoint.containers import NoWeightsError, read_json, read_tensors
from rmt_engine.checkpoint.families import Parts, PlainBackboneError, unwrap, word_embeddings
from rmt_engine.checkpoint.loading import is_converted, load
from rmt_engine.errors import CheckpointError


def inspect(path: str | Path) -> dict[str, Any]:
    """Say what `path` is. Never raises for what a file holds: `error` tells what is wrong with it.

    Keys: path, kind, runs (as it is), error (or None); then, as far as they are known: container, family, model_type,
    num_mem_tokens, lora_pairs (merged), tensors, parameters, dtypes, shapes, and for a converted folder its settings;
    for the authors' files `missing` (what a run still needs) and `convert` (the command).
    """
    report: dict[str, Any] = {"path": str(path), "kind": "unknown", "runs": False, "error": None}
    try:
        place = hf.locate(path)
        if is_converted(place):
            report |= _converted(place)
        else:
            _authors(place, report)
    except (NoWeightsError, PlainBackboneError) as error:
        report |= {"error": str(error), **_backbone(place)}
    except CheckpointError as error:
        report["error"] = str(error)
    return report


def _converted(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": "converted checkpoint"}
    try:
        config, weights = load(folder)
    except (CheckpointError, ValueError) as error:
        return found | {"error": str(error)}
    settings = {
        "family": config.family,
        "model_type": config.model_type,
        "num_mem_tokens": config.num_mem_tokens,
        "segment_size": config.segment_size,
        "alignment": config.alignment,
        "labels": config.labels if config.family == "encoder_classifier" else [],
        "ask_template": config.ask_template,
        "stop_ids": list(config.stop_ids),
        "drop_ids": list(config.drop_ids),
        "tokenizer": hf.has_tokenizer(folder),
    }
    return found | settings | _figures(weights) | {"runs": True}


def _backbone(folder: Path) -> dict[str, Any]:
    """A folder with a backbone's config and no recurrent weights is what `convert` wants as its base."""
    config = folder / "config.json"
    model_type = read_json(config).get("model_type") if config.is_file() else None
    if not isinstance(model_type, str):
        return {}
    return {"kind": "backbone folder", "model_type": model_type, "tokenizer": hf.has_tokenizer(folder)}


def _authors(place: Path, report: dict[str, Any]) -> None:
    """Fill `report` step by step, so that what was understood before an error is kept."""
    container = read_tensors(place)
    report |= {"kind": "weights", "container": container.kind, "file": str(container.path)}
    report |= _figures(container.tensors)
    parts = unwrap(container)
    report |= {"kind": "checkpoint in its authors' format", "family": parts.family, "model_type": parts.model_types[0]}
    report |= {"num_mem_tokens": parts.num_mem_tokens} | _figures(_distinct(parts))
    if parts.lora_pairs:
        report["lora_pairs"] = parts.lora_pairs
    kinds = " or ".join(parts.model_types)
    report["missing"] = [
        f"the Hugging Face folder of the {kinds} model that was fine-tuned: its config.json and tokenizer",
        "the segment size: text tokens of a segment (--segment-size) or rows of a whole one (--input-size)",
    ]
    size = "--segment-size N" if parts.family == "decoder" else "--input-size N"
    report["convert"] = f"rmt-engine convert {shlex.quote(report['path'])} --base DIR {size} --out DIR"


def _distinct(parts: Parts) -> dict[str, Tensor]:
    """The tensors without buffers and second names."""
    model_type = parts.model_types[0]
    tied = {**module_of(model_type).TIED, "embeddings.weight": word_embeddings(model_type)}
    return {
        name: tensor
        for name, tensor in parts.tensors.items()
        if tensor.is_floating_point() and not (name in tied and _same_place(tensor, parts.tensors.get(tied[name])))
    }


def _same_place(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and a.data_ptr() == b.data_ptr()


def _figures(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        "tensors": len(tensors),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "dtypes": dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())),
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
    }
