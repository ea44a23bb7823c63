"""Many documents on the command line: where they come from, their lines, and runs that are repeated, torn or killed."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from campaign.processes import exit_code, fork
from test_cli import Run
from test_cli import run as run_fixture
from test_stream import TEXT

from rmt_engine import cli
from rmt_engine.document_lists import documents_in
from rmt_engine.document_run import DocumentRun, Wanted
from rmt_engine.engine import Engine
from rmt_engine.errors import InputError
from rmt_engine.results import ResultsFolder

COUNT = 9
run = run_fixture


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """Texts of different lengths, one of them in a folder below."""
    folder = tmp_path / "books"
    (folder / "more").mkdir(parents=True)
    for i in range(COUNT):
        (folder / ("more" if i == 4 else ".") / f"{i}.txt").write_text(TEXT * (1 + 7 * i % 5))
    return folder


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


# -------------------------------------------------------------------------------------- where they come from


def test_a_folder_and_a_pattern(books: Path) -> None:
    (books / ".hidden").write_text("not this")
    ids = [document.id for document in documents_in(books)]
    assert ids == [f"{i}.txt" for i in range(COUNT) if i != 4] + ["more/4.txt"]
    found = [document.id for document in documents_in(f"{books}/**/[0-4].txt")]
    assert found == [f"{books}/{i}.txt" for i in range(4)] + [f"{books}/more/4.txt"]
    (single,) = documents_in(books / "3.txt")
    assert single.source == books / "3.txt"
    (books.parent / "empty").mkdir()
    for source, words in ((books.parent / "empty", "^there is no file in "), (f"{books}/*.md", "^no file matches ")):
        with pytest.raises(InputError, match=words):
            list(documents_in(source))


def test_json_lines(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "text": "the milk"},
        {"text": "numbered"},
        {"id": 7, "ids": [1, 2, 3]},
        {"id": "file", "path": "sub/x.txt"},
        {"id": "none"},
        {"id": [1], "text": "x"},
        {"id": "seventh", "text": ""},
        {"ids": [1, "2"]},
    ]
    text = "\n".join(map(json.dumps, rows)) + "\n\n[1]\n{broken\n"
    (tmp_path / "list.jsonl").write_text(text)
    (tmp_path / "list.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("list.jsonl", "list.jsonl.gz"):
        found = {document.id: document.source for document in documents_in(tmp_path / name)}
        assert [found["a"], found["2"], found["7"]] == [b"the milk", b"numbered", [1, 2, 3]]
        assert found["file"] == tmp_path / "sub" / "x.txt"
        wrong = {id_: str(source) for id_, source in found.items() if isinstance(source, InputError)}
        assert [*wrong] == ["5", "6", "8", "9", "10"]
        assert wrong["5"].endswith("line 5 has no field 'text', 'ids' or 'path'; its fields: 'id'")
        assert wrong["6"].endswith("expected a text or a whole number as 'id', found [1]")
        assert "expected a JSON object" in wrong["9"] and "expected a JSON object" in wrong["10"]
    assert next(documents_in(tmp_path / "list.jsonl", field="id")).source == b"a"


def test_parquet_rows(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"id": ["a", "b", "c"], "text": ["one", None, "three"], "other": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "data.parquet")
    found = list(documents_in(tmp_path / "data.parquet"))
    assert [(document.id, document.source) for document in found[::2]] == [("a", b"one"), ("c", b"three")]
    assert "expected a string in 'text', found null" in str(found[1].source)
    with pytest.raises(InputError, match=r"has no column 'body'; its columns: 'id', 'text', 'other'$"):
        list(documents_in(tmp_path / "data.parquet", field="body"))


def test_a_list_is_read_as_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "list.jsonl", "w") as file:
        for i in range(20_000):
            print(json.dumps({"id": i, "text": "word " * 20}), file=file)
    taken = 0

    def first() -> Iterator[str]:
        nonlocal taken
        for document in documents_in(tmp_path / "list.jsonl"):
            taken += 1
            yield str(document.id)

    ids = first()
    assert [next(ids) for _ in range(3)] == ["0", "1", "2"] and taken == 3
    ids.close()  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------ the lines


def test_lines_hold_what_was_asked_for(run: Run, decoder_folder: Path, books: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--ask", "Who?", "--ask", "Where?", "--score", "--pooling", "mean", "--save-states", "--order", "input"]
    result = run("run", "--input", books, "--slots", 3, "--output", out, "--model", decoder_folder, *options)
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[1] == f"results: {out}/results.jsonl" and "9 documents: " in result.out
    engine = Engine.from_pretrained(decoder_folder, device="cpu")
    assert [line["index"] for line in lines(out)] == list(range(COUNT))
    for line in lines(out):
        stream = engine.stream(score=True)
        stream.feed((books / line["id"]).read_bytes())
        stream.flush()
        assert (line["tokens"], line["segments"]) == (stream.position, stream.segments + 1)
        assert line["answers"] == [{"question": q, "answer": stream.ask(q).strip()} for q in ("Who?", "Where?")]
        assert line["score"]["nll"] == pytest.approx(stream.scores().total.nll, rel=1e-4)
        resumed = engine.resume(out / line["state"])
        assert resumed.position == stream.position and resumed.ask("Who?").strip() == line["answers"][0]["answer"]
        stream.finish()
        assert line["features"] == pytest.approx(stream.memory.mean(0).tolist(), abs=1e-4)


def test_a_classifiers_lines(run: Run, encoder_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps({"text": "a b c d e f " * n}) for n in (1, 4, 9)))
    out = tmp_path / "out"
    assert run("run", "--input", tmp_path / "list.jsonl", "--output", out, "--model", encoder_folder).code == 0
    engine = Engine.from_pretrained(encoder_folder, device="cpu")
    for line, result in zip(lines(out), engine.run_many(["a b c d e f " * n for n in (1, 4, 9)]), strict=True):
        assert [(entry["label"], entry["score"]) for entry in line["labels"]] == list(result.labels)
    words = "this checkpoint is a classifier: it generates no text; use classify"
    asked = run("run", "--input", tmp_path / "list.jsonl", "--slots", 2, "--model", encoder_folder, "--ask", "a?")
    assert asked.code == 2 and words in asked.err


def test_without_a_folder_the_lines_are_printed(run: Run, decoder_folder: Path, books: Path) -> None:
    (books / "bad.txt").write_bytes(b"\xff")
    result = run("run", "--input", books, "--slots", 2, "--model", decoder_folder, "--order", "input")
    found = [json.loads(line) for line in result.out.splitlines()]
    assert [line["index"] for line in found] == list(range(COUNT + 1)) and result.code == 1
    assert "expected UTF-8" in next(line["error"] for line in found if line["id"] == "bad.txt")
    assert result.err.startswith("9 documents, 1 failed: ")


@pytest.mark.parametrize(
    "options, words",
    [
        (["--slots", 2, "--generate", 3], "--generate is for one input, not with --slots or --output"),
        (["--slots", 2, "--save-state", "x"], "--save-state is for one input, not with --slots or --output"),
        (["--slots", 2, "--save-states"], "--save-states needs --output DIR, the folder to keep them in"),
        (["--pooling", "mean"], "--pooling is for many documents: give --output DIR or --slots N"),
        (["--slots", 2, "--ask", "Q", "--top-p", 3], "top_p must be above 0 and at most 1; got 3.0"),
        (["--slots", 2, "--ask", " "], "expected a question, got an empty one"),
    ],
)
def test_options_that_do_not_go_together(
    run: Run, decoder_folder: Path, books: Path, options: list[Any], words: str
) -> None:
    result = run("run", "--input", books, "--model", decoder_folder, *options)
    assert (result.code, result.err) == (2, f"rmt-engine: {words}\n")


# --------------------------------------------------------------------------------------- repeated and broken


def test_what_is_done_is_not_done_again(run: Run, decoder_folder: Path, books: Path, tmp_path: Path) -> None:
    out, hidden = tmp_path / "out", tmp_path / "hidden.txt"
    (books / "3.txt").rename(hidden)
    (books / "3.txt").write_bytes(b"\xff\xff")
    command = ["run", "--input", books, "--slots", 4, "--output", out, "--model", decoder_folder, "--ask", "Who?"]
    first = run(*command)
    assert first.code == 1 and first.out.startswith("8 documents, 1 failed: ")
    assert (
        first.err.startswith("rmt-engine: 3.txt: expected UTF-8, found 0xff at byte 0 ") and first.err.count("\n") == 1
    )
    assert [json.loads(line)["id"] for line in (out / "failures.jsonl").read_text().splitlines()] == ["3.txt"]
    before = (out / "results.jsonl").read_bytes()
    again = run(*command)
    assert again.out.startswith("0 documents, 8 done before, 1 failed: ") and again.code == 1
    assert (out / "results.jsonl").read_bytes() == before
    hidden.replace(books / "3.txt")
    last = run(*command, "--json").json
    assert (last["done"], last["skipped"], last["failed"], last["failures"]) == (1, 8, 0, [])
    assert sorted(line["index"] for line in lines(out)) == list(range(COUNT))
    assert (out / "failures.jsonl").read_bytes() == b""


def test_ids_tell_documents_apart(run: Run, decoder_folder: Path, tmp_path: Path) -> None:
    rows = [{"id": "a", "text": "one"}, {"id": "b", "text": "two"}, {"id": "a", "text": "three"}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["run", "--input", tmp_path / "list.jsonl", "--output", tmp_path / "out", "--model", decoder_folder]
    for _ in range(2):
        result = run(*command)
        assert result.code == 1
        assert result.err == "rmt-engine: a (again, number 2): the id 'a' has come before: ids tell documents apart\n"
    assert {line["id"] for line in lines(tmp_path / "out")} == {"a", "b"}


def test_a_torn_last_line_is_done_again(run: Run, decoder_folder: Path, books: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [
        "run",
        "--input",
        books,
        "--slots",
        2,
        "--output",
        out,
        "--model",
        decoder_folder,
        "--ask",
        "Who?",
        "--json",
    ]
    assert run(*command).json["done"] == COUNT
    whole = (out / "results.jsonl").read_bytes()
    expected = sorted(whole.splitlines())
    last = whole.rindex(b"\n", 0, len(whole) - 1) + 1
    for cut in (last, last + 1, last + 20, len(whole) - 1):
        (out / "results.jsonl").write_bytes(whole[:cut])
        result = run(*command).json
        assert (result["done"], result["skipped"]) == (1, COUNT - 1)
        assert sorted((out / "results.jsonl").read_bytes().splitlines()) == expected


def test_a_folder_of_something_else_is_refused(run: Run, decoder_folder: Path, books: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["run", "--input", books, "--slots", 2, "--output", out, "--model", decoder_folder]
    assert run(*command, "--ask", "Who?").code == 0
    before = (out / "results.jsonl").read_bytes()
    words = (
        rf"rmt-engine: {out} holds results of another run (questions: ['Who?'], now ['What?']): give another --output"
    )
    other = run(*command, "--ask", "What?")
    assert (other.code, other.err) == (2, words + "\n")
    for more in (["--temperature", "2"], ["--score"], ["--batch-invariant"], ["--segment-size", "9"]):
        assert run(*command, "--ask", "Who?", *more).code == 2
    assert run(*command[:4], 5, *command[5:], "--ask", "Who?").code == 0, "the number of slots may change"
    with open(out / "results.jsonl", "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        busy = run(*command, "--ask", "Who?")
        assert (busy.code, busy.err) == (
            2,
            f"rmt-engine: another run writes to {out}: wait for it, or give another --output\n",
        )
    (out / "results.jsonl").write_bytes(b"{}\n" + before)
    damaged = run(*command, "--ask", "Who?")
    assert damaged.code == 1 and "results.jsonl, line 1 is damaged ('id'): mend it" in damaged.err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "results.jsonl").write_text("a file of the user\n")
    mine = run(*command[:-3], tmp_path / "mine", *command[-2:])
    assert mine.code == 2 and "is of no run of ours" in mine.err


def test_sorting_keeps_every_line(tmp_path: Path) -> None:
    with ResultsFolder(tmp_path, {}) as results:
        for index in random.Random(0).sample(range(200), 200):
            results.add({"id": str(index), "index": index, "text": "é" * (index % 7)})
        results.sort()
    assert [line["index"] for line in lines(tmp_path)] == list(range(200))
    with ResultsFolder(tmp_path, {}) as results:
        assert len(results.done) == 200


# ------------------------------------------------------------------------------------------------- killed


@pytest.mark.parametrize("seed", range(1))
def test_a_kill_loses_no_finished_document(decoder_folder: Path, books: Path, tmp_path: Path, seed: int) -> None:
    """kill -9 at random moments, again and again: a line that was there stays, the end is that of a run in peace."""
    rng, log = random.Random(seed), tmp_path / "log"
    texts = [random.Random(i).randrange(1, 40) * TEXT for i in range(30)]
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps({"id": f"d{i}", "text": t}) for i, t in enumerate(texts)))
    base = [
        "run",
        "--input",
        str(tmp_path / "list.jsonl"),
        "--slots",
        "4",
        "--model",
        str(decoder_folder),
        "--ask",
        "Who?",
    ]

    def start(out: str) -> int:
        return fork(lambda: cli.main([*base, "--output", str(tmp_path / out)]), log)

    begun = time.monotonic()
    assert exit_code(start("peace")) == 0, log.read_text()
    seconds = time.monotonic() - begun
    out, seen, kills = "out", b"", 0
    for _ in range(6):
        path, child = tmp_path / out / "results.jsonl", start(out)
        time.sleep(rng.uniform(0.2, 0.8) * seconds)
        os.kill(child, signal.SIGKILL)
        kills += exit_code(child) == -signal.SIGKILL
        if not kills:  # done before it was killed: the machine is faster now
            out, seconds = f"{out}-again", seconds / 2
            continue
        now = path.read_bytes() if path.exists() else b""
        whole = now[: now.rfind(b"\n") + 1]
        assert whole.startswith(seen), "a finished line is gone"
        seen = whole
    assert kills and seen
    assert exit_code(start(out)) == 0, log.read_text()
    assert path.read_bytes().startswith(seen)
    assert sorted(path.read_bytes().splitlines()) == sorted(
        (tmp_path / "peace" / "results.jsonl").read_bytes().splitlines()
    )


def test_a_write_that_is_torn_by_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short write is gone on with; a full disk ends the run, and the torn line is cut off by the next."""
    real = os.write
    with ResultsFolder(tmp_path, {}) as results:
        monkeypatch.setattr(os, "write", lambda handle, data: real(handle, bytes(data)[:5]))
        results.add({"id": "a", "index": 0})
        calls = iter(range(3))

        def full(handle: int, data: Any) -> int:
            if next(calls) == 2:
                raise OSError(28, "No space left on device")
            return real(handle, bytes(data)[:5])

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            results.add({"id": "b", "index": 1})
    monkeypatch.undo()
    assert not (tmp_path / "results.jsonl").read_bytes().endswith(b"\n")
    with ResultsFolder(tmp_path, {}) as results:
        assert results.done == {"a"}
        results.add({"id": "b", "index": 1})
    assert [line["id"] for line in lines(tmp_path)] == ["a", "b"]


def test_an_interrupted_run_keeps_what_is_done(decoder_folder: Path, tmp_path: Path) -> None:
    engine = Engine.from_pretrained(decoder_folder, device="cpu")

    def many() -> Iterator[Any]:
        for number, document in enumerate(documents_in(tmp_path / "list.jsonl")):
            if number == 12:
                raise KeyboardInterrupt
            yield document

    rows = [{"ids": np.random.default_rng(i).integers(0, 256, 30 + i).tolist()} for i in range(20)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(KeyboardInterrupt):
        DocumentRun(engine, Wanted(), {"slots": 2}).into(many(), tmp_path / "out", "completed")
    assert len(lines(tmp_path / "out")) >= 10
    tally = DocumentRun(engine, Wanted(), {"slots": 2}).into(
        documents_in(tmp_path / "list.jsonl"), tmp_path / "out", "input"
    )
    assert tally.done + tally.skipped == 20 and tally.skipped >= 10
    assert [line["index"] for line in lines(tmp_path / "out")] == list(range(20))
