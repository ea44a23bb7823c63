"""A context is a file: saving, resuming and forking change no bit, and a wrong file is refused with the reason."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints_for_tests import tiny_decoder, tiny_encoder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rmt_engine.memory
from rmt_engine import Engine, NumericalError, StateError, Stream
from rmt_engine.cli import main
from rmt_engine.memory import HEADER, MemoryState, StateFile
from rmt_engine.run import Checkpoints, Summary

TEXT = "Mary went to the garden. Ünïcödé — 花園 and plain words follow; then more of them.\n" * 40


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained(device="cpu")


def same(one: MemoryState, other: MemoryState) -> bool:
    """Every field, to the bit."""
    return all(_equal(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(MemoryState))


def _equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and np.array_equal(a, b)
    return a == b


def summary_of(events: object) -> Summary:
    *_, last = events  # type: ignore[misc]
    assert isinstance(last, Summary)
    return last


# ---------------------------------------------------------------------------------------------------- save and resume


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, len(TEXT.encode())), min_size=1, max_size=4), as_bytes=st.booleans())
def test_resuming_is_as_if_it_had_never_stopped(
    engine: Engine, tmp_path: Path, cuts: list[int], as_bytes: bool
) -> None:
    whole = engine.stream()
    data = TEXT.encode() if as_bytes else TEXT
    whole.feed(data)
    stream = engine.stream()
    start = 0
    for cut in sorted(min(cut, len(data)) for cut in cuts):
        stream.feed(data[start:cut])
        stream.save(tmp_path / "a.state")
        stream, start = engine.resume(tmp_path / "a.state"), cut
    stream.feed(data[start:])
    assert same(stream.place, whole.place)
    stream.finish(), whole.finish()
    assert same(stream.place, whole.place)


def test_a_state_in_the_middle_of_a_character(engine: Engine, tmp_path: Path) -> None:
    data = "words 花園 more words".encode()
    cut = data.index("花".encode()) + 1
    stream = engine.stream()
    stream.feed(data[:cut])
    stream.save(tmp_path / "a.state")
    resumed = engine.resume(tmp_path / "a.state")
    assert resumed.place.held_bytes == data[cut - 1 : cut]
    resumed.feed(data[cut:])
    resumed.flush()
    assert np.array_equal(resumed.rest, engine.tokenizer.encode(data.decode()))


def test_a_fork_and_its_origin_go_their_own_ways(engine: Engine) -> None:
    stream = engine.stream()
    stream.feed(TEXT)
    before = stream.place
    fork = stream.fork()
    fork.feed("and something else altogether. " * 50)
    assert stream.place is before
    assert not torch.equal(fork.memory, stream.memory)


def test_a_state_is_small(engine: Engine, tmp_path: Path) -> None:
    stream = engine.stream()
    stream.feed(TEXT * 20)
    stream.save(tmp_path / "a.state")
    assert (tmp_path / "a.state").stat().st_size < 8 * 128 * 4 + 112 * 8 + 2500
    assert [path.name for path in tmp_path.iterdir()] == ["a.state"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_states_keep_their_bits(tmp_path: Path, dtype: str) -> None:
    engine = Engine.from_pretrained(device="cpu", dtype=dtype, backend="ref")  # `cpu` needs instructions for them
    stream = engine.stream()
    stream.feed(TEXT)
    stream.save(tmp_path / "a.state")
    assert same(engine.resume(tmp_path / "a.state").place, stream.place)


# ------------------------------------------------------------------------------------------------------ what is refused


def saved(engine: Engine, path: Path) -> Path:
    stream = engine.stream()
    stream.feed(TEXT)
    stream.save(path)
    return path


def test_a_state_of_another_model_tokenizer_or_dtype_is_refused(engine: Engine, tmp_path: Path) -> None:
    path = saved(engine, tmp_path / "a.state")
    tiny = tiny_decoder("gpt2")
    other = Engine.from_weights(tiny.rmt_config(20), tiny.weights(), device="cpu")
    with pytest.raises(StateError, match="belongs to another model"):
        other.resume(path)
    half = Engine.from_pretrained(device="cpu", dtype="bfloat16", backend="ref")
    with pytest.raises(StateError, match=r"computed with dtype float32, this engine uses bfloat16.*--allow-inexact"):
        half.resume(path)
    assert half.resume(path, allow_inexact=True).position == engine.resume(path).position
    state = StateFile.load(path)
    moved = dataclasses.replace(state, origin=dataclasses.replace(state.origin, tokenizer="0" * 64))
    moved.save(tmp_path / "b.state")
    with pytest.raises(StateError, match="another tokenizer"):
        engine.resume(tmp_path / "b.state")


def test_the_same_weights_under_another_segment_size_are_another_model(engine: Engine, tmp_path: Path) -> None:
    path = saved(engine, tmp_path / "a.state")
    with pytest.raises(StateError, match="another model"):
        Engine.from_pretrained(device="cpu", segment_size=100).resume(path)


def test_every_flipped_bit_is_found(engine: Engine, tmp_path: Path) -> None:
    path = saved(engine, tmp_path / "a.state")
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    places = {*range(HEADER.size * 8), *rng.integers(0, len(data) * 8, size=1500).tolist()}
    for place in places:
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        with pytest.raises(StateError):
            StateFile.load(path)
        data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)
    StateFile.load(path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: b"", "expected a state file"),
        (lambda data: b"hello" * 100, "expected a state file"),
        (lambda data: data[:-1], "the file is not whole"),
        (lambda data: data + b"x", "the file is not whole"),
        (lambda data: data[:8] + b"\x02" + data[9:], "format version 2; this engine reads 1"),
    ],
)
def test_what_is_wrong_is_named(engine: Engine, tmp_path: Path, damage, words: str) -> None:  # type: ignore[no-untyped-def]
    path = saved(engine, tmp_path / "a.state")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StateError, match=words):
        engine.resume(path)


def test_a_missing_file_and_a_folder(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cannot be read: No such file"):
        engine.resume(tmp_path / "none")
    with pytest.raises(StateError, match="cannot be read: Is a directory"):
        engine.resume(tmp_path)


def test_a_failed_save_leaves_the_old_state(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(engine, tmp_path / "a.state")
    old = path.read_bytes()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rmt_engine.memory.os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        engine.stream().save(path)
    assert path.read_bytes() == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.state"]


# ------------------------------------------------------------------------------------------------ runs that are cut off


@pytest.fixture(scope="module")
def inputs(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    text = TEXT * 12
    (folder / "a.txt").write_text(text, encoding="utf-8")
    (folder / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    np.save(folder / "a.npy", engine.tokenizer.encode(text).astype(np.uint16))
    return {name: folder / name for name in ("a.txt", "a.txt.gz", "a.npy")}


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.npy"])
@pytest.mark.parametrize("alignment", ["left", "right"])
def test_a_run_cut_off_again_and_again(
    engine: Engine, inputs: dict[str, Path], tmp_path: Path, name: str, alignment: str
) -> None:
    whole = summary_of(engine.run(inputs[name], alignment=alignment)).stream.place
    rng, resume = np.random.default_rng(1), None
    for _ in range(8):
        events = engine.run(
            inputs[name], alignment=alignment, checkpoints=Checkpoints(tmp_path / "a.state"), resume=resume
        )
        for _ in range(int(rng.integers(1, 9))):
            next(events)
        events.close()
        resume = tmp_path / "a.state"
    last = summary_of(engine.run(inputs[name], checkpoints=Checkpoints(resume), resume=resume))
    assert same(last.stream.place, whole)
    again = summary_of(engine.run(inputs[name], resume=resume))
    assert again.read == 0, "the same command after the end reads nothing twice"
    assert same(again.stream.place, whole)


def test_checkpoints_come_every_so_many_tokens(engine: Engine, inputs: dict[str, Path], tmp_path: Path) -> None:
    checkpoints, seen = Checkpoints(tmp_path / "a.state", every=1000), set()
    for _ in engine.run(inputs["a.npy"], checkpoints=checkpoints):
        seen.add(checkpoints.saved_at)
    gaps = np.diff(sorted(position for position in seen if position is not None))
    assert len(gaps) > 5
    assert gaps[:-1].min() >= 1000
    assert gaps.max() <= 1000 + 112


def test_another_text_follows_a_state_that_is_complete(engine: Engine, inputs: dict[str, Path], tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "a.state")
    summary_of(engine.run(inputs["a.txt"], checkpoints=checkpoints))
    more = tmp_path / "more.txt"
    more.write_text("and so it went on. " * 100, encoding="utf-8")
    resumed = summary_of(engine.run(more, resume=checkpoints.path)).stream
    stream = engine.stream()
    stream.feed(inputs["a.txt"].read_text(encoding="utf-8"))
    stream.flush()
    stream.feed(more.read_text(encoding="utf-8"))
    stream.flush()
    assert same(resumed.place, stream.place)


def test_an_input_that_changed_is_not_gone_on_with(engine: Engine, inputs: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "a.txt"
    copy.write_bytes(inputs["a.txt"].read_bytes())
    events = engine.run(copy, checkpoints=Checkpoints(tmp_path / "a.state"))
    next(events), next(events)
    events.close()
    copy.write_bytes(inputs["a.txt"].read_bytes() + b"more")
    with pytest.raises(Exception, match="the file has changed"):
        summary_of(engine.run(copy, resume=tmp_path / "a.state"))


def test_text_cannot_follow_a_stream_aligned_for_its_length(
    engine: Engine, inputs: dict[str, Path], tmp_path: Path
) -> None:
    checkpoints = Checkpoints(tmp_path / "a.state")
    summary_of(engine.run(inputs["a.npy"], alignment="right", checkpoints=checkpoints))
    with pytest.raises(ValueError, match="aligned for exactly"):
        summary_of(engine.run(inputs["a.txt"], resume=checkpoints.path))


# --------------------------------------------------------------------------------------------------------- NaN and Inf


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_memory_that_is_not_finite_is_found_within_the_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: dict[str, Path], bad: float
) -> None:
    engine = Engine.from_pretrained(device="cpu")
    fold, count = engine.executor.fold, 0

    def breaks(ids: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        new = fold(ids, memory).clone()
        if count == 6:
            new[0, 3, 5] = bad
        return new

    monkeypatch.setattr(engine.executor, "fold", breaks)
    checkpoints = Checkpoints(tmp_path / "a.state")
    with pytest.raises(NumericalError, match=r"not finite after segment 5 \(tokens 560 to 671\)"):
        summary_of(engine.run(inputs["a.npy"], checkpoints=checkpoints))
    kept = StateFile.load(tmp_path / "a.state").state
    assert (kept.segments, kept.folded) == (5, 560)
    monkeypatch.undo()
    whole = summary_of(engine.run(inputs["a.npy"])).stream.place
    assert same(summary_of(engine.run(inputs["a.npy"], resume=tmp_path / "a.state")).stream.place, whole)


def test_feeding_stops_at_the_last_finite_state(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.from_pretrained(device="cpu")
    ids = np.arange(112 * 5) % 2000 + 1
    reference = engine.stream()
    reference.feed(ids[: 112 * 3 + 1])
    fold = engine.executor.fold
    broken = {"left": 4}

    def breaks(segment: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        broken["left"] -= 1
        return fold(segment, memory) * (float("nan") if broken["left"] == 0 else 1.0)

    monkeypatch.setattr(engine.executor, "fold", breaks)
    stream = engine.stream()
    with pytest.raises(NumericalError, match="after segment 3"):
        stream.feed(ids)
    assert stream.segments == 3
    assert torch.equal(stream.memory, reference.memory)


# -------------------------------------------------------------------------------------------------------- command line


def test_save_and_ask_on_the_command_line(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = str(tmp_path / "a.state")
    assert (
        main(["run", "--input", str(inputs["a.txt"]), "--save-state", state, "--ask", "Where is Mary?", "--json"]) == 0
    )
    first = json.loads(capsys.readouterr().out)
    assert main(["ask", "--resume", state, "Where is Mary?", "Where is John?", "--json"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["answers"][0] == first["answers"][0]
    assert second["tokens"] == first["tokens"]
    assert main(["ask", "--resume", str(inputs["a.txt"]), "Where is Mary?"]) == 3
    assert "expected a state file" in capsys.readouterr().err
    in_half = ["ask", "--resume", state, "--dtype", "bfloat16", "--backend", "ref"]
    assert main([*in_half, "Where is Mary?"]) == 3
    assert main([*in_half, "--allow-inexact", "Where is Mary?"]) == 0
    assert main(["run", "--input", str(inputs["a.txt"]), "--checkpoint-every", "5"]) == 2
    assert "--checkpoint-every needs --save-state" in capsys.readouterr().err


def test_what_cannot_be_saved_is_told_before_reading(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["run", "--input", str(inputs["a.txt"]), "--save-state"]
    assert main([*run, str(tmp_path)]) == 2
    assert "is a directory: give a file to save the state in" in capsys.readouterr().err
    assert main([*run, str(tmp_path / "none" / "a.state")]) == 2
    assert f"there is no folder {tmp_path / 'none'} to save the state in" in capsys.readouterr().err


def test_ctrl_c_saves_and_says_so(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    take, count = Stream.take, 0

    def interrupted(self: Stream, ids: np.ndarray, **text: object) -> None:
        nonlocal count
        count += 1
        if count == 7:
            raise KeyboardInterrupt
        take(self, ids, **text)

    monkeypatch.setattr(Stream, "take", interrupted)
    state = str(tmp_path / "a.state")
    assert main(["run", "--input", str(inputs["a.txt"]), "--save-state", state]) == 130
    assert f"the state at token 672 is saved: go on with --resume {state}" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["run", "--input", str(inputs["a.txt"]), "--resume", state, "--save-state", state]) == 0
    engine = Engine.from_pretrained(device="cpu")
    assert same(engine.resume(state).place, summary_of(engine.run(inputs["a.txt"])).stream.place)


def test_an_encoder_state_resumes_too(tmp_path: Path) -> None:
    tiny = tiny_encoder("bert")
    engine = Engine.from_weights(tiny.rmt_config(20, "left"), tiny.weights(), device="cpu")
    ids = torch.randint(5, 90, (150,)).numpy()
    whole, stream = engine.stream(), engine.stream()
    whole.feed(ids)
    stream.feed(ids[:77])
    stream.save(tmp_path / "a.state")
    resumed = engine.resume(tmp_path / "a.state")
    resumed.feed(ids[77:])
    assert same(resumed.place, whole.place)
    assert resumed.classify() == whole.classify()
