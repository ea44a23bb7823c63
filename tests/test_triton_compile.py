"""The Triton kernels compiled without a GPU: no spills, shared memory that fits, tensor cores where they belong.

One configuration of each kernel; `make kernels-report` compiles every launch of every backbone.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rmt_kernels import configs, head_norm, linear_residual, lm_head, memory, norm_linear, segment_attention
from rmt_kernels.configs import ARCHS, Arch, AttentionConfig, LinearConfig
from rmt_kernels.memory import Embeddings, Frame
from rmt_kernels.per_slot import PerSlot, Rows
from rmt_kernels.segment_attention import AttentionSpec, KVCache
from rmt_kernels.weights import Linear, Norm
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: it is for Linux alone", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

import triton
from rmt_kernels import aot

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def norm(kind: str = "layer") -> Norm:
    return Norm("layer" if kind == "layer" else "rms", meta(768), meta(768) if kind == "layer" else None, 1e-5)


def qkv_linear() -> None:
    norm_linear.plan(Linear(meta(2304, 768), meta(2304)), norm(), "gelu_tanh", backend="triton")(meta(1, 512, 768))


def gated_linear() -> None:
    norm_linear.plan(Linear(meta(4096, 768)), norm("rms"), "swiglu", backend="triton")(meta(1, 512, 768))


def fp32_linear() -> None:
    norm_linear.plan(Linear(meta(768, 768, dtype=FP32)), backend="triton")(meta(1, 512, 768, dtype=FP32))


def one_row_split_among_programs() -> None:
    """A launch whose counts are 1, which Triton makes constants of."""
    linear_residual.plan(Linear(meta(768, 3072), meta(768)), norm(), backend="triton")(
        meta(1, 1, 3072), meta(1, 1, 768)
    )


def attention() -> None:
    plan = segment_attention.plan(AttentionSpec(12, 12, 64, True, 0.125), backend="triton")
    q, k, v = meta(1, 512, 2304).split(768, -1)
    plan(q, k, v, length=512)


def rotary() -> tuple[segment_attention.SegmentAttention, tuple[Tensor, ...]]:
    rope = (meta(4096, 64, dtype=FP32), meta(4096, 64, dtype=FP32))
    plan = segment_attention.plan(AttentionSpec(32, 8, 64, True, 0.125, rope), backend="triton")
    return plan, meta(1, 512, 3072).split((2048, 512, 512), -1)


def rotary_attention() -> None:
    plan, (q, k, v) = rotary()
    plan(q, k, v, length=512)


def decode_over(past: int) -> None:
    plan, (q, k, v) = rotary()
    plan(q[:, :1], k[:, :1], v[:, :1], length=1, cache=KVCache(meta(1, 8, 600, 64), meta(1, 8, 600, 64), past))


def decode() -> None:
    decode_over(512)


def embeddings() -> None:
    tables = Embeddings(meta(30522, 768), meta(512, 768), meta(768), norm())
    frame = Frame((101, *(~row for row in range(10)), 102), (102,))
    memory.plan_read(tables, backend="triton")(meta(1, 499, dtype=torch.int64), meta(1, 10, 768), frame, 512)
    memory.plan_write(norm(), backend="triton")(meta(1, 512, 768)[:, 1:11])


def norm_of_heads() -> None:
    rms = Norm("rms", meta(128), None, 1e-6)
    head_norm.plan(rms, backend="triton")(meta(1, 512, 4096)[..., 2048:3072])


def slots_of_different_lengths() -> None:
    """Starts and lengths on the device; fp16 stands here for both 16-bit types."""
    lengths = torch.empty(2, dtype=torch.int32, device="meta")
    hidden, window = meta(2, 512, 768, dtype=FP16), Rows(PerSlot(lengths, 16), 16)
    layer = Linear(meta(768, 768, dtype=FP16), meta(768, dtype=FP16))
    q = norm_linear.plan(layer, backend="triton")(hidden, window)
    attend = segment_attention.plan(AttentionSpec(12, 12, 64, True, 0.125), backend="triton")
    linear_residual.plan(layer, backend="triton")(
        attend(q, hidden, hidden, length=PerSlot(lengths, 32), start=window.start), hidden, window
    )


def log_probabilities() -> None:
    plan = lm_head.plan_nll(Linear(meta(50257, 768)), norm(), backend="triton")
    plan(meta(1, 480, 768), meta(1, 480, dtype=torch.int64))


# One configuration of each kernel for every architecture, and for Hopper's what else differs in kind.
EVERYWHERE: list[Callable[[], None]] = [
    qkv_linear,
    one_row_split_among_programs,
    attention,
    decode,
    embeddings,
    norm_of_heads,
    log_probabilities,
]
ON_HOPPER: list[Callable[[], None]] = [gated_linear, fp32_linear, rotary_attention, slots_of_different_lengths]
STEPS = [(step, arch) for step in EVERYWHERE for arch in ARCHS] + [(step, "sm_90") for step in ON_HOPPER]
KERNELS = {"linear", "finish", "attention", "join", "append", "read", "norm_rows", "nll", "join_nll"}


compiled = cache(aot.compiled)  # tests share launches


def launches(step: Callable[[], None], arch: Arch) -> list[aot.Launch]:
    with configs.assume(arch), aot.recorded() as found:
        step()
    return found


@pytest.mark.parametrize("step, arch", STEPS, ids=lambda part: part if isinstance(part, str) else part.__name__)
def test_compiles_without_a_breach(step: Callable[[], None], arch: Arch) -> None:
    for launch in launches(step, arch):
        result = compiled(launch, arch)
        assert aot.breaches(launch, result, arch) == [], f"{launch.name} {launch.label()}: {result}"
        assert result.registers > 0 and result.programs(arch) > 0
        if launch.name == "linear_kernel" and launch.half:
            assert result.async_copies + result.tma, "tiles must be on their way while others are multiplied"


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_is_compiled(arch: Arch) -> None:
    assert {launch.name.removesuffix("_kernel") for step in EVERYWHERE for launch in launches(step, arch)} == KERNELS


def test_no_length_is_a_reason_to_compile_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same binaries serve texts of any length in rows of one width, any slots, any place in a KV cache."""

    def segment(slots: int, text: int) -> None:
        rows = -(-text // 16) * 16 + 32
        tables = Embeddings(meta(1000, 768), meta(4096, 768), None, norm())
        read = memory.plan_read(tables, backend="triton")
        hidden = read(meta(slots, text, dtype=torch.int64), meta(slots, 2, 768), Frame((~0,), (~1,)), rows)
        layer = Linear(meta(768, 768), meta(768))
        plan = segment_attention.plan(AttentionSpec(12, 12, 64, True, 0.125), backend="triton")
        attended = plan(hidden, hidden, hidden, length=text + 2)
        hidden = linear_residual.plan(layer, norm(), backend="triton")(
            norm_linear.plan(layer, norm(), backend="triton")(attended), hidden
        )
        score = lm_head.plan_nll(Linear(meta(5000, 768)), norm(), backend="triton")
        score(hidden[:, :text], meta(slots, text, dtype=torch.int64))

    for arch in ARCHS:
        once = launches(partial(segment, 2, 480), arch)
        for slots, text in product((1, 3, 16), (480, 479, 465)):
            assert set(launches(partial(segment, slots, text), arch)) == set(once)
        assert all(launches(partial(decode_over, past), arch) == launches(decode, arch) for past in (300, 463, 527))
    for param in importlib.import_module("rmt_kernels.segment_attention.triton").append_kernel.params:
        monkeypatch.setattr(param, "do_not_specialize", False)
    assert launches(partial(decode_over, 527), "sm_90") != launches(decode, "sm_90")  # the control


def test_a_breach_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention tile far too large for one warp, and a product on which Hopper's instructions are lost."""
    monkeypatch.setitem(configs.ATTENTION["sm_90"], ("half", False, False), AttentionConfig(64, 16, warps=1, stages=1))
    launch = launches(attention, "sm_90")[0]
    result = compiled(launch, "sm_90")
    assert any(words.startswith("spills: ") for words in aot.breaches(launch, result, "sm_90"))
    fine = replace(result, spills=0, stack=0, shared=1024, wgmma=4, mma=0)
    assert aot.breaches(launch, fine, "sm_90") == []
    assert aot.breaches(launch, replace(fine, wgmma=0), "sm_90") == [
        "no HGMMA in a 16-bit matrix product",
        "no tensor-core instruction in a 16-bit matrix product",
    ]
    assert aot.breaches(launch, replace(fine, shared=233_000), "sm_90") == [
        "shared memory: 233000 bytes, sm_90 has 232448"
    ]


def test_a_launch_is_known_by_its_source_and_its_constants() -> None:
    first, second = launches(attention, "sm_90")[0], launches(qkv_linear, "sm_90")[0]
    assert first.key("sm_90") == launches(attention, "sm_90")[0].key("sm_90")
    assert len({first.key("sm_90"), first.key("sm_80"), second.key("sm_90")}) == 3
    assert "p_q" in first.divisible and "q_row" in first.divisible
    assert "length" not in first.divisible and "start" not in first.divisible


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "kernels"))
    return importlib.import_module("report")


def test_the_committed_report_has_no_breach(report: ModuleType) -> None:
    table, known = report.TABLE.read_text(), report.known()
    arch_of = {key: next(arch for arch in ARCHS if f"| `{key}` | {arch} |" in table) for key in known}
    assert len(known) > 300 and "not compiled yet" not in table
    assert [
        key for key, row in known.items() if row.spills or row.stack or row.shared > configs.SHARED_LIMIT[arch_of[key]]
    ] == []


def test_the_committed_report_is_of_these_kernels(report: ModuleType) -> None:
    """Every launch of every backbone has its row: a kernel that changed asks for `make kernels-report`."""
    if f"by Triton {triton.__version__}." not in report.TABLE.read_text():
        pytest.skip("the report was written with another Triton, whose binaries differ")
    known = report.known()
    assert [
        f"{arch} {name} {launch.name}" for arch, name, _, launch in report.launches() if launch.key(arch) not in known
    ] == []


def test_the_report_compiles_what_it_does_not_know(
    report: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each launch once, an interrupt keeps what is done, and a breach fails."""
    fine = aot.Compiled(32, 0, 1024, 4, spills=0, wgmma=1, tcgen05=0, mma=0, async_copies=0, tma=2)
    results = {"linear_kernel": fine}
    wanted = [(arch, "gpt2", "bf16", launch) for arch in ("sm_90", "sm_100") for launch in launches(qkv_linear, arch)]
    done: list[Arch] = []

    def compiled(launch: aot.Launch, arch: Arch) -> aot.Compiled:
        if len(done) == 1 and "interrupt" in results:
            raise KeyboardInterrupt
        done.append(arch)
        return results[launch.name]

    monkeypatch.setattr(report, "compiled", compiled)
    monkeypatch.setattr(report, "launches", lambda: iter(wanted))
    monkeypatch.setattr(report, "TABLE", tmp_path / "REPORT.md")
    monkeypatch.setattr(sys, "argv", ["report.py"])
    results["interrupt"] = fine
    assert report.main() == 1 and done == ["sm_90"]
    assert "1 launches are not compiled yet" in report.TABLE.read_text()
    del results["interrupt"]
    assert report.main() == 0 and done == ["sm_90", "sm_100"]
    assert report.main() == 0 and len(done) == 2
    assert list(report.known().values()) == [fine, fine] and "not compiled yet" not in report.TABLE.read_text()
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    assert report.main() == 0
    report.TABLE.write_text(report.TABLE.read_text().replace("| 32 | 0 |", "| 32 | 8 |"))
    assert report.main() == 1
    assert "spills: 8 bytes of stack" in capsys.readouterr().err


def test_loads_through_descriptors_are_in_the_binary() -> None:
    """Two tensors come by descriptor; a binary that has not as many loads through them is a breach."""
    launch = launches(qkv_linear, "sm_90")[0]
    assert launch.descriptors == 2 and launches(qkv_linear, "sm_80")[0].descriptors == 0
    result = compiled(launch, "sm_90")
    assert result.tma >= 2 and result.wgmma and not result.async_copies and aot.breaches(launch, result, "sm_90") == []
    assert aot.breaches(launch, replace(result, tma=1), "sm_90") == ["2 descriptors, 1 loads through them"]


@pytest.mark.parametrize("head_dim", [32, 128])
def test_attention_of_narrow_and_wide_heads(head_dim: int) -> None:
    """The longest segment; 64 wide is compiled above, for each architecture."""

    def step() -> None:
        plan = segment_attention.plan(AttentionSpec(8, 8, head_dim, True, 1.0), backend="triton")
        q, k, v = meta(2, 4096, 24 * head_dim).split(8 * head_dim, -1)
        plan(q, k, v, length=4096)

    for launch in launches(step, "sm_90"):
        result = compiled(launch, "sm_90")
        assert aot.breaches(launch, result, "sm_90") == [] and result.wgmma


@pytest.mark.parametrize("arch", ARCHS)
def test_shipped_tiles_fit_the_shared_memory(arch: Arch) -> None:
    for (of, width, _), config in configs.LINEAR.items():
        if of == arch:
            assert config.shared_bytes(width) <= configs.SHARED_LIMIT[arch]


def test_configurations_state_their_constraints() -> None:
    for make, words in (
        (lambda: LinearConfig(48, 64, 32, 4, 3), r"block_m=48: expected a power of two in 16\.\.256"),
        (lambda: LinearConfig(64, 64, 32, 4, 9), r"stages=9: expected 1\.\.8"),
        (lambda: LinearConfig(64, 64, 32, 3, 2), r"warps=3: expected a power of two in 1\.\.16"),
        (lambda: AttentionConfig(256, 64, 4, 2), r"block_q=256: expected a power of two in 16\.\.128"),
        (lambda: AttentionConfig(64, 64, 4, 0), r"stages=0: expected 1\.\.4"),
    ):
        with pytest.raises(ValueError, match=f"^{words}$"):
            make()


def test_a_slot_is_split_alike_whatever_stands_beside_it() -> None:
    config = configs.default_linear_config("sm_90", BF16, 16)
    assert configs.split_k("sm_90", config, 16, 768, 3072) == 8
    assert configs.split_k("sm_90", config, 16, 50257, 768) == 1
    assert configs.split_k("sm_90", configs.default_linear_config("sm_90", BF16, 512), 512, 4096, 4096) == 1
