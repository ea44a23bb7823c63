"""rmt-engine bench: what is measured, checked, left out and printed."""

from __future__ import annotations

import argparse
import csv
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_for_tests import TinyCheckpoint, tiny_encoder
from torch import Tensor

from rmt_engine.backbones import module_of
from rmt_engine.bench import card, cases, readers, session
from rmt_engine.bench.arguments import CONFIGS, FORMATS
from rmt_engine.bench.card import Floors
from rmt_engine.bench.peak_memory import peak_memory
from rmt_engine.bench.readers import ENGINE, EngineReader, LoopReader
from rmt_engine.bench.record import about, command
from rmt_engine.bench.results import FAILED, LEFT_OUT, MEASURED, Report, Result, Row
from rmt_engine.bench.session import Limits, Session, relative_error
from rmt_engine.bench.setup import BACKBONES, Setup, named_config, random_weights, write_random
from rmt_engine.bench.timing import interleaved, ms_at_ends, plan
from rmt_engine.checkpoint.conversion import write_folder
from rmt_engine.cli import main, parser
from rmt_engine.engine import Engine
from rmt_engine.errors import BackendError

CPU = torch.device("cpu")
QUICK = ["--repetitions", "2", "--no-memory", "--threads", "1", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def small_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is measured in a moment."""
    monkeypatch.setattr(card, "SIDES", {"cpu": (128,)})
    monkeypatch.setattr(card, "BYTES", {"cpu": 1 << 20})


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["bench", *QUICK, "-o", "json", *arguments])
    return code, json.loads(capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------- whole runs


def test_a_decoder_beside_its_baselines(decoder_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    against = ["hf", "fair", "full-attention"]
    code, found = bench(
        capsys, "--model", str(decoder_folder), "--lengths", "50,250", "--batch", "1,3,5", "--scope", "segment,tokens",
        "--against", ",".join(against),
    )  # fmt: skip
    assert code == 0
    assert [(row["scope"], row["tokens"], row["batch"]) for row in found["rows"]] == [
        ("segment", 20, 1), ("segment", 20, 3), ("segment", 20, 5),
        ("tokens", 50, 1), ("tokens", 250, 1), ("tokens", 50, 3), ("tokens", 250, 3),
        ("tokens", 50, 5), ("tokens", 250, 5),
    ]  # fmt: skip
    for row in found["rows"]:
        expected = [ENGINE, *against] if row["scope"] == "tokens" else [ENGINE, *against[:2]]
        assert [result["name"] for result in row["results"]] == expected
        for result in row["results"]:
            assert result["status"] == MEASURED and len(result["seconds"]) == 2
            assert result["error"] <= 1e-4 and result["floor"] > 0
            assert result["rate"] == pytest.approx(row["amount"] / result["median"])
        engine = row["results"][0]["median"]
        assert all(r["speed_up_of_the_engine"] == pytest.approx(r["median"] / engine) for r in row["results"][1:])
    assert found["cards"]["float32"]["flops"] > 1e8 and found["threads"] == 1
    assert {"command", "commit", "machine", "versions", "before", "after", "device"} <= set(found)


def test_an_encoder_beside_its_baselines(encoder_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = bench(
        capsys, "--model", str(encoder_folder), "--lengths", "50", "--scope", "tokens,ask",
        "--against", "hf,fair,full-attention",
    )  # fmt: skip
    assert code == 0
    tokens, ask = found["rows"]
    assert [result["status"] for result in tokens["results"]] == [MEASURED, MEASURED, MEASURED, LEFT_OUT]
    assert "needs a decoder" in tokens["results"][3]["reason"]
    assert ask["results"][0]["status"] == MEASURED


def test_the_loops_of_a_roberta() -> None:
    """Its classifier has no pooler before it."""
    tiny = tiny_encoder("roberta", seed=3, noise="all", layers=2)
    config, weights, ids = tiny.rmt_config(20, "left"), tiny.weights(), 6 + torch.arange(50)[None] % 30
    expected = Engine.from_weights(config, weights, device="cpu", dtype="float32").forward(ids)
    for name in ("hf", "fair"):
        found = readers._baselines().build(name, config, weights)(ids)
        torch.testing.assert_close(found.memory_state, expected.memory_state, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=0)


def test_a_question_that_does_not_fit_is_left_out(decoder_folder: Path, tmp_path: Path) -> None:
    row = next(_rows(_session(decoder_folder, tmp_path), "ask"))
    assert row.engine.status == LEFT_OUT and "a segment holds 20" in row.engine.reason


def test_text_answers_and_states(
    decoder_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cases, "QUESTION", "Who?")
    code, found = bench(
        capsys, "--model", str(decoder_folder), "--lengths", "90", "--scope", "text,tokenize,ask,state"
    )  # fmt: skip
    assert code == 0
    assert [row["scope"] for row in found["rows"]] == ["text", "tokenize", "ask", "save", "resume", "fork"]
    assert all(row["results"][0]["status"] == MEASURED for row in found["rows"])
    text, tokenize = found["rows"][:2]
    assert text["amount"] == tokenize["amount"] and abs(text["amount"] - 90) < 30
    assert found["rows"][2]["unit"] == "ms"


def test_everything_is_written_after_each_row(decoder_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    assert main(["bench", *QUICK, "--model", str(decoder_folder), "--lengths", "50", "--out", str(out)]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["format"] == 1 and len(found["rows"][0]["results"][0]["seconds"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_a_checkpoint_without_a_tokenizer_reads_no_text(tmp_path: Path, tiny_gpt2: TinyCheckpoint) -> None:
    row = next(_rows(_untokenized(tmp_path, tiny_gpt2), "text"))
    assert row.engine.status == LEFT_OUT and "no tokenizer" in row.engine.reason


def test_a_row_that_no_backend_serves_is_left_out(
    decoder_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Engine.from_weights

    def picky(*args: Any, dtype: str, **options: Any) -> Engine:
        if dtype == "bfloat16":
            raise BackendError("not in bfloat16")
        return build(*args, dtype=dtype, **options)

    monkeypatch.setattr(Engine, "from_weights", picky)
    arguments = ["--model", str(decoder_folder), "--lengths", "50", "--dtype", "bfloat16,float32"]
    code, found = bench(capsys, *arguments)
    assert code == 0
    assert [row["results"][0]["status"] for row in found["rows"]] == [LEFT_OUT, MEASURED]
    assert found["rows"][0]["results"][0]["reason"] == "not in bfloat16"


# ------------------------------------------------------------------------------------------------- checks


def wrong(run: Any) -> Any:
    return lambda on_step: run(on_step) + 0.01


def test_a_wrong_engine_is_printed_without_a_speed(
    decoder_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = EngineReader.stream
    monkeypatch.setattr(EngineReader, "stream", lambda self, ids: wrong(right(self, ids)))
    code, found = bench(capsys, "--model", str(decoder_folder), "--lengths", "50", "--against", "fair")
    engine, fair = found["rows"][0]["results"]
    assert code == 1
    assert engine["status"] == FAILED and "off by" in engine["reason"]
    assert engine["seconds"] == [] and engine["rate"] is None
    assert fair["status"] == LEFT_OUT and fair["speed_up_of_the_engine"] is None


def test_a_wrong_baseline_makes_no_speed_up(
    decoder_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = LoopReader.stream
    monkeypatch.setattr(LoopReader, "stream", lambda self, ids: wrong(right(self, ids)))
    code, found = bench(capsys, "--model", str(decoder_folder), "--lengths", "50", "--against", "fair,full-attention")
    assert code == 1
    engine, *others = found["rows"][0]["results"]
    assert engine["status"] == MEASURED
    assert all(o["status"] == FAILED and o["rate"] is None and o["seconds"] == [] for o in others)


def test_repetitions_of_the_engine_must_agree_in_bits(
    decoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = _session(decoder_folder, tmp_path)
    made._checked(ENGINE, 1)
    right, calls = EngineReader.stream, iter(range(100))
    monkeypatch.setattr(
        EngineReader, "stream", lambda self, ids: lambda on_step: right(self, ids)(on_step) * (1 + next(calls) * 1e-6)
    )
    row = made.stream(50, 1, Limits(2, 100, False))
    assert (row.engine.status, row.engine.seconds) == (FAILED, [])
    assert "differ in bits" in row.engine.reason


@pytest.mark.parametrize(("scope", "module"), [("text", "reader"), ("tokenize", "tokens")])
def test_wrong_text_is_printed_without_a_speed(
    decoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scope: str, module: str
) -> None:
    if module == "reader":
        right = EngineReader.text
        monkeypatch.setattr(EngineReader, "text", lambda self, path: wrong(right(self, path)))
    else:
        real = cases.tokenize_stream
        monkeypatch.setattr(cases, "tokenize_stream", lambda *a: (ids + 1 for ids in real(*a)))
    row = next(_rows(_session(decoder_folder, tmp_path), scope))
    assert (row.engine.status, row.engine.seconds) == (FAILED, [])


def test_the_error_is_relative_and_not_a_number_is_an_error() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(expected + torch.tensor([0.3, 0.4]), expected) == pytest.approx(0.1)
    assert not relative_error(torch.tensor([float("nan"), 4.0]), expected) <= 1.0


# ------------------------------------------------------------------------------------------------- budget, memory


def test_what_does_not_fit_the_budget_is_left_out_slowest_first() -> None:
    estimates = {"engine": 2.0, "slow": 10.0, "fair": 3.0}
    assert plan(estimates, 100, 5) == plan(estimates, 75, 5)
    assert plan(estimates, 75, 5).repetitions == 5 and plan(estimates, 74, 5).repetitions == 4
    assert plan(estimates, 15, 5).kept == ("engine", "slow", "fair")
    tight = plan(estimates, 14, 5)
    assert (tight.kept, dict(tight.left_out), tight.repetitions) == (("engine", "fair"), {"slow": 10.0}, 2)
    alone = plan({"engine": 9.0, "fast": 1.0}, 9.5, 5)
    assert (alone.kept, alone.left_out, alone.repetitions) == (("engine",), {"fast": 1.0}, 1)
    assert plan({"engine": 9.0}, 8, 5).kept == ()
    assert plan({"engine": 9.0}, 17, 5, more=1).kept == () and plan({"engine": 9.0}, 18, 5, more=1).repetitions == 1


def test_a_row_over_the_budget_has_no_speed(decoder_folder: Path, tmp_path: Path) -> None:
    made = _session(decoder_folder, tmp_path, "fair")
    row = made.stream(50, 1, Limits(3, 1e-9, False))
    assert [result.status for result in row.results] == [LEFT_OUT, LEFT_OUT]
    assert all("would take about" in result.reason and not result.seconds for result in row.results)


def test_what_would_fill_the_memory_is_left_out(
    decoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = _session(decoder_folder, tmp_path, "hf")
    monkeypatch.setattr(session, "_available", lambda device: 1000)
    row = made.stream(50, 1, Limits(1, 100, False))
    assert [result.status for result in row.results] == [MEASURED, LEFT_OUT]
    assert "it would hold" in row.results[1].reason


def test_full_attention_has_no_positions_that_memory_could_not_fill(
    tmp_path: Path, tiny_gpt2: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "gpt2"
    write_folder(folder, tiny_gpt2.rmt_config(20), tiny_gpt2.weights())
    made = _session(folder, tmp_path, "full-attention", longest=1_000_000_000)
    monkeypatch.setattr(session, "_available", lambda device: 1 << 20)
    short, long = (made.stream(tokens, 1, Limits(1, 100, False)) for tokens in (90, 1_000_000))
    assert [result.status for result in short.results] == [MEASURED, MEASURED]
    assert long.results[1].status == LEFT_OUT


def test_memory_is_that_of_another_process(decoder_folder: Path) -> None:
    here = torch.ones(300 << 20)  # 1.2 GiB of this process
    found = peak_memory(Setup(str(decoder_folder), device="cpu", threads=1), ENGINE, 1, 50)
    assert found is not None and 20 << 20 < found < here.numel() * 4


# ------------------------------------------------------------------------------------------------- times, floors


def test_runs_take_turns() -> None:
    order: list[str] = []
    timings = interleaved({name: lambda on_step, n=name: order.append(n) for name in "abc"}, 4, CPU)
    assert "".join(order) == "abcbcacababc"
    assert [len(timing.seconds) for timing in timings.values()] == [4, 4, 4]


def test_the_ends_are_medians_of_quarters() -> None:
    ends = [0.0]
    for ms in [1, 1, 9, 5, 5, 5, 2, 2, 2, 8, 3, 3]:
        ends.append(ends[-1] + ms / 1e3)
    assert ms_at_ends(ends) == pytest.approx((1, 3))
    assert ms_at_ends(ends[:8]) is None


def test_the_floor_of_a_stream_is_that_of_its_segments(decoder_folder: Path, tmp_path: Path) -> None:
    made = _session(decoder_folder, tmp_path)
    floors: Floors = made.floors
    whole = 3 * floors.step(20, 2) + floors.step(7, 2, 7)
    assert floors.stream(67, 2) == pytest.approx(whole)
    assert floors.work(67, 2) < floors.work(68, 2)
    assert floors.full_attention_work(200, 1) / floors.full_attention_work(100, 1) > 2


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("bert-base", 109_483_778), ("llama-3.2-1b", 1_235_814_400)],
)
def test_the_shapes_are_those_of_their_names(name: str, parameters: int) -> None:
    config = named_config(name)
    shapes = module_of(config.model_type).parameter_shapes(config.backbone)
    assert sum(map(prod, shapes.values())) == parameters
    assert config.segment_size + config.overhead == 512 and config.alignment == "left"
    assert set(CONFIGS) == set(BACKBONES)


def test_random_weights_are_the_same_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2}
    monkeypatch.setitem(BACKBONES, "gpt2", {**BACKBONES["gpt2"], **small})
    one, other = (random_weights(named_config("gpt2")) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one["transformer.h.0.ln_1.weight"].eq(1).all() and one["transformer.h.0.attn.c_attn.bias"].eq(0).all()
    assert abs(float(one["transformer.wte.weight"].std()) - 0.02) < 1e-3
    write_random("gpt2", tmp_path / "made")
    loaded = Setup(str(tmp_path / "made")).load()
    assert all(torch.equal(one[name], loaded.weights[name]) for name in one)


# ------------------------------------------------------------------------------------------------- forms


@pytest.fixture
def report() -> Report:
    fast = Result(ENGINE, seconds=[2.0, 1.0, 1.5], start_ms=[3.0], end_ms=[4.0], memory=3 << 20, floor=0.75)
    slow, wrong, long = Result("hf", seconds=[3.0]), Result("fair", FAILED, "off"), Result(ENGINE, LEFT_OUT, "too slow")
    rows = [
        Row("tokens", "m", 1, "float32", 3000, 3000, [fast, slow, wrong]),
        Row("tokens", "m", 8, "float32", 4000, 32000, [long, Result("hf", LEFT_OUT, "too slow")]),
        Row("ask", "m", 1, "float32", None, 1, [Result(ENGINE, seconds=[0.25])]),
    ]
    return Report({"command": "c"}, rows)


def test_the_table_for_people(report: Report) -> None:
    head, first, second, _, *notes = report.text("table").splitlines()
    assert head.split()[:6] == ["scope", "model", "tokens", "batch", "dtype", "tokens/s"]
    assert " ".join(first.split()) == "tokens m 3k 1 float32 2,000 33 % 3 4 3 MiB 50 % 2.00 failed"
    assert " ".join(second.split()) == "tokens m 4k 8 float32 left out left out"
    assert notes[0] == "tokens 3k × 1, float32, fair failed: off"
    assert "250" in notes[-1]


def test_a_busy_machine_is_told() -> None:
    calm, busy = (
        Result(ENGINE, seconds=[1.0, 1.0], cpu_seconds=[0.9, 1.9]),
        Result("hf", seconds=[1.0], cpu_seconds=[0.5]),
    )
    assert not calm.disturbed and busy.disturbed
    text = Report({}, [Row("tokens", "m", 1, "float32", 4000, 4000, [calm, busy])]).text("table")
    assert text.count("other work on this machine") == 1 and "hf waited" in text


def test_the_other_forms_hold_the_same(report: Report) -> None:
    lines = report.text("md").splitlines()
    assert lines[2] == "| tokens | m | 3k | 1 | float32 | 2,000 | 33 % | 3 | 4 | 3 MiB | 50 % | 2.00 | failed |"
    whole = json.loads(report.text("json"))
    first, *rows = (json.loads(line) for line in report.text("jsonl").splitlines())
    assert rows == whole["rows"] and first == {"format": 1, "command": "c"}
    assert whole["rows"][0]["results"][0]["seconds"] == [2.0, 1.0, 1.5]
    table = list(csv.DictReader(io.StringIO(report.text("csv"))))
    assert [row["status"] for row in table] == [MEASURED, MEASURED, FAILED, LEFT_OUT, LEFT_OUT, MEASURED]
    assert [row["reader"] for row in table] == [ENGINE, "hf", "fair", ENGINE, "hf", ENGINE]
    assert (table[0]["rate"], table[1]["speed_up_of_the_engine"], table[2]["rate"]) == ("2000.0", "2.0", "")
    assert {report.text(kind) for kind in FORMATS} and report.failed


# ------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scope", "segment,nothing"], "expected some of segment, tokens"),
        (["--against", "hf,other"], "expected some of hf, fair, compile, full-attention, none"),
        (["--config", "gpt5"], "invalid choice"),
        (["--config", "gpt2", "--model", "x"], "not allowed with"),
        (["--lengths", "4q"], "expected a whole number above 0"),
    ],
)
def test_mistakes_are_told(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(["bench", *arguments])
    assert said in capsys.readouterr().err


def test_without_a_checkout_there_is_nothing_to_compare_with(
    decoder_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "SOURCE", tmp_path / "baselines.py")
    arguments = ["bench", *QUICK, "--model", str(decoder_folder), "--lengths", "50"]
    assert main([*arguments, "--against", "fair"]) == 2
    assert "needs benchmarks/baselines.py" in capsys.readouterr().err
    assert main(arguments) == 0


def test_help_says_what_a_scope_is_and_needs_no_torch() -> None:
    code = "import sys; from rmt_engine.cli import main\ntry: main(['bench', '--help'])\nexcept SystemExit: pass\n"
    code += "print('heavy:', *sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "tokenize   the same text file" in done.stdout and done.stdout.splitlines()[-1] == "heavy:"


def test_the_record_names_command_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/any/bin/rmt-engine", "bench", "--out", "f.json", "--lengths", "4k"])
    assert command() == "rmt-engine bench --lengths 4k"
    found = about()
    assert found["versions"]["torch"] == torch.__version__ and found["machine"]


# ------------------------------------------------------------------------------------------------- helpers


def _session(folder: Path, tmp_path: Path, *against: str, longest: int = 500) -> Session:
    setup = Setup(str(folder), device="cpu", dtype="float32", threads=1)
    return Session(setup, "tiny", against, longest, tmp_path)


def _untokenized(tmp_path: Path, tiny: TinyCheckpoint) -> Session:
    weights: dict[str, Tensor] = tiny.weights()
    write_folder(tmp_path / "plain", tiny.rmt_config(20), weights)
    return _session(tmp_path / "plain", tmp_path)


def _rows(made: Session, scope: str) -> Iterator[Row]:
    from rmt_engine.bench.command import _session_rows

    options = argparse.Namespace(scope=[scope], lengths=[90], batch=[1], repetitions=2, budget=60, no_memory=True)
    return _session_rows(options, made)
