"""The authors' files -> one folder that holds everything a run needs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from rmt_engine.checkpoint import base as hf
from rmt_engine.checkpoint.loading import is_converted, load
from rmt_engine.config import Alignment, RMTConfig
from rmt_engine.errors import CheckpointError


@dataclass(frozen=True)
class Converted:
    """What `convert` wrote. parameters: numbers in all tensors; size: bytes of model.safetensors."""

    folder: Path
    config: RMTConfig
    parameters: int
    size: int
    files: tuple[str, ...]

    @property
    def has_tokenizer(self) -> bool:
        return "tokenizer.json" in self.files


def convert(
    src: str | Path,
    out: str | Path,
    base: str | Path | None = None,
    *,
    segment_size: int | None = None,
    input_size: int | None = None,
    alignment: Alignment | None = None,
    ask_template: str | None = None,
    stop_ids: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> Converted:
    """Write `out`: config.json with its `rmt` section, model.safetensors under canonical names, the tokenizer.

    The arguments are those of `load`. The folder appears whole or not at all. An existing one is replaced only with
    `force`, and only if it is itself a converted checkpoint. Raises ValueError and CheckpointError as `load` does,
    ValueError for an `out` that is taken, OSError when it cannot be written.
    """
    source, target = hf.locate(src), Path(out).expanduser()
    if is_converted(source):
        raise ValueError(f"{src} is converted already: run it as it is")
    _check_target(target, force)
    config, weights = load(
        source,
        base=base,
        segment_size=segment_size,
        input_size=input_size,
        alignment=alignment,
        ask_template=ask_template,
        stop_ids=stop_ids,
        dtype=dtype,
    )
    tokenizer = source if base is None else hf.locate(base, hf.BASE_PATTERNS)
    write_folder(target, config, weights, tokenizer)
    return Converted(
        target,
        config,
        parameters=sum(tensor.numel() for tensor in weights.values()),
        size=(target / "model.safetensors").stat().st_size,
        files=tuple(sorted(os.listdir(target))),
    )


def write_folder(target: Path, config: RMTConfig, weights: Mapping[str, Tensor], tokenizer: Path | None = None) -> None:
    """Write a converted folder, replacing `target` in one step. tokenizer: the folder to take its files from."""
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    made = target.parent / f".{target.name}.{os.getpid()}.new"
    made.mkdir()
    try:
        if tokenizer is not None:
            hf.copy_tokenizer(tokenizer, made)
        config.save(made)
        tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(tensors, made / "model.safetensors", {"format": "pt"})
        for path in [*made.iterdir(), made]:
            _sync(path)
        _put(made, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _check_target(target: Path, force: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file; give a folder to write to")
    if not os.listdir(target):
        return
    try:
        ours = is_converted(target)
    except CheckpointError:
        ours = False
    if not force or not ours:
        advice = "give another folder, or force (--force) to replace it" if ours else "give another folder"
        what = "holds a converted checkpoint" if ours else "is not empty and holds something else"
        raise ValueError(f"{target} {what}: {advice}")


def _sync(path: Path) -> None:
    """A file, or a folder's list of names, reaches the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put(made: Path, target: Path) -> None:
    """Give `made` its name; a folder cannot be renamed over a full one, so the old one steps aside first."""
    old = target.parent / f".{target.name}.{os.getpid()}.old"
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(made, target)
    except OSError:
        if old.exists():
            os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
