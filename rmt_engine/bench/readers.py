"""Who reads: the engine, and the baselines of benchmarks/baselines.py. All read the same ids and are asked the same."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rmt_engine.bench.arguments import BASELINES
from rmt_engine.bench.record import ROOT
from rmt_engine.bench.setup import Loaded, Setup
from rmt_engine.bench.timing import OnStep, Run
from rmt_engine.engine import Engine, device_of, dtype_of
from rmt_engine.run import Summary
from rmt_engine.stream import Stream

ENGINE = "rmt-engine"
SOURCE = ROOT / "benchmarks" / "baselines.py"


class Reader(Protocol):
    """ids are [B, N]; what is not to be timed happens before the `Run` is given."""

    name: str

    def stream(self, ids: np.ndarray) -> Run:
        """Reads all of it -> memory state [B, M, E], the last segment's logits having been computed."""

    def segment(self, ids: np.ndarray, count: int) -> Run:
        """`count` segment steps over the same ids [B, S], each from the memory state of the one before."""


class EngineReader:
    """One document as a token file through `Engine.run`, more of them through `Engine.run_many`, a slot for each."""

    name = ENGINE

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine, self.folder = engine, folder

    def stream(self, ids: np.ndarray) -> Run:
        if len(ids) > 1:
            return lambda on_step: self._many(list(ids), on_step)
        path = self.folder / f"{ids.shape[1]}.npy"
        np.save(path, ids[0].astype(np.uint16 if self.engine.vocab_size <= 1 << 16 else np.uint32))
        return lambda on_step: self._file(path, on_step)

    def text(self, path: Path) -> Run:
        return lambda on_step: self._file(path, on_step)

    def segment(self, ids: np.ndarray, count: int) -> Run:
        executor, tensor = self.engine.executor, torch.from_numpy(ids).to(self.engine.device)

        def run(on_step: OnStep) -> Tensor:
            memory = executor.initial_memory(len(ids))
            for _ in range(count):
                memory = executor.fold(tensor, memory)
            return memory

        return run

    def _file(self, path: Path, on_step: OnStep) -> Tensor:
        for event in self.engine.run(path):
            if isinstance(event, Summary):
                return self._finished([event.stream])
            on_step()
        raise AssertionError("a run ends with its summary")

    def _many(self, documents: Sequence[np.ndarray], on_step: OnStep) -> Tensor:
        results = self.engine.run_many(documents, slots=len(documents), on_step=lambda tokens: on_step())
        streams = []
        for result in results:
            if result.error is not None:
                raise result.error
            assert result.stream is not None
            streams.append(result.stream)
        return self._finished(streams)

    def _finished(self, streams: Sequence[Stream]) -> Tensor:
        """Folds the last segments side by side and computes their logits, as the baselines do."""
        ids = torch.from_numpy(np.stack([stream.rest for stream in streams])).to(self.engine.device)
        memory = torch.cat([stream.place.memory for stream in streams])
        return self.engine.executor.fold_with_logits(ids, memory)[0]


class LoopReader:
    """A baseline, which gets its ids on the device."""

    def __init__(self, name: str, loop: Any, device: torch.device) -> None:
        self.name, self.loop, self.device = name, loop, device

    def stream(self, ids: np.ndarray) -> Run:
        tensor = self._placed(ids)
        if self.name == "full-attention":
            return lambda on_step: self.loop(tensor, on_step)
        return lambda on_step: self.loop(tensor).memory_state

    def segment(self, ids: np.ndarray, count: int) -> Run:
        tensor = self._placed(ids)

        def run(on_step: OnStep) -> Tensor:
            memory = self.loop.memory.expand(len(ids), *self.loop.memory.shape)
            for _ in range(count):
                memory = self.loop.segment(tensor, memory)[1]
            return memory.clone()

        return run

    def _placed(self, ids: np.ndarray) -> Tensor:
        return torch.from_numpy(ids).to(self.device)


def reader(name: str, setup: Setup, loaded: Loaded, folder: Path, longest: int) -> Reader:
    """The reader of that name. longest: tokens it will read at most. Raises ValueError for what cannot be compared."""
    if name == ENGINE:
        return EngineReader(setup.engine(loaded), folder)
    device = device_of(setup.device)
    dtype = dtype_of(setup.dtype, device)
    loop = _baselines().build(name, loaded.config, loaded.weights, dtype=dtype, device=device, longest=longest)
    return LoopReader(name, loop, device)


def _baselines() -> ModuleType:
    """benchmarks/baselines.py of the checkout. Raises ValueError where the package was installed without one."""
    if not SOURCE.is_file():
        raise ValueError(
            f"--against {','.join(BASELINES)} needs benchmarks/baselines.py, which is not installed with the package: "
            "run it in a checkout of the sources (make setup), or use --against none"
        )
    spec = importlib.util.spec_from_file_location("rmt_baselines", SOURCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


def check_baselines(names: Sequence[str]) -> None:
    """Tells before anything is measured that there is nothing to compare with."""
    if any(name != "none" for name in names):
        _baselines()


def random_ids(loaded: Loaded, batch: int, tokens: int) -> np.ndarray:
    """int64 [B, N] of the vocabulary, without those that the checkpoint drops; the same for every reader and run."""
    config = loaded.config
    special = {*config.drop_ids, *(i for i in (config.cls_id, config.sep_id) if i is not None)}
    allowed = np.setdiff1d(np.arange(int(config.backbone["vocab_size"])), list(special))
    return allowed[np.random.default_rng(0).integers(0, len(allowed), (batch, tokens))]
