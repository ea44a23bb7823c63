"""x Wᵀ on Triton with everything around it in the same kernel: the norm before, bias, activation and residual after.

A norm is folded into the weights when the op is planned. With gain g and offset β,

    LayerNorm(x) Wᵀ + b = (x W'ᵀ − mean · rowsum(W')) / std + (W β + b),    W' = W · g,

so the GEMM runs on x as it lies in memory, and mean and std are gathered from the tiles that pass by. The head does not
fold: its weight is the tied embedding, of which there is no second copy; its rows are normalized as they are read.

Tiles come through TMA descriptors where the configuration says so (Hopper and newer) and rows are aligned, else through
pointers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rmt_kernels.configs import LinearConfig, arch_of, linear_config, split_k
from rmt_kernels.per_slot import Rows
from rmt_kernels.triton_rows import COUNTS, NUMERICS, RowNorm, as_slots, check_dtype, normalize, on
from rmt_kernels.weights import Activation, Linear, Norm


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh u) / 2 is the sigmoid of 2u
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "tanh":
        x = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    return x


@triton.jit
def weights_tile(
    d_w, p_w, FIRST: tl.constexpr, n, k, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """A tile [BK, BN] of Wᵀ from output n and input k on, of the N rows of W [·, K] from row FIRST on.

    By descriptor where there is one. Behind K are zeros; outputs behind N are anything.
    """
    if d_w is not None:
        b = d_w.load([FIRST + n, k]).T
    else:
        o_n = n + tl.arange(0, BN)
        o_k = k + tl.arange(0, BK)
        p_b = p_w + (FIRST + o_n).to(tl.int64)[None, :] * K + o_k[:, None]
        if N % BN == 0 and K % BK == 0:
            b = tl.load(p_b)
        elif K % BK == 0:
            b = tl.load(p_b, mask=(o_n < N)[None, :], other=0.0)
        else:
            b = tl.load(p_b, mask=(o_n < N)[None, :] & (o_k < K)[:, None], other=0.0)
    return b


@triton.jit
def inputs_tile(d_x, p_rows, m, k, K: tl.constexpr, BK: tl.constexpr):
    """A tile [BM, BK] of x from row m and input k on; p_rows [BM, 1] are its rows; zeros behind K."""
    if d_x is not None:
        a = d_x.load([m, k])
    else:
        o_k = k + tl.arange(0, BK)
        if K % BK == 0:
            a = tl.load(p_rows + o_k[None, :])
        else:
            a = tl.load(p_rows + o_k[None, :], mask=(o_k < K)[None, :], other=0.0)
    return a


@triton.jit
def deviations(a, pivot, k, K: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr):
    """A tile of x in fp32, for LayerNorm less the row's pivot.

    Deviations from any element of the row lose less than squares of the elements themselves.
    """
    wide = a.to(tl.float32)
    if NORM == "layer":
        wide = wide - pivot[:, None]
        if K % BK != 0:
            wide = tl.where((k + tl.arange(0, BK) < K)[None, :], wide, 0.0)
    return wide


@triton.jit
def moments(total, square, pivot, eps, K: tl.constexpr, NORM: tl.constexpr):
    """Mean and 1 / std of rows, from the sums of deviations and of their squares; of RMSNorm the mean is 0."""
    if NORM == "layer":
        shift = total / K
        scale = tl.rsqrt(tl.maximum(square / K - shift * shift, 0.0) + eps)
        mean = pivot + shift
    else:
        scale = tl.rsqrt(square / K + eps)
        mean = total  # of zeros
    return mean, scale


@triton.jit
def row_moments(d_x, p_rows, m, eps, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr):
    """Mean and 1 / std of a block of rows, ahead of everything else."""
    total = tl.zeros([BM], dtype=tl.float32)
    square = tl.zeros([BM], dtype=tl.float32)
    pivot = tl.max(tl.load(p_rows), 1).to(tl.float32)
    for k in range(0, K, BK):
        wide = deviations(inputs_tile(d_x, p_rows, m, k, K, BK), pivot, k, K, BK, NORM)
        if NORM == "layer":
            total += tl.sum(wide, 1)
        square += tl.sum(wide * wide, 1)
    return moments(total, square, pivot, eps, K, NORM)


@triton.jit
def normalized_tile(a, mean, scale, p_gain, p_offset, k, K: tl.constexpr, BK: tl.constexpr):
    """A tile of the normalized rows, rounded to their dtype as a norm of its own would; zeros behind K."""
    o_k = k + tl.arange(0, BK)
    x = (a.to(tl.float32) - mean[:, None]) * scale[:, None]
    x = x * tl.load(p_gain + o_k, mask=o_k < K, other=0.0).to(tl.float32)[None, :]
    if p_offset is not None:
        x += tl.load(p_offset + o_k, mask=o_k < K, other=0.0).to(tl.float32)[None, :]
    return x.to(a.dtype)


@triton.jit
def places(o_row, slot_rows, p_starts, slot_stride, row_stride):
    """Where rows of B slots of `slot_rows` each lie, which are a window of what is stored."""
    i_b = o_row // slot_rows
    i_t = o_row % slot_rows
    if p_starts is not None:
        i_t += tl.load(p_starts + i_b)
    return i_b.to(tl.int64) * slot_stride + i_t.to(tl.int64) * row_stride


@triton.jit(do_not_specialize=COUNTS)
def linear_kernel(
    p_x,  # [B, ·, K], rows anywhere
    d_x,  # a descriptor of [B·T, K], or None: by pointer
    p_x_starts,  # [B] int32: first row of each slot's window of x, or None
    p_w,  # [N, K]; gated: [2·N, K], gate rows first
    d_w,  # a descriptor of the same, or None: by pointer
    p_sums,  # [N] or [2·N] fp32: sums of the rows of w, for a folded LayerNorm
    p_gain,  # [K], of a norm that is not folded, or None
    p_offset,  # [K], of a norm that is not folded, or None
    p_bias,  # [N] or [2·N] fp32, or None
    p_residual,  # [B, ·, N], rows anywhere, or None
    p_residual_starts,  # [B] int32, as of x
    p_out,  # [B·T, N]; with SPLITS > 1 [SPLITS, B·T, N] fp32
    rows,  # B·T
    slot_rows,  # T
    x_slot,
    x_row,
    residual_slot,
    residual_row,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    N_BLOCKS: tl.constexpr = (N + BN - 1) // BN
    K_SHARE: tl.constexpr = ((K + BK - 1) // BK + SPLITS - 1) // SPLITS * BK
    # Programs that run together share rows and weights: GROUP tiles down, then one to the right.
    i_tile = tl.program_id(0)
    i_split = tl.program_id(1)
    i_group = i_tile // (GROUP * N_BLOCKS) * GROUP
    group_rows = tl.minimum(tl.cdiv(rows, BM) - i_group, GROUP)
    i_m = i_group + i_tile % (GROUP * N_BLOCKS) % group_rows
    i_n = i_tile % (GROUP * N_BLOCKS) // group_rows

    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    m_m = o_m < rows
    o_row = tl.minimum(o_m, rows - 1)  # rows past the end repeat the last one and are not stored
    p_rows = p_x + places(o_row, slot_rows, p_x_starts, x_slot, x_row)[:, None]

    acc = tl.zeros([BM, BN], dtype=tl.float32)
    up = tl.zeros([BM, BN], dtype=tl.float32)
    total = tl.zeros([BM], dtype=tl.float32)
    square = tl.zeros([BM], dtype=tl.float32)
    pivot = tl.zeros([BM], dtype=tl.float32)
    if p_gain is not None:
        mean, scale = row_moments(d_x, p_rows, i_m * BM, eps, K, BM, BK, NORM)
    elif NORM == "layer":
        pivot = tl.max(tl.load(p_rows), 1).to(tl.float32)
    k_start = i_split * K_SHARE
    for k in range(k_start, min(k_start + K_SHARE, K), BK):
        a = inputs_tile(d_x, p_rows, i_m * BM, k, K, BK)
        if p_gain is not None:
            a = normalized_tile(a, mean, scale, p_gain, p_offset, k, K, BK)
        b = weights_tile(d_w, p_w, 0, i_n * BN, k, N, K, BN, BK)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        if GATED:
            b = weights_tile(d_w, p_w, N, i_n * BN, k, N, K, BN, BK)
            up = tl.dot(a, b, up, input_precision="ieee")
        if NORM != "none" and p_gain is None:
            wide = deviations(a, pivot, k, K, BK, NORM)
            if NORM == "layer":
                total += tl.sum(wide, 1)
            square += tl.sum(wide * wide, 1)

    if NORM != "none" and p_gain is None:
        mean, scale = moments(total, square, pivot, eps, K, NORM)
        if NORM == "layer":
            acc -= mean[:, None] * tl.load(p_sums + o_n, mask=o_n < N, other=0.0)[None, :]
            if GATED:
                up -= mean[:, None] * tl.load(p_sums + N + o_n, mask=o_n < N, other=0.0)[None, :]
        acc = acc * scale[:, None]
        up = up * scale[:, None]
    if p_bias is not None:
        acc += tl.load(p_bias + o_n, mask=o_n < N, other=0.0)[None, :]
        if GATED:
            up += tl.load(p_bias + N + o_n, mask=o_n < N, other=0.0)[None, :]
    acc = activate(acc, "silu") * up if GATED else activate(acc, ACTIVATION)
    m_out = m_m[:, None] & (o_n < N)[None, :]
    if p_residual is not None:
        o_residual = places(o_row, slot_rows, p_residual_starts, residual_slot, residual_row)
        acc += tl.load(p_residual + o_residual[:, None] + o_n[None, :], mask=m_out, other=0.0).to(tl.float32)
    p_tile = p_out + i_split.to(tl.int64) * rows * N + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    tl.store(p_tile, acc.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=COUNTS)
def finish_kernel(
    p_parts,  # [SPLITS, B·T, N] fp32
    p_bias,  # [N] fp32, or None
    p_residual,  # [B, ·, N], rows anywhere
    p_starts,  # [B] int32: first row of each slot's window of the residual, or None
    p_weight,  # [N], of the norm
    p_offset,  # [N], of the norm
    p_out,  # [B·T, N]
    rows,
    slot_rows,
    residual_slot,
    residual_row,
    eps,
    N: tl.constexpr,
    SPLITS: tl.constexpr,
    NORM: tl.constexpr,
    BE: tl.constexpr,
):
    """norm(Σ parts + b + residual), the parts in their order."""
    i_r = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BE)
    m_n = o_n < N
    x = tl.zeros([BE], dtype=tl.float32)
    for i_split in tl.static_range(SPLITS):
        x += tl.load(p_parts + (i_split * rows + i_r) * N + o_n, mask=m_n, other=0.0)
    if p_bias is not None:
        x += tl.load(p_bias + o_n, mask=m_n, other=0.0)
    p_row = p_residual + places(i_r, slot_rows, p_starts, residual_slot, residual_row)
    x += tl.load(p_row + o_n, mask=m_n, other=0.0).to(tl.float32)
    x = normalize(x, m_n, p_weight, p_offset, o_n, eps, N, NORM)
    tl.store(p_out + i_r * N + o_n, x.to(p_out.dtype.element_ty), mask=m_n)


GROUP = 8


@dataclass(frozen=True, eq=False)
class Window:
    """`rows` rows of each slot of x [B, ·, K], from the row starts[b] on (None: from the first)."""

    x: Tensor
    starts: Tensor | None
    rows: int

    @classmethod
    def of(cls, x: Tensor, rows: Rows | None) -> Window:
        if rows is None:
            slots = as_slots(x)
            return cls(slots, None, slots.shape[1])
        narrowed, starts = rows.narrowed(x)
        return cls(as_slots(narrowed), starts, rows.count)

    def descriptor(self, block_m: int, block_k: int) -> TensorDescriptor | None:
        """Of all rows as one matrix [B·T, K]; None where they are none, or not aligned as TMA wants it."""
        batch, _, inputs = self.x.shape
        apart, row = self.x.stride(0), self.x.stride(1)
        if self.starts is not None or (batch > 1 and apart != self.rows * row) or not aligned(self.x, row):
            return None
        return TensorDescriptor(self.x, [batch * self.rows, inputs], [row, 1], [block_m, block_k])


def aligned(x: Tensor, row: int) -> bool:
    """Whether x and its rows, `row` elements apart, start at multiples of 16 bytes."""
    size = x.element_size()
    return x.data_ptr() % 16 == 0 and x.storage_offset() * size % 16 == 0 and row * size % 16 == 0


class TritonLinear:
    """f(x, rows=None), as `NormLinear`; or norm'(residual + x Wᵀ + b) with `add`, as `LinearResidual`."""

    def __init__(
        self, layer: Linear, norm: Norm | None = None, activation: Activation = "none", *, folded: bool = True
    ):
        """folded: the norm's gain multiplies a copy of the weights; else rows are normalized as they are read."""
        check_dtype("weight", layer.weight)
        weight, bias = layer.weight.detach(), layer.bias
        self.activation = activation
        self.norm, self.eps = ("none", 0.0) if norm is None else (norm.kind, norm.eps)
        self.gain: Tensor | None = None if norm is None or folded else norm.weight
        self.offset: Tensor | None = None if norm is None or folded else norm.bias
        offset = None if bias is None else bias.double()
        if norm is not None and folded:
            if norm.bias is not None:
                shift = weight.double() @ norm.bias.double()
                offset = shift if offset is None else offset + shift
            weight = (weight.double() * norm.weight.double()).to(weight.dtype)
        self.weight = weight.contiguous()
        self.sums = self.weight.double().sum(1).float() if self.norm == "layer" and folded else None
        self._descriptors: dict[tuple[int, int], TensorDescriptor | None] = {}
        self.bias = None if offset is None else offset.float()
        self.outputs = weight.shape[0] // 2 if activation == "swiglu" else weight.shape[0]

    def __call__(self, x: Tensor, rows: Rows | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
        window = self._window(x, rows)
        shape = x.shape[:-1] if rows is None else (x.shape[0], rows.count)
        out = torch.empty((*shape, self.outputs), dtype=out_dtype or x.dtype, device=x.device)
        self._launch(window, out, bias=self.bias)
        return out

    def add(self, x: Tensor, residual: Tensor, post: RowNorm, rows: Rows | None = None) -> Tensor:
        """norm'(residual + x Wᵀ + b)."""
        window, others = self._window(x, None), Window.of(residual, rows)
        out = torch.empty((*x.shape[:-1], self.outputs), dtype=x.dtype, device=x.device)
        slot_rows = window.rows
        if (others.x.shape[0], others.rows, others.x.shape[2]) != (window.x.shape[0], slot_rows, self.outputs):
            raise ValueError(f"linear: rows of {list(x.shape)} do not match the residual {list(residual.shape)}")
        config = self._config(x, slot_rows)
        splits = split_k(arch_of(x.device), config, slot_rows, *self.weight.shape)
        if splits == 1 and post.kind == "none":
            self._launch(window, out, bias=self.bias, residual=others)
            return out
        parts = torch.empty((splits, window.x.shape[0] * slot_rows, self.outputs), dtype=torch.float32, device=x.device)
        self._launch(window, parts, splits=splits)
        with on(x.device):
            finish_kernel[(parts.shape[1],)](
                parts,
                self.bias,
                others.x,
                others.starts,
                post.weight,
                post.bias,
                out,
                parts.shape[1],
                slot_rows,
                others.x.stride(0),
                others.x.stride(1),
                post.eps,
                N=self.outputs,
                SPLITS=splits,
                NORM=post.kind,
                BE=post.block,
                **post.options,
            )
        return out

    def _config(self, x: Tensor, slot_rows: int) -> LinearConfig:
        gated = self.activation == "swiglu"
        return linear_config(arch_of(x.device), x.dtype, slot_rows, self.outputs, self.weight.shape[1], gated)

    def _window(self, x: Tensor, rows: Rows | None) -> Window:
        inputs, dtype = self.weight.shape[1], self.weight.dtype
        if x.dtype != dtype or x.shape[-1] != inputs:
            raise ValueError(f"linear: expected [..., {inputs}] in {dtype}, got {list(x.shape)} in {x.dtype}")
        return Window.of(x, rows)

    def descriptor(self, block_n: int, block_k: int) -> TensorDescriptor | None:
        """Of the weights; None where their rows are not aligned as TMA wants it. Made once for each tile."""
        tile = (block_n, block_k)
        if tile not in self._descriptors:
            fits = aligned(self.weight, self.weight.shape[1])
            shape, strides = list(self.weight.shape), list(self.weight.stride())
            self._descriptors[tile] = TensorDescriptor(self.weight, shape, strides, list(tile)) if fits else None
        return self._descriptors[tile]

    def _launch(
        self,
        window: Window,
        out: Tensor,
        *,
        bias: Tensor | None = None,
        residual: Window | None = None,
        splits: int = 1,
    ) -> None:
        x, rows = window.x, window.x.shape[0] * window.rows
        config = self._config(x, window.rows)
        block_n = config.block_n // 2 if self.activation == "swiglu" else config.block_n
        tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(self.outputs, block_n)
        with on(x.device):
            linear_kernel[(tiles, splits)](
                x,
                window.descriptor(config.block_m, config.block_k) if config.tma else None,
                window.starts,
                self.weight,
                self.descriptor(block_n, config.block_k) if config.tma else None,
                self.sums,
                self.gain,
                self.offset,
                bias,
                None if residual is None else residual.x,
                None if residual is None else residual.starts,
                out,
                rows,
                window.rows,
                x.stride(0),
                x.stride(1),
                0 if residual is None else residual.x.stride(0),
                0 if residual is None else residual.x.stride(1),
                self.eps,
                N=self.outputs,
                K=x.shape[2],
                NORM=self.norm,
                ACTIVATION=self.activation,
                SPLITS=splits,
                BM=config.block_m,
                BN=block_n,
                BK=config.block_k,
                GROUP=GROUP,
                num_warps=config.warps,
                num_stages=config.stages,
                **NUMERICS,
            )
