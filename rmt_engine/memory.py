"""What a stream is: the memory state, the unfinished rest, the text held back. In memory, and as a small file.

A state file is MAGIC, the format version, the payload's length and SHA-256, and the payload: safetensors with named
fp32 tensors (so that other families' states fit the same format) and everything else as JSON in its metadata.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from rmt_engine.config import RMTConfig
from rmt_engine.errors import StateError
from rmt_engine.scoring import Scores

MAGIC = b"RMTSTATE"
VERSION = 1
HEADER = struct.Struct("<8sIQ32s")  # magic, version, bytes of the payload, its SHA-256
MAX_BYTES = 1 << 32  # a header that claims more is damaged


@dataclass(frozen=True, eq=False)
class MemoryState:
    """A place in one stream. Nothing in it is ever written in place: a fork is the same object.

    memory: [1, M, E] in the model's dtype. rest: int64 [L], read but not folded. segments, folded: segments and tokens
    in the memory. first, size: text tokens of the first and of every other segment. length: tokens announced, or None.
    held_text, continued, held_bytes, bytes_read: text and bytes that the tokenizer still holds back. scores: of the
    segments in the memory, or None in a stream that is not scored.
    """

    memory: Tensor
    first: int
    size: int
    length: int | None = None
    rest: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    segments: int = 0
    folded: int = 0
    held_text: str = ""
    continued: bool = False
    held_bytes: bytes = b""
    bytes_read: int = 0
    scores: Scores | None = None

    @property
    def position(self) -> int:
        """Tokens read."""
        return self.folded + len(self.rest)

    @property
    def next_size(self) -> int:
        """Tokens of the segment that is being filled."""
        return self.size if self.segments else self.first


@dataclass(frozen=True)
class Origin:
    """What a state belongs to: hashes of the model and of its tokenizer, and where it was computed."""

    model: str
    tokenizer: str | None
    dtype: str
    device: str

    def check(self, ours: Origin, allow_inexact: bool = False) -> None:
        """Raises StateError unless a state of this origin can go on in an engine of `ours`."""
        if self.model != ours.model:
            raise StateError(
                "this state belongs to another model (other weights, segment size or memory): "
                "resume it with the checkpoint that made it"
            )
        if self.tokenizer and ours.tokenizer and self.tokenizer != ours.tokenizer:
            raise StateError("this state was made with another tokenizer: resume it with the tokenizer that made it")
        for name in ("dtype", "device"):
            was, now = getattr(self, name), getattr(ours, name)
            if was != now and not allow_inexact:
                raise StateError(
                    f"this state was computed with {name} {was}, this engine uses {now}: the bits would differ; "
                    f"use {name}={was}, or allow_inexact=True (--allow-inexact)"
                )


@dataclass(frozen=True)
class StateFile:
    """A state as it lies on disk. input: the place in an input that is not read to its end, or None."""

    state: MemoryState
    origin: Origin
    input: Mapping[str, Any] | None = None

    def save(self, path: str | Path) -> None:
        """Writes the file whole or not at all: the old one stays until the new one is on the disk. Raises OSError,
        StateError for a memory that is not finite."""
        if not bool(self.state.memory.isfinite().all()):
            raise StateError("the memory state is not finite (NaN or Inf): it is not saved")
        write_atomically(Path(path), self._to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> StateFile:
        """Raises StateError for everything that is wrong with the file."""
        try:
            data = _read_bounded(Path(path))
        except OSError as error:
            raise StateError(f"the state file {path} cannot be read: {error.strerror or error}") from error
        try:
            return cls._from_payload(_checked_payload(data))
        except StateError as error:
            raise StateError(f"{path}: {error}") from None

    def _to_bytes(self) -> bytes:
        apart = ("memory", "rest", "scores")
        plain = {f.name: getattr(self.state, f.name) for f in fields(MemoryState) if f.name not in apart}
        scores = self.state.scores
        about = {
            "state": plain | {"held_bytes": self.state.held_bytes.hex()},
            "origin": vars(self.origin),
            "input": self.input,
            "scores": None if scores is None else scores.sums(),
        }
        tensors = {
            "memory": self.state.memory[0].float().cpu().contiguous(),
            "rest": torch.from_numpy(np.ascontiguousarray(self.state.rest)),
        }
        if scores is not None and scores.row is not None:
            tensors["score_row"] = scores.row.float().cpu().contiguous()
        payload = safetensors.torch.save(tensors, {"rmt_state": json.dumps(about)})
        return HEADER.pack(MAGIC, VERSION, len(payload), hashlib.sha256(payload).digest()) + payload

    @classmethod
    def _from_payload(cls, payload: bytes) -> StateFile:
        try:
            tensors = safetensors.torch.load(payload)
            length = int.from_bytes(payload[:8], "little")
            about = json.loads(json.loads(payload[8 : 8 + length])["__metadata__"]["rmt_state"])
            plain = {**about["state"], "held_bytes": bytes.fromhex(about["state"]["held_bytes"])}
            sums, row = about["scores"], tensors.get("score_row")
            scores = None if sums is None else Scores.restored(sums, row)
            state = MemoryState(memory=tensors["memory"][None], rest=tensors["rest"].numpy(), scores=scores, **plain)
            origin, place = Origin(**about["origin"]), about["input"]
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise StateError(f"the checksum is right, but this is no state of version {VERSION}: {error}") from error
        if not bool(state.memory.isfinite().all()):
            raise StateError("its memory state is not finite")
        if not (_is_sound(state) and all(isinstance(v, str | None) for v in vars(origin).values())):
            raise StateError(f"the checksum is right, but what it says is of no state of version {VERSION}")
        if not isinstance(place, dict | None):
            raise StateError("the checksum is right, but its place in the input is none")
        return cls(state, origin, place)


def _is_sound(state: MemoryState) -> bool:
    """Whether everything is of the type and in the range that a stream can have."""
    length = 0 if state.length is None else state.length
    counts = (state.first, state.size, state.segments, state.folded, state.bytes_read, length)
    return (
        all(type(count) is int and count >= 0 for count in counts)
        and 1 <= state.first <= state.size
        and isinstance(state.held_text, str)
        and isinstance(state.continued, bool)
        and state.memory.ndim == 3
        and state.memory.is_floating_point()
        and state.rest.ndim == 1
        and state.rest.dtype == np.int64
        and len(state.rest) <= state.next_size
    )


def fingerprint(config: RMTConfig, weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of everything that decides what a memory state means: the weights and how segments are made."""
    digest = hashlib.sha256()
    shape = {
        "family": config.family,
        "backbone": dict(config.backbone),
        "segment_size": config.segment_size,
        "drop_ids": config.drop_ids,
        "frame": (config.cls_id, config.sep_id),
    }
    digest.update(json.dumps(shape, sort_keys=True).encode())
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_bounded(path: Path) -> bytes:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_BYTES:
            raise StateError(f"{path} has {size:,} bytes: it is no state file")
        return file.read(size + 1)


def _checked_payload(data: bytes) -> bytes:
    if len(data) < HEADER.size or not data.startswith(MAGIC):
        raise StateError("expected a state file (it begins with RMTSTATE), found something else or a part of one")
    _, version, size, digest = HEADER.unpack_from(data)
    if version != VERSION:
        raise StateError(f"the file says format version {version}; this engine reads {VERSION}")
    payload = data[HEADER.size :]
    if len(payload) != size:
        raise StateError(f"expected {size:,} bytes after the header, found {len(payload):,}: the file is not whole")
    if hashlib.sha256(payload).digest() != digest:
        raise StateError("the checksum does not fit: the file is damaged")
    return payload


def write_atomically(path: Path, data: bytes) -> None:
    """Temporary file in the same folder, fsync, rename, fsync of the folder. Raises OSError; then nothing changed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(handle, left) :]
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes the new name last. The file is whole either way."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
