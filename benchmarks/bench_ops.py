"""The operations of a segment step on a CPU, fp32, on GPT-2's shape: 512 rows, 768 wide, 12 heads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from rmt_kernels import linear_residual, lm_head, memory, norm_linear, segment_attention
from rmt_kernels.memory import Embeddings, Frame
from rmt_kernels.segment_attention import AttentionSpec
from rmt_kernels.weights import Linear, Norm
from torch import Tensor

ROWS, WIDTH, HEADS, INNER, VOCABULARY, MEMORY = 512, 768, 12, 3072, 50257, 16
BACKEND = "cpu"


def random(*shape: int) -> Tensor:
    return torch.empty(shape).normal_(0, 0.02, generator=torch.Generator().manual_seed(0))


def linear(rows: int, columns: int) -> Linear:
    return Linear(random(rows, columns), random(rows))


def norm() -> Norm:
    return Norm("layer", torch.ones(WIDTH), torch.zeros(WIDTH), 1e-5)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def test_norm_qkv(timed: BenchmarkFixture) -> None:
    op = norm_linear.plan(linear(3 * WIDTH, WIDTH), norm(), backend=BACKEND)
    assert timed(op, random(1, ROWS, WIDTH)).shape == (1, ROWS, 3 * WIDTH)


def test_norm_mlp_in(timed: BenchmarkFixture) -> None:
    op = norm_linear.plan(linear(INNER, WIDTH), norm(), "gelu_tanh", backend=BACKEND)
    assert timed(op, random(1, ROWS, WIDTH)).shape == (1, ROWS, INNER)


@pytest.mark.parametrize("inner", [WIDTH, INNER])
def test_linear_residual(timed: BenchmarkFixture, inner: int) -> None:
    op = linear_residual.plan(linear(WIDTH, inner), backend=BACKEND)
    assert timed(op, random(1, ROWS, inner), random(1, ROWS, WIDTH)).shape == (1, ROWS, WIDTH)


@pytest.mark.parametrize("rows", [ROWS, MEMORY])
def test_attention(timed: BenchmarkFixture, rows: int) -> None:
    """All rows, and the write memory's alone, as in the last layer."""
    dim = WIDTH // HEADS
    op = segment_attention.plan(AttentionSpec(HEADS, HEADS, dim, causal=True, scale=dim**-0.5), backend=BACKEND)
    q, k, v = random(1, rows, WIDTH), random(1, ROWS, WIDTH), random(1, ROWS, WIDTH)
    assert timed(op, q, k, v, length=ROWS, start=ROWS - rows).shape == (1, rows, WIDTH)


def test_read_memory(timed: BenchmarkFixture) -> None:
    op = memory.plan_read(Embeddings(random(VOCABULARY, WIDTH), random(1024, WIDTH)), backend=BACKEND)
    slots = tuple(~row for row in range(MEMORY))
    ids = torch.arange(ROWS - 2 * MEMORY)[None]
    assert timed(op, ids, random(1, MEMORY, WIDTH), Frame(slots, slots), ROWS).shape == (1, ROWS, WIDTH)


def test_write_memory(timed: BenchmarkFixture) -> None:
    op = memory.plan_write(norm(), backend=BACKEND)
    assert timed(op, random(1, MEMORY, WIDTH)).shape == (1, MEMORY, WIDTH)


def test_head_of_one_row(timed: BenchmarkFixture) -> None:
    op = lm_head.plan(Linear(random(VOCABULARY, WIDTH)), norm(), backend=BACKEND)
    assert timed(op, random(1, 1, WIDTH)).shape == (1, 1, VOCABULARY)


def test_log_probabilities(timed: BenchmarkFixture) -> None:
    op = lm_head.plan_nll(Linear(random(VOCABULARY, WIDTH)), norm(), backend=BACKEND)
    rows = 64
    assert timed(op, random(1, rows, WIDTH), torch.arange(rows)[None]).shape == (1, rows)
