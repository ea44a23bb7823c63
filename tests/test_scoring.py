"""Scores: the op against its plain statement, every token of a stream once, and nothing as large as its logits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoints_for_tests import byte_tokenizer
from reference import split
from rmt_kernels import lm_head
from rmt_kernels.lm_head import cpu
from rmt_kernels.weights import Linear, Norm
from test_kernels import named, random, random_linear, random_norm
from test_parity import LENGTHS, SEGMENT, engine_of, random_ids, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rmt_engine.cli import main
from rmt_engine.engine import Engine
from rmt_engine.layouts import Cut
from rmt_engine.run import Checkpoints, Summary
from rmt_engine.scoring import Scores, SegmentScores, Total
from rmt_engine.tokens import Tokenizer

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
        loss = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_scored_row_has_the_same_bits_wherever_it_stands(dtype: torch.dtype) -> None:
    f, hidden, targets = nll_of(dtype), random(0, 2, 150, 768).to(dtype), targets_for(150, 2, 5000)
    whole = f(hidden, targets)
    assert torch.equal(torch.cat([f(hidden[i : i + 1], targets[i : i + 1]) for i in range(2)]), whole)
    for count in (1, 2, 15, 16, 17, 33, 64, 127, 128, 129, 149):
        assert torch.equal(f(hidden[:, :count], targets[:, :count]), whole[:, :count]), count
        assert torch.equal(f(hidden[:, -count:], targets[:, -count:]), whole[:, -count:]), count


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
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


# ------------------------------------------------------------------------------------------------------ whole streams


def expected_scores(reference: Any, ids: Tensor) -> Tensor:
    """[N] of one text: the reference's logits of all segments, one behind the other, shifted by one; and before them
    the logits of the last row of read memory, which the reference computes and leaves out."""
    logits = torch.cat(reference.forward(ids)[0])
    part = split(ids, reference.segment_size, reference.alignment)[0]
    rows = torch.cat([reference.memory, reference.model.get_input_embeddings()(part), reference.memory])
    with torch.no_grad():
        first = reference.model(inputs_embeds=rows[None], use_cache=False).logits[:, len(reference.memory) - 1]
    return torch.cat([first, logits[:-1]]).log_softmax(-1).gather(1, ids[:, None])[:, 0]


def joined(segments: list[SegmentScores]) -> np.ndarray:
    """The scores of all tokens, after a look at how the segments follow one another."""
    total = Total()
    for index, segment in enumerate(segments):
        assert (segment.index, segment.start) == (index, total.tokens)
        assert len(segment.log_probabilities) == segment.end - segment.start
        assert segment.nll == pytest.approx(-segment.log_probabilities.sum(dtype=np.float64), abs=1e-9)
        assert segment.perplexity == pytest.approx(math.exp(segment.nll / (segment.end - segment.start)))
        total = segment.total
        assert total.tokens == segment.end
    assert total.nll == pytest.approx(sum(segment.nll for segment in segments), abs=1e-9)
    return np.concatenate([segment.log_probabilities for segment in segments])


@pytest.mark.parametrize("backend", ["ref", "cpu"])
@pytest.mark.parametrize("alignment", ["left", "right", "center"])
@pytest.mark.parametrize("kind", DECODERS)
def test_every_token_once_as_the_reference_has_it(kind: str, alignment: str, backend: str) -> None:
    checkpoint = tiny(kind)
    engine, reference = engine_of(checkpoint, backend, alignment), checkpoint.reference(SEGMENT, alignment)
    for length in LENGTHS:
        ids = random_ids(checkpoint, length)
        segments = list(engine.score(ids))
        bounds = Cut.of(length, SEGMENT, alignment).bounds(length)
        assert [(segment.start, segment.end) for segment in segments] == bounds
        scores = torch.from_numpy(joined(segments))
        assert len(scores) == length
        assert float((scores - expected_scores(reference, ids)).abs().max()) <= TOLERANCE
        total = segments[-1].total
        assert total.first == -float(scores[0])
        if length > 1:  # the authors' loss, as they compute it
            logits = torch.cat(reference.forward(ids)[0])
            assert total.loss == pytest.approx(float(F.cross_entropy(logits[:-1], ids[1:])), abs=TOLERANCE)


def test_fifty_segments_add_up_to_the_reference_loss() -> None:
    checkpoint = tiny("gpt2")
    ids = random_ids(checkpoint, 50 * SEGMENT + 3)
    *_, last = engine_of(checkpoint, "cpu").score(ids)
    logits = torch.cat(checkpoint.reference(SEGMENT).forward(ids)[0])
    assert last.total.loss == pytest.approx(float(F.cross_entropy(logits[:-1].double(), ids[1:])), rel=1e-6)
    assert last.total.perplexity == pytest.approx(math.exp(last.total.nll / len(ids)))


@pytest.mark.parametrize("alignment", ["left", "right", "center"])
def test_a_file_is_scored_like_its_ids(tmp_path: Path, alignment: str) -> None:
    checkpoint = tiny("gpt2")
    engine = engine_of(checkpoint, "cpu", alignment)
    for length in LENGTHS:
        ids = random_ids(checkpoint, length).numpy()
        np.save(tmp_path / "ids.npy", ids)
        events = list(engine.run(tmp_path / "ids.npy", score=True))
        scores = [event.scores for event in events if event.scores is not None]
        truth = list(engine.score(ids))
        assert np.array_equal(joined(scores), joined(truth))
        assert [segment.total for segment in scores] == [segment.total for segment in truth]
        assert isinstance(events[-1], Summary) and events[-1].total == truth[-1].total
        assert [s.total for s in engine.score(str(tmp_path / "ids.npy"))] == [s.total for s in truth]


def test_max_n_segments_scores_what_is_read(tmp_path: Path) -> None:
    checkpoint = tiny("gpt2")
    engine, ids = engine_of(checkpoint, "cpu"), random_ids(checkpoint, 90).numpy()
    np.save(tmp_path / "ids.npy", ids)
    for count in (1, 2, 4):
        scores = list(engine.score(tmp_path / "ids.npy", max_n_segments=count))
        assert np.array_equal(joined(scores), joined(list(engine.score(ids[: count * SEGMENT]))))


def test_without_being_asked_nothing_is_scored(tmp_path: Path) -> None:
    checkpoint = tiny("gpt2")
    engine, ids = engine_of(checkpoint, "cpu"), random_ids(checkpoint, 50).numpy()
    np.save(tmp_path / "ids.npy", ids)
    *steps, summary = engine.run(tmp_path / "ids.npy")
    assert all(event.scores is None for event in [*steps, summary]) and summary.total is None
    with pytest.raises(ValueError, match=r"not scored: make it with engine\.stream\(score=True\)"):
        engine.stream().scores()


@pytest.mark.parametrize("step", [1, 7, SEGMENT, 3 * SEGMENT])
def test_scores_do_not_depend_on_the_pieces_and_leave_the_stream_as_it_is(step: int) -> None:
    checkpoint = tiny("llama")
    engine, ids = engine_of(checkpoint, "cpu"), random_ids(checkpoint, 67)
    plain, stream = engine.stream(), engine.stream(score=True)
    plain.feed(ids)
    for start in range(0, len(ids), step):
        stream.feed(ids[start : start + step])
        read = min(start + step, len(ids))
        if step >= 7:
            *_, last = engine.score(ids[:read])
            assert stream.scores().total == last.total
    assert torch.equal(stream.memory, plain.memory) and np.array_equal(stream.rest, plain.rest)
    before = stream.place
    twin = stream.fork()
    twin.feed(ids[:30])
    assert twin.scores().total.tokens == 97 and stream.place is before
    *_, last = engine.score(torch.cat([ids, ids[:30]]))
    assert twin.scores().total == last.total


def test_scored_tokens_can_be_asked_about(tmp_path: Path) -> None:
    checkpoint = tiny("gpt2", noise="all")
    engine = Engine.from_weights(
        checkpoint.rmt_config(SEGMENT),
        checkpoint.weights(),
        Tokenizer(byte_tokenizer().to_str()),
        device="cpu",
        backend="cpu",
    )
    (tmp_path / "a.txt").write_text("the kitchen is where Mary went, and then she went away again")
    *_, plain = engine.run(tmp_path / "a.txt")
    *_, scored = engine.run(tmp_path / "a.txt", score=True)
    for question in ("Mary?", "where is Mary?"):  # the one shares the last segment, the other needs its own
        assert scored.stream.ask(question) == plain.stream.ask(question)
    assert scored.stream.generate(5) == plain.stream.generate(5)
    assert scored.stream.scores().total == scored.total
    assert scored.total.tokens == len(engine.tokenizer.encode((tmp_path / "a.txt").read_text()))


@pytest.mark.parametrize("place", [1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 55])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_stream_has_the_scores_of_one_that_never_stopped(tmp_path: Path, dtype: str, place: int) -> None:
    checkpoint = tiny("gpt2")
    engine = Engine.from_weights(checkpoint.rmt_config(SEGMENT), checkpoint.weights(), device="cpu", dtype=dtype)
    ids = random_ids(checkpoint, 90)
    stream = engine.stream(score=True)
    stream.feed(ids[:place])
    stream.save(tmp_path / "a.state")
    resumed = engine.resume(tmp_path / "a.state")
    for one in (stream, resumed):
        one.feed(ids[place:])
    ours, truth = resumed.scores(), stream.scores()
    assert ours.total == truth.total
    assert ours.last is not None and truth.last is not None
    assert np.array_equal(ours.last.log_probabilities, truth.last.log_probabilities)


def test_a_run_goes_on_with_its_scores_or_says_why_not(tmp_path: Path) -> None:
    checkpoint = tiny("gpt2")
    engine, ids = engine_of(checkpoint, "cpu"), random_ids(checkpoint, 90).numpy()
    np.save(tmp_path / "ids.npy", ids)
    *_, truth = engine.run(tmp_path / "ids.npy", score=True)
    events = engine.run(tmp_path / "ids.npy", score=True, checkpoints=Checkpoints(tmp_path / "a.state"))
    first = [next(events) for _ in range(3)]
    events.close()
    rest = list(engine.run(tmp_path / "ids.npy", score=True, resume=tmp_path / "a.state"))
    assert rest[-1].total == truth.total
    assert len(joined([event.scores for event in first + rest if event.scores is not None])) == len(ids)

    *_, plain = engine.run(tmp_path / "ids.npy", checkpoints=Checkpoints(tmp_path / "plain.state"))
    with pytest.raises(ValueError, match=r"plain\.state was read without scores, and what is folded cannot be scored"):
        list(engine.run(tmp_path / "ids.npy", score=True, resume=tmp_path / "plain.state"))
    *_, unscored = engine.run(tmp_path / "ids.npy", resume=tmp_path / "a.state")
    assert unscored.total is None and torch.equal(unscored.stream.memory, plain.stream.memory)


def test_a_classifier_has_nothing_to_score(tmp_path: Path) -> None:
    checkpoint = tiny("bert")
    engine = engine_of(checkpoint, "cpu")
    np.save(tmp_path / "ids.npy", random_ids(checkpoint, 30).numpy())
    message = "this checkpoint is a classifier: it predicts labels, not tokens, so there is nothing to score"
    for call in (
        lambda: engine.stream(length=30, score=True),
        lambda: list(engine.score(random_ids(checkpoint, 30))),
        lambda: list(engine.run(tmp_path / "ids.npy", score=True)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_ids_that_cannot_be_scored_are_told() -> None:
    engine = engine_of(tiny("gpt2"), "cpu")
    with pytest.raises(ValueError, match="expected at least one token id: there is nothing to score"):
        list(engine.score([]))
    with pytest.raises(ValueError, match="expected 1-D integer token ids"):
        list(engine.score(torch.zeros(2, 3, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"token id 271 at place 1 is outside 0\.\.270"):
        list(engine.score([0, 271]))


@pytest.mark.parametrize("alignment", ["left", "right"])
def test_a_long_stream_holds_no_more_than_a_short_one(alignment: str) -> None:
    """Constant in the length: what is carried, and what any operation makes."""
    checkpoint = tiny("gpt2")
    engine, largest = engine_of(checkpoint, "cpu", alignment), []
    for count in (5, 50):
        with Largest() as seen:
            *_, last = engine.score(random_ids(checkpoint, count * SEGMENT))
        assert len(last.log_probabilities) == SEGMENT
        largest.append(seen.elements)
    assert largest[0] == largest[1]


# ---------------------------------------------------------------------------------------------------- command line


def test_the_command_line_prints_and_writes_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("Mary went to the kitchen. " * 100)
    truth = list(Engine.from_pretrained(device="cpu").score(tmp_path / "a.txt"))
    command = ["run", "--device", "cpu", "--input", str(tmp_path / "a.txt"), "--score"]
    assert main([*command, "--score-output", str(tmp_path / "scores.jsonl"), "--json", "--ask", "Where is Mary?"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["score"] == truth[-1].total.to_dict() and result["answers"]
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert lines == [segment.to_dict() for segment in truth] and len(lines) > 3
    assert main(command) == 0
    total = truth[-1].total
    assert f"score of {total.tokens:,} tokens: perplexity {total.perplexity:,.4g}, " in capsys.readouterr().out
    assert main([*command[:-1], "--score-output", str(tmp_path / "x.jsonl")]) == 2
    assert "--score-output needs --score" in capsys.readouterr().err
    assert not (tmp_path / "x.jsonl").exists()


def test_an_infinite_perplexity_is_null_in_json() -> None:
    values = Total(1, 1e6, 1e6).to_dict()
    assert values["perplexity"] is None and json.loads(json.dumps(values)) == values
