"""The examples run, and so does every command of the tutorial, on a shorter text than its first one makes."""

from __future__ import annotations

import io
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from rmt_engine import cli

ROOT = Path(__file__).parent.parent
LINE = "Nothing else is told here, and nobody asks. "


def run_example(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    try:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit as end:
        assert not end.code


@pytest.mark.parametrize(
    "name, words",
    [
        ("contexts", ["Where is Mary?  kitchen", "in the fork:  garden", "in the story:  kitchen"]),
        ("answers", [" office\n", "awaited:  office", "transformers' streamer:  office"]),
        ("many_documents", ["story 1: 727 tokens, Sandra is in the garden", "broken: expected UTF-8", "[4, 128]"]),
    ],
)
def test_examples(
    name: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_example(f"examples/{name}.py", monkeypatch)
    shown = capsys.readouterr().out
    assert not [word for word in words if word not in shown], shown


def test_the_main_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """What `make run` and the tutorial's first command do."""
    run_example("examples/two_million_tokens.py", monkeypatch, "--tokens", "3000", "--out", str(tmp_path))
    assert "the fact was found both times" in capfd.readouterr().out


def tutorial_commands() -> list[str]:
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    return [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines() if line]


def test_the_tutorial(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "big.txt").write_text(LINE * 40 + "Sandra journeyed to the office. " + LINE * 90)
    (tmp_path / "run" / "more.txt").write_text("Sandra travelled to the garden. " + LINE * 9)
    ran = 0
    for command in tutorial_commands():
        command = command.replace("500k", "1k")
        feed, _, rest = command.rpartition(" | ")
        words = shlex.split(rest)
        capfd.readouterr()
        if words[0] != "rmt-engine":
            assert words[0] in ("make", "source") or (ROOT / words[1]).is_file()
            continue  # the set-up, and the examples, which are tested above
        if feed:
            data = (tmp_path / feed.removeprefix("cat ")).read_bytes()
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert cli.main(words[1:]) == 0, command
        ran += 1
        shown = capfd.readouterr().out
        asked = "ask" in words[1] or "--ask" in words
        assert not asked or "garden" in shown or "office" in shown or "results" in shown, (command, shown)
    assert ran == 8
    lines = [json.loads(line) for line in (tmp_path / "run" / "results" / "results.jsonl").read_text().splitlines()]
    answers = {line["id"]: line["answers"][0]["answer"] for line in lines}
    assert answers == {"run/big.txt": "office", "run/more.txt": "garden"}
