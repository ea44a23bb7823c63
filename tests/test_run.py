"""Whole inputs: every kind of input and alignment equals reading at once; errors, threads, memory."""

from __future__ import annotations

import io
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints_for_tests import SPECIAL, TinyCheckpoint, byte_tokenizer, tiny_decoder
from torch import Tensor

from rmt_engine.engine import Engine
from rmt_engine.errors import InputError, TokenizerError
from rmt_engine.run import Progress, Summary, resident_bytes
from rmt_engine.stream import Stream
from rmt_engine.tokens import IncrementalTokenizer, Tokenizer

SEGMENT = 20
LENGTHS = (1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 3 * SEGMENT, 3 * SEGMENT + 7)


@pytest.fixture(scope="module")
def decoder(decoder_folder: Path) -> Engine:
    engine = Engine.from_pretrained(decoder_folder, device="cpu")
    engine.tokenizer.encode_pieces(["a"] * 64)  # the tokenizers library keeps its threads
    return engine


@pytest.fixture(scope="module")
def encoder(encoder_folder: Path) -> Engine:
    return Engine.from_pretrained(encoder_folder, device="cpu")


@pytest.fixture(autouse=True)
def no_thread_is_left(decoder: Engine) -> Iterator[None]:
    before = threads()
    yield
    deadline = time.monotonic() + 3
    while left := threads() - before:
        assert time.monotonic() < deadline, f"left running: {left}"
        time.sleep(0.01)


def threads() -> set[str]:
    """Those of Python by name, and those of the extension by the system's number."""
    task = Path("/proc/self/task")
    return {t.name for t in threading.enumerate()} | ({t.name for t in task.iterdir()} if task.exists() else set())


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """What `work` gives; a failure where it hangs."""
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert done, f"still busy after {seconds} s, or failed"
    return done[0]


def summary_of(engine: Engine, source: Any, **options: Any) -> Summary:
    *progress, summary = engine.run(source, **options)
    assert isinstance(summary, Summary) and all(isinstance(event, Progress) for event in progress)
    return summary


def memory_of(engine: Engine, ids: np.ndarray, alignment: str = "left", **options: Any) -> Tensor:
    """Read at once."""
    other = Engine(engine.config, engine.executor, None, engine.backend)
    object.__setattr__(other, "config", type(engine.config)(**{**vars(engine.config), "alignment": alignment}))
    return other.forward(torch.from_numpy(ids)[None], output="none", **options).memory_state[0]


def finished(stream: Stream) -> Tensor:
    fork = stream.fork()
    fork.finish()
    return fork.memory


def text_of(engine: Engine, length: int) -> str:
    """A text of exactly `length` tokens."""
    letters = np.random.default_rng(length).integers(ord("a"), ord("z") + 1, length).tolist()
    text = ("" if engine.config.family == "decoder" else " ").join(map(chr, letters))
    assert len(engine.tokenizer.encode(text)) == length
    return text


def write(folder: Path, kind: str, engine: Engine, length: int) -> tuple[Any, np.ndarray, dict[str, Any]]:
    """(what to give to `run`, its ids, options)."""
    text = text_of(engine, length)
    ids = engine.tokenizer.encode(text)
    path = folder / f"input{length}{kind}"
    if kind == ".txt":
        path.write_text(text)
    elif kind == ".npy":
        np.save(path, ids.astype(np.uint16))
    else:
        ids.astype(np.uint32).tofile(path)
        return str(path), ids, {"token_dtype": "uint32"}
    return path, ids, {}


# ------------------------------------------------------------------------------- every input and alignment


@pytest.mark.parametrize("alignment", ["left", "right", "center"])
@pytest.mark.parametrize("kind", [".txt", ".npy", ".bin"])
@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_a_run_equals_reading_at_once(
    family: str, kind: str, alignment: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    engine: Engine = request.getfixturevalue(family)
    for length in LENGTHS:
        source, ids, options = write(tmp_path, kind, engine, length)
        summary = summary_of(engine, source, alignment=alignment, **options)
        stream = summary.stream
        assert summary.tokens == summary.read == stream.position == length
        assert summary.segments == stream.segments + 1 == -(-length // SEGMENT)
        assert np.array_equal(stream.rest, ids[length - len(stream.rest) :]) and len(stream.rest) > 0
        assert torch.equal(finished(stream), memory_of(engine, ids, alignment))
        fed = engine.stream(length=length, alignment=alignment)
        fed.feed(ids)
        assert torch.equal(fed.memory, stream.memory) and np.array_equal(fed.rest, stream.rest)


def test_the_checkpoint_says_how_to_align(encoder: Engine, decoder: Engine, tmp_path: Path) -> None:
    assert encoder.config.alignment == "right" and decoder.config.alignment == "left"
    source, ids, _ = write(tmp_path, ".txt", encoder, 47)
    assert len(summary_of(encoder, source).stream.rest) == SEGMENT
    labels = summary_of(encoder, source).stream.classify()
    scores = encoder.forward(torch.from_numpy(ids)[None]).logits[0].softmax(-1)
    assert [score for _, score in labels] == pytest.approx(sorted(scores.tolist(), reverse=True))


def test_the_standard_input(decoder: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    text = text_of(decoder, 67)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    *progress, summary = decoder.run("-")
    assert torch.equal(finished(summary.stream), memory_of(decoder, decoder.tokenizer.encode(text)))
    assert all(event.fraction is None for event in progress)


def test_a_named_pipe_is_opened_once(decoder: Engine, tmp_path: Path) -> None:
    text, path = text_of(decoder, 67), tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=(text,), daemon=True)
    writer.start()
    summary = within(20, lambda: summary_of(decoder, path))
    assert torch.equal(finished(summary.stream), memory_of(decoder, decoder.tokenizer.encode(text)))
    writer.join()


def test_line_ends_stay_and_the_byte_order_mark_goes(decoder: Engine, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n three\r\n" * 3)
    ids = decoder.tokenizer.encode(path.read_bytes().decode().removeprefix("\ufeff"))
    assert torch.equal(finished(summary_of(decoder, path).stream), memory_of(decoder, ids))


def test_what_was_read_can_be_asked(decoder: Engine, tiny_gpt2: TinyCheckpoint, tmp_path: Path) -> None:
    source, ids, _ = write(tmp_path, ".txt", decoder, 65)
    stream = summary_of(decoder, source).stream
    reference = tiny_gpt2.reference(SEGMENT)
    question = decoder.tokenizer.encode(" Q: What? A:")
    assert len(stream.rest) + len(question) <= SEGMENT
    for answer, asked in (
        (stream.generate(9), ids),
        (stream.ask("What?", 9), np.concatenate([ids, question])),
    ):
        new = reference.generate(asked, 9, eos_ids={0})
        assert answer == decoder.tokenizer.decode([i for i in new if i != 0])
    stream.feed(ids[:30])
    assert torch.equal(finished(stream), memory_of(decoder, np.concatenate([ids, ids[:30]])))


# ------------------------------------------------------------------------------------------- limits, drops


@pytest.mark.parametrize("alignment", ["left", "right", "center"])
@pytest.mark.parametrize("kind", [".txt", ".npy"])
@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_max_n_segments_keeps_tokens_from_the_start(
    family: str, kind: str, alignment: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The first segment_size·max_n_segments tokens, then aligned, as the authors' encoder does it."""
    engine: Engine = request.getfixturevalue(family)
    for length in (SEGMENT - 1, 3 * SEGMENT, 3 * SEGMENT + 7):
        source, ids, options = write(tmp_path, kind, engine, length)
        for most in (1, 2, 3, 4, 100):
            summary = summary_of(engine, source, alignment=alignment, max_n_segments=most, **options)
            kept = ids[: most * SEGMENT]
            assert summary.tokens == len(kept) and summary.segments == -(-len(kept) // SEGMENT)
            assert torch.equal(finished(summary.stream), memory_of(engine, kept, alignment))
            forward = memory_of(engine, ids, alignment, max_n_segments=most)
            assert torch.equal(finished(summary.stream), forward)


@pytest.mark.parametrize("alignment", ["left", "right", "center"])
def test_dropped_ids_do_not_count(alignment: str, encoder: Engine, tmp_path: Path) -> None:
    ids = encoder.tokenizer.encode(text_of(encoder, 50))
    special = [SPECIAL.cls, SPECIAL.pad, SPECIAL.sep]
    mixed = np.concatenate([special, ids[:20], special, ids[20:41], special * 30, ids[41:], special])
    np.save(tmp_path / "ids.npy", mixed)
    (tmp_path / "text").write_text("[CLS] " + encoder.tokenizer.decode(ids) + "[SEP][PAD] [PAD]")
    for source in (tmp_path / "ids.npy", tmp_path / "text"):
        for most in (None, 2):
            summary = summary_of(encoder, source, alignment=alignment, max_n_segments=most)
            kept = ids if most is None else ids[: most * SEGMENT]
            assert summary.tokens == len(kept)
            assert torch.equal(finished(summary.stream), memory_of(encoder, kept, alignment))


@pytest.mark.parametrize("alignment", ["left", "right", "center"])
def test_nothing_but_dropped_ids(alignment: str, encoder: Engine, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.full(70, SPECIAL.pad))
    np.save(tmp_path / "none.npy", np.empty(0, dtype=np.int64))
    (tmp_path / "text").write_text("[PAD] [CLS]\n[SEP]  ")
    (tmp_path / "white").write_text("  \n\n ")
    for name in ("ids.npy", "none.npy", "text", "white"):
        words = f"{tmp_path / name} holds no tokens of content: there is nothing to read"
        with pytest.raises(InputError, match=f"^{re.escape(words)}$"):
            list(encoder.run(tmp_path / name, alignment=alignment))


# ------------------------------------------------------------------------------------------------ progress


@pytest.mark.parametrize("kind", [".txt", ".npy"])
def test_progress_only_rises(kind: str, decoder: Engine, tmp_path: Path) -> None:
    source, _, options = write(tmp_path, kind, decoder, 40 * SEGMENT + 3)
    *progress, summary = decoder.run(source, **options)
    assert 40 <= len(progress) <= 41 and isinstance(summary, Summary)
    positions = [event.position for event in progress]
    assert positions == sorted(set(positions)) and positions[-1] <= summary.tokens
    segments = [event.segments for event in progress]
    assert segments == sorted(segments) and segments[-1] <= summary.segments
    fractions = [event.fraction for event in progress]
    assert fractions == sorted(fractions) and fractions[0] > 0 and 0.9 < fractions[-1] <= 1
    for event in progress:
        assert event.fraction == pytest.approx(event.position / summary.tokens, abs=0.1)


def test_times_are_taken_after_the_warm_up(decoder: Engine, tmp_path: Path) -> None:
    source, _, _ = write(tmp_path, ".npy", decoder, 60 * SEGMENT)
    summary = summary_of(decoder, source)
    assert summary.ms_early > 0 and summary.ms_late > 0 and summary.seconds > 0
    assert summary.tokens_per_second == summary.tokens / summary.seconds
    assert summary.memory_early is None and summary.memory_late == pytest.approx(resident_bytes(), rel=0.1)
    short = summary_of(decoder, write(tmp_path, ".npy", decoder, 5)[0])
    assert short.ms_early is None and short.ms_late is None


def test_memory_does_not_grow_with_the_text(decoder: Engine, tmp_path: Path) -> None:
    if resident_bytes() is None:
        pytest.skip("needs /proc")
    path = tmp_path / "long.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, again and again. " * 800)  # 49,600 tokens
    sizes = [resident_bytes() for event in decoder.run(path) if isinstance(event, Progress)]
    early, late = sizes[len(sizes) // 4], sizes[-1]
    assert late - early < 2 << 20, f"{(late - early) / 2**20:.1f} MiB more over three quarters of the text"


# -------------------------------------------------------------------------------------------------- errors


def message_of(engine: Engine, source: Any, kind: type[BaseException], **options: Any) -> str:
    with pytest.raises(kind) as raised:
        list(engine.run(source, **options))
    assert type(raised.value) is kind
    return str(raised.value)


CANNOT_BE_READ: list[tuple[str, type[Exception], dict[str, Any], str]] = [
    ("gone.txt", InputError, {}, "there is no file {}; give the path of a text file, or - for the standard input"),
    ("empty.txt", InputError, {}, "expected text, found an empty file: {}"),
    ("", InputError, {}, "expected a text file, found a directory: {}; give one of the files in it"),
    (
        "bad.txt",
        InputError,
        {},
        "expected UTF-8, found 0xe2 at byte 110 (invalid continuation byte); convert the text to UTF-8, or give "
        "--errors replace (errors='replace') to read such bytes as U+FFFD",
    ),
    ("bad.txt", ValueError, {"errors": "ignore"}, "errors='ignore' is not known; use 'strict' or 'replace'"),
    ("bad.txt", ValueError, {"alignment": "top"}, "alignment must be one of left, right, center; got 'top'"),
    ("bad.txt", ValueError, {"max_n_segments": 0}, "max_n_segments must be at least 1; got 0"),
    (
        "tokens.bin",
        ValueError,
        {},
        "{}: a raw token file needs its type: --token-dtype uint16, uint32, int32 or int64",
    ),
    (
        "tokens.bin",
        InputError,
        {"token_dtype": "uint16"},
        "{}: expected a multiple of 2 bytes (uint16), came 7 bytes; check dtype, or copy the file again",
    ),
    (
        "tokens.bin",
        ValueError,
        {"token_dtype": "int8"},
        'dtype: expected uint8, uint16, uint32, int32 or int64, came "int8"; '
        "name the type the tokens were written with",
    ),
    ("gone.bin", InputError, {"token_dtype": "int32"}, "{}: cannot open the token file: No such file or directory"),
    ("gone.npy", InputError, {}, "{}: cannot open the token file: No such file or directory"),
    (
        "folder.npy",
        InputError,
        {},
        "{}: expected a token file, came a directory; name a .npy or .bin file, or push the tokens",
    ),
    (
        "large.npy",
        InputError,
        {},
        "token 271 at position 50 is outside the vocabulary: expected 0 to 270; "
        "tokenize the input with this model's tokenizer",
    ),
    (
        "-",
        ValueError,
        {"token_dtype": "uint16"},
        "the standard input is read as text: give a token file by its path, or leave out its type",
    ),
]


@pytest.mark.parametrize("alignment", ["left", "right"])
def test_what_cannot_be_read(alignment: str, decoder: Engine, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "tokens.bin").write_bytes(b"\0" * 7)
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "bad.txt").write_bytes(b"good words " * 10 + b"\xe2\x28 more")
    np.save(tmp_path / "float.npy", np.zeros(3))
    np.save(tmp_path / "large.npy", np.array([3] * 50 + [271]))
    for name, kind, options, words in CANNOT_BE_READ:
        source = name if name == "-" else tmp_path / name
        assert message_of(decoder, source, kind, **{"alignment": alignment, **options}) == words.format(source)
    assert "float.npy: " in message_of(decoder, tmp_path / "float.npy", InputError, alignment=alignment)


def test_bytes_that_are_not_utf8_can_be_replaced(decoder: Engine, tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(b"good words " * 10 + b"\xff\xfe more")
    ids = decoder.tokenizer.encode(path.read_bytes().decode("utf-8", "replace"))
    for alignment in ("left", "right"):
        stream = summary_of(decoder, path, errors="replace", alignment=alignment).stream
        assert torch.equal(finished(stream), memory_of(decoder, ids, alignment))


def test_an_error_comes_after_the_segments_before_it(
    decoder: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rmt_engine.inputs.READ_BYTES", 1000)
    path = tmp_path / "bad.txt"
    path.write_bytes(b"x" * 7 * SEGMENT + b" and " * 4000 + b"\xff")
    events = []
    with pytest.raises(InputError, match="found 0xff at byte 20,140"):
        for event in decoder.run(path, max_n_segments=None):
            events.append(event)
            if len(events) == 3:
                assert [e.position for e in events] == [SEGMENT, 2 * SEGMENT, 3 * SEGMENT]
    assert len(events) > 500


@pytest.mark.parametrize("error", [TokenizerError("it broke"), ZeroDivisionError("it broke"), MemoryError("it broke")])
def test_an_error_of_the_tokenizer_thread_keeps_its_type(
    error: Exception, decoder: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _, _ = write(tmp_path, ".txt", decoder, 67)

    def feed(self: IncrementalTokenizer, text: str) -> np.ndarray:
        raise error

    monkeypatch.setattr(IncrementalTokenizer, "feed", feed)
    for alignment in ("left", "right"):
        assert message_of(decoder, source, type(error), alignment=alignment) == "it broke"


def test_even_a_panic_reaches_the_caller(decoder: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no Exception must not leave the compute waiting for ever."""

    class PanicException(BaseException):
        pass

    def flush(self: IncrementalTokenizer) -> np.ndarray:
        raise PanicException("index out of bounds")

    monkeypatch.setattr(IncrementalTokenizer, "flush", flush)
    source, _, _ = write(tmp_path, ".txt", decoder, 67)

    def kind() -> type[BaseException]:
        try:
            list(decoder.run(source))
        except BaseException as error:
            return type(error)
        raise AssertionError("it ended as if all were well")

    assert within(10, kind) is PanicException


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    """More tokens than the model has: the error says so, and which."""
    checkpoint = tiny_decoder("gpt2", layers=1, vocab_size=200)
    tokenizer = Tokenizer(byte_tokenizer().to_str())
    engine = Engine.from_weights(checkpoint.rmt_config(SEGMENT), checkpoint.weights(), tokenizer, device="cpu")
    path = tmp_path / "text"
    path.write_text("plain:words,without_a_space;" * 3 + " x")
    words = (
        "token 221 at position 84 is outside the vocabulary: expected 0 to 199; "
        "tokenize the input with this model's tokenizer"
    )
    assert message_of(engine, path, InputError) == words


def test_a_checkpoint_without_a_tokenizer_reads_token_files(tmp_path: Path) -> None:
    checkpoint = tiny_decoder("gpt2", layers=1)
    engine = Engine.from_weights(checkpoint.rmt_config(SEGMENT), checkpoint.weights(), device="cpu")
    np.save(tmp_path / "ids.npy", np.arange(50))
    assert summary_of(engine, tmp_path / "ids.npy").tokens == 50
    (tmp_path / "text").write_text("text")
    words = "this checkpoint has no tokenizer.json: give token ids, or convert it with --base DIR"
    for alignment in ("left", "right"):
        assert message_of(engine, tmp_path / "text", TokenizerError, alignment=alignment) == words


def test_alignment_needs_a_length_that_a_pipe_has_not(encoder: Engine, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for source, what in (("-", "the standard input"), (tmp_path / "pipe", f"the pipe {tmp_path / 'pipe'}")):
        words = (
            f"this checkpoint aligns segments right, which needs the length, and {what} has none: "
            "give a file, or use --alignment left"
        )
        assert within(10, lambda source=source: message_of(encoder, source, ValueError)) == words


# ------------------------------------------------------------------------------------------- ending early


@pytest.mark.parametrize("kind", [".txt", ".npy"])
@pytest.mark.parametrize("how", ["close", "forget", "raise"])
def test_a_run_left_early_leaves_no_thread(how: str, kind: str, decoder: Engine, tmp_path: Path) -> None:
    source, _, options = write(tmp_path, kind, decoder, 400 * SEGMENT)
    events = decoder.run(source, **options)
    next(events)
    if how == "close":
        events.close()
    elif how == "raise":
        with pytest.raises(KeyboardInterrupt):
            events.throw(KeyboardInterrupt)
    del events  # no_thread_is_left looks


def test_a_silent_pipe_does_not_keep_a_run_that_ends(decoder: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    for end in ("limit", "close"):
        reader, writer = os.pipe()
        with open(reader, encoding="utf-8") as stdin, open(writer, "wb", buffering=0) as pipe:
            monkeypatch.setattr("sys.stdin", stdin)
            pipe.write(b"words and words and words " * 10)
            if end == "limit":
                assert within(10, lambda: summary_of(decoder, "-", max_n_segments=2)).segments == 2
            else:
                events = decoder.run("-")
                next(events)
                within(10, lambda events=events: events.close() or True)
            deadline = time.monotonic() + 2
            while any(thread.name.startswith("rmt-") for thread in threading.enumerate()):
                assert time.monotonic() < deadline, "a thread waits for a pipe that nobody reads any more"
                time.sleep(0.01)


def test_runs_side_by_side(decoder: Engine, tmp_path: Path) -> None:
    source, ids, _ = write(tmp_path, ".txt", decoder, 9 * SEGMENT + 3)
    one, two = decoder.run(source), decoder.run(source)
    last: list[Any] = [None, None]
    for last[0], last[1] in zip(one, two, strict=True):
        assert last[0].position == last[1].position if isinstance(last[0], Progress) else True
    for summary in last:
        assert torch.equal(finished(summary.stream), memory_of(decoder, ids))
