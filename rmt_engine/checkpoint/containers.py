"""Files and folders that hold weights -> named tensors. Nothing here knows what the names mean.

A file is recognised by its first bytes, not by its name. Tensors are mapped from the file, not copied. Pickles go
through PyTorch's weights-only reader and nothing else; no other file of a folder is ever opened.
"""

from __future__ import annotations

import json
import os
import re
import stat
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rmt_engine.errors import CheckpointError

MAX_HEADER = 100_000_000  # bytes of names and shapes; safetensors has the same cap
MAX_JSON = 64_000_000
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
LOOSE_SUFFIXES = (".safetensors", ".pth", ".pt")
SHARD_NAME = re.compile(r"[\w-][\w.-]*\.(safetensors|bin)")
NUMBERED = re.compile(r"(?P<stem>.+)-\d+-of-\d+\.(?P<suffix>safetensors|bin)")


class NoWeightsError(CheckpointError):
    """A folder without a file of weights."""


@dataclass(frozen=True)
class Container:
    """What a file or folder holds.

    path: the file that was read (for shards: the index). kind: a word for it. tensors: dense, on the CPU, in the dtype
    of the file, mapped from it. metadata: of a safetensors header.
    """

    path: Path
    kind: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)


def read_tensors(path: str | Path) -> Container:
    """Read a weights file, or the weights of a folder.

    Raises CheckpointError when there are none, or the file is empty, damaged, or holds more than tensors.
    """
    path = Path(path)
    if path.is_dir():
        path = weights_file(path)
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    kind = _kind_of(path)
    return _read_safetensors(path) if kind == "safetensors" else _read_pickle(path)


def weights_file(folder: Path) -> Path:
    """The one file of `folder` to read: the usual names, the same under model_best/, or a single loose file."""
    for place in (folder, folder / "model_best"):
        for name in WEIGHT_FILES:
            if (place / name).is_file():
                return place / name
    if (folder / "model_best.pth").is_file():
        return folder / "model_best.pth"
    names = sorted(os.listdir(folder))
    _check_no_lone_shards(folder)
    loose = [name for name in names if name.endswith(LOOSE_SUFFIXES)]
    if len(loose) == 1:
        return folder / loose[0]
    if loose:
        raise CheckpointError(f"{folder} holds several weight files ({', '.join(loose)}): name the one to read")
    found = ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "nothing"
    raise NoWeightsError(
        f"{folder} holds no weights: expected one of {', '.join(WEIGHT_FILES)}, model_best/ or model_best.pth; "
        f"found {found}"
    )


def _check_no_lone_shards(folder: Path) -> None:
    """Shards whose index was not copied with them cannot be told from a part of them."""
    for place in (folder, folder / "model_best"):
        shards = [
            match for name in (os.listdir(place) if place.is_dir() else ()) if (match := NUMBERED.fullmatch(name))
        ]
        if shards:
            index = f"{shards[0]['stem']}.{shards[0]['suffix']}.index.json"
            raise CheckpointError(
                f"{place} holds shards of weights ({min(match[0] for match in shards)}, …) without their index: "
                f"copy {index} too"
            )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError, also for one that is absurdly large or deep."""
    try:
        _check_regular(path, MAX_JSON)
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {_first_line(error)}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def _check_regular(path: Path, limit: int | None = None) -> int:
    """Size of a regular file: a pipe or a device would never end."""
    try:
        info = path.stat()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(info.st_mode):
        raise CheckpointError(f"{path} is not a regular file")
    if limit is not None and info.st_size > limit:
        raise CheckpointError(f"{path} holds {info.st_size} bytes; expected at most {limit}")
    return info.st_size


def _kind_of(path: Path) -> str:
    """`safetensors` or `pickle`, by the first bytes."""
    size = _check_regular(path)
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes): copy or download it again")
    if head.startswith(b"PK\x03\x04"):
        return "pickle"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER:
        return "safetensors"
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` where it came from")
    if head[:1] == b"\x80":
        raise CheckpointError(
            f"{path} is a bare pickle, as written by PyTorch before 1.6 or by other programs, which this engine does "
            "not open: load it where it was written and save its state dict with torch.save of a newer PyTorch"
        )
    raise CheckpointError(
        f"{path} ({size} bytes, starting with {head[:8]!r}) is neither a safetensors file nor one of torch.save: "
        "name the checkpoint's weights, or copy them again if they should be"
    )


def _read_safetensors(path: Path) -> Container:
    size = _check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except Exception as error:  # the parser's own type, and torch's for a dtype it lacks
        raise CheckpointError(
            f"{path} ({size} bytes) is not a whole safetensors file: {_first_line(error)}; copy or download it again"
        ) from error
    return Container(path, "safetensors", tensors, metadata)


def _read_shards(index: Path) -> Container:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected a weight_map from tensor names to files")
    files = sorted({str(file) for file in weight_map.values()})
    strange = [file for file in files if not SHARD_NAME.fullmatch(file)]
    if strange:
        raise CheckpointError(f"{index} names files that are not shards beside it: {', '.join(strange)}")
    absent = [file for file in files if not (index.parent / file).is_file()]
    if absent:
        raise CheckpointError(f"{index} names shards that are not there: {', '.join(absent)}; copy all of them")
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        shard = read_tensors(index.parent / file)
        tensors |= {name: tensor for name, tensor in shard.tensors.items() if weight_map.get(name) == file}
        metadata |= shard.metadata
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise CheckpointError(f"{index} promises tensors that its shards lack: {', '.join(missing)}")
    return Container(index, f"{len(files)} shards", tensors, metadata)


def _read_pickle(path: Path) -> Container:
    size = _check_regular(path)
    _check_archive(path, size)
    data = _weights_only(path)
    kind = "torch.save"
    if isinstance(data, Mapping) and isinstance(data.get("model_state_dict"), Mapping):
        data, kind = data["model_state_dict"], "trainer's torch.save"
    if not isinstance(data, Mapping) or not data:
        raise CheckpointError(f"{path} holds {_words_for(data)}; expected tensors by name, or a model_state_dict")
    wrong = [f"{name!r}: {_words_for(t)}" for name, t in data.items() if not _is_dense(name, t, size)]
    if wrong:
        raise CheckpointError(f"{path} holds more than dense tensors by name: {', '.join(wrong)}")
    return Container(path, kind, {name: tensor.detach() for name, tensor in data.items()})


def _check_archive(path: Path, size: int) -> None:
    """torch.save stores without compression: an entry that would unfold, or that reaches past the end, is refused."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile raises half a dozen types on a damaged directory
        raise CheckpointError(
            f"{path} ({size} bytes) is a torn torch.save file: {_first_line(error)}; copy or download it again"
        ) from error
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise CheckpointError(f"{path}: entry {entry.filename!r} is compressed, which torch.save never does")
        if entry.header_offset + entry.file_size > size:
            raise CheckpointError(f"{path}: entry {entry.filename!r} reaches past the end of the file ({size} bytes)")
    pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > MAX_HEADER:
        raise CheckpointError(f"{path} is a zip archive, but not one that torch.save wrote (it needs one data.pkl)")


class _Ignored:
    """Stands for a numpy value in a pickle: the first trainer saved its metrics as numpy scalars beside the weights.
    Nothing of numpy runs, and what it would have made is thrown away."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


_NUMPY_NAMES = (
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
)


def _weights_only(path: Path) -> Any:
    allowed: list[Any] = [(_Ignored, name) for name in _NUMPY_NAMES]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle can raise anything
        name = re.search(r"GLOBAL (\S+)", str(error))
        if name is None:
            raise CheckpointError(
                f"{path} is a damaged torch.save file: {_first_line(error)}; copy or download it again"
            ) from error
        raise CheckpointError(
            f"{path} holds more than tensors (it asks for {name[1]}), and this engine runs no code from a file. "
            "If you trust it, load it with the code that wrote it and save the weights alone: "
            "torch.save(model.state_dict(), 'weights.pth')"
        ) from error


def _is_dense(name: object, tensor: object, size: int) -> bool:
    """A plain CPU tensor that claims no more bytes than its file has."""
    if not isinstance(name, str) or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    assert isinstance(tensor, Tensor)
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= size


def _words_for(value: object) -> str:
    if isinstance(value, Mapping):
        keys = [str(key) for key in list(value)[:8]]
        return f"a dictionary of {', '.join(keys)}" if keys else "an empty dictionary"
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.layout} on {value.device}"
    return f"a {type(value).__name__}"


def _first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    return text[:200] or type(error).__name__
