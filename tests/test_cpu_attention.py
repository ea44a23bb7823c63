"""The C++ kernels of a CPU (csrc/cpu): attention and fp32 linears of every instruction set here, against ref.py."""

from __future__ import annotations

import math

import pytest
import rmt_kernels._cpu as _cpu
import torch
from rmt_kernels import norm_linear, segment_attention
from rmt_kernels.cpu_linear import NativeLinear
from rmt_kernels.per_slot import Count, PerSlot
from rmt_kernels.segment_attention import AttentionSpec, KVCache
from rmt_kernels.segment_attention.cpu import NativeAttention
from rmt_kernels.weights import Linear, Norm
from torch import Tensor

FP32 = 2e-6  # of the greatest value
HALF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # one rounding of the result
SETS = _cpu.instruction_sets()

# B, T, H, H_kv, D
SHAPES = [
    (1, 1, 1, 1, 2),
    (2, 100, 4, 4, 60),
    (1, 33, 6, 2, 10),
    (3, 16, 4, 1, 8),
    (2, 71, 2, 2, 64),
    (1, 37, 2, 2, 18),
]
Shape = tuple[int, int, int, int, int]


@pytest.fixture(params=[1, 2], ids=["one-thread", "two-threads"])
def threads(request: pytest.FixtureRequest) -> int:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def projection(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as views of one projection, as the QKV linear leaves them."""
    b, t, h, hkv, d = shape
    return random(0, b, t, (h + 2 * hkv) * d).to(dtype).split([h * d, hkv * d, hkv * d], -1)  # type: ignore[return-value]


def rope_of(head_dim: int, positions: int = 128) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(positions).float(), 100.0 ** -torch.linspace(0, 1, head_dim // 2))
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def plans(shape: Shape, causal: bool, rope: bool, instruction_set: str = "auto") -> tuple:
    _, _, h, hkv, d = shape
    spec = AttentionSpec(h, hkv, d, causal, 1.3 * d**-0.5, rope_of(d) if rope else None)
    return segment_attention.plan(spec, backend="ref"), NativeAttention(spec, instruction_set)


def difference(ours: Tensor, truth: Tensor) -> float:
    assert ours.shape == truth.shape and ours.dtype == truth.dtype and ours.isfinite().all()
    return float((ours.float() - truth.float()).abs().max() / truth.float().abs().max())


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("rope", [False, True], ids=["plain", "rope"])
@pytest.mark.parametrize("causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lengths_and_windows(shape: Shape, causal: bool, rope: bool, instruction_set: str) -> None:
    ref, ours = plans(shape, causal, rope, instruction_set)
    q, k, v = projection(shape)
    for length in sorted({shape[1], max(shape[1] - 7, 1), 1}):
        keys, values = k.clone(), v.clone()
        keys[:, length:] = values[:, length:] = math.nan
        truth = ref(q[:, :length], keys[:, :length], values[:, :length], length=length)
        whole = ours(q, keys, values, length=length)
        assert difference(whole[:, :length], truth) <= FP32
        for start, end in {(length // 2, length), (length - 1, length), (0, 1)}:
            window = ours(q[:, start:end], keys, values, length=length, start=start)
            assert torch.equal(window, whole[:, start:end]), "a row's bits depend on the window"


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3]], ids=str)
def test_every_slot_at_its_own_numbers_is_as_alone(shape: Shape, threads: int) -> None:
    batch, rows = shape[0], shape[1]
    _, ours = plans(shape, causal=True, rope=True)
    q, k, v = projection(shape)
    lengths = torch.tensor([rows - 5 * i for i in range(batch)], dtype=torch.int32)
    starts = torch.arange(batch, dtype=torch.int32)
    together = ours(q[:, :4], k, v, length=PerSlot(lengths), start=PerSlot(starts, plus=1))
    for b in range(batch):
        one = slice(b, b + 1)
        alone = ours(q[one, :4], k[one], v[one], length=int(lengths[b]), start=b + 1)
        assert torch.equal(together[one], alone)


@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
def test_the_number_of_threads_changes_no_bits(shape: Shape) -> None:
    _, ours = plans(shape, causal=True, rope=False)
    q, k, v = projection(shape)
    found = []
    before = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(ours(q, k, v, length=shape[1]))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_half_precision_is_rounded_once(shape: Shape, dtype: torch.dtype) -> None:
    """Computed in fp32: the result is that of fp32 over the same stored values, rounded."""
    ref, ours = plans(shape, causal=True, rope=True)
    q, k, v = projection(shape, dtype)
    truth = ref(q.float(), k.float(), v.float(), length=shape[1])
    assert difference(ours(q, k, v, length=shape[1]).float(), truth) <= HALF[dtype]


def test_half_precision_is_read_and_written_as_torch_does() -> None:
    """One key: the output is the value itself, so every bit pattern goes through both conversions."""
    for dtype in HALF:
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        values = bits.view(dtype).view(1, 1, -1)
        plan = NativeAttention(AttentionSpec(1024, 1024, 64, causal=True, scale=0.0))
        zeros = torch.zeros_like(values)
        out = plan(zeros, zeros, values, length=1)
        assert torch.equal(out.isnan(), values.isnan())
        finite = values.isfinite()
        assert torch.equal(out[finite], values[finite])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("per_slot", [False, True], ids=["one-number", "per-slot"])
def test_a_cache_gives_the_rows_of_one_pass(per_slot: bool, dtype: torch.dtype) -> None:
    shape = (2, 40, 4, 2, 16)
    ref, ours = plans(shape, causal=True, rope=True)
    q, k, v = projection(shape, dtype)
    truth = ref(q.float(), k.float(), v.float(), length=40)
    cache = KVCache(*(torch.full((2, 2, 43, 16), math.nan, dtype=dtype) for _ in range(2)))
    tolerance = FP32 if dtype == torch.float32 else 4 * HALF[dtype]
    place = 0
    for count in (30, 1, 4, 5):
        now = slice(place, place + count)
        length: Count = PerSlot(torch.full((2,), count, dtype=torch.int32)) if per_slot and place == 0 else count
        out = ours(q[:, now], k[:, now], v[:, now], length=length, cache=cache)
        assert difference(out.float(), truth[:, now]) <= tolerance
        place += count
    for table in (cache.keys, cache.values):
        assert table[:, :, :40].isfinite().all() and table[:, :, 40:].isnan().all()


def test_what_is_wrong_is_said() -> None:
    plan = NativeAttention(AttentionSpec(2, 1, 4, causal=True, scale=1.0, rope=rope_of(4, 16)))
    q, k, v = torch.zeros(1, 8, 8), torch.zeros(1, 8, 4), torch.zeros(1, 8, 4)
    with pytest.raises(ValueError, match=r"^q: expected \[B, R, E=8\], got \[1, 8, 9\]"):
        plan(torch.zeros(1, 8, 9), k, v, length=8)
    with pytest.raises(ValueError, match=r"^k: expected \[B=1, T, E=4\]"):
        plan(q, torch.zeros(2, 8, 4), v, length=8)
    with pytest.raises(ValueError, match=r"expected one of float32, bfloat16, float16 on the CPU, got .*float64"):
        plan(q, k, v.double(), length=8)
    with pytest.raises(ValueError, match=r"on the CPU, got .*float32 on meta"):
        plan(q.to("meta"), k, v, length=8)
    with pytest.raises(ValueError, match=r"^length: expected 1\.\.8, got 9"):
        plan(q, k, v, length=9)
    with pytest.raises(ValueError, match=r"^rope has 16 positions; row 16 is behind them"):
        plan(q, k, v, length=8, start=9)
    with pytest.raises(ValueError, match="side by side"):
        plan(torch.zeros(1, 8, 8, 2)[..., 0], k, v, length=8)
    small = KVCache(torch.zeros(1, 1, 7, 4), torch.zeros(1, 1, 7, 4))
    with pytest.raises(ValueError, match=r"^the cache has room for 7 rows; 0 \+ 8 are too many"):
        plan(q, k, v, length=8, cache=small)
    with pytest.raises(ValueError, match=r'expected one of auto, .*portable on this CPU, came "sse9"'):
        NativeAttention(AttentionSpec(1, 1, 4, causal=True, scale=1.0), "sse9")


# ----------------------------------------------------------------------------------------------------- linears


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "relu", "silu", "tanh"])
@pytest.mark.parametrize("sizes", [(1, 1, 2), (5, 60, 44), (37, 33, 130), (130, 800, 35)], ids=str)
def test_linear(sizes: tuple[int, int, int], activation: str, instruction_set: str) -> None:
    rows, inputs, outputs = sizes
    x, other = random(0, rows, inputs) + 0.5, random(1, rows, outputs)
    weight, bias = random(2, outputs, inputs) * inputs**-0.5, random(3, outputs)
    for kind in ("none", "layer", "rms"):
        norm = None if kind == "none" else Norm(kind, 1 + 0.3 * random(4, inputs), None, 1e-5)  # type: ignore[arg-type]
        layer = Linear(weight, bias)
        truth = norm_linear.plan(layer, norm, activation, backend="ref")(x)  # type: ignore[arg-type]
        ours = NativeLinear(layer, activation, norm, instruction_set)
        scale = max(float(truth.abs().max()), 1.0)
        for found, expected in ((ours(x), truth), (ours.add(x, other), truth + other)):
            assert float((found - expected).abs().max()) <= 4e-6 * scale
        assert float((ours.multiply(x, other) - truth * other).abs().max()) <= 4e-6 * scale * float(other.abs().max())


def test_a_row_of_a_linear_has_its_bits_alone(threads: int) -> None:
    x = random(0, 67, 500)
    ours = NativeLinear(Linear(random(1, 90, 500), random(2, 90)), "gelu_tanh", Norm("rms", random(3, 500), None, 1e-5))
    whole = ours(x)
    for count in (1, 2, 5, 13, 40):
        assert torch.equal(ours(x[-count:]), whole[-count:])
    assert torch.equal(ours(x.view(1, 67, 500)[:, 3:9]), whole[None, 3:9])
    torch.set_num_threads(3 - threads)
    assert torch.equal(ours(x), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_linear_of_half_precision_is_the_fp32_one_rounded_once(dtype: torch.dtype) -> None:
    layer, norm = Linear(random(1, 90, 50), random(2, 90)), Norm("layer", random(3, 50), random(4, 50), 1e-5)
    x, other = random(0, 7, 50).to(dtype), random(5, 7, 90).to(dtype)
    half = (
        Linear(layer.weight.to(dtype), layer.bias.to(dtype)),
        Norm("layer", norm.weight.to(dtype), norm.bias.to(dtype), 1e-5),
    )
    wide = (
        Linear(half[0].weight.float(), half[0].bias.float()),
        Norm("layer", half[1].weight.float(), half[1].bias.float(), 1e-5),
    )
    ours, truth = NativeLinear(half[0], "gelu", half[1]), NativeLinear(wide[0], "gelu", wide[1])
    assert torch.equal(ours(x), truth(x.float()).to(dtype))
    assert torch.equal(ours.add(x, other), truth.add(x.float(), other.float()).to(dtype))


def test_a_linear_says_what_is_wrong() -> None:
    ours = NativeLinear(Linear(torch.zeros(3, 4)))
    with pytest.raises(
        ValueError, match=r"expected float32 \[\.\.\., 4\] on the CPU, got torch.float64 \[2, 4\] on cpu"
    ):
        ours(torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"on the CPU, got torch.float32 \[2, 4\] on meta"):
        ours(torch.zeros(2, 4, device="meta"))
    with pytest.raises(ValueError, match="other: expected 2 rows of 3, got 1"):
        ours.add(torch.zeros(2, 4), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"weight: expected contiguous float32 of 2 dim.* on the CPU, came float64"):
        _cpu.Linear(torch.zeros(3, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="bias: expected 3 elements, came 4"):
        _cpu.Linear(torch.zeros(3, 4), torch.zeros(4))
    with pytest.raises(ValueError, match=r'activation: expected one of none, gelu, .*, came "gulu"'):
        _cpu.Linear(torch.zeros(3, 4), activation="gulu")


def test_the_threads_are_those_of_torch() -> None:
    """A second OpenMP runtime in the process would fight for the same cores."""
    assert "omp" in _cpu.thread_pool()
