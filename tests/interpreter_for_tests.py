"""Triton's interpreter for triton_ops.py: quicker, and every address must lie in the tensors of the launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

_first, _last = np.zeros(0, np.uint64), np.zeros(0, np.uint64)  # bytes of the storages, in their order


def quicken() -> None:
    """Leaves out what takes half its time: patches at each call of a device function, asserts that are off."""
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
    interpreter._get_np_dtype = partial(_numpy_type, cache(interpreter._get_np_dtype))


def _numpy_type(of_scalar: Callable[[Any], Any], kind: Any) -> Any:
    scalar = kind.scalar  # of a tensor's type, its elements'
    return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else of_scalar(scalar)


def watch() -> None:
    """An address outside of the tensors that a launch was given is an InterpreterError, as under compute-sanitizer."""
    begin, load, store = (
        interpreter.GridExecutor._init_args_hst,
        interpreter.InterpreterBuilder.create_masked_load,
        interpreter.InterpreterBuilder.create_masked_store,
    )

    def watched_begin(self: Any, args: Any, named: Any) -> Any:
        on_host = begin(self, args, named)
        _allow([*on_host[0], *on_host[1].values()])
        return on_host

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        _check(pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        _check(pointers, mask)
        return store(self, pointers, value, mask, *rest, **named)

    interpreter.GridExecutor._init_args_hst = watched_begin
    interpreter.InterpreterBuilder.create_masked_load = watched_load
    interpreter.InterpreterBuilder.create_masked_store = watched_store


def round_products(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Every sum of products is rounded to `dtype`."""
    dot = interpreter.InterpreterBuilder.create_dot

    def rounded(self: Any, *args: Any) -> Any:
        result = dot(self, *args)
        data = torch.from_numpy(np.ascontiguousarray(result.data))
        return interpreter.TensorHandle(data.to(dtype).to(data.dtype).numpy(), result.dtype)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", rounded)


@dataclass(frozen=True)
class Far:
    """What a kernel knows of a tensor; nothing lies at its address."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


@contextmanager
def far_apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Inside, launches on `meta` compute their addresses, at the corners of the grid: loads give 0, stores nothing.

    An address outside of the tensors is an error, and so is a 32-bit number that overflows. Gives the kernels' names.
    """
    launched: list[str] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        launched.append(self.__name__)
        given = {**dict(zip(self.arg_names, args, strict=False)), **{n: named[n] for n in named if n in self.arg_names}}
        launch = interpreter.GridExecutor(self.rewrite(), self.arg_names, grid, [])
        values = {n: v if n in launch.constexprs else interpreter._implicit_cvt(v) for n, v in _placed(given).items()}
        whole = (*grid, 1, 1)[:3]
        interpreter.interpreter_builder.set_grid_dim(*whole)
        for corner in product(*({0, count - 1} for count in whole)):
            interpreter.interpreter_builder.set_grid_idx(*corner)
            launch.fn(**values)

    def zeros(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        _check(pointers, mask)
        kind = pointers.get_element_ty()
        return interpreter.TensorHandle(np.zeros(pointers.data.shape, interpreter._get_np_dtype(kind)), kind)

    with monkeypatch.context() as patch:
        options = replace(interpreter.interpreter_builder.options, debug=True, sanitize_overflow=True)
        patch.setattr(interpreter.interpreter_builder, "options", options)
        patch.setattr(interpreter.InterpretedFunction, "run", run)
        patch.setattr(interpreter.InterpreterBuilder, "create_masked_load", zeros)
        patch.setattr(
            interpreter.InterpreterBuilder,
            "create_masked_store",
            lambda self, pointers, value, mask, *rest: _check(pointers, mask),
        )
        yield launched


def _placed(given: dict[str, Any]) -> dict[str, Any]:
    """Each storage at an address of its own, behind a gap."""
    free, places = 1 << 40, {}
    for tensor in (t for t in given.values() if isinstance(t, Tensor)):
        storage = tensor.untyped_storage()
        if storage._cdata not in places:
            places[storage._cdata] = free, free + storage.nbytes()
            free += storage.nbytes() + (1 << 36)
    _allow_ranges(sorted(places.values()))

    def far(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        start, _ = places[value.untyped_storage()._cdata]
        return Far(value.dtype, start + value.storage_offset() * value.element_size())

    return {name: far(value) for name, value in given.items()}


def _allow(arguments: list[Any]) -> None:
    tensors = [a.base if isinstance(a, TensorDescriptor) else a for a in arguments]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}
    _allow_ranges([(start, start + size) for start, size in sorted(storages.items())])


def _allow_ranges(ranges: list[tuple[int, int]]) -> None:
    global _first, _last
    _first = np.array([start for start, _ in ranges], np.uint64)
    _last = np.array([end for _, end in ranges], np.uint64)


def _check(pointers: Any, mask: Any) -> None:
    used = pointers.data[mask.data]
    if not used.size:
        return
    low, high = used.min(), used.max() + pointers.get_element_ty().primitive_bitwidth // 8
    place = np.searchsorted(_first, low, "right") - 1
    if place >= 0 and high <= _last[place]:  # as nearly always: all in one tensor
        return
    raise IndexError(f"bytes {low}..{high} lie outside of what the launch was given")
