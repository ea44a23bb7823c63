"""The graph executor's buffers, lengths, slots and steps, on a CPU: recordings that are functions called again."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from checkpoints_for_tests import TinyCheckpoint, tiny_decoder, tiny_encoder
from rmt_kernels.per_slot import PerSlot
from torch import Tensor

from rmt_engine.backbones import module_of
from rmt_engine.errors import BackendError
from rmt_engine.executors import EagerExecutor
from rmt_engine.graph_executor import GraphExecutor
from rmt_engine.graph_plan import GraphKey, keys_for, plan_graphs
from rmt_engine.recording import CudaRecorder, HostRecorder, Recording, Work, out_of_memory_first

SEGMENT = 21  # odd: a place of the ring is wider than a segment


class CountingRecorder(HostRecorder):
    """Knows how much was recorded in which pool, and has no memory for more than `most` slots."""

    def __init__(self, most: int = 64) -> None:
        self.most = most
        self.recorded = 0
        self.pools: Counter[str] = Counter()

    def record(self, work: Work, pool: str = "") -> Recording:
        recording = super().record(work, pool)
        if any(len(result) > self.most for result in recording.result):
            raise torch.OutOfMemoryError("no room")
        self.recorded += 1
        self.pools[pool] += 1
        return recording


def executors(
    tiny: TinyCheckpoint, backend: str = "cpu", most: int = 64, slots: int = 1
) -> tuple[GraphExecutor, EagerExecutor]:
    config, weights = tiny.rmt_config(SEGMENT), tiny.weights()
    backbone = module_of(config.model_type).build(config.backbone, weights, backend)
    memory = weights["memory"]
    graph = GraphExecutor(config, backbone, memory, CountingRecorder(most), slots)
    return graph, EagerExecutor(config, backbone, memory, fixed=True)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def decoder(request: pytest.FixtureRequest) -> tuple[GraphExecutor, EagerExecutor]:
    return executors(tiny_decoder(request.param, seed=5, noise="all", layers=2))


@pytest.fixture(scope="module")
def encoder() -> tuple[GraphExecutor, EagerExecutor]:
    return executors(tiny_encoder("bert", seed=3, noise="all", layers=2))


def inputs(executor: EagerExecutor, slots: int, text: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 97, (slots, text), generator=generator)
    memory = executor.initial_memory(slots)
    return ids, memory + 0.1 * torch.randn(memory.shape, generator=generator)


def check_equal(found: object, wanted: object) -> None:
    found, wanted = ((value if isinstance(value, tuple) else (value,)) for value in (found, wanted))
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape and torch.equal(one, other)


# Slots and widths of text, in an order in which each call finds what another one left in the buffers.
CALLS = [(3, SEGMENT), (1, 4), (4, 7), (2, SEGMENT), (3, 1), (1, SEGMENT), (4, 20)]


@pytest.mark.parametrize("step", ["fold", "fold_with_logits"])
def test_decoder_steps_have_the_eager_bits(step: str, decoder: tuple[GraphExecutor, EagerExecutor]) -> None:
    graph, eager = decoder
    for seed, (slots, text) in enumerate(CALLS):
        call = inputs(eager, slots, text, seed)
        check_equal(getattr(graph, step)(*call), getattr(eager, step)(*call))


def test_scores_at_the_start_and_behind_a_segment(decoder: tuple[GraphExecutor, EagerExecutor]) -> None:
    graph, eager = decoder
    for seed, (slots, text) in enumerate(CALLS):
        ids, memory = inputs(eager, slots, text, seed)
        before = torch.randn(slots, memory.shape[2], generator=torch.Generator().manual_seed(seed))
        check_equal(graph.fold_with_scores(ids, memory, None), eager.fold_with_scores(ids, memory, None))
        check_equal(graph.fold_with_scores(ids, memory, before), eager.fold_with_scores(ids, memory, before))
        begun = torch.arange(slots) % 2 == 0
        mixed = graph.fold_with_scores(ids, memory, before, begun=begun)
        check_equal(mixed, eager.fold_with_scores(ids, memory, before, begun=begun))
        alone = eager.fold_with_scores(ids[1:2], memory[1:2], None) if slots > 1 else None
        if alone is not None:  # a slot that has not begun does not look at `before`
            assert torch.allclose(mixed[1][1:2], alone[1], atol=1e-5)


def test_classifier_steps_have_the_eager_bits(encoder: tuple[GraphExecutor, EagerExecutor]) -> None:
    graph, eager = encoder
    for step in ("fold", "fold_with_logits", "logits"):
        for seed, (slots, text) in enumerate(CALLS):
            call = inputs(eager, slots, text, seed)
            check_equal(getattr(graph, step)(*call), getattr(eager, step)(*call))


def test_lengths_that_change_between_replays(decoder: tuple[GraphExecutor, EagerExecutor]) -> None:
    graph, eager = decoder
    for seed in range(4):
        ids, memory = inputs(eager, 3, SEGMENT, seed)
        lengths = torch.randint(1, SEGMENT + 1, (3,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
        check_equal(graph.fold(ids, memory, lengths), eager.fold(ids, memory, lengths))


def test_fixed_shapes_compute_what_the_text_alone_gives(decoder: tuple[GraphExecutor, EagerExecutor]) -> None:
    _, fixed = decoder
    plain = EagerExecutor(config_of(fixed), fixed.backbone, fixed.initial)
    ids, memory = inputs(plain, 2, 9)
    torch.testing.assert_close(fixed.fold(ids, memory), plain.fold(ids, memory), rtol=0, atol=1e-5)
    logits, caches = fixed.prefill(ids, memory, 5)
    wanted, plain_caches = plain.prefill(ids, memory, 5)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5)
    step = torch.tensor([[7], [9]])
    torch.testing.assert_close(fixed.decode(step, caches), plain.decode(step, plain_caches), rtol=0, atol=1e-5)


def config_of(executor: EagerExecutor) -> object:
    """What an executor asks of a config."""

    class Config:
        family, segment_size = "decoder", executor.segment_size
        num_mem_tokens = executor.layout.num_mem_tokens

    return Config()


def decoded(executor: EagerExecutor, slots: int, text: int, steps: int, seed: int) -> list[Tensor]:
    ids, memory = inputs(executor, slots, text, seed)
    logits, caches = executor.prefill(ids, memory, steps)
    all_logits = [logits]
    for _ in range(steps - 1):
        all_logits.append(executor.decode(all_logits[-1].argmax(-1)[:, None], caches))
    return all_logits


@pytest.mark.parametrize("slots, text, steps", [(1, 5, 6), (3, SEGMENT, 4), (1, 12, 33), (2, 1, 2)])
def test_prefill_and_decode(slots: int, text: int, steps: int, decoder: tuple[GraphExecutor, EagerExecutor]) -> None:
    graph, eager = decoder
    for seed in range(2):
        found, wanted = (decoded(executor, slots, text, steps, seed) for executor in (graph, eager))
        for one, other in zip(found, wanted, strict=True):
            check_equal(one, other)


def test_answers_that_take_turns_do_not_share_their_caches(decoder: tuple[GraphExecutor, EagerExecutor]) -> None:
    graph, eager = decoder
    wanted = [decoded(eager, 1, 4 + seed, 5, seed) for seed in range(3)]
    begun = [graph.prefill(*inputs(graph, 1, 4 + seed, seed), 5) for seed in range(3)]
    logits = [[first] for first, _ in begun]
    for step in range(4):
        for answer, (_, caches) in enumerate(begun):
            logits[answer].append(graph.decode(logits[answer][step].argmax(-1)[:, None], caches))
    for one, other in zip(logits, wanted, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            check_equal(mine, theirs)


def test_caches_come_back_when_an_answer_is_dropped(decoder: tuple[GraphExecutor, EagerExecutor]) -> None:
    graph, _ = decoder
    held = [graph.caches(1, 5) for _ in range(3)]
    buffers = {id(caches.recorded) for caches in held}
    assert len(buffers) == 3
    del held
    gc.collect()
    again = [graph.caches(1, 5) for _ in range(3)]
    assert {id(caches.recorded) for caches in again} == buffers


def test_slots_of_answers_filled_one_by_one(decoder: tuple[GraphExecutor, EagerExecutor]) -> None:
    """As `DecodeSlots` does: each prefilled alone, then decoded side by side, at places of their own."""

    def side_by_side(executor: EagerExecutor) -> list[Tensor]:
        room, size = SEGMENT + 4, 3
        caches = executor.caches(size, room)
        lengths = torch.zeros(size, dtype=torch.int32)
        for slot in range(size):
            ids, memory = inputs(executor, 1, 6 + 2 * slot, slot)
            _, own = executor.prefill(ids, memory, room - ids.shape[1])
            for whole, part in zip(caches, own, strict=True):
                whole.keys[slot], whole.values[slot] = part.keys[0], part.values[0]
            lengths[slot] = executor.layout.num_mem_tokens + ids.shape[1]
        results = []
        for step in range(3):
            for cache in caches:
                cache.length = PerSlot(lengths + step)
            results.append(executor.decode(torch.tensor([[7 + step], [8], [9]]), caches))
        return results

    graph, eager = decoder
    for one, other in zip(side_by_side(graph), side_by_side(eager), strict=True):
        check_equal(one, other)


def test_results_are_copies(decoder: tuple[GraphExecutor, EagerExecutor]) -> None:
    graph, eager = decoder
    first = graph.fold(*inputs(eager, 2, 9, 1))
    kept = first.clone()
    graph.fold(*inputs(eager, 2, 9, 2))
    assert torch.equal(first, kept)


def recorder_of(graph: GraphExecutor) -> CountingRecorder:
    assert isinstance(graph.recorder, CountingRecorder)
    return graph.recorder


def run_every_step(graph: GraphExecutor, slots: int, text: int) -> None:
    call = inputs(graph, slots, text)
    graph.fold(*call)
    graph.fold_with_logits(*call)
    if not graph.sizes.decoder:
        graph.logits(*call)
        return
    graph.fold_with_scores(*call, None)
    decoded(graph, slots, text, 3, 0)


@pytest.mark.parametrize("tiny", [tiny_decoder("gpt2", seed=5, layers=1), tiny_encoder("bert", seed=3, layers=1)])
@pytest.mark.parametrize("slots", [1, 3])
def test_all_that_an_engine_is_built_for_is_recorded_then(tiny: TinyCheckpoint, slots: int) -> None:
    graph, _ = executors(tiny, slots=slots)
    recorder = recorder_of(graph)
    assert set(graph.plan.keys) == set(keys_for(graph.sizes, slots)) and recorder.recorded == len(graph.plan.keys)
    at_first, planned = recorder.recorded, graph.plan
    for text in (3, SEGMENT):
        for some in range(1, slots + 1):
            run_every_step(graph, some, text)
    graph.stream_graphs(scored=graph.sizes.decoder)
    gc.collect()
    assert recorder.recorded == at_first and graph.plan == planned
    assert recorder.pools == {"stream": 4 if graph.sizes.decoder else 2, "steps": at_first - recorder.pools["stream"]}


def test_the_head_of_all_tokens_runs_once_while_an_engine_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    heads: list[tuple[int, ...]] = []
    real = GraphExecutor._logits
    monkeypatch.setattr(GraphExecutor, "_logits", lambda self, rows: (heads.append(rows.shape), real(self, rows))[1])
    graph, _ = executors(tiny_decoder("gpt2", seed=5, layers=1), slots=2)
    graph.prepare(4)
    assert [shape[0] for shape in heads] == [1]


def test_more_slots_and_longer_answers_are_recorded_on_first_use_or_when_they_are_prepared() -> None:
    graph, eager = executors(tiny_decoder("gpt2", seed=5, layers=1))
    recorder = recorder_of(graph)
    at_first = recorder.recorded
    for text in (3, 9, SEGMENT):
        for slots in (3, 4):
            graph.fold(*inputs(eager, slots, text))
    assert recorder.recorded == at_first + 1
    assert GraphKey("fold", 4) in graph.plan.keys
    graph.prepare(4, max_new_tokens=30)
    prepared = recorder.recorded
    run_every_step(graph, 4, SEGMENT)
    decoded(graph, 4, SEGMENT, 30, 0)
    assert prepared == recorder.recorded - 2  # the shorter answer's room of 16 was not asked for
    graph.prepare(4, max_new_tokens=30)
    assert recorder.recorded == prepared + 2


def test_buffers_are_as_large_as_planned(
    decoder: tuple[GraphExecutor, EagerExecutor], encoder: tuple[GraphExecutor, EagerExecutor]
) -> None:
    for graph, _ in (decoder, encoder):
        free = [recorded for answers in graph._free_answers.values() for recorded in answers]
        all_recorded = [*graph._steps.values(), *{key.room: one for one in free for key in one.recordings}.values()]
        keys = tuple(key for recorded in all_recorded for key in recorded.recordings)
        held = [buffer for recorded in all_recorded for buffer in recorded.buffers.values()]
        results = [
            x for recorded in all_recorded for key in recorded.recordings for x in recorded.recordings[key].result
        ]
        plan = plan_graphs(graph.sizes, keys)
        assert plan.buffers == sum(buffer.numel() * buffer.element_size() for buffer in held)
        assert plan.outputs == sum(result.numel() * result.element_size() for result in results)


def test_fewer_slots_where_memory_ends() -> None:
    tiny = tiny_decoder("gpt2", seed=5, layers=1)
    graph, eager = executors(tiny, most=2)
    for slots in (7, 2, 1, 5):
        call = inputs(eager, slots, 9, slots)
        wanted = [eager.fold(call[0][i : i + 2], call[1][i : i + 2]) for i in range(0, slots, 2)]
        check_equal(graph.fold(*call), torch.cat(wanted))
    assert graph.most_slots == 2
    built, _ = executors(tiny, most=2, slots=8)
    assert built.most_slots == 2 and {key.slots for key in built.plan.keys} == {1, 2}
    recorded = recorder_of(built).recorded
    check_equal(built.fold(*call), torch.cat(wanted))
    assert recorder_of(built).recorded == recorded
    with pytest.raises(torch.OutOfMemoryError):
        executors(tiny, most=0)


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda e: e.fold(torch.ones(1, SEGMENT + 1, dtype=torch.int64), e.initial_memory()),
            "at most segment_size=21",
        ),
        (lambda e: e.decode(torch.ones(1, 1, dtype=torch.int64), []), "expected caches that this executor gave"),
    ],
)
def test_what_cannot_be_meant(
    call: Callable[[GraphExecutor], object], words: str, decoder: tuple[GraphExecutor, EagerExecutor]
) -> None:
    with pytest.raises(ValueError, match=words):
        call(decoder[0])


def test_memory_that_ends_in_a_capture_is_told_as_such() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="no room"), out_of_memory_first():
        try:
            raise torch.OutOfMemoryError("no room")
        finally:
            raise RuntimeError("the capture was invalidated")
    with pytest.raises(RuntimeError, match="another fault"), out_of_memory_first():
        raise RuntimeError("another fault")


def test_a_recorder_of_graphs_says_why_it_cannot_run() -> None:
    with pytest.raises(BackendError, match="executor 'graph' cannot run: it needs a CUDA device, not 'cpu'"):
        CudaRecorder(torch.device("cpu"))
