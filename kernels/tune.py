"""Tunes the launch configurations of the card it runs on and writes rmt_kernels/tuned/<architecture>.json.

`make tune` runs it. Each candidate is compiled and refused for a spill, checked against `ref`, and only then timed: a
CUDA graph of CALLS launches, candidates one after the other in every round.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rmt_kernels import configs, dispatch, linear_residual, norm_linear, segment_attention, tuning
from rmt_kernels.configs import Arch, AttentionCase, AttentionConfig, LinearCase, LinearConfig, Tuned
from rmt_kernels.segment_attention import AttentionSpec
from rmt_kernels.weights import Linear
from torch import Tensor

CALLS = 20  # launches a measurement: more than a graph's own start
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}  # of the greatest value
# (width, inner, heads, kv heads, head dim, gated) of the backbones that are tuned for
BACKBONES = {
    "gpt2": (768, 3072, 12, 12, 64, False),
    "gpt2-medium": (1024, 4096, 16, 16, 64, False),
    "llama-1b": (2048, 8192, 32, 8, 64, True),
}
ROWS = (16, 512)  # of one slot: the write memory's, a segment's

Op = Callable[[], Tensor]


def linear_shapes(name: str) -> list[tuple[int, int, bool, bool]]:
    """(outputs, inputs, gated, with a residual) of a backbone's linears."""
    width, inner, heads, kv_heads, head_dim, gated = BACKBONES[name]
    queries, both = heads * head_dim, 2 * kv_heads * head_dim
    plain = [(queries + both, width, False, False), (queries, width, False, False), (both, width, False, False)]
    added = [(width, queries, False, True), (width, inner, False, True)]
    # those with a residual first: of two linears of one shape, they are the one whose inputs may be shared
    return [*added, *plain, (inner, width, gated, False)]


def linear_op(case: LinearCase, residual: bool, dtype: torch.dtype, backend: str) -> Op:
    """One call over random rows of one slot."""
    generator = torch.Generator("cuda").manual_seed(1)
    random = partial(torch.randn, generator=generator, device="cuda")
    outputs = case.outputs * (2 if case.gated else 1)
    weight = (random(outputs, case.inputs) * case.inputs**-0.5).to(dtype)
    layer, x = Linear(weight, random(outputs).to(dtype)), random(1, case.rows, case.inputs).to(dtype)
    if residual:
        return partial(linear_residual.plan(layer, backend=backend), x, random(1, case.rows, outputs).to(dtype))
    return partial(norm_linear.plan(layer, None, "swiglu" if case.gated else "none", backend=backend), x)


def attention_op(case: AttentionCase, name: str, dtype: torch.dtype, backend: str) -> Op:
    """A segment of 512 rows, queries of all or of the last of them."""
    _, _, heads, kv_heads, head_dim, _ = BACKBONES[name]
    generator = torch.Generator("cuda").manual_seed(1)
    rows = max(1, case.rows * kv_heads // heads)
    q, k, v = (
        torch.randn(1, ROWS[-1], count * head_dim, generator=generator, device="cuda").to(dtype)
        for count in (heads, kv_heads, kv_heads)
    )
    spec = AttentionSpec(heads, kv_heads, head_dim, case.causal, head_dim**-0.5)
    rows, start = min(rows, ROWS[-1]), max(ROWS[-1] - rows, 0)
    attend = segment_attention.plan(spec, backend=backend)
    return partial(attend, q[:, start:], k, v, length=ROWS[-1], start=start)


def check(op: Op, truth: Tensor, arch: Arch, config: LinearConfig | AttentionConfig) -> str | None:
    """Why a candidate must not be timed; None when nothing speaks against it."""
    from rmt_kernels.aot import breaches, compiled, recorded

    try:
        with configs.forced(config):
            with recorded() as launches:
                op()
            for launch in launches:
                if found := breaches(launch, compiled(launch, arch), arch):
                    return "; ".join(found)
            ours = op()
    except Exception as error:  # whatever the compiler or the driver says of a candidate, the next one is tried
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    worst = float((ours.float() - truth).abs().max() / truth.abs().max())
    return None if worst <= TOLERANCE[ours.dtype] else f"error {worst:.1e}"


def microseconds(op: Op, config: LinearConfig | AttentionConfig) -> float:
    """One launch, of CALLS in a CUDA graph."""
    with configs.forced(config):
        op()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                op()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1000 / CALLS


def tune_one(label: str, op: Op, truth: Tensor, arch: Arch, default: Any, candidates: list[Any]) -> tuple[Any, Any]:
    """(configuration, (its time, the default's)) of one case."""
    done = tuning.race(default, candidates, partial(check, op, truth, arch), partial(microseconds, op))
    chosen = done.winner(default)
    times = done.microseconds[chosen], done.microseconds[default]
    print(f"{label}: {times[0]:.2f} us, default {times[1]:.2f}; {len(done.refused)} refused; {chosen}", file=sys.stderr)
    return chosen, times


def tune(arch: Arch, dtype: torch.dtype, names: list[str], found: Tuned) -> None:
    """Every case of the backbones in `names`, into `found`."""
    width = configs.width_of(dtype)
    for name in names:
        *_, heads, kv_heads, head_dim, _ = BACKBONES[name]
        for rows in ROWS:
            for outputs, inputs, gated, residual in linear_shapes(name):
                linear = LinearCase(width, rows, outputs, inputs, gated)
                if linear in found.linear:
                    continue
                op = linear_op(linear, residual, dtype, "triton")
                truth = linear_op(linear, residual, dtype, "ref")().float()
                default = configs.default_linear_config(arch, dtype, rows)
                tried = tuning.linear_candidates(arch, linear)
                tried = tried if residual else [config for config in tried if config.splits == 1]
                found.linear[linear], found.microseconds[linear] = tune_one(
                    f"{name} {linear}", op, truth, arch, default, tried
                )
            for causal in (True, False):
                packed = configs.rows_of(rows * heads // kv_heads)
                attention = AttentionCase(width, packed, max(head_dim, 16), causal)
                if attention in found.attention:
                    continue
                op = attention_op(attention, name, dtype, "triton")
                truth = attention_op(attention, name, dtype, "ref")().float()
                base = configs.default_attention_config(arch, dtype, packed, attention.head_dim)
                found.attention[attention], found.microseconds[attention] = tune_one(
                    f"{name} {attention}", op, truth, arch, base, tuning.attention_candidates(arch, attention)
                )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="bf16 also serves fp16: both are 16 bits wide")
    parser.add_argument("--backbone", choices=BACKBONES, action="append", help="default: all of them")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("make tune needs a CUDA device, and this torch sees none", file=sys.stderr)
        return 2
    try:
        dispatch.choose("triton", "cuda")
    except RuntimeError as error:
        print(f"make tune cannot run: {error}", file=sys.stderr)
        return 2
    import triton

    arch = configs.arch_of(torch.device("cuda"))
    path = configs.TUNED / f"{arch}.json"
    device, date = torch.cuda.get_device_name(), datetime.date.today().isoformat()
    versions = f"torch {torch.__version__}, triton {triton.__version__}, CUDA {torch.version.cuda}"
    words = " ".join(sys.argv[1:] if arguments is None else arguments)
    found = Tuned(arch, device, versions, date, f"make tune ARGS='{words}'", {}, {}, {})
    tune(arch, DTYPES[chosen.dtype], chosen.backbone or list(BACKBONES), found)
    tuning.write(path, found)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
