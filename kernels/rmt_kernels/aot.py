"""Compiling the Triton kernels on a machine without a GPU, as a launch there would compile them.

Launches are recorded, not run: on meta tensors an op costs neither memory nor time, and what is compiled is what it
would launch, its specializations among it.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from rmt_kernels.configs import SHARED_LIMIT, Arch

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
DIVISOR = 16  # what Triton looks for in pointers (bytes) and integers
REGISTERS, THREADS, RESERVED_SHARED = 65536, 2048, 1024  # of one multiprocessor; shared memory kept for each program
SHARED_TOTAL: dict[Arch, int] = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}


@dataclass(frozen=True)
class Launch:
    """One kernel with everything its binary depends on."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def has_dot(self) -> bool:
        return self.name in ("linear_kernel", "attention_kernel", "nll_kernel")

    @property
    def half(self) -> bool:
        """Whether a 16-bit matrix comes in."""
        return dict(self.signature).get("p_x", dict(self.signature).get("p_q")) in ("*fp16", "*bf16")

    @property
    def descriptors(self) -> int:
        """How many TMA descriptors come in."""
        return sum(kind.startswith("tensordesc") for _, kind in self.signature)

    def key(self, arch: Arch) -> str:
        """Changes with the source of the kernel (and of what it calls), the launch, the target and Triton."""
        launch = (self.signature, self.constants, self.divisible, self.options)
        facts = (triton.__version__, arch, self.kernel.cache_key, launch)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def label(self) -> str:
        """Its constants, the zeros and Nones left out."""
        shown = {**dict(self.constants), **dict(self.options)}
        shown.pop("enable_fp_fusion", None)
        return " ".join(
            f"{name}={value}" for name, value in shown.items() if value not in (None, False, "none") and name.isupper()
        )


@dataclass(frozen=True)
class Compiled:
    """What the assembler says: registers of a thread, bytes of stack and shared memory, counts of instructions."""

    registers: int
    stack: int
    shared: int
    warps: int
    spills: int  # STL and LDL
    wgmma: int  # HGMMA, Hopper's
    tcgen05: int  # UTC*MMA, Blackwell's
    mma: int  # HMMA
    async_copies: int  # LDGSTS
    tma: int  # UTMALDG, loads through descriptors

    def programs(self, arch: Arch) -> int:
        """How many fit on one multiprocessor at once."""
        threads = self.warps * 32
        per_thread = -(-max(self.registers, 1) // 8) * 8
        by_shared = SHARED_TOTAL[arch] // (self.shared + RESERVED_SHARED)
        return min(REGISTERS // (per_thread * threads), THREADS // threads, by_shared, 32)

    def occupancy(self, arch: Arch) -> float:
        """Threads of the programs that fit, of those that a multiprocessor holds: the bound on its occupancy."""
        return self.programs(arch) * self.warps * 32 / THREADS


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, a launch is written down and nothing runs."""
    launches: dict[Launch, None] = {}
    found: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launch = _launch(kernel, args, options)
        if launch not in launches:
            launches[launch] = None
            found.append(launch)

    with mock.patch.object(JITFunction, "run", record):
        yield found


def _launch(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: options.pop(name) for name in list(options) if name in kernel.arg_names}
    constexprs = {kernel.arg_names[i] for i in kernel.constexprs}
    as_it_is = {param.name for param in kernel.params if param.do_not_specialize}
    signature, constants, divisible = {}, {}, []
    for name in kernel.arg_names:
        value = values[name]
        if name in constexprs or value is None or (type(value) is int and value == 1 and name not in as_it_is):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype][1:]}{list(value.block_shape)}>"
        elif isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
            offset = value.storage_offset() * value.element_size()
            divisible += [name] if offset % DIVISOR == 0 else []
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible += [name] if value % DIVISOR == 0 and name not in as_it_is else []
        else:
            signature[name] = "fp32"
    return Launch(
        kernel, tuple(signature.items()), tuple(constants.items()), tuple(divisible), tuple(sorted(options.items()))
    )


def compiled(launch: Launch, arch: Arch) -> Compiled:
    """Compiles one launch for `arch` and reads the binary."""
    names = launch.kernel.arg_names
    attributes = {(names.index(name),): [["tt.divisibility", DIVISOR]] for name in launch.divisible}
    constants = {(names.index(name),): value for name, value in launch.constants}
    source = ASTSource(launch.kernel, dict(launch.signature), constants, attributes)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    binary = triton.compile(source, target=target, options=dict(launch.options))
    code = _disassembled(binary.asm["cubin"])
    registers, stack = (int(re.findall(rf"\b{word}:(\d+)", code)[-1]) for word in ("REG", "STACK"))

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    return Compiled(
        registers=registers,
        stack=stack,
        shared=binary.metadata.shared,
        warps=binary.metadata.num_warps,
        spills=count(r"\b(?:STL|LDL)\b"),
        wgmma=count(r"\bHGMMA\b"),
        tcgen05=count(r"\bUTC\w*MMA\b"),
        mma=count(r"\bHMMA\b"),
        async_copies=count(r"\bLDGSTS\b"),
        tma=count(r"\bUTMALDG\b"),
    )


def _disassembled(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", "-sass", file.name], check=True, capture_output=True, text=True)
    return said.stdout


def breaches(launch: Launch, result: Compiled, arch: Arch) -> list[str]:
    """What a shipped kernel must not do, in words; empty when all is well."""
    found = []
    if result.spills or result.stack:
        found.append(f"spills: {result.stack} bytes of stack, {result.spills} STL/LDL")
    if result.shared > SHARED_LIMIT[arch]:
        found.append(f"shared memory: {result.shared} bytes, {arch} has {SHARED_LIMIT[arch]}")
    if result.tma < launch.descriptors:
        found.append(f"{launch.descriptors} descriptors, {result.tma} loads through them")
    if launch.has_dot and launch.half:
        blocks = dict(launch.constants)
        wide = blocks.get("BM", blocks.get("BQ", 0)) >= 64
        if arch == "sm_90" and wide and not result.wgmma:
            found.append("no HGMMA in a 16-bit matrix product")
        if not result.wgmma + result.tcgen05 + result.mma:
            found.append("no tensor-core instruction in a 16-bit matrix product")
    return found
