"""The GPU script without a GPU: its parts on a CPU with tiny shapes, and what it keeps when time ends."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_gpu  # noqa: E402 - beside the benchmarks
import gpu_parts  # noqa: E402
from rmt_kernels.cost_model import Card  # noqa: E402


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> gpu_parts.Place:
    monkeypatch.setattr(gpu_parts, "measured_card", lambda device, dtype: Card("none", 1e12, 1e11))
    for name in ("ROUNDS", "REPEATS"):
        monkeypatch.setattr(gpu_parts, name, 1)
    monkeypatch.setattr(gpu_parts.micro_gpu, "WARM_UP", 1)
    return gpu_parts.Place(torch.device("cpu"), torch.float32, True, time.monotonic() + 300)


def test_steps_are_checked_and_then_compared(place: gpu_parts.Place) -> None:
    card, *rows = gpu_parts.steps(place)
    assert card["name"] == "card"
    assert [(row["name"], row["slots"]) for row in rows] == [("tiny", 1), ("tiny", 2)] * 2
    for row in rows[:2]:
        assert "failed" not in row and row["error"] == 0
        assert {"graph ms", "eager ms", "hf ms", "fair ms", "share of the floor", "times faster than hf"} <= set(row)
        assert row["share of the floor"] == pytest.approx(row["floor ms"] / row["graph ms"])
    assert all("max-autotune ms" in row and "compiling s" in row for row in rows[2:])


def test_a_step_that_is_wrong_has_no_speed(place: gpu_parts.Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts.EagerExecutor, "fold", lambda self, ids, memory, lengths=None: memory + 1)
    _, row, *_ = gpu_parts.steps(place)
    assert "failed" in row and "graph ms" not in row


def test_streams_are_compared_with_single_steps(place: gpu_parts.Place) -> None:
    rows = list(gpu_parts.streams(place))
    assert [row["tokens"] for row in rows[:3]] == [2_000, 3_000, 5_000] and rows[3]["name"] == "tiny, text"
    assert all("tokens/s" in row and "failed" not in row for row in rows[1:])


def test_our_linear_is_checked_against_torch(place: gpu_parts.Place) -> None:
    rows = list(gpu_parts.micro(place))
    assert len(rows) == 4 and all("ours TFLOP/s" in row and "torch TFLOP/s" in row for row in rows)


def test_every_file_with_gpu_tests_is_run(place: gpu_parts.Place, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {path.name for path in Path(__file__).parent.glob("test_*.py") if "pytest.mark.gpu" in path.read_text()}
    assert files - {Path(__file__).name} == set(gpu_parts.GPU_TESTS)
    (row,) = gpu_parts.tests(place)
    assert "tests collected" in row["result"] and "failed" not in row
    words: list[list[str]] = []
    monkeypatch.setattr(
        gpu_parts, "_ended", lambda command, seconds, environment: (words.append(command), (0, "ok"))[1]
    )
    assert [row["name"] for row in gpu_parts.tests(replace(place, dry_run=False))] == list(gpu_parts.GPU_TESTS)
    assert [command[-1] for command in words] == [f"tests/{file}" for file in gpu_parts.GPU_TESTS]


def test_what_a_command_started_ends_with_its_time(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    assert gpu_parts._ended(["sh", "-c", f"sleep 600 & echo $! > {pid}; wait"], 1, os.environ) == (None, "")
    state = Path("/proc", pid.read_text().strip(), "stat")
    for _ in range(100):
        if not state.exists() or state.read_text().split()[2] == "Z":  # perhaps nobody has collected it yet
            break
        time.sleep(0.05)
    else:
        raise AssertionError(state.read_text())
    assert gpu_parts._ended([sys.executable, "-c", "print('done')"], 60, os.environ) == (0, "done\n")


def test_without_compute_sanitizer_that_is_said(place: gpu_parts.Place) -> None:
    assert list(gpu_parts.sanitizer(place)) == [{"name": "compute-sanitizer", "skipped": "a dry run"}]


def test_graphs_and_kernels_are_looked_at_by_compute_sanitizer(
    place: gpu_parts.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's cache stays on for the graphs: without it nothing can be captured."""
    script = tmp_path / "compute-sanitizer"
    script.write_text('#!/bin/sh\necho "without a cache: ${PYTORCH_NO_CUDA_MEMORY_CACHING:-0}; $*"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    graphs, kernels = gpu_parts.sanitizer(replace(place, dry_run=False))
    assert graphs["result"].startswith("without a cache: 0;") and "-m gpu tests/test_graph_small.py" in graphs["result"]
    assert kernels["result"].startswith("without a cache: 1;") and "tests/triton_ops.py" in kernels["result"]
    assert all((gpu_parts.ROOT / "tests" / name).is_file() for name in ("test_graph_small.py", "triton_ops.py"))


FAKE = """
import argparse, json, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("part")
parser.add_argument("--rows")
parser.add_argument("--seconds")
parser.add_argument("--dry-run", action="store_true")
options = parser.parse_args()
with open(options.rows, "a", buffering=1) as file:
    print(json.dumps({"name": options.part, "ms": 0.25, "tokens": 2000}), file=file)
    if options.part == "slow":
        file.write('{"name": "cut o')
        file.flush()
        time.sleep(600)
    if options.part == "broken":
        raise SystemExit("the card fell off the bus")
    if options.part == "wrong":
        print(json.dumps({"name": "wrong", "failed": "other bits"}), file=file)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "gpu_parts.py").write_text(FAKE)
    monkeypatch.setattr(bench_gpu, "HERE", tmp_path)
    return bench_gpu


def test_what_was_measured_is_kept_when_time_ends_or_a_part_breaks(fake: Any) -> None:
    row = {"ms": 0.25, "tokens": 2000}
    slow = fake.run_part(fake.Part("slow", 2), 2.0, False)
    assert slow == {"status": "time", "rows": [{"name": "slow", **row}]}
    broken = fake.run_part(fake.Part("broken", 60), 60.0, False)
    assert broken["status"] == "failed" and "the card fell off the bus" in broken["error"]
    assert broken["rows"] == [{"name": "broken", **row}]
    assert fake.run_part(fake.Part("wrong", 60), 60.0, False)["status"] == "failed"
    assert fake.run_part(fake.Part("good", 60), 60.0, False) == {"status": "done", "rows": [{"name": "good", **row}]}


def test_the_report_is_written_after_each_part(fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "PARTS", (fake.Part("good", 60), fake.Part("later", 60)))
    output = tmp_path / "out.json"
    written = []
    real = fake.write
    monkeypatch.setattr(fake, "write", lambda report, path: (written.append(len(report["parts"])), real(report, path)))
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--dry-run", "--output", str(output)])
    assert fake.main() == 0
    assert written == [1, 2]
    report = json.loads(output.read_text())
    assert report["dry_run"] and set(report["parts"]) == {"good", "later"} and report["commit"]
    table = output.with_suffix(".md").read_text()
    assert "nothing here says anything about speed" in table and "0.25" not in table and "2,000" in table


def test_a_table_of_figures() -> None:
    rows = [
        {"name": "a", "ms": 0.123456, "rounds ms": {"a": [1]}},
        {"name": "b", "ms": 2.0},
        {"name": "c|d", "failed": "x"},
    ]
    assert bench_gpu.table(rows, figures=True) == [
        "| name | ms |",
        "|---|---|",
        "| a | 0.1235 |",
        "| b | 2 |",
        "",
        "| name | failed |",
        "|---|---|",
        "| c/d | x |",
        "",
    ]


def test_long_words_are_cut_in_the_table() -> None:
    assert bench_gpu.cell("first\n" + "x" * 300 + "|last") == "…" + "x" * 195 + "/last"


def test_the_parts_fit_into_nine_minutes() -> None:
    assert sum(part.seconds for part in bench_gpu.PARTS) <= bench_gpu.SECONDS < 540
    assert {part.name for part in bench_gpu.PARTS} == set(gpu_parts.PARTS)


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--output", str(tmp_path / "out.json")])
    assert bench_gpu.main() == 1
    assert "sees no CUDA device" in capsys.readouterr().err and not (tmp_path / "out.json").exists()


def test_the_kernels_of_the_measurements_compile() -> None:
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("interpreted kernels cannot be compiled")
    import micro_kernels
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def compiled(kernel: Any, signature: dict[str, str], constants: dict[str, Any], **options: Any) -> str:
        constexprs = dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, signature | constexprs, constants, {})
        options |= {"enable_fp_fusion": True}
        return str(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])

    for early in (False, True):
        constants = {"BLOCK": 128, "EARLY": early}
        ptx = compiled(micro_kernels.add_one_kernel, {"p_values": "*fp32"}, constants, launch_pdl=early)
        assert ("griddepcontrol.wait" in ptx) is early
    arguments = {"p_arrived": "*i32", "programs": "i32", "rounds": "i32"}
    ptx = compiled(micro_kernels.barrier_kernel, arguments, {}, launch_cooperative_grid=True)
    assert "acq_rel" in ptx and "acquire" in ptx
