"""`rmt-engine eval` on the command line: what it prints, draws, keeps and refuses."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rmt_engine import InputError
from rmt_engine.cli import main, parser
from rmt_engine.eval_commands import duration
from rmt_engine.evaluation import plots, report, retrieval
from rmt_engine.evaluation.cost import Load, estimate
from rmt_engine.evaluation.drift import Drift
from rmt_engine.evaluation.perplexity import Change, Column, Result
from rmt_engine.evaluation.retrieval import Cell

CELLS = [
    Cell("memorize", 1, 1000, 9, 4, 4, ((4, 4), *[(0, 0)] * 9), ()),
    Cell("detect", 2, 1000, 9, 4, 3, ((1, 1), (2, 1), *[(0, 0)] * 6, (1, 1), (0, 0)), (("Q?", "garden", "office"),)),
    Cell("detect", 2, 20000, 179, 4, 1, ((2, 0), *[(0, 0)] * 8, (2, 1)), ()),
]


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("noise") / "noise.txt"
    path.write_text(Path(json.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return path


def _retrieval(noise: Path, *more: object) -> int:
    command = ["eval", "retrieval", "--noise", noise, "--lengths", "600,8seg", "--trials", 2, "--tasks", "detect"]
    return main([str(part) for part in [*command, *more]])


def test_retrieval(noise: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _retrieval(noise) == 0
    result = capsys.readouterr()
    assert "600 tokens         6 segments  2/2 = 100.0 % (95 %: 34.2 to 100.0)" in result.out
    assert "896 tokens         8 segments" in result.out
    assert "detect: percent right by the place of the fact" in result.out
    told, unit = result.err.split(":")
    assert told.startswith("reading 2.") or (told.startswith("reading 1.") and "k tokens" in told)
    assert unit.split()[0] == "about"


@pytest.mark.parametrize("answer", ["generate", "score"])
def test_retrieval_as_json(noise: Path, capsys: pytest.CaptureFixture[str], answer: str) -> None:
    assert _retrieval(noise, "--json", "--facts", 2, "--answer", answer, "--seed", 3) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["commit"] is None or len(result["commit"]) >= 40
    assert result["command"] and result["machine"] and result["versions"]["torch"]
    assert [(cell["task"], cell["facts"], cell["tokens"], cell["trials"]) for cell in result["cells"]] == [
        ("detect", 2, 600, 2),
        ("detect", 2, 896, 2),
    ]
    assert (result["seed"], result["dtype"], result["answer"]) == (3, "float32", answer)


def test_retrieval_is_kept_and_drawn(noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--resume-dir", tmp_path / "kept", "--plot", tmp_path / "map.png", "-o", "csv"]
    assert _retrieval(noise, *more) == 0
    first = capsys.readouterr()
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(io.StringIO(first.out)))
    assert [(row["task"], row["tokens"], row["correct"]) for row in rows] == [
        ("detect", "600", "2"),
        ("detect", "896", "2"),
    ]
    assert _retrieval(noise, *more) == 0
    second = capsys.readouterr()
    assert second.out == first.out and "reading 0 tokens" in second.err
    assert _retrieval(noise, *more, "--seed", 1) == 2
    assert "holds another measurement (seed: 0 there, 1 now): give another folder" in capsys.readouterr().err


def test_an_interrupted_run_says_how_it_goes_on(
    noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(retrieval, "evaluate", interrupted)
    assert _retrieval(noise, "--resume-dir", tmp_path / "kept") == 130
    assert f"what was answered is kept in {tmp_path / 'kept'}: the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--tasks", "juggle"], "tasks must be of memorize, detect, reasoning; got juggle"),
        (["--plot", "map.xyz"], "cannot draw map.xyz: expected a file that ends in one of"),
        (["--plot", "/nowhere/map.png"], "there is no folder /nowhere to draw in"),
    ],
)
def test_mistakes(noise: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str) -> None:
    assert _retrieval(noise, *more) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("text", ["3sog", "seg", "-1", "0seg", "1.5k"])
def test_lengths_that_are_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["eval", "retrieval", "--lengths", text])
    assert "--lengths" in capsys.readouterr().err


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"a figure needs matplotlib, .* pip install 'rmt-engine\[figures\]'"):
        plots.check_plot("map.png")


def test_a_killed_run_goes_on(noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """kill -9 behind the first batch: its answers are there, nothing else is, and the end is that of a whole run."""
    command = ["eval", "retrieval", "--noise", str(noise), "--tasks", "detect", "--trials", "4", "--slots", "2"]
    command += ["--lengths", "600,60k", "-o", "csv"]
    kept = tmp_path / "kept"
    run = [sys.executable, "-m", "rmt_engine", *command, "--resume-dir", str(kept)]
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ})
    answers, patience = kept / "answers.jsonl", time.monotonic() + 120
    while not (answers.exists() and answers.read_bytes().endswith(b"\n")):
        assert process.poll() is None and time.monotonic() < patience
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = answers.read_bytes()
    assert 1 <= before.count(b"\n") < 4

    command[command.index("600,60k")] = "600,2k"  # what was answered serves any lengths
    assert main([*command, "--resume-dir", str(kept)]) == 0
    resumed = capsys.readouterr().out
    assert answers.read_bytes().startswith(before)
    assert main(command) == 0
    assert capsys.readouterr().out == resumed


def test_drift(noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The slow backend computes in half precision on any CPU."""
    command = ["eval", "drift", "--noise", str(noise), "--lengths", "300", "--trials", "3", "--backend", "ref"]
    command += ["--tasks", "detect", "--resume-dir", str(tmp_path / "kept")]
    assert main([*command, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["drift"]
    assert row["both"] + row["only_first"] + row["only_second"] + row["neither"] == 3
    assert row["dtypes"] == ["float32", "bfloat16"] and row["both"] >= 2
    assert main([*command, "-o", "md"]) == 0
    assert "| task | tokens | trials | float32 | bfloat16 |" in capsys.readouterr().out
    assert main([*command, "--dtypes", "float32"]) == 2
    assert "--dtypes expects two that differ" in capsys.readouterr().err


def test_perplexity(noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "perplexity", "--input", str(noise), "--segments", "1,2", "--targets", "6"]
    assert main([*command, "--plot", str(tmp_path / "curve.svg")]) == 0
    result = capsys.readouterr()
    assert [line.split()[0] for line in result.out.splitlines()[1:3]] == ["1", "2"]
    assert "666 tokens of 6 segments in 1 documents, the same in each row" in result.out
    assert "6 segments to predict, 16 side by side: about" in result.err
    assert "<svg" in (tmp_path / "curve.svg").read_text(encoding="utf-8")
    assert main([*command, "--json"]) == 0
    first, _ = json.loads(capsys.readouterr().out)["columns"]
    assert first["change"] == {"percent": 0.0, "interval": [0.0, 0.0]}


def test_babilong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = {"input": "Mary went to the garden.", "question": "Where is Mary?", "target": "garden"}
    (tmp_path / "qa1_0k.json").write_text(json.dumps([sample]))
    command = ["eval", "babilong", "--data", str(tmp_path), "--max-new-tokens", "8"]
    asked = ["--prompt", "{context}\nQuestion: {question}\nAnswer:"]
    assert main([*command, *asked]) == 0
    result = capsys.readouterr()
    assert "qa1      0k  1/1 = 100.0 % (95 %: 20.7–100.0)" in result.out
    assert "tokens, 1 files, 16 samples side by side: about" in result.err
    kept = [*command, *asked, "--resume-dir", str(tmp_path / "kept")]
    assert (main(kept), main(kept)) == (0, 0)
    assert "reading 0 tokens, 1 files" in capsys.readouterr().err
    assert main([*command, *asked, "-o", "md"]) == 0
    assert "| qa1 | 0k | 1 of 1 | 100.0 % | 20.7–100.0 |" in capsys.readouterr().out
    assert main([*command, *asked, "--instructions", "x.json"]) == 2
    assert "leave out --prompt" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ reports


def test_a_table_of_markdown() -> None:
    assert report.retrieval(CELLS[:2], "md", {}).splitlines() == [
        "| task | facts | tokens | segments | right | accuracy | 95 % |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| memorize | 1 | 1,000 | 9 | 4 of 4 | 100.0 % | 51.0–100.0 |",
        "| detect | 2 | 1,000 | 9 | 3 of 4 | 75.0 % | 30.1–95.4 |",
    ]


def test_a_heat_map_of_characters() -> None:
    lines = report.heat_maps(CELLS).splitlines()
    assert lines[0] == "detect: percent right by the place of the fact"
    assert lines[2].split() == ["1,000", "100", "50", *"······", "100", "·"]
    assert lines[3].split() == ["20,000", "0", *"········", "50"]
    assert report.heat_maps(CELLS[:1]) == ""


def test_drift_counts_pairs() -> None:
    row = Drift("detect", 1000, ("float32", "bfloat16"), both=27, only_first=2, only_second=0, neither=1, same=28)
    assert row.accuracy == (29 / 30, 27 / 30) and row.difference == pytest.approx(-100 * 2 / 30)
    low, high = row.interval
    assert low < row.difference < high
    assert "-6.7" in report.drift([row], "table", {}) and "-6.7" in report.drift([row], "csv", {})


def test_what_is_not_a_number_is_null() -> None:
    nothing = Change(float("nan"), None)
    column = Column(1, 9.0, 9.5, float("nan"), Change(0.0, (0.0, 0.0)), Change(0.0, None), nothing)
    result: dict[str, Any] = json.loads(report.perplexity(Result((column,), 11, 1, 1, "target"), "json", {}))
    assert result["columns"][0]["other"] is None and result["columns"][0]["perplexity"] == 9.0
    assert "nan" in report.perplexity(Result((column,), 11, 1, 1, "target"), "csv", {})


def test_the_cost_is_that_of_measured_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from rmt_engine.evaluation import cost

    monkeypatch.setattr(cost, "step_seconds", lambda engine, slots: 0.1 + 0.01 * slots)
    told = estimate(None, [Load(10, 5, 500), Load(1, 2, 20)])  # type: ignore[arg-type]
    assert told.tokens == 520 and told.seconds == pytest.approx(5 * 0.2 + 2 * 0.11)
    assert estimate(None, []).seconds == 0  # type: ignore[arg-type]


@pytest.mark.parametrize(("seconds", "words"), [(0.2, "1 s"), (59, "59 s"), (90, "1 min 30 s"), (5000, "1 h 23 min")])
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
