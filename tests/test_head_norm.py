"""The norm of heads: `cpu` against `ref`, and `ref` against each head by itself."""

from __future__ import annotations

import pytest
import torch
from rmt_kernels import head_norm
from rmt_kernels.weights import Norm
from test_kernels import FP32, difference, named, random
from test_kernels import random_norm as any_norm

SIZES = [named(B=1, R=1, H=1, D=8), named(B=2, R=17, H=4, D=12), named(B=3, R=5, H=2, D=64)]


def random_norm(seed: int, width: int) -> Norm:
    norm = any_norm(seed, width, "rms")
    assert norm is not None
    return norm


@pytest.mark.parametrize("sizes", SIZES)
def test_every_head_has_its_own_norm(sizes: dict[str, int]) -> None:
    b, r, h, d = sizes.values()
    norm = random_norm(1, d)
    packed = random(0, b, r, 3 * h * d) * 2 + 0.5
    x = packed[..., h * d : 2 * h * d]  # keys, inside the packed projection
    kept = packed.clone()
    ref, cpu = (head_norm.plan(norm, backend=backend) for backend in ("ref", "cpu"))
    truth = ref(x)
    for i in range(h):
        head = x[..., i * d : (i + 1) * d]
        alone = head / (head.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
        assert difference(truth[..., i * d : (i + 1) * d], alone) <= FP32
    ours = cpu(x)
    assert difference(ours, truth) <= FP32
    assert ours.is_contiguous() and torch.equal(packed, kept)
    for i in range(b):
        assert torch.equal(cpu(x[i : i + 1])[0], ours[i])  # the same bits alone and in a batch


@pytest.mark.parametrize("shape", [(2, 3, 20), (3, 24), (1, 2, 3, 8)], ids=str)
@pytest.mark.parametrize("backend", ["ref", "cpu"])
def test_rows_that_are_no_heads_are_refused(shape: tuple[int, ...], backend: str) -> None:
    plan = head_norm.plan(random_norm(1, 8), backend=backend)
    with pytest.raises(ValueError, match=r"^head_norm: expected \[B, R, H·8\], got "):
        plan(torch.zeros(*shape))
