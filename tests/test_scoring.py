"""Scores: the op against its plain statement, every token of a stream once, and nothing as large as its logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from rmt_kernels import lm_head
from rmt_kernels.lm_head import cpu
from rmt_kernels.weights import Linear, Norm
from test_kernels import named, needs_bf16, random, random_linear, random_norm
from test_parity import SEGMENT, engine_of, random_ids, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rmt_engine.scoring import Scores, Total

DECODERS = ["gpt2", "gpt2-untied", "llama", "llama-tied-llama3"]
TOLERANCE = 2e-5  # nats

# ---------------------------------------------------------------------------------------------------------- the op


def targets_for(rows: int, batch: int, vocab: int) -> Tensor:
    targets = torch.randint(0, vocab, (batch, rows), generator=torch.Generator().manual_seed(rows))
    targets[:, 0], targets[0, -1] = vocab - 1, 0
    targets[-1, rows // 2] = -1
    return targets


@pytest.mark.parametrize("norm", ["none", "layer", "rms"])
@pytest.mark.parametrize(
    "sizes",
    [
        named(B=1, R=1, K=8, V=2),
        named(B=2, R=21, K=60, V=271),
        named(B=3, R=100, K=33, V=cpu.TILE_COLUMNS + 1),
        named(B=1, R=130, K=32, V=2 * cpu.TILE_COLUMNS),
    ],
)
def test_nll_is_the_log_softmax_of_the_logits(sizes: dict[str, int], norm: str) -> None:
    b, r, k, v = sizes.values()
    hidden, targets = random(0, b, r, k, scale=3), targets_for(r, b, v)
    for bias in (True, False):
        layer, final = random_linear(1, k, v, bias), random_norm(5, k, norm)
        logits = lm_head.plan(layer, final, backend="ref")(hidden)
        loss = torch.nn.functional.cross_entropy(
            logits.double().flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none"
        )
        for backend in ("ref", "cpu"):
            ours = lm_head.plan_nll(layer, final, backend=backend)(hidden, targets)
            assert ours.dtype == torch.float32 and ours.shape == (b, r)
            assert float((ours + loss.view(b, r)).abs().max()) <= TOLERANCE
            assert ours[-1, r // 2] == 0


def test_nll_of_logits_far_from_zero() -> None:
    layer = Linear(torch.tensor([[1000.0], [-1000.0], [999.0]]))
    targets = torch.tensor([[0, 1, 2, -1]])
    for backend in ("ref", "cpu"):
        ours = lm_head.plan_nll(layer, None, backend=backend)(torch.ones(1, 4, 1), targets)[0]
        beside = math.log1p(math.exp(-1))
        assert ours.tolist() == pytest.approx([-beside, -2000 - beside, -1 - beside, 0], abs=1e-4)  # fp32 near 1000


def nll_of(dtype: torch.dtype, backend: str = "cpu", k: int = 768, v: int = 5000) -> Any:
    layer = random_linear(1, k, v, bias=False)
    norm = Norm("rms", torch.ones(k, dtype=dtype), None, 1e-5)
    return lm_head.plan_nll(Linear(layer.weight.to(dtype)), norm, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)], ids=str)
def test_a_scored_row_has_the_same_bits_wherever_it_stands(dtype: torch.dtype) -> None:
    f, hidden, targets = nll_of(dtype), random(0, 2, 150, 768).to(dtype), targets_for(150, 2, 5000)
    whole = f(hidden, targets)
    assert torch.equal(torch.cat([f(hidden[i : i + 1], targets[i : i + 1]) for i in range(2)]), whole)
    for count in (1, 2, 15, 16, 17, 33, 64, 127, 128, 129, 149):
        assert torch.equal(f(hidden[:, :count], targets[:, :count]), whole[:, :count]), count
        assert torch.equal(f(hidden[:, -count:], targets[:, -count:]), whole[:, -count:]), count


@needs_bf16
def test_with_another_number_of_rows_the_bits_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    hidden, targets = random(0, 1, 512, 768).bfloat16(), targets_for(512, 1, 5000)
    found = []
    for rows in (16, 32, 128, 512):
        monkeypatch.setattr(cpu, "TILE_ROWS", rows)
        found.append(nll_of(torch.bfloat16)(hidden, targets))
    if all(torch.equal(found[0], other) for other in found):
        pytest.skip("on this machine a row's bits do not depend on the number of rows")


class Largest(TorchDispatchMode):
    """The most elements that one result of any torch operation has, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not function.is_view:
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)], ids=str)
def test_no_logits_of_all_rows_or_of_the_whole_vocabulary(dtype: torch.dtype) -> None:
    rows, width, vocab = 500, 16, 50_000
    hidden, targets = random(0, 1, rows, width).to(dtype), targets_for(rows, 1, vocab)
    largest = {}
    for backend in ("ref", "cpu"):
        f = nll_of(dtype, backend, width, vocab)
        with Largest() as seen:
            f(hidden, targets)
        largest[backend] = seen.elements
    assert largest["ref"] == rows * vocab  # it is seen when it is there
    assert largest["cpu"] == cpu.TILE_ROWS * cpu.TILE_COLUMNS < rows * vocab / 90


# ------------------------------------------------------------------------------------------------- one segment step


@pytest.mark.parametrize("backend", ["ref", "cpu"])
@pytest.mark.parametrize("kind", DECODERS)
def test_a_segment_is_scored_and_folded_in_one_step(kind: str, backend: str) -> None:
    checkpoint = tiny(kind, noise="all")
    engine, reference = engine_of(checkpoint, backend), checkpoint.reference(SEGMENT)
    executor, memory, before = engine.executor, checkpoint.memory, None
    for index, length in enumerate((SEGMENT, 7, 1, SEGMENT)):
        ids = random_ids(checkpoint, length, seed=index)
        logits, truth = reference.segment(ids, memory)
        ours, scores, row = executor.fold_with_scores(ids[None], memory[None], before)
        expected = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        assert (scores[0, 1:] - expected).abs().max() <= TOLERANCE if length > 1 else True
        assert float((ours[0] - truth).abs().max()) <= TOLERANCE
        folded = executor.fold(ids[None], memory[None])
        assert torch.equal(ours, folded) or (backend == "ref" and float((ours - folded).abs().max()) <= TOLERANCE)
        after = executor.backbone.head(row[:, None])[0, 0]
        assert float((after - logits[-1]).abs().max()) <= TOLERANCE
        memory, before = truth, row


def test_totals() -> None:
    scores = Scores()
    assert scores.total == Total()
    row = torch.zeros(1, 2)
    scores = scores.add(torch.tensor([-3.0, -1.0]).numpy(), row).add(torch.tensor([-2.0]).numpy(), row)
    total = scores.total
    assert (total.tokens, total.nll, total.first) == (3, 6.0, 3.0)
    assert total.loss == 1.5 and total.perplexity == math.exp(2) and total.bits_per_token == 2 / math.log(2)
    assert scores.last is not None and scores.last.total == total
    assert (scores.last.index, scores.last.start, scores.last.end, scores.last.nll) == (1, 2, 3, 2.0)
    assert Total(1, 3.0, 3.0).loss is None
    assert Total(1, 1e6, 1e6).perplexity == math.inf
