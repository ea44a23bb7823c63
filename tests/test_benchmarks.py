"""The comparison that `make bench` ends with, and the suite it runs."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare", BENCHMARKS / "compare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        patch.setitem(sys.modules, "compare", module)
        spec.loader.exec_module(module)
        yield module


def report(**entries: tuple[float, float]) -> dict[str, object]:
    """As pytest-benchmark writes it: name=(fastest round, calibration kernel beside it)."""
    return {
        "benchmarks": [
            {"fullname": f"benchmarks/bench_ops.py::{name}", "stats": {"min": best}, "extra_info": {"calibration": own}}
            for name, (best, own) in entries.items()
        ]
    }


def verdicts(compare: ModuleType, then: dict[str, float], now: dict[str, float]) -> dict[str, str]:
    return {change.name: change.verdict() for change in compare.compare(then, now)}


def test_another_machine_is_no_regression(compare: ModuleType) -> None:
    here = compare.ratios(report(fold=(0.010, 0.005), ask=(0.020, 0.005)))
    half_as_fast = compare.ratios(report(fold=(0.020, 0.010), ask=(0.040, 0.010)))
    assert here == {"bench_ops.py::fold": 2.0, "bench_ops.py::ask": 4.0}
    assert set(verdicts(compare, here, half_as_fast).values()) == {"ok"}


def test_what_is_slower_gone_new_or_faster(compare: ModuleType) -> None:
    then = {"same": 1.0, "slow": 1.0, "gone": 1.0, "fast": 1.0, "edge": 1.0}
    now = {"same": 1.1, "slow": 1.51, "new": 1.0, "fast": 0.5, "edge": 1.5}
    expected = {"same": "ok", "slow": "slower", "gone": "gone", "new": "new", "fast": "faster", "edge": "ok"}
    assert verdicts(compare, then, now) == expected
    changes = compare.compare(then, now)
    assert {change.name for change in compare.failed(changes, compare.THRESHOLD, some=False)} == {"slow", "gone"}
    assert [change.name for change in compare.failed(changes, compare.THRESHOLD, some=True)] == ["slow"]
    assert compare.failed(changes, 1.6, some=True) == []


def test_a_real_slow_down_fails(
    compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Work that is done three times in place of once, measured, through the command."""

    def measured(times: int) -> tuple[float, float]:
        return fastest(lambda: [busy() for _ in range(times)]), fastest(busy)

    baseline = tmp_path / "baseline.json"
    for name, times in (("before", 1), ("same", 1), ("slower", 3)):
        (tmp_path / f"{name}.json").write_text(json.dumps(report(work=measured(times))), encoding="utf-8")

    def run(name: str, *options: str) -> int:
        monkeypatch.setattr(
            sys, "argv", ["compare.py", f"{tmp_path / name}.json", "--baseline", str(baseline), *options]
        )
        code: int = compare.main()
        return code

    assert run("before", "--accept") == 0
    assert run("same") == 0
    capsys.readouterr()
    assert run("slower") == 1
    out = capsys.readouterr().out
    assert re.search(r"^slower +[23]\.\d\d .*bench_ops.py::work$", out, re.M) and "1 of 1 benchmarks fail" in out


def busy() -> int:
    return sum(i * i for i in range(20_000))


def fastest(call: object) -> float:
    times = []
    for _ in range(40):
        start = time.process_time()
        call()  # type: ignore[operator]
        times.append(time.process_time() - start)
    return min(times)


def test_the_baseline_holds_what_the_suite_measures() -> None:
    ratios = json.loads((BENCHMARKS / "results" / "bench_cpu.json").read_text(encoding="utf-8"))["ratios"]
    files = ("bench_ops.py", "bench_segment.py", "bench_stream.py")
    tests = {f"{name}::{test}" for name in files for test in functions(BENCHMARKS / name)}
    assert {name.partition("[")[0] for name in ratios} == tests
    assert all(ratio > 0 for ratio in ratios.values())


def functions(path: Path) -> list[str]:
    return re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M)
