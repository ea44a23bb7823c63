"""lm_head on Triton. Rows are normalized as they are read: folding the norm would copy the tied embedding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmt_kernels.checks import dims
from rmt_kernels.configs import arch_of, default_linear_config
from rmt_kernels.lm_head import LMHead, LogProbabilities
from rmt_kernels.triton_linear import (
    TritonLinear,
    Window,
    inputs_tile,
    normalized_tile,
    row_moments,
    weights_tile,
)
from rmt_kernels.triton_rows import COUNTS, NUMERICS, on
from rmt_kernels.weights import Linear, Norm

# Columns of the vocabulary that one program sums. Fixed, so that the order of a sum does not depend on the rows.
PART_COLUMNS = 2048
JOINED_ROWS = 64


@triton.jit(do_not_specialize=COUNTS)
def nll_kernel(
    p_x,  # [R, K]
    d_x,  # a descriptor of it, or None: by pointer
    p_w,  # [V, K]
    d_w,  # a descriptor of it, or None: by pointer
    p_gain,  # [K], of the norm, or None
    p_offset,  # [K], of the norm, or None
    p_bias,  # [V], or None
    p_targets,  # [R] int64
    p_maximum,  # [parts, R] fp32: of the part's logits · log2(e)
    p_weight,  # [parts, R] fp32: sum of 2^(logit · log2(e) - maximum)
    p_chosen,  # [parts, R] fp32: the target's logit where the part holds it, else 0
    rows,  # R
    eps,
    V: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    PART: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    i_m = tl.program_id(0)
    i_part = tl.program_id(1)
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < rows
    o_row = tl.minimum(o_m, rows - 1).to(tl.int64)
    p_rows = p_x + (o_row * K)[:, None]
    target = tl.load(p_targets + o_row)
    maximum = tl.full([BM], float("-inf"), dtype=tl.float32)
    weight = tl.zeros([BM], dtype=tl.float32)
    chosen = tl.zeros([BM], dtype=tl.float32)
    if p_gain is not None:
        mean, scale = row_moments(d_x, p_rows, i_m * BM, eps, K, BM, BK, NORM)
    for n in range(i_part * PART, min(i_part * PART + PART, V), BN):
        o_v = n + tl.arange(0, BN)
        logits = tl.zeros([BM, BN], dtype=tl.float32)
        for k in range(0, K, BK):
            a = inputs_tile(d_x, p_rows, i_m * BM, k, K, BK)
            if p_gain is not None:
                a = normalized_tile(a, mean, scale, p_gain, p_offset, k, K, BK)
            logits = tl.dot(a, weights_tile(d_w, p_w, 0, n, k, V, K, BN, BK), logits, input_precision="ieee")
        if p_bias is not None:
            logits += tl.load(p_bias + o_v, mask=o_v < V, other=0.0).to(tl.float32)[None, :]
        chosen += tl.sum(tl.where(o_v[None, :] == target[:, None], logits, 0.0), 1)
        logits = tl.where((o_v < V)[None, :], logits * 1.4426950408889634, float("-inf"))
        higher = tl.maximum(maximum, tl.max(logits, 1))
        weight = weight * tl.exp2(maximum - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
        maximum = higher
    o_out = i_part.to(tl.int64) * rows + o_m
    tl.store(p_maximum + o_out, maximum, mask=m_m)
    tl.store(p_weight + o_out, weight, mask=m_m)
    tl.store(p_chosen + o_out, chosen, mask=m_m)


@triton.jit(do_not_specialize=COUNTS)
def join_nll_kernel(
    p_targets,  # [R] int64
    p_lengths,  # [B] int32, or None: of every slot's rows, how many are asked for
    p_maximum,  # [parts, R] fp32
    p_weight,
    p_chosen,
    p_out,  # [R] fp32
    rows,
    slot_rows,
    parts,
    BM: tl.constexpr,
):
    """Log-probabilities of the targets from the parts of the vocabulary, in their order; 0 where none is asked for."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    m_m = o_m < rows
    maximum = tl.load(p_maximum + o_m, mask=m_m, other=0.0)
    weight = tl.load(p_weight + o_m, mask=m_m, other=1.0)
    chosen = tl.load(p_chosen + o_m, mask=m_m, other=0.0)
    for i in range(1, parts):
        other = tl.load(p_maximum + i * rows + o_m, mask=m_m, other=0.0)
        higher = tl.maximum(maximum, other)
        share = tl.exp2(other - higher) * tl.load(p_weight + i * rows + o_m, mask=m_m, other=1.0)
        weight = weight * tl.exp2(maximum - higher) + share
        chosen += tl.load(p_chosen + i * rows + o_m, mask=m_m, other=0.0)
        maximum = higher
    probability = chosen - 0.6931471805599453 * (maximum + tl.log2(weight))
    nothing = tl.load(p_targets + o_m, mask=m_m, other=-1) < 0
    if p_lengths is not None:
        nothing = nothing | (o_m % slot_rows >= tl.load(p_lengths + o_m // slot_rows, mask=m_m, other=0))
    probability = tl.where(nothing, 0.0, probability)
    tl.store(p_out + o_m, probability, mask=m_m)


def plan(layer: Linear, norm: Norm | None) -> LMHead:
    linear = TritonLinear(layer, norm, folded=False)
    return lambda hidden: linear(hidden, out_dtype=torch.float32)


def plan_nll(layer: Linear, norm: Norm | None) -> LogProbabilities:
    linear = TritonLinear(layer, norm, folded=False)
    vocabulary, width = linear.weight.shape
    parts = triton.cdiv(vocabulary, PART_COLUMNS)

    def log_probabilities(hidden: Tensor, targets: Tensor, lengths: Tensor | None = None) -> Tensor:
        bound = dims("hidden", hidden, "B R E", E=width)
        dims("targets", targets, "B R", **bound)
        x, targets = hidden.contiguous(), targets.contiguous()
        if lengths is not None:
            dims("lengths", lengths, "B", B=bound["B"])
        config = default_linear_config(arch_of(x.device), x.dtype, bound["R"])
        window, rows = Window(x, None, bound["R"]), targets.numel()
        out = torch.empty(targets.shape, dtype=torch.float32, device=x.device)
        maximum, weights, chosen = (torch.empty((parts, rows), dtype=out.dtype, device=x.device) for _ in range(3))
        with on(x.device):
            nll_kernel[(triton.cdiv(rows, config.block_m), parts)](
                x,
                window.descriptor(config.block_m, config.block_k) if config.tma else None,
                linear.weight,
                linear.descriptor(config.block_n, config.block_k) if config.tma else None,
                linear.gain,
                linear.offset,
                linear.bias,
                targets,
                maximum,
                weights,
                chosen,
                rows,
                linear.eps,
                V=vocabulary,
                K=width,
                NORM=linear.norm,
                PART=PART_COLUMNS,
                BM=config.block_m,
                BN=config.block_n,
                BK=config.block_k,
                num_warps=config.warps,
                num_stages=config.stages,
                **NUMERICS,
            )
            join_nll_kernel[(triton.cdiv(rows, JOINED_ROWS),)](
                targets,
                lengths,
                maximum,
                weights,
                chosen,
                out,
                rows,
                bound["R"],
                parts,
                BM=JOINED_ROWS,
                num_warps=2,
                **NUMERICS,
            )
        return out

    return log_probabilities
