"""Slots whose texts differ in length, side by side: each gives what it gives alone, and what stands behind is unseen.

`check_lengths` is the whole contract of an executor; triton_ops.py runs it on the Triton kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checkpoints_for_tests import TinyCheckpoint, tiny_decoder, tiny_encoder
from rmt_kernels.per_slot import PerSlot, Rows, added
from rmt_kernels.segment_attention import KVCache
from torch import Tensor

from rmt_engine.backbones import module_of
from rmt_engine.engine import Engine
from rmt_engine.executors import EagerExecutor

SEGMENT = 20
TOLERANCE = 1e-5  # of the greatest value: a slot alone, its text not padded
Step = Callable[[EagerExecutor, Tensor, Tensor, Tensor | None], list[Tensor]]


ENCODERS = ("bert", "roberta")


def engine_of(kind: str, backend: str, device: str = "cpu") -> Engine:
    make: Callable[..., TinyCheckpoint] = tiny_encoder if kind in ENCODERS else tiny_decoder
    checkpoint = make(kind, seed=2, noise="all", layers=2)
    return Engine.from_weights(
        checkpoint.rmt_config(SEGMENT, "left"), checkpoint.weights(), device=device, dtype="float32", backend=backend
    )


def fold(executor: EagerExecutor, ids: Tensor, memory: Tensor, lengths: Tensor | None) -> list[Tensor]:
    return [executor.fold(ids, memory, lengths)]


def fold_with_logits(executor: EagerExecutor, ids: Tensor, memory: Tensor, lengths: Tensor | None) -> list[Tensor]:
    return list(executor.fold_with_logits(ids, memory, lengths))


def fold_with_scores(executor: EagerExecutor, ids: Tensor, memory: Tensor, lengths: Tensor | None) -> list[Tensor]:
    return list(executor.fold_with_scores(ids, memory, None, lengths))


def logits(executor: EagerExecutor, ids: Tensor, memory: Tensor, lengths: Tensor | None) -> list[Tensor]:
    return [executor.logits(ids, memory, lengths)]


def answer(executor: EagerExecutor, ids: Tensor, memory: Tensor, lengths: Tensor | None) -> list[Tensor]:
    """Prefill, then two tokens."""
    first, caches = executor.prefill(ids, memory, 2, lengths)
    chosen = (torch.arange(len(ids), device=ids.device) * 0 + 7)[:, None]  # the same for a slot wherever it stands
    return [first, executor.decode(chosen, caches), executor.decode(chosen + 1, caches)]


def steps_of(kind: str) -> list[Step]:
    return [fold, fold_with_logits, logits] if kind in ENCODERS else [fold, fold_with_logits, fold_with_scores, answer]


def texts(lengths: list[int], garbage: int, device: str) -> Tensor:
    ids = torch.randint(5, 97, (len(lengths), SEGMENT), generator=torch.Generator().manual_seed(3))
    for row, length in zip(ids, lengths, strict=True):
        row[length:] = garbage  # no token at all: whoever looks at it falls
    return ids.to(device)


def difference(ours: Tensor, truth: Tensor) -> float:
    assert ours.shape == truth.shape and ours.isfinite().all()
    return float((ours - truth).abs().max() / truth.abs().max())


def check_lengths(engine: Engine, step: Step, numbers: list[int]) -> list[bool]:
    """Per slot: whether its bits are also those of the text alone, without padding."""
    device, executor = engine.device.type, engine.executor
    memory = executor.initial_memory(len(numbers))
    memory = memory + torch.randn(memory.shape, generator=torch.Generator().manual_seed(4)).to(device)
    lengths = torch.tensor(numbers, dtype=torch.int32, device=device)
    together = step(executor, texts(numbers, 10**9, device), memory, lengths)
    other = step(executor, texts(numbers, -(10**9), device), memory, lengths)
    same = []
    for b, length in enumerate(numbers):
        slot, ids = slice(b, b + 1), texts(numbers, 0, device)
        alone = step(executor, ids[slot], memory[slot], lengths[slot])
        plain = step(executor, ids[slot, :length], memory[slot], None)
        for ours, theirs, of_one, unpadded in zip(together, other, alone, plain, strict=True):
            real = slice(0, unpadded.shape[1])  # of logits and scores, those of the text
            alike = torch.equal(ours[slot, real], of_one[:, real])  # `ref` keeps no bits
            close = engine.backend == "ref" and difference(ours[slot, real], of_one[:, real]) <= TOLERANCE
            assert alike or close, "a slot must not depend on its neighbours"
            assert torch.equal(ours[slot, real], theirs[slot, real]), "what stands behind the text must not be seen"
            assert difference(ours[slot, real], unpadded) <= TOLERANCE
        same.append(
            all(torch.equal(ours[slot, : part.shape[1]], part) for ours, part in zip(together, plain, strict=True))
        )
    return same


@pytest.mark.parametrize("backend", ["ref", "cpu"])
@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama", "qwen3", "bert", "roberta"])
def test_slots_of_different_lengths_are_each_alone(kind: str, backend: str) -> None:
    engine = engine_of(kind, backend)
    for step in steps_of(kind):
        for numbers in ([SEGMENT, 7, 1], [3, SEGMENT - 1], [SEGMENT]):
            same = check_lengths(engine, step, numbers)
            assert backend == "ref" or all(same), "on a CPU a padded text has the bits of the text alone"


@pytest.mark.parametrize("backend", ["ref", "cpu"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_a_wrong_length_is_another_text(kind: str, backend: str) -> None:
    """The control: the comparison above fails where a length is off by one."""
    executor = engine_of(kind, backend).executor
    ids, memory = texts([9, 8], 5, "cpu"), executor.initial_memory(2)
    right, wrong = (torch.tensor(pair, dtype=torch.int32) for pair in ([9, 8], [9, 9]))
    for step in steps_of(kind):
        ours, theirs = step(executor, ids, memory, right)[0], step(executor, ids, memory, wrong)[0]
        assert torch.equal(ours[0, :9], theirs[0, :9])
        assert difference(ours[1:, :8], theirs[1:, :8]) > 100 * TOLERANCE


def check_replayed_decode(engine: Engine) -> None:
    """A decode step that finds its place in a tensor, to which it adds: what a captured graph does at every replay."""
    device, executor = engine.device.type, engine.executor
    numbers = torch.tensor([9, 3], dtype=torch.int32, device=device)
    ids, memory = texts([9, 3], 0, device), executor.initial_memory(2)
    chosen = torch.tensor([[7], [11]], device=device)
    _, caches = executor.prefill(ids, memory, 3, numbers)
    plain = [executor.decode(chosen + step, caches) for step in range(3)]
    _, caches = executor.prefill(ids, memory, 3, numbers)
    filled = numbers + executor.layout.num_mem_tokens
    for step in range(3):
        for cache in caches:
            cache.length = PerSlot(filled)  # as it was when the step was captured
        assert torch.equal(executor.decode(chosen + step, caches), plain[step])
        filled.add_(1)


@pytest.mark.parametrize("backend", ["ref", "cpu"])
@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama", "qwen3"])
def test_a_decode_step_can_be_replayed(kind: str, backend: str) -> None:
    check_replayed_decode(engine_of(kind, backend))


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama", "qwen3", "bert"])
def test_nothing_waits_for_a_number(kind: str) -> None:
    """On `meta` there are shapes and no numbers, and who asks for one fails: so a step can be captured and replayed."""
    engine = engine_of(kind, "ref")
    weights = {name: tensor.to("meta") for name, tensor in engine._weights.items()}
    backbone = module_of(engine.config.model_type).build(engine.config.backbone, weights, "ref")
    executor = EagerExecutor(engine.config, backbone, weights["memory"])
    ids = torch.empty(3, SEGMENT, dtype=torch.int64, device="meta")
    lengths = torch.empty(3, dtype=torch.int32, device="meta")
    for step in steps_of(kind):
        outs = step(executor, ids, executor.initial_memory(3), lengths)
        assert all(out.is_meta and out.shape[0] == 3 for out in outs)
    with pytest.raises(RuntimeError, match="meta"):
        lengths.tolist()  # the control


def test_lengths_that_cannot_be_are_refused() -> None:
    executor = engine_of("gpt2", "cpu").executor
    ids, memory = texts([4, 4], 0, "cpu"), executor.initial_memory(2)
    for numbers, words in (
        (torch.tensor([4, 0], dtype=torch.int32), r"lengths: expected 1\.\.20, got \[4, 0\]"),
        (torch.tensor([4, 21], dtype=torch.int32), r"lengths: expected 1\.\.20, got \[4, 21\]"),
        (torch.tensor([4, 4]), r"lengths: expected int32 on cpu, got torch.int64 on cpu"),
        (torch.tensor([4], dtype=torch.int32), r"lengths: expected \[B=2\], got \[1\]"),
    ):
        with pytest.raises(ValueError, match=f"^{words}$"):
            executor.fold(ids, memory, numbers)


# ------------------------------------------------------------------------------------- numbers of the slots, windows


def test_numbers_of_slots_add_up_on_the_host() -> None:
    slots = torch.tensor([3, 1], dtype=torch.int32)
    both = added(added(PerSlot(slots), 2), -1)
    assert isinstance(both, PerSlot) and both.slots is slots and both.numbers().tolist() == [4, 2]
    assert added(1, 2) == 3 and added(5, PerSlot(slots, 1)).plus == 6  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"^two numbers of each slot cannot be added on the host"):
        added(both, both)
    with pytest.raises(ValueError, match=r"^numbers of the slots: expected contiguous int32, got torch.int64$"):
        PerSlot(slots.long())


def test_a_window_is_a_view_or_each_slots_own() -> None:
    x = torch.arange(2 * 6 * 3).view(2, 6, 3)
    assert torch.equal(Rows(2, 3).of(x), x[:, 2:5]) and Rows(2, 3).of(x)._base is not None
    own = Rows(PerSlot(torch.tensor([0, 3], dtype=torch.int32), 1), 2)
    assert torch.equal(own.of(x), torch.stack([x[0, 1:3], x[1, 4:6]]))
    narrowed, starts = own.narrowed(x)
    assert torch.equal(narrowed, x[:, 1:]) and starts is not None and starts.tolist() == [0, 3]


def test_a_cache_takes_each_slots_own_rows() -> None:
    cache = KVCache(*(torch.full((2, 1, 6, 1), float("nan")) for _ in "kv"))
    k = torch.arange(1.0, 9.0).view(2, 1, 4, 1)
    lengths = torch.tensor([4, 1], dtype=torch.int32)
    cache.append(k, -k, PerSlot(lengths))
    cache.append(10 * k[:, :, :1], -k[:, :, :1], 1)
    assert isinstance(cache.length, PerSlot) and cache.length.slots is lengths and cache.length.plus == 1
    assert cache.keys[0, 0, :5, 0].tolist() == [1, 2, 3, 4, 10] and cache.keys[1, 0, :2, 0].tolist() == [5, 50]
    assert cache.values[1, 0, :2, 0].tolist() == [-5, -5]
    assert cache.keys[0, 0, 5:].isnan().all() and cache.keys[1, 0, 2:].isnan().all()
