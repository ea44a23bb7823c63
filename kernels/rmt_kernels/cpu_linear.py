"""A linear layer planned for a CPU, the floor under every CPU op that multiplies by weights.

Two ways, chosen when it is planned (`plan_linear`): our own kernel in fp32 where it is the faster one (with AVX2
alone, where oneDNN reaches two thirds of its speed and its GELU costs as much again; with AVX-512 for small weights,
where a call costs less: docs/perf_log.md), and for dtypes that the CPU has no instructions for, whose products are then
taken in fp32 and rounded once; else oneDNN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import rmt_kernels._cpu as _cpu
from rmt_kernels.weights import Linear, Norm

# activation -> oneDNN's name and algorithm. In the GEMM's epilogue an element's bits do not depend on where it stands;
# torch's own silu and tanh take another path for the last few elements of a tensor.
FUSED = {
    "none": ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
    "tanh": ("tanh", ""),
}
ROW_MULTIPLE = 16  # fewer rows would take another GEMM path of oneDNN and give other bits
# Elements of the largest fp32 weight for which ours is the faster one, by the widest instructions of the CPU.
LARGEST_OF_OURS = {"avx2": math.inf, "avx512": 2**19}


class CPULinear(Protocol):
    """f(x [..., K]) = act(x Wᵀ + b) [..., N]; also that + other, and that · other, with other [..., N]."""

    def __call__(self, x: Tensor) -> Tensor: ...
    def add(self, x: Tensor, other: Tensor) -> Tensor: ...
    def multiply(self, x: Tensor, other: Tensor) -> Tensor: ...


def plan_linear(layer: Linear, activation: str = "none", norm: Norm | None = None) -> CPULinear:
    """act(norm(x) Wᵀ + b), on whichever is faster here."""
    dtype = layer.weight.dtype
    largest = LARGEST_OF_OURS.get(_cpu.instruction_sets()[0], 0) if dtype == torch.float32 else 0
    if not has_instructions(dtype) or layer.weight.numel() <= largest:
        return NativeLinear(layer, activation, norm)
    return OneDNNLinear(layer, activation, norm)


def has_instructions(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies in `dtype`: torch would else do it element by element, twenty times slower."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype != torch.float16 or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def product(x: Tensor, layer: Linear) -> Tensor:
    """x Wᵀ + b in fp32 [..., N], of a weight that is not packed, for it is the embedding too."""
    if has_instructions(x.dtype):
        return F.linear(x, layer.weight, layer.bias).float()
    return F.linear(x.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float())


class NativeLinear:
    """Our own kernel: the norm done while rows are read, the activation before they are written.

    It computes in fp32; rows, weights and results of another dtype are converted around it. A row's bits depend neither
    on the other rows nor on the number of threads, so nothing is padded.
    """

    def __init__(
        self, layer: Linear, activation: str = "none", norm: Norm | None = None, instruction_set: str = "auto"
    ):
        self.outputs, self.inputs = layer.weight.shape
        self.dtype = layer.weight.dtype
        self.kernel = _cpu.Linear(
            layer.weight.detach().float().contiguous(),
            _fp32(layer.bias),
            "none" if norm is None else norm.kind,
            None if norm is None else _fp32(norm.weight),
            None if norm is None else _fp32(norm.bias),
            0.0 if norm is None else norm.eps,
            activation,
            instruction_set,
        )

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(x, "none", None)

    def add(self, x: Tensor, other: Tensor) -> Tensor:
        return self._run(x, "add", other)

    def multiply(self, x: Tensor, other: Tensor) -> Tensor:
        return self._run(x, "multiply", other)

    def _run(self, x: Tensor, combine: str, other: Tensor | None) -> Tensor:
        rows = self._rows(x, self.inputs)
        others = rows if other is None else self._rows(other, self.outputs)
        count = rows.shape[0]
        if others.shape[0] != count:
            raise ValueError(f"other: expected {count} rows of {self.outputs}, got {others.shape[0]}")
        out = x.new_empty(*x.shape[:-1], self.outputs, dtype=torch.float32)
        threads, stride, other_stride = torch.get_num_threads(), rows.stride(0), others.stride(0)
        self.kernel(rows.data_ptr(), count, stride, combine, others.data_ptr(), other_stride, out.data_ptr(), threads)
        return out.to(self.dtype)

    def _rows(self, x: Tensor, width: int) -> Tensor:
        """x [..., width] as fp32 rows whose elements lie side by side."""
        if x.dtype != self.dtype or x.shape[-1] != width or not x.is_cpu:
            name = str(self.dtype).removeprefix("torch.")
            raise ValueError(f"expected {name} [..., {width}] on the CPU, got {x.dtype} {list(x.shape)} on {x.device}")
        rows = x.reshape(-1, width).float()
        return rows if rows.stride(1) == 1 else rows.contiguous()


def _fp32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().float().contiguous()


class OneDNNLinear:
    """oneDNN: weights packed once, bias and activation in the GEMM's epilogue."""

    def __init__(self, layer: Linear, activation: str = "none", norm: Norm | None = None):
        self.out_features = layer.weight.shape[0]
        self.bias = layer.bias
        self.normalize = plan_norm(norm)
        self.attr, self.algorithm = FUSED[activation]
        with torch.no_grad():  # packed tensors cannot be made in inference mode
            self.weight = _pack(layer.weight.detach().contiguous())

    def __call__(self, x: Tensor) -> Tensor:
        rows, count = padded_rows(self.normalize(x))
        y = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, self.attr, [], self.algorithm)
        return y[:count].view(*x.shape[:-1], self.out_features)

    def add(self, x: Tensor, other: Tensor) -> Tensor:
        return self._binary(x, other, "add")

    def multiply(self, x: Tensor, other: Tensor) -> Tensor:
        return self._binary(x, other, "mul")

    def _binary(self, x: Tensor, other: Tensor, operation: str) -> Tensor:
        assert self.attr == "none", "oneDNN takes one operation behind a product"
        rows, count = padded_rows(self.normalize(x))
        others, _ = padded_rows(other)
        y = torch.ops.mkldnn._linear_pointwise.binary(rows, others, self.weight, self.bias, operation)
        return y[:count].view(*x.shape[:-1], self.out_features)


def _pack(weight: Tensor) -> Tensor:
    # torch before 2.12 packs an opaque oneDNN tensor, later versions a plain one.
    plain = torch._C._dispatch_has_kernel_for_dispatch_key("mkldnn::_reorder_linear_weight", "CPU")
    return torch.ops.mkldnn._reorder_linear_weight(weight if plain else weight.to_mkldnn())


def plan_norm(norm: Norm | None) -> Callable[[Tensor], Tensor]:
    """torch's norm over the last dimension; x itself without one."""
    if norm is None:
        return lambda x: x
    shape, weight, bias, eps = norm.weight.shape, norm.weight, norm.bias, norm.eps
    if norm.kind == "layer":
        return lambda x: F.layer_norm(x, shape, weight, bias, eps)
    return lambda x: F.rms_norm(x, shape, weight, eps)


def padded_rows(x: Tensor) -> tuple[Tensor, int]:
    """x [..., K] as [R, K] with R a multiple of 16, and the number of true rows."""
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    missing = -count % ROW_MULTIPLE
    return (torch.cat([rows, rows.new_zeros(missing, rows.shape[1])]) if missing else rows), count
