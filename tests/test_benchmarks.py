"""The comparison that `make bench` ends with, the suite it runs, and the figures."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def compare() -> Iterator[ModuleType]:
    yield from script("compare")


@pytest.fixture(scope="module")
def figures() -> Iterator[ModuleType]:
    pytest.importorskip("matplotlib")
    yield from script("figures")


def script(name: str) -> Iterator[ModuleType]:
    """A file of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        patch.setitem(sys.modules, name, module)
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
    here = compare.ratios([report(fold=(0.010, 0.005), ask=(0.020, 0.005))])
    half_as_fast = compare.ratios([report(fold=(0.020, 0.010), ask=(0.040, 0.010))])
    assert here == {"bench_ops.py::fold": 2.0, "bench_ops.py::ask": 4.0}
    assert set(verdicts(compare, here, half_as_fast).values()) == {"ok"}


def test_the_best_of_all_passes_counts(compare: ModuleType) -> None:
    passes = [report(fold=(0.010, 0.009), ask=(0.04, 0.005)), report(fold=(0.030, 0.006), ask=(0.02, 0.008))]
    assert compare.ratios(passes) == {"bench_ops.py::fold": 2.0, "bench_ops.py::ask": 4.0}


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
    calibration, before, same, slower = fastest(1, 1, 1, 3)
    baseline = tmp_path / "baseline.json"
    for name, best in (("before", before), ("same", same), ("slower", slower)):
        (tmp_path / f"{name}.json").write_text(json.dumps(report(work=(best, calibration))), encoding="utf-8")

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
    assert re.search(r"^slower +\d\.\d\d .*bench_ops.py::work$", out, re.M) and "1 of 1 benchmarks fail" in out


def busy() -> int:
    return sum(i * i for i in range(20_000))


def fastest(*times: int) -> list[float]:
    """Processor seconds of `busy`, done that many times: the best of many rounds that take turns."""
    best = [float("inf")] * len(times)
    for _ in range(60):
        for place, count in enumerate(times):
            start = time.process_time()
            for _ in range(count):
                busy()
            best[place] = min(best[place], time.process_time() - start)
    return best


def test_the_baseline_holds_what_the_suite_measures() -> None:
    ratios = json.loads((BENCHMARKS / "results" / "bench_cpu.json").read_text(encoding="utf-8"))["ratios"]
    files = ("bench_ops.py", "bench_segment.py", "bench_stream.py")
    tests = {f"{name}::{test}" for name in files for test in functions(BENCHMARKS / name)}
    assert {name.partition("[")[0] for name in ratios} == tests
    assert all(ratio > 0 for ratio in ratios.values())


def functions(path: Path) -> list[str]:
    return re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M)


# ------------------------------------------------------------------------------------------------- figures


def result(name: str, seconds: float | None, tokens: int) -> dict[str, object]:
    return {
        "name": name,
        "median": seconds,
        "rate": None if seconds is None else tokens / seconds,
        "memory": None if seconds is None else 100 << 20,
        "floor": tokens / 1e5,
        "share": None if seconds is None else 0.5,
        "holds": tokens * 512,
    }


@pytest.fixture
def drawn_from(figures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A result file in which full attention was measured at 4k only."""
    rows = []
    for tokens, batch in ((4000, 1), (32000, 1), (4000, 8)):
        full = 9.0 if (tokens, batch) == (4000, 1) else None
        results = [result("rmt-engine", 1.0, tokens), result("hf", 2.0, tokens), result("full-attention", full, tokens)]
        common = {"model": "m", "batch": batch, "dtype": "float32", "tokens": tokens, "results": results}
        rows += [{**common, "scope": "tokens"}, {**common, "scope": "segment", "tokens": 112}]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "r.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    monkeypatch.setattr(figures, "HERE", tmp_path)
    return "r.json"


def test_what_was_not_measured_is_not_drawn(figures: ModuleType, drawn_from: str) -> None:
    seconds, memory = figures.context_figure([drawn_from]).axes
    lines = {line.get_label(): (line.get_xdata(), line.get_linestyle()) for line in seconds.lines}
    assert list(lines["full attention, KV cache"][0]) == [4000]
    assert list(lines["rmt-engine"][0]) == [4000, 32000]
    modelled, style = lines["its floor by the cost model"]
    assert list(modelled) == [4000, 32000] and style == "--"
    assert [line.get_linestyle() for line in memory.lines] == ["-", "-", "-", "--"]
    assert seconds.get_xscale() == seconds.get_yscale() == memory.get_yscale() == "log"


def test_tokens_by_batch_and_shares(figures: ModuleType, drawn_from: str) -> None:
    (axes,) = figures.batch_figure([drawn_from]).axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[1, 8], [1, 8], [1]]
    (axes,) = figures.share_figure({"m": [drawn_from]}).axes
    assert [bar.get_height() for bar in axes.patches] == [50, 50]


def test_the_figures_are_those_of_the_committed_results(figures: ModuleType) -> None:
    """Every result file that they are drawn from is there, and every picture that is shown."""
    source = (BENCHMARKS / "figures.py").read_text(encoding="utf-8")
    assert all((BENCHMARKS / "results" / name).exists() for name in re.findall(r'"(\w+\.json)"', source))
    shown = "".join(
        (BENCHMARKS.parent / name).read_text(encoding="utf-8") for name in ("README.md", "docs/benchmarks.md")
    )
    pictures = re.findall(r"figures/(\w+)\.svg", shown)
    assert pictures and all((BENCHMARKS.parent / "docs" / "figures" / f"{name}.svg").exists() for name in pictures)
