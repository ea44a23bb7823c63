"""The command line: what it prints, its exit codes, and the words for every mistake."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints_for_tests import TinyCheckpoint, save_base, save_flat, save_trainer_dict, tiny_decoder

from rmt_engine import cli, commands
from rmt_engine.engine import Engine

SEGMENT = 20
TEXT = "The milk is in the garden. Mary went to the kitchen. " * 3  # 159 tokens of a byte each


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`rmt-engine` in this process: starting Python and torch takes longer than everything that is tested."""

    def main(*arguments: object) -> Result:
        capsys.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse
            code = int(end.code or 0)
        return Result(code, *capsys.readouterr())

    return main


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="session")
def answers(decoder_folder: Path) -> Callable[..., str]:
    """What the Python API answers."""
    engine = Engine.from_pretrained(decoder_folder, device="cpu")

    def answer(question: str | None, text: str = TEXT, most: int = 16) -> str:
        stream = engine.stream()
        stream.feed(text)
        return stream.generate(most) if question is None else stream.ask(question, most).strip()

    return answer


# ------------------------------------------------------------------------------------------------------ run


def test_run_prints_a_summary_and_how_to_go_on(run: Run, decoder_folder: Path, text: Path) -> None:
    result = run("run", "--input", text, "--model", decoder_folder)
    assert result.code == 0 and result.err == ""
    first, second, *_, last = result.out.splitlines()
    assert re.fullmatch(r"159 tokens in 8 segments: \d+\.\d s, [\d,]+ tokens/s", first)
    assert second == "memory state: 4 × 32, the same at any length"
    assert "--ask" in last and "--generate" in last


def test_run_asks_every_question_and_goes_on(
    run: Run, decoder_folder: Path, text: Path, answers: Callable[..., str]
) -> None:
    arguments = ["run", "--input", text, "--model", decoder_folder, "--ask", "Who?", "--ask", "Where?", "--generate", 7]
    plain = run(*arguments)
    assert plain.code == 0 and plain.err == ""
    expected = [f"Who?  {answers('Who?')}", f"Where?  {answers('Where?')}", answers(None, most=7)]
    assert plain.out.split("\n", 2)[2] == "\n".join(expected) + "\n"
    result = run(*arguments, "--json").json
    assert result["answers"] == [{"question": q, "answer": answers(q)} for q in ("Who?", "Where?")]
    assert result["generated"] == answers(None, most=7)
    assert (result["input"], result["tokens"], result["segments"]) == (str(text), 159, 8)
    short = run(*arguments, "--json", "--max-new-tokens", 2).json
    assert short["answers"][0]["answer"] == answers("Who?", most=2)


def test_json_is_one_object_and_nothing_else(run: Run, decoder_folder: Path, text: Path) -> None:
    result = run("run", "--input", text, "--model", decoder_folder, "--json")
    assert result.err == "" and result.out.count("\n") == 1
    assert result.json["tokens_per_second"] > 0 and result.json["rss_anon_late"] != 0
    assert "answers" not in result.json and "labels" not in result.json


def test_a_classifier_prints_labels_and_scores(run: Run, encoder_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "letters.txt"
    path.write_text("a b c d e f g h " * 6)
    engine = Engine.from_pretrained(encoder_folder, device="cpu")
    stream = engine.stream(length=48)
    stream.feed(path.read_text())
    labels = stream.classify()
    result = run("run", "--input", path, "--model", encoder_folder, "--json").json
    assert [(entry["label"], entry["score"]) for entry in result["labels"]] == labels
    assert result["tokens"] == 48 and result["segments"] == 3
    plain = run("run", "--input", path, "--model", encoder_folder)
    assert plain.code == 0 and plain.out.endswith("".join(f"{score:.4f}  {label}\n" for label, score in labels))
    assert "--ask" not in plain.out


def test_run_reads_the_standard_input(
    run: Run, decoder_folder: Path, monkeypatch: pytest.MonkeyPatch, answers: Callable[..., str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    result = run("run", "--input", "-", "--model", decoder_folder, "--ask", "Who?", "--json").json
    assert (result["input"], result["tokens"], result["answers"][0]["answer"]) == ("-", 159, answers("Who?"))


def test_run_reads_token_files(run: Run, decoder_folder: Path, tmp_path: Path, answers: Callable[..., str]) -> None:
    ids = Engine.from_pretrained(decoder_folder, device="cpu").tokenizer.encode(TEXT)
    np.save(tmp_path / "ids.npy", ids.astype(np.uint16))
    ids.astype(np.int32).tofile(tmp_path / "ids.bin")
    for arguments in (["ids.npy"], ["ids.npy", "--token-dtype", "uint16"], ["ids.bin", "--token-dtype", "int32"]):
        name, *more = arguments
        result = run(
            "run", "--input", tmp_path / name, *more, "--model", decoder_folder, "--ask", "Who?", "--json"
        ).json
        assert result["tokens"] == 159 and result["answers"][0]["answer"] == answers("Who?")


def test_run_can_be_told_how_to_read(run: Run, decoder_folder: Path, text: Path, answers: Callable[..., str]) -> None:
    base = ["run", "--input", text, "--model", decoder_folder, "--json"]
    limited = run(*base, "--max-n-segments", 2, "--ask", "Who?").json
    assert limited["tokens"] == 40 and limited["answers"][0]["answer"] == answers("Who?", TEXT[:40])
    assert run(*base, "--segment-size", 50).json["segments"] == 4
    assert run(*base, "--input-size", 58).json["segments"] == 4
    for option in (["--alignment", "right"], ["--alignment", "center"], ["--dtype", "float32"], ["--backend", "ref"]):
        assert run(*base, *option, "--device", "cpu").json["segments"] == 8


def test_run_takes_the_authors_files(run: Run, tiny_gpt2: TinyCheckpoint, text: Path, tmp_path: Path) -> None:
    source = save_trainer_dict(tmp_path / "model_best.pth", tiny_gpt2.state_dict())
    base = save_base(tmp_path / "base", tiny_gpt2)
    arguments = ["run", "--input", text, "--model", source, "--base", base, "--segment-size", SEGMENT, "--json"]
    assert run(*arguments).json["segments"] == 8


def test_an_answer_that_does_not_fit_late_loses_nothing(run: Run, decoder_folder: Path, text: Path) -> None:
    """How much of the last segment is filled is not known before the input is read."""
    arguments = ["run", "--input", text, "--model", decoder_folder, "--generate", 110]
    words = (
        "rmt-engine: max_new_tokens=110 does not fit: 4 memory tokens and 19 tokens of text and question leave 105 of "
        "128 positions\n"
    )
    plain, as_json = run(*arguments), run(*arguments, "--json")
    assert plain.code == as_json.code == 2 and plain.err == as_json.err == words
    assert plain.out.startswith("159 tokens in 8 segments: ")
    assert json.loads(as_json.out)["tokens"] == 159


def test_brackets_and_odd_bytes_in_a_name(run: Run, decoder_folder: Path, tmp_path: Path) -> None:
    for name in (b"[red]a.txt", "中.txt".encode(), b"\xff\xfe.txt"):
        path = os.fsdecode(os.fsencode(tmp_path) + b"/" + name)
        Path(path).write_text(TEXT)
        result = run("run", "--input", path, "--model", decoder_folder, "--json")
        assert result.json["input"] == path


def test_a_terminal_that_knows_only_ascii(
    decoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text is written as well as it goes; JSON is UTF-8."""
    path = tmp_path / "é😀.txt"
    path.write_text(TEXT)
    arguments = ["run", "--input", str(path), "--model", str(decoder_folder)]
    for more in ([], ["--json"]):
        written = io.BytesIO()
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii"))
        assert cli.main([*arguments, *more]) == 0
        if more:
            assert json.loads(written.getvalue())["input"] == str(path)
        else:
            assert b"memory state: 4 \\xd7 32, the same at any length\n" in written.getvalue()


# -------------------------------------------------------------------------------------------------- answers

SAMPLED = ["--temperature", "2.5", "--top-k", "40", "--top-p", "0.9", "--repetition-penalty", "1.2", "--seed", "3"]
SAMPLING = {"temperature": 2.5, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 3}


def test_answers_are_sampled_stopped_and_rolled_as_in_python(
    run: Run, decoder_folder: Path, text: Path, tmp_path: Path
) -> None:
    engine = Engine.from_pretrained(decoder_folder, device="cpu")
    stream = engine.stream()
    stream.feed(TEXT)
    free = stream.ask("Who?", 30, **SAMPLING)
    stop = free[5:7]
    state = tmp_path / "s.state"
    base = ["run", "--input", text, "--model", decoder_folder, "--json", "--max-new-tokens"]
    result = run(*base, 30, "--ask", "Who?", "--ask", "What?", "--generate", 9, "--save-state", state, *SAMPLED).json
    assert [entry["answer"] for entry in result["answers"]] == [
        free.strip(),
        stream.ask("What?", 30, **SAMPLING).strip(),
    ]
    assert result["generated"] == stream.generate(9, **SAMPLING)
    stopped = run(*base, 30, "--ask", "Who?", "--stop", "never there", "--stop", stop, *SAMPLED).json
    assert stopped["answers"][0]["answer"] == free[: free.index(stop)].strip()
    rolled = run(*base, 300, "--ask", "Who?", "--roll").json
    assert rolled["answers"][0]["answer"] == stream.ask("Who?", 300, roll=True).strip()
    asked = run("ask", "--resume", state, "--model", decoder_folder, "--json", "--max-new-tokens", 30, "Who?", *SAMPLED)
    assert asked.json["answers"][0]["answer"] == free.strip()


def test_answers_are_printed_as_they_come(
    run: Run, decoder_folder: Path, text: Path, tmp_path: Path, answers: Callable[..., str]
) -> None:
    state = tmp_path / "s.state"
    base = ["run", "--input", text, "--model", decoder_folder, "--ask", "Who?", "--ask", "Where?", "--generate", 7]
    plain, pieces = run(*base, "--save-state", state), run(*base, "--stream")
    whole = [line.rstrip() for line in plain.out.splitlines() if not line.startswith("saved: ")]
    assert pieces.code == 0 and [line.rstrip() for line in pieces.out.splitlines()[1:]] == whole[1:]
    asked = run("ask", "--resume", state, "--model", decoder_folder, "--stream", "Who?")
    assert asked.code == 0 and asked.out.rstrip() == f"Who?  {answers('Who?')}".rstrip()


def test_what_cannot_be_answered_is_said_before_reading(run: Run, decoder_folder: Path) -> None:
    """The input is not even there."""
    base = ["run", "--input", "nowhere.txt", "--model", decoder_folder]
    for more, words in (
        (["--ask", "Who?", "--max-new-tokens", 120], "max_new_tokens=120 does not fit: 4 memory tokens and "),
        (["--generate", 124], "max_new_tokens=124 does not fit: 4 memory tokens and 1 tokens of text"),
        (["--ask", "Who? " * 9], "the question 'Who? Who? "),
        (["--ask", "Who?", "--temperature", -1], "temperature must be at least 0; got -1.0"),
        (["--ask", "Who?", "--stop", ""], "stop must be a sequence of strings that are not empty"),
    ):
        result = run(*base, *more)
        assert result.code == 2 and result.err.startswith(f"rmt-engine: {words}"), result.err
    assert run(*base, "--ask", "Who?", "--max-new-tokens", 120, "--roll").code == 1
    unused = run(*base, "--top-p", 0.5)
    assert (unused.code, unused.err) == (2, "rmt-engine: --top-p is for answers: give --ask Q or --generate N\n")


# ---------------------------------------------------------------------------------------- convert, inspect


def test_convert_inspect_run(run: Run, tiny_gpt2: TinyCheckpoint, text: Path, tmp_path: Path) -> None:
    source = save_trainer_dict(tmp_path / "model_best.pth", tiny_gpt2.state_dict())
    base, out = save_base(tmp_path / "base", tiny_gpt2), tmp_path / "out"
    about = run("inspect", source)
    assert about.code == 0 and "--base DIR" in about.out and "checkpoint in its authors' format" in about.out
    made = run(
        "convert",
        source,
        "--base",
        base,
        "--segment-size",
        30,
        "--out",
        out,
        "--ask-template",
        "? {question} !",
        "--stop-ids",
        "0,7",
        "--dtype",
        "bfloat16",
        "--json",
    ).json
    assert (made["folder"], made["segment_size"], made["num_mem_tokens"]) == (str(out), 30, 4)
    report = run("inspect", out, "--json").json
    assert report["runs"] and report["ask_template"] == "? {question} !" and report["stop_ids"] == [0, 7]
    assert report["dtypes"] == {"bfloat16": report["tensors"]}
    assert run("run", "--input", text, "--model", out, "--ask", "Who?").code == 0
    again = run("convert", source, "--base", base, "--segment-size", 30, "--out", out)
    assert again.code == 2 and again.err == (
        f"rmt-engine: {out} holds a converted checkpoint: give another folder, or force (--force) to replace it\n"
    )
    assert run("convert", source, "--base", base, "--segment-size", 30, "--out", out, "--force").code == 0
    plain = run("inspect", out)
    assert plain.code == 0 and re.search(r"^segment size +30$", plain.out, re.M) and "shapes" not in plain.out


def test_inspect_tells_what_is_wrong_with_exit_code_3(run: Run, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no weights here")
    for path in (tmp_path / "gone", tmp_path / "notes.txt", tmp_path):
        result = run("inspect", path, "--json")
        assert result.code == 3 and result.err == "" and json.loads(result.out)["error"]


# ------------------------------------------------------------------------------------------------ mistakes


@dataclass
class Mistake:
    """arguments after `run --input TEXT --model FOLDER`, unless they say so themselves; {tmp} is the test's folder."""

    words: str
    arguments: Sequence[str] = ()
    code: int = 2
    input: str = "{tmp}/text.txt"
    model: str = "{decoder}"


MISTAKES = {
    "missing-file": Mistake(
        "there is no file {tmp}/gone; give the path of a text file, or - for the standard input",
        input="{tmp}/gone",
        code=1,
    ),
    "empty-file": Mistake("expected text, found an empty file: {tmp}/empty", input="{tmp}/empty", code=1),
    "white-file": Mistake(
        "{tmp}/white holds no tokens of content: there is nothing to read",
        input="{tmp}/white",
        model="{encoder}",
        code=1,
    ),
    "directory": Mistake(
        "expected a text file, found a directory: {tmp}; give one of the files in it", input="{tmp}", code=1
    ),
    "not-utf8": Mistake(
        "expected UTF-8, found 0xff at byte 9 (invalid start byte); convert the text to UTF-8, or give "
        "--errors replace (errors='replace') to read such bytes as U+FFFD",
        input="{tmp}/latin",
        code=1,
    ),
    "bin-without-type": Mistake(
        "{tmp}/ids.bin: a raw token file needs its type: --token-dtype uint16, uint32, int32 or int64",
        input="{tmp}/ids.bin",
    ),
    "bin-without-type-aligned-right": Mistake(
        "{tmp}/ids.bin: a raw token file needs its type: --token-dtype uint16, uint32, int32 or int64",
        input="{tmp}/ids.bin",
        model="{encoder}",
    ),
    "unknown-type": Mistake(
        'dtype: expected uint8, uint16, uint32, int32 or int64, came "float"; '
        "name the type the tokens were written with",
        ["--token-dtype", "float"],
        input="{tmp}/ids.bin",
    ),
    "other-type-than-the-file": Mistake(
        '{tmp}/ids.npy: dtype="int32" does not agree with the file, which holds int64; pass dtype="auto"',
        ["--token-dtype", "int32"],
        input="{tmp}/ids.npy",
    ),
    "odd-bytes": Mistake(
        "{tmp}/ids.bin: expected a multiple of 2 bytes (uint16), came 7 bytes; check dtype, or copy the file again",
        ["--token-dtype", "uint16"],
        input="{tmp}/ids.bin",
        code=1,
    ),
    "npy-that-is-none": Mistake(
        "{tmp}/text.npy: ",
        input="{tmp}/text.npy",
        code=1,
    ),
    "outside-the-vocabulary": Mistake(
        "token 271 at position 2 is outside the vocabulary: expected 0 to 270; "
        "tokenize the input with this model's tokenizer",
        input="{tmp}/ids.npy",
        code=1,
    ),
    "tokens-on-stdin": Mistake(
        "the standard input is read as text: give a token file by its path, or leave out its type",
        ["--token-dtype", "uint16"],
        input="-",
    ),
    "stdin-aligned-right": Mistake(
        "this checkpoint aligns segments right, which needs the length, and the standard input has none: give a file, "
        "or use --alignment left",
        input="-",
        model="{encoder}",
    ),
    "no-model-there": Mistake("{tmp}/gone: no such file or folder", model="{tmp}/gone", code=3),
    "model-is-a-text": Mistake(
        "{tmp}/text.txt (159 bytes, starting with b'The milk') is neither a safetensors file nor one of torch.save: ",
        model="{tmp}/text.txt",
        code=3,
    ),
    "folder-without-weights": Mistake(
        "{tmp}/empty-folder holds no weights: expected one of model.safetensors, ", model="{tmp}/empty-folder", code=3
    ),
    "folder-of-a-plain-backbone": Mistake("{tmp}/base holds no weights: ", model="{tmp}/base", code=3),
    "segment-too-long": Mistake(
        "segment_size=121 does not fit n_positions=128 with 2×4 memory tokens; use at most 120",
        ["--segment-size", "121"],
    ),
    "input-size-too-long": Mistake(
        "segment_size=121 does not fit n_positions=128 with 2×4 memory tokens; use at most 120",
        ["--input-size", "129"],
    ),
    "input-size-too-short": Mistake(
        "input_size=8 leaves no room for text beside 2×4 memory tokens; use more than 8", ["--input-size", "8"]
    ),
    "two-sizes": Mistake(
        "segment_size=20 and input_size=30 disagree: with 2×4 memory tokens segment_size is 22; give one of them",
        ["--segment-size", "20", "--input-size", "30"],
    ),
    "base-of-a-converted-folder": Mistake(
        "{decoder} is a converted folder and holds its backbone's config: leave out base", ["--base", "{tmp}/base"]
    ),
    "classifier-asked": Mistake(
        "this checkpoint is a classifier: it prints labels; leave out --ask and --generate",
        ["--ask", "a?"],
        model="{encoder}",
    ),
    "classifier-to-go-on": Mistake(
        "this checkpoint is a classifier: it prints labels; leave out --ask and --generate",
        ["--generate", "3"],
        model="{encoder}",
    ),
    "question-too-long": Mistake(
        "the question 'Where in the whole house is it?' has 38 tokens; a segment holds 20",
        ["--ask", "Where in the whole house is it?"],
    ),
    "empty-question": Mistake("expected a question, got an empty one", ["--ask", " "]),
    "answer-does-not-fit": Mistake(
        "max_new_tokens=120 does not fit: 4 memory tokens and 11 tokens of text and question leave 113 of "
        "128 positions",
        ["--ask", "Who?", "--max-new-tokens", "120"],
    ),
    "continuation-does-not-fit": Mistake(
        "max_new_tokens=124 does not fit: 4 memory tokens and 1 tokens of text and question leave 123 of 128 positions",
        ["--generate", "124"],
    ),
    "no-tokenizer-for-a-text": Mistake(
        "this checkpoint has no tokenizer.json: give token ids, or convert it with --base DIR",
        model="{bare}",
        code=1,
    ),
    "no-tokenizer-for-a-question": Mistake(
        "this checkpoint has no tokenizer.json: give token ids, or convert it with --base DIR",
        ["--ask", "Who?"],
        input="{tmp}/small.npy",
        model="{bare}",
        code=1,
    ),
    "no-tokenizer-to-go-on": Mistake(
        "this checkpoint has no tokenizer.json: give token ids, or convert it with --base DIR",
        ["--generate", "3"],
        input="{tmp}/small.npy",
        model="{bare}",
        code=1,
    ),
    "unknown-device": Mistake("device must be auto, cpu, cuda or cuda:N; got 'tpu9'", ["--device", "tpu9"]),
}


@pytest.fixture(scope="session")
def bare_folder(tiny_gpt2: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted without a tokenizer."""
    from rmt_engine.checkpoint import convert

    folder = tmp_path_factory.mktemp("bare")
    source = save_trainer_dict(folder / "model_best.pth", tiny_gpt2.state_dict())
    base = save_base(folder / "base", tiny_gpt2, tokenizer="none")
    return convert(source, folder / "converted", base, segment_size=SEGMENT).folder


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_words(
    name: str, run: Run, tiny_gpt2: TinyCheckpoint, text: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    mistake = MISTAKES[name]
    (tmp_path / "empty").touch()
    (tmp_path / "white").write_text(" \n\t\n")
    (tmp_path / "latin").write_bytes(b"the milk \xff is in")
    (tmp_path / "ids.bin").write_bytes(b"\1" * 7)
    (tmp_path / "text.npy").write_text(TEXT)
    np.save(tmp_path / "ids.npy", np.array([3, 4, 271]))
    np.save(tmp_path / "small.npy", np.array([3, 4]))
    (tmp_path / "empty-folder").mkdir()
    save_base(tmp_path / "base", tiny_gpt2)
    places = {"tmp": tmp_path}
    for place in ("decoder", "encoder", "bare"):
        if f"{{{place}}}" in f"{mistake.model} {mistake.words}":
            places[place] = request.getfixturevalue(f"{place}_folder")
    source, model, words, *more = (
        part.format(**places) for part in (mistake.input, mistake.model, mistake.words, *mistake.arguments)
    )
    result = run("run", "--input", source, "--model", model, *more)
    assert (result.out, result.code) == ("", mistake.code), result.err
    if words.endswith((": ", ", ")):  # what follows depends on libraries and folders
        assert result.err.startswith(f"rmt-engine: {words}") and result.err.count("\n") == 1
    else:
        assert result.err == f"rmt-engine: {words}\n"


COUNT = "expected a whole number above 0, like 512, 16k or 2M; got"
USAGE = {
    "no-command": ([], "rmt-engine: error: the following arguments are required: COMMAND"),
    "unknown-command": (["walk"], "rmt-engine: error: argument COMMAND: invalid choice: 'walk'"),
    "no-input": (["run"], "rmt-engine run: error: the following arguments are required: --input"),
    "unknown-option": (["run", "--input", "x", "--fast"], "rmt-engine: error: unrecognized arguments: --fast"),
    "ask-nothing": (["run", "--input", "x", "--ask"], "rmt-engine run: error: argument --ask: expected one argument"),
    "zero-tokens": (
        ["run", "--input", "x", "--max-new-tokens", "0"],
        f"rmt-engine run: error: argument --max-new-tokens: {COUNT} '0'",
    ),
    "generate-some": (
        ["run", "--input", "x", "--generate", "some"],
        f"rmt-engine run: error: argument --generate: {COUNT} 'some'",
    ),
    "segments-below-zero": (
        ["run", "--input", "x", "--max-n-segments", "-3"],
        f"rmt-engine run: error: argument --max-n-segments: {COUNT} '-3'",
    ),
    "unknown-errors": (
        ["run", "--input", "x", "--errors", "ignore"],
        "rmt-engine run: error: argument --errors: invalid choice: 'ignore'",
    ),
    "unknown-alignment": (
        ["run", "--input", "x", "--alignment", "top"],
        "rmt-engine run: error: argument --alignment: invalid choice: 'top'",
    ),
    "unknown-backend": (
        ["run", "--input", "x", "--backend", "mps"],
        "rmt-engine run: error: argument --backend: invalid choice: 'mps'",
    ),
    "convert-nowhere": (["convert", "x"], "rmt-engine convert: error: the following arguments are required: --out"),
    "stop-words": (
        ["convert", "x", "--out", "y", "--stop-ids", "a,b"],
        "rmt-engine convert: error: argument --stop-ids: expected token ids like 50256 or 1,2; got 'a,b'",
    ),
    "inspect-nothing": (["inspect"], "rmt-engine inspect: error: the following arguments are required: PATH"),
}


@pytest.mark.parametrize("name", USAGE)
def test_a_wrong_command_line_is_told_in_words(name: str, run: Run) -> None:
    arguments, words = USAGE[name]
    result = run(*arguments)
    assert (result.out, result.code) == ("", 2)
    assert result.err.startswith("usage: rmt-engine") and result.err.splitlines()[-1].startswith(words)


CONVERT = {
    "template-without-question": (
        ["--segment-size", "20", "--ask-template", "Q:"],
        2,
        "ask_template must hold {question}; got 'Q:'",
    ),
    "no-size": (
        [],
        2,
        "the authors' files do not hold the segment size: give segment_size (--segment-size), the text tokens of a "
        "segment, or input_size (--input-size), which counts 2×4 memory tokens too",
    ),
    "too-long": (
        ["--segment-size", "300"],
        2,
        "segment_size=300 does not fit n_positions=128 with 2×4 memory tokens; use at most 120",
    ),
}


@pytest.mark.parametrize("name", CONVERT)
def test_a_conversion_that_cannot_be_done(name: str, run: Run, tiny_gpt2: TinyCheckpoint, tmp_path: Path) -> None:
    more, code, words = CONVERT[name]
    source, base = save_flat(tmp_path / "model.pth", tiny_gpt2.state_dict()), save_base(tmp_path / "base", tiny_gpt2)
    result = run("convert", source, "--base", base, "--out", tmp_path / "out", *more)
    assert (result.out, result.err, result.code) == ("", f"rmt-engine: {words}\n", code)
    assert not (tmp_path / "out").exists()


def test_other_families_and_pickles_are_refused_with_3(run: Run, text: Path, tmp_path: Path) -> None:
    tiny = tiny_decoder("gpt2", layers=1)
    layer = {
        f"memory_cell.layers.0.{name}": torch.zeros(2, 2) for name in ("W_mq.weight", "W_mk.weight", "W_mv.weight")
    }
    armt = save_flat(tmp_path / "armt.pth", {**tiny.state_dict(), **layer})
    base = save_base(tmp_path / "base", tiny)

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    torch.save({"model_state_dict": Evil()}, tmp_path / "evil.pth")
    for path, word in ((armt, "ARMT"), (tmp_path / "evil.pth", "weights")):
        for command in (
            ["run", "--input", text, "--model", path, "--base", base, "--segment-size", 20],
            ["convert", path, "--base", base, "--segment-size", 20, "--out", tmp_path / "out"],
        ):
            result = run(*command)
            assert result.code == 3 and result.out == "" and word in result.err, result.err
            assert result.err.startswith(f"rmt-engine: {path}") and result.err.count("\n") == 1
        assert run("inspect", path).code == 3
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_a_damaged_converted_folder_is_refused_with_3(
    run: Run, decoder_folder: Path, text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in decoder_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = run("run", "--input", text, "--model", folder)
    assert result.code == 3 and result.err.startswith(f"rmt-engine: {weights}") and result.err.count("\n") == 1
    (folder / "config.json").write_text("{")
    assert run("run", "--input", text, "--model", folder).code == 3


def test_bytes_that_are_not_utf8_can_be_replaced(run: Run, decoder_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "latin"
    path.write_bytes(b"the milk \xff is in")
    assert run("run", "--input", path, "--model", decoder_folder, "--errors", "replace", "--json").json["tokens"] == 18


def test_standard_input_without_text(run: Run, decoder_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stdin, words in (
        (io.TextIOWrapper(io.BytesIO(b"")), "expected text, found an empty input"),
        (None, "there is no standard input to read; give the path of a text file"),
    ):
        monkeypatch.setattr("sys.stdin", stdin)
        result = run("run", "--input", "-", "--model", decoder_folder)
        assert (result.out, result.err, result.code) == ("", f"rmt-engine: {words}\n", 1)


def test_a_backend_that_cannot_run(run: Run, decoder_folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = ["run", "--input", text, "--model", decoder_folder, "--device", "cpu"]
    for backend in ("triton", "cuda"):
        forced = run(*arguments, "--backend", backend)
        assert forced.code == 1 and forced.err.startswith(f"rmt-engine: backend '{backend}' cannot run: ")
        monkeypatch.setenv("RMT_BACKEND", backend)
        assert run(*arguments).err == forced.err
    monkeypatch.setenv("RMT_BACKEND", "fast")
    result = run(*arguments)
    words = "rmt-engine: RMT_BACKEND must be one of auto, ref, cpu, triton, cuda; got 'fast'\n"
    assert (result.code, result.err) == (2, words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(run: Run, decoder_folder: Path, text: Path) -> None:
    result = run("run", "--input", text, "--model", decoder_folder, "--device", "cuda")
    words = "rmt-engine: device 'cuda' was asked for, but this torch sees no CUDA device; use device='cpu'\n"
    assert (result.code, result.err) == (1, words)


# ------------------------------------------------------------------------------------------ things that end


def ends_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(options: object) -> int:
        raise error

    monkeypatch.setattr(commands, "inspect", fail)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        np._core._exceptions._ArrayMemoryError((10**9,), np.dtype("float64")),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
    ],
    ids=["python", "numpy", "cuda", "torch-cpu"],
)
def test_out_of_memory_is_4(error: BaseException, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ends_with(error, monkeypatch)
    result = run("inspect", "x")
    assert result.code == 4 and result.err.startswith("rmt-engine: out of memory: ") and result.err.count("\n") == 1


def test_what_we_did_not_foresee_is_not_hidden(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (RuntimeError("shapes do not fit"), ModuleNotFoundError("No module named 'torch'", name="torch")):
        ends_with(error, monkeypatch)
        with pytest.raises(type(error), match=str(error)):
            run("inspect", "x")


def test_other_ends(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, code, words in (
        (KeyboardInterrupt(), 130, "rmt-engine: interrupted\n"),
        (OSError(28, "No space left on device"), 1, "rmt-engine: [Errno 28] No space left on device\n"),
        (BrokenPipeError(), 1, ""),
        (
            ModuleNotFoundError("No module named 'rmt_engine._C'", name="rmt_engine._C"),
            1,
            "rmt-engine: the C++ extension is not built; build it: make setup, or pip install -e .\n",
        ),
    ):
        ends_with(error, monkeypatch)
        result = run("inspect", "x")
        assert (result.out, result.err, result.code) == ("", words, code)


# ---------------------------------------------------------------------- a process of its own, where it matters

PROGRAM = [sys.executable, "-m", "rmt_engine"]


def environment(**more: str) -> dict[str, str]:
    return {**{k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}, "OMP_NUM_THREADS": "1", **more}


def test_help_is_quick() -> None:
    times = []
    for command in ([], ["run"], ["convert"]):
        start = time.perf_counter()
        done = subprocess.run([*PROGRAM, *command, "--help"], capture_output=True, text=True, env=environment())
        times.append(time.perf_counter() - start)
        assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("usage: rmt-engine")
        assert "exit codes: 0 done" in done.stdout
    assert sorted(times)[1] < 0.5, times


def test_as_a_program(decoder_folder: Path, text: Path, answers: Callable[..., str]) -> None:
    """stdin to stdout; nothing on stderr, for it is no terminal; names and answers in any encoding."""
    arguments = ["run", "--input", "-", "--model", str(decoder_folder), "--ask", "Who?", "--json"]
    env = environment(PYTHONIOENCODING="ascii:strict")
    done = subprocess.run([*PROGRAM, *arguments], input=TEXT.encode(), capture_output=True, env=env)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["answers"][0]["answer"] == answers("Who?")


def test_nobody_reads_the_output(decoder_folder: Path) -> None:
    """A pipe that was left, and a disk that is full: an exit code, and no noise of Python's own."""
    reader, writer = os.pipe()
    os.close(reader)
    for out, words in ((writer, b""), (os.open("/dev/full", os.O_WRONLY), b"cannot write the output: [Errno 28]")):
        done = subprocess.run(
            [*PROGRAM, "inspect", decoder_folder], stdout=out, stderr=subprocess.PIPE, env=environment()
        )
        os.close(out)
        assert done.returncode == 1
        assert done.stderr.startswith(b"rmt-engine: " + words if words else b"") and done.stderr.count(b"\n") <= 1


def read_until(terminal: int, seconds: float, enough: Callable[[str], bool]) -> str:
    """What a terminal shows, until it is enough, or closed."""
    shown, deadline = b"", time.monotonic() + seconds
    while not enough(shown.decode("utf-8", "replace")):
        assert time.monotonic() < deadline, shown
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                shown += os.read(terminal, 65536)
            except OSError:  # closed
                break
    return shown.decode("utf-8", "replace")


def test_a_bar_on_a_terminal_and_ctrl_c(decoder_folder: Path, tmp_path: Path) -> None:
    """The input goes on for ever; the bar shows how far it is, and Ctrl-C ends it with 130."""
    controller, terminal = pty.openpty()
    program = subprocess.Popen(
        [*PROGRAM, "run", "--input", "-", "--model", str(decoder_folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=terminal,
        env=environment(TERM="xterm", COLUMNS="150"),
    )
    os.close(terminal)
    assert program.stdin is not None and program.stdout is not None
    try:
        program.stdin.write(TEXT.encode() * 200)
        program.stdin.flush()  # and then the pipe is silent
        shown = read_until(controller, 60, lambda shown: "tokens/s" in shown and "segments" in shown)
        program.send_signal(signal.SIGINT)
        shown += read_until(controller, 20, lambda shown: False)
        assert program.wait(20) == 130
    finally:
        program.kill()
        program.wait()
        os.close(controller)
    assert re.search(r"- .*[\d.]+k? tokens · [\d.]+k? tokens/s · [\d.]+k? segments · [\d.]+ MiB", shown), shown
    assert "rmt-engine: interrupted" in shown and "Traceback" not in shown
    assert program.stdout.read() == b""


def test_a_bar_with_a_name_that_looks_like_markup(decoder_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "[" / "red].txt"
    path.parent.mkdir()
    path.write_text(TEXT * 100)
    controller, terminal = pty.openpty()
    try:
        monkey = pytest.MonkeyPatch()
        with os.fdopen(os.dup(terminal), "w") as stderr, monkey.context() as patch:
            patch.setattr("sys.stderr", stderr)
            patch.setenv("TERM", "xterm")
            patch.setenv("COLUMNS", "250")
            assert cli.main(["run", "--input", str(path), "--model", str(decoder_folder)]) == 0
        os.close(terminal)
        shown = read_until(controller, 5, lambda shown: False)
    finally:
        os.close(controller)
    assert str(path) in shown and "100%" in shown
