"""The Triton kernels of micro_gpu.py."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def add_one_kernel(p_values, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """values += 1. EARLY: the next kernel may be set up while this one runs, and waits before it reads."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_values + o, tl.load(p_values + o) + 1.0)


@triton.jit
def barrier_kernel(p_arrived, programs, rounds):
    """All programs meet `rounds` times. p_arrived: int32, 0 before."""
    for i in range(rounds):
        arrived = tl.atomic_add(p_arrived, 1, sem="acq_rel", scope="gpu") + 1
        while arrived < (i + 1) * programs:
            arrived = tl.atomic_add(p_arrived, 0, sem="acquire", scope="gpu")
