"""Tuning without a card: candidates that can run, a fair race, and the file that configurations are read from."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rmt_kernels import configs, tuning
from rmt_kernels.configs import ARCHS, Arch, AttentionCase, AttentionConfig, LinearCase, LinearConfig, Tuned

SEGMENT = LinearCase("half", 512, 768, 3072, gated=False)
WRITE_ROWS = LinearCase("half", 16, 768, 3072, gated=False)
ATTENTION = AttentionCase("half", 512, 64, causal=True)
DEFAULT = configs.default_linear_config("sm_90", torch.bfloat16, 512)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of tuned configurations."""
    monkeypatch.setattr(configs, "TUNED", tmp_path / "tuned")
    configs.tuned.cache_clear()
    yield tmp_path / "tuned"
    configs.tuned.cache_clear()


# ---------------------------------------------------------------------------------------------------- candidates


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("width", ["half", "full"])
def test_linear_candidates_can_run_and_hold_the_default(arch: Arch, width: configs.Width) -> None:
    dtype = torch.bfloat16 if width == "half" else torch.float32
    for rows, gated in ((16, False), (512, False), (512, True)):
        case = LinearCase(width, rows, 768, 3072, gated)
        found = tuning.linear_candidates(arch, case)
        assert 10 < len(found) == len(set(found)) < 400
        for config in found:
            assert config.shared_bytes(width) <= configs.SHARED_LIMIT[arch]
            assert config.block_m * config.block_n <= tuning.ACCUMULATORS * 32 * config.warps
            assert config.tma in ((False, True) if arch != "sm_80" and width == "half" else (False,))
            assert 3072 // config.splits >= tuning.FEWEST_SHARED_INPUTS
        if width == "half":
            default = configs.default_linear_config(arch, dtype, rows)
            assert default in [LinearConfig(**{**vars(config), "splits": 0}) for config in found]


def test_a_candidate_over_the_shared_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tuning.linear_candidates("sm_90", SEGMENT)
    monkeypatch.setitem(configs.SHARED_LIMIT, "sm_90", 64 * 1024)
    few = tuning.linear_candidates("sm_90", SEGMENT)
    assert set(few) == {config for config in whole if config.shared_bytes("half") <= 64 * 1024} != set(whole)


def test_splits_leave_each_program_enough() -> None:
    assert tuning.splits_of(LinearCase("half", 16, 768, 768, False)) == (1, 2)
    assert tuning.splits_of(WRITE_ROWS) == (1, 2, 4, 8)
    assert tuning.splits_of(LinearCase("half", 16, 768, 128, False)) == (1,)


@pytest.mark.parametrize("rows, head_dim", [(16, 64), (512, 64), (512, 128)])
def test_attention_candidates_can_run(rows: int, head_dim: int) -> None:
    found = tuning.attention_candidates("sm_90", AttentionCase("half", rows, head_dim, True))
    assert found and {config.block_q == 16 for config in found} == {rows == 16}
    assert configs.ATTENTION["sm_90"]["half", rows == 16, head_dim > 64] in found


# ---------------------------------------------------------------------------------------------------------- race


def plans(*stages: int) -> list[LinearConfig]:
    return [LinearConfig(64, 64, 32, warps=4, stages=count) for count in stages]


def test_the_fastest_that_is_right_wins() -> None:
    slow, fast, wrong, default = plans(1, 2, 3, 4)
    speed, order = {slow: 9.0, fast: 5.0, wrong: 1.0, default: 7.0}, []

    def timer(config: LinearConfig) -> float:
        assert config != wrong, "what is wrong is not timed"
        order.append(config)
        return speed[config]

    def check(config: LinearConfig) -> str | None:
        return "error 1.0e+00" if config == wrong else None

    done = tuning.race(default, [slow, fast, wrong], check, timer, rounds=3)
    assert done.winner(default) == fast and done.refused == {wrong: "error 1.0e+00"}
    assert done.microseconds == {default: 7.0, fast: 5.0, slow: 9.0}
    assert order[3:] == [default, fast, slow] * 3, "one after the other in every round"


def test_noise_does_not_win_over_the_default() -> None:
    near, default = plans(1, 2)
    for share, winner in ((0.985, default), (0.97, near)):
        done = tuning.race(default, [near], lambda _: None, {near: share, default: 1.0}.__getitem__)
        assert done.winner(default) == winner


def test_a_median_is_not_moved_by_one_slow_sample() -> None:
    one, default = plans(1, 2)
    calls: Counter[LinearConfig] = Counter()

    def timer(config: LinearConfig) -> float:
        calls[config] += 1
        return 100.0 if config == one and calls[config] == 3 else {one: 4.0, default: 5.0}[config]

    assert tuning.race(default, [one], lambda _: None, timer).winner(default) == one


def test_only_the_first_rounds_best_go_on() -> None:
    everyone = [
        LinearConfig(64, 64, 32, 4, stages, splits=splits) for stages in (1, 2, 3, 4, 5) for splits in (1, 2, 4)
    ]
    calls: Counter[LinearConfig] = Counter()

    def timer(config: LinearConfig) -> float:
        calls[config] += 1
        return float(config.stages * 10 + config.splits)

    tuning.race(everyone[-1], everyone, lambda _: None, timer, rounds=5)
    assert [config for config, count in calls.items() if count == 6] == [everyone[-1], *everyone[: tuning.FINALISTS]]


def test_a_default_that_is_wrong_is_no_winner() -> None:
    with pytest.raises(RuntimeError, match=r"^the default LinearConfig\(.*\) does not pass its check: spills$"):
        tuning.race(DEFAULT, plans(1), lambda config: "spills" if config == DEFAULT else None, lambda _: 1.0)


# ---------------------------------------------------------------------------------------------------------- file


def found_somewhere() -> Tuned:
    linear, attention = LinearConfig(128, 128, 64, 8, 3, tma=True, splits=2), AttentionConfig(128, 64, 8, 2)
    times = {SEGMENT: (10.25, 12.5), ATTENTION: (7.0, 7.5)}
    words = ("sm_90", "Some Card", "torch 2, triton 3", "2026-01-02", "make tune ARGS=''")
    return Tuned(*words, {SEGMENT: linear}, {ATTENTION: attention}, times)  # type: ignore[arg-type]


def test_what_was_tuned_is_used_for_its_case_alone(folder: Path) -> None:
    assert configs.linear_config("sm_90", torch.bfloat16, 512, 768, 3072, False) == DEFAULT
    assert configs.provenance() == "sm_80, sm_90, sm_100: defaults whose compilation is checked, not tuned on a card."
    wanted = found_somewhere()
    tuning.write(folder / "sm_90.json", wanted)
    configs.tuned.cache_clear()
    assert configs.tuned("sm_90") == wanted and configs.tuned("sm_80") is None
    for rows, outputs, gated, tuned in (
        (512, 768, False, True),
        (500, 768, False, True),
        (256, 768, False, False),
        (512, 769, False, False),
        (512, 768, True, False),
    ):
        config = configs.linear_config("sm_90", torch.float16, rows, outputs, 3072, gated)
        assert config == (wanted.linear[SEGMENT] if tuned else DEFAULT)
    assert configs.split_k("sm_90", wanted.linear[SEGMENT], 512, 768, 3072) == 2
    assert configs.attention_config("sm_90", torch.bfloat16, 512, 64, True) == wanted.attention[ATTENTION]
    assert configs.attention_config("sm_90", torch.bfloat16, 512, 64, False) != wanted.attention[ATTENTION]
    assert configs.provenance() == (
        "sm_90: tuned on Some Card, 2026-01-02; "
        "sm_80, sm_100: defaults whose compilation is checked, not tuned on a card."
    )


def test_a_damaged_file_is_named(folder: Path) -> None:
    path = folder / "sm_90.json"
    tuning.write(path, found_somewhere())
    facts = json.loads(path.read_text())
    facts["linear"][0]["config"]["block_m"] = 48
    for text, words in (("{", "JSONDecodeError"), ("{}", "KeyError"), (json.dumps(facts), "block_m=48")):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"sm_90\.json: not a file of tuned configurations: .*{words}"):
            configs.read_tuned(path)


def test_a_forced_configuration_is_for_its_kind_alone() -> None:
    forced = plans(1)[0]
    with configs.forced(forced):
        assert configs.linear_config("sm_80", torch.float32, 1, 2, 3, False) == forced
        assert (
            configs.attention_config("sm_80", torch.float32, 1, 16, True)
            == configs.ATTENTION["sm_80"]["full", True, False]
        )
    assert configs.linear_config("sm_80", torch.float32, 1, 2, 3, False) != forced


# ------------------------------------------------------------------------------------------------------ make tune


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "kernels"))
    return importlib.import_module("tune")


def test_without_a_card_it_says_so(tune: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert capsys.readouterr().err == "make tune needs a CUDA device, and this torch sees none\n"


def test_every_case_is_tuned_once_and_kept(tune: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk over the cases with a made-up card; what it writes is what the configurations then are."""
    cases: list[str] = []

    def one(label: str, op: object, truth: object, arch: Arch, default: object, candidates: list[object]) -> object:
        cases.append(label)
        assert candidates and default is not None
        return candidates[-1], (1.0, 2.0)

    class Called:
        def __call__(self) -> torch.Tensor:
            return torch.ones(1)

    monkeypatch.setattr(tune, "tune_one", one)
    monkeypatch.setattr(tune, "linear_op", lambda *_: Called())
    monkeypatch.setattr(tune, "attention_op", lambda *_: Called())
    found = Tuned("sm_90", "Some Card", "", "", "", {}, {}, {})
    tune.tune("sm_90", torch.bfloat16, ["gpt2", "llama-1b"], found)
    assert len(cases) == len(set(cases)) == len(found.linear) + len(found.attention) == len(found.microseconds)
    assert found.linear[LinearCase("half", 16, 768, 768, False)].splits == 2, "the projection behind the attention"
    assert found.linear[LinearCase("half", 512, 8192, 2048, True)].splits == 1
    assert AttentionCase("half", 64, 64, True) in found.attention, "16 rows of four heads that share keys"
    tuning.write(folder / "sm_90.json", found)
    assert configs.read_tuned(folder / "sm_90.json") == found
