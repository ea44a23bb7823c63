"""A checkpoint -> RMTConfig and weights under canonical names, every tensor accounted for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmt_engine.backbones import module_of
from rmt_engine.checkpoint import base as hf
from rmt_engine.checkpoint.containers import read_json, read_tensors
from rmt_engine.checkpoint.families import Parts, label_layer, unwrap, word_embeddings
from rmt_engine.config import Alignment, RMTConfig
from rmt_engine.errors import CheckpointError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ENCODER_EXTRA = 3  # [CLS] and two [SEP] of every segment


def load(
    path: str | Path,
    *,
    base: str | Path | None = None,
    segment_size: int | None = None,
    input_size: int | None = None,
    alignment: Alignment | None = None,
    ask_template: str | None = None,
    stop_ids: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[RMTConfig, dict[str, Tensor]]:
    """Load a converted folder, or the authors' files with what those do not say.

    path: a converted folder; a weights file or folder of the authors' code; a hub id. base: the backbone's Hugging Face
    folder or hub id, for the authors' files. segment_size: S, text tokens of a segment, or input_size: rows of a whole
    segment, memory and special tokens included. The others replace what the checkpoint or its family says.

    Returns the config and the weights: canonical Hugging Face names (a tied head left out) and `memory` [M, E], in
    `dtype`, or as stored. Raises ValueError for a missing or impossible argument, CheckpointError for everything that
    is wrong with a file.
    """
    place = hf.locate(path)
    if is_converted(place):
        if base is not None:
            raise ValueError(f"{path} is a converted folder and holds its backbone's config: leave out base")
        config, weights = _load_converted(place)
        size = _segment_size(config.family, config.num_mem_tokens, segment_size, input_size, config.segment_size)
    else:
        parts = unwrap(read_tensors(place))
        size = _segment_size(parts.family, parts.num_mem_tokens, segment_size, input_size, None)
        config, weights = _load_foreign(parts, _base_folder(place, base), size)
    changes: dict[str, Any] = {"segment_size": size, "alignment": alignment, "ask_template": ask_template}
    changes["stop_ids"] = None if stop_ids is None else tuple(stop_ids)
    config = replace(config, **{key: value for key, value in changes.items() if value is not None})
    if dtype is not None:
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    return config, weights


def is_converted(path: Path) -> bool:
    """Whether `path` is a folder that `convert` wrote."""
    config = path / "config.json"
    return path.is_dir() and config.is_file() and "rmt" in read_json(config)


def tokenizer_folder(path: str | Path, base: str | Path | None = None) -> Path | None:
    """The folder whose tokenizer belongs to what `load` would load, or None where there is none."""
    folder = hf.locate(path) if base is None else hf.locate(base, hf.BASE_PATTERNS)
    return folder if folder.is_dir() and hf.has_tokenizer(folder) else None


def _load_converted(folder: Path) -> tuple[RMTConfig, dict[str, Tensor]]:
    config = RMTConfig.from_folder(folder)
    container = read_tensors(folder)
    shapes = _expected(config.backbone, config.num_mem_tokens, len(container.tensors), folder / "config.json")
    return config, fit(container.path, container.tensors, shapes)


def _load_foreign(parts: Parts, folder: Path, segment_size: int) -> tuple[RMTConfig, dict[str, Tensor]]:
    backbone = hf.read_config(folder)
    model_type = backbone["model_type"]
    if model_type not in parts.model_types:
        raise CheckpointError(
            f"{parts.path} wraps a {' or '.join(parts.model_types)} model, but {folder} is the folder of a {model_type}"
        )
    if parts.family == "encoder_classifier":
        return _encoder(parts, folder, backbone, segment_size)
    size, module = parts.num_mem_tokens, module_of(model_type)
    shapes = _expected(backbone, size, len(parts.tensors), folder / "config.json")
    weights = fit(parts.path, parts.tensors, shapes, module.TIED, module.IGNORED, parts.stray)
    stop_ids = hf.eos_ids(folder, backbone)
    return RMTConfig("decoder", backbone, size, segment_size, "left", stop_ids=stop_ids), weights


def _encoder(
    parts: Parts, folder: Path, backbone: dict[str, Any], segment_size: int
) -> tuple[RMTConfig, dict[str, Tensor]]:
    vocab = _set_vocabulary(parts, folder, backbone)
    _set_labels(parts, backbone)
    size, module, words = (
        parts.num_mem_tokens,
        module_of(backbone["model_type"]),
        word_embeddings(backbone["model_type"]),
    )
    shapes = _expected(backbone, size, len(parts.tensors), folder / "config.json")
    shapes[words] = (vocab + size, shapes.pop("memory")[1])
    tied = {**module.TIED, "embeddings.weight": words}
    weights = fit(parts.path, parts.tensors, shapes, tied, module.IGNORED, parts.stray)
    extended = weights[words]
    weights[words], weights["memory"] = extended[:vocab], extended[vocab:]
    ids = _checked_special_ids(parts, folder, backbone)
    config = RMTConfig(
        "encoder_classifier",
        backbone,
        size,
        segment_size,
        "right",
        drop_ids=_dropped(ids),
        cls_id=ids["cls"],
        sep_id=ids["sep"],
    )
    return config, weights


def _set_vocabulary(parts: Parts, folder: Path, backbone: dict[str, Any]) -> int:
    """V, the words that are not memory. A base that was saved after it was wrapped counts the memory rows too."""
    vocab, start = backbone["vocab_size"], parts.memory_start
    assert start is not None
    if vocab not in (start, start + parts.num_mem_tokens):
        raise CheckpointError(
            f"{parts.path}: the memory rows begin at {start}, but the vocabulary of {folder} has {vocab} words: "
            "this is not the backbone that was fine-tuned"
        )
    backbone["vocab_size"] = start
    return start


def _set_labels(parts: Parts, backbone: dict[str, Any]) -> None:
    """The config of a pretrained base knows two nameless labels; the classifier's rows tell how many there are."""
    head = parts.tensors[label_layer(backbone["model_type"])]
    classes = head.shape[0] if head.ndim else 0
    if len(backbone.get("id2label") or {}) != classes and 0 < classes < 2**20:
        backbone["id2label"] = {str(i): f"LABEL_{i}" for i in range(classes)}
        backbone["label2id"] = {name: int(i) for i, name in backbone["id2label"].items()}


def _checked_special_ids(parts: Parts, folder: Path, backbone: Mapping[str, Any]) -> dict[str, int]:
    """Ids by name, from the checkpoint's buffers, which must agree with the tokenizer; pad is not among those."""
    own = {name.removesuffix("_token"): i for name, i in parts.special.items()}
    tokenizer = hf.special_ids(folder)
    for name in own:
        if tokenizer and tokenizer.get(name) != own[name]:
            raise CheckpointError(
                f"{parts.path} was trained with {name} id {own[name]}, but the tokenizer in {folder} has "
                f"{tokenizer.get(name)}: this is not the tokenizer that was used"
            )
    pad = tokenizer.get("pad", backbone.get("pad_token_id"))
    if not isinstance(pad, int):
        raise CheckpointError(f"{folder} names no padding token, neither in its tokenizer nor in config.json")
    return {"pad": pad, **own}


def _dropped(ids: Mapping[str, int]) -> tuple[int, ...]:
    """Ids removed from the text. One that serves two purposes is kept: the authors' mask is 1 minus the number of
    purposes, and everything but 0 keeps."""
    values = list(ids.values())
    return tuple(sorted(i for i in values if values.count(i) == 1))


def _base_folder(place: Path, base: str | Path | None) -> Path:
    if base is not None:
        return hf.locate(base, hf.BASE_PATTERNS)
    if (place / "config.json").is_file() and "model_type" in read_json(place / "config.json"):
        return place
    raise ValueError(
        f"{place} is in its authors' format, which does not hold the backbone's config: give base (--base), "
        "the Hugging Face folder or hub id of the model that was fine-tuned"
    )


def _segment_size(family: str, size: int, segment_size: int | None, input_size: int | None, default: int | None) -> int:
    """S, from either of the two numbers that the authors' scripts take."""
    extra = 2 * size if family == "decoder" else size + ENCODER_EXTRA
    parts = f"2×{size} memory tokens" if family == "decoder" else f"{size} memory and {ENCODER_EXTRA} special tokens"
    if input_size is not None:
        if input_size <= extra:
            raise ValueError(f"input_size={input_size} leaves no room for text beside {parts}; use more than {extra}")
        if segment_size not in (None, input_size - extra):
            raise ValueError(
                f"segment_size={segment_size} and input_size={input_size} disagree: with {parts} "
                f"segment_size is {input_size - extra}; give one of them"
            )
        return input_size - extra
    segment_size = default if segment_size is None else segment_size
    if segment_size is None:
        raise ValueError(
            "the authors' files do not hold the segment size: give segment_size (--segment-size), the text tokens of a "
            f"segment, or input_size (--input-size), which counts {parts} too"
        )
    return segment_size


def width(backbone: Mapping[str, Any]) -> int:
    """E."""
    return int(backbone["n_embd"] if "n_embd" in backbone else backbone["hidden_size"])


def _expected(backbone: Mapping[str, Any], size: int, tensors: int, path: Path) -> dict[str, tuple[int, ...]]:
    """Canonical names -> shapes, `memory` too. A config of more layers than the file has tensors is stopped before
    they are listed."""
    layers = backbone.get("n_layer", backbone.get("num_hidden_layers"))
    if not isinstance(layers, int) or layers > tensors:
        raise CheckpointError(f"{path} speaks of {layers!r} layers, but the checkpoint has only {tensors} tensors")
    try:
        shapes = module_of(str(backbone["model_type"])).parameter_shapes(backbone)
        return {**shapes, "memory": (size, width(backbone))}
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{path} is not a whole config: {type(error).__name__} {error}") from error


@dataclass
class Problems:
    """Everything that is wrong with a set of tensors, so that one error can name it all."""

    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, words: Iterable[str]) -> None:
        for word in words:
            self.found.setdefault(kind, []).append(word)

    def raise_if_any(self, path: Path) -> None:
        if self.found:
            text = "; ".join(f"{kind}: {', '.join(words)}" for kind, words in self.found.items())
            raise CheckpointError(f"{path} does not fit its config. {text}")


def fit(
    path: Path,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    tied: Mapping[str, str] | None = None,
    ignored: Sequence[str] = (),
    stray: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Exactly the tensors of `shapes`, checked: aliases of tied ones resolved, old buffers left out.

    Raises one CheckpointError that names every missing, stray, misshapen, contradictory or non-finite tensor.
    """
    problems = Problems()
    tensors = {name: t for name, t in tensors.items() if not any(re.fullmatch(old, name) for old in ignored)}
    aliases = {alias: name for alias, name in (tied or {}).items() if alias not in shapes}
    problems.add("tied in the config but different", _resolve_tied(tensors, aliases))
    known = {name: tensor for name, tensor in tensors.items() if name in shapes}
    misshapen = {name for name, tensor in known.items() if tuple(tensor.shape) != tuple(shapes[name])}
    odd = {name for name, tensor in known.items() if tensor.dtype not in FLOATS}
    sound = [name for name in known if name not in misshapen | odd]
    problems.add("missing", sorted(set(shapes) - set(known)))
    problems.add("stray", sorted({*stray, *(set(tensors) - set(known))}))
    shapes_found = [f"{n} is {list(known[n].shape)}, expected {list(shapes[n])}" for n in sorted(misshapen)]
    problems.add("wrong shape", shapes_found)
    problems.add("wrong dtype", [f"{name} is {known[name].dtype}" for name in sorted(odd)])
    problems.add("not finite", [name for name in sound if not _finite(known[name])])
    problems.raise_if_any(path)
    return {name: known[name] for name in shapes}


def _resolve_tied(tensors: dict[str, Tensor], aliases: Mapping[str, str]) -> list[str]:
    """Leave one name to each tied tensor, whichever were there; the pairs that are not the same after all."""
    clashes = []
    for alias, name in aliases.items():
        if alias in tensors:
            other = tensors.pop(alias)
            if not _same(tensors.setdefault(name, other), other):
                clashes.append(f"{alias} and {name}")
    return clashes


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))


def _finite(tensor: Tensor) -> bool:
    """NaN and Inf both reach one of the extremes, and no copy of the tensor is made."""
    if tensor.numel() == 0:
        return True
    low, high = tensor.aminmax()
    return bool(torch.isfinite(low) and torch.isfinite(high))
