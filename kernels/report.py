"""Compiles every launch of a segment step for every architecture and writes kernels/REPORT.md. Needs no GPU.

`make kernels-report` runs it: registers, shared memory, instructions. A spill, a stack, too much shared memory or a
16-bit matrix product without tensor cores is a breach, and fails. A row whose key has not changed (source of the
kernel, launch, architecture, Triton) is not compiled again: the table is its own cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rmt_kernels import configs
from rmt_kernels.aot import Compiled, Launch, breaches, compiled, recorded
from rmt_kernels.segment_attention import KVCache
from transformers import BertConfig, GPT2Config, LlamaConfig

from rmt_engine.backbones import module_of
from rmt_engine.backbones.common import run_blocks

TABLE = Path(__file__).parent / "REPORT.md"
ROWS, MEMORY = 512, 16

LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA_1B |= {"head_dim": 64, "max_position_embeddings": 4096, "vocab_size": 128256, "tie_word_embeddings": True}
LLAMA_3B = {**LLAMA_1B, "hidden_size": 3072, "num_attention_heads": 24, "head_dim": 128}
BACKBONES: dict[str, tuple[str, Any]] = {
    "gpt2": ("gpt2", GPT2Config(n_layer=2)),
    "llama-1b": ("llama", LlamaConfig(num_hidden_layers=2, **LLAMA_1B)),
    "llama-3b": ("llama", LlamaConfig(num_hidden_layers=2, **LLAMA_3B)),
    "bert-base": ("bert", BertConfig(num_hidden_layers=2)),
}
# bf16 stands for fp16: the same tiles, the same instructions but for the type.
DTYPES = {"bf16": (torch.bfloat16, BACKBONES), "fp32": (torch.float32, ("gpt2",))}
COLUMNS = ("registers", "stack", "shared", "warps", "spills", "wgmma", "tcgen05", "mma", "async_copies")


def segment_step(name: str, dtype: torch.dtype) -> None:
    """Everything an engine launches: fold a segment, score it, prefill an answering one and decode."""
    model_type, config = BACKBONES[name]
    module, facts = module_of(model_type), config.to_dict()
    weights = {
        key: torch.empty(shape, dtype=dtype, device="meta") for key, shape in module.parameter_shapes(facts).items()
    }
    backbone = module.build(facts, weights, "triton")
    ids = torch.empty(1, ROWS, dtype=torch.int64, device="meta")
    width = facts.get("n_embd") or facts["hidden_size"]
    memory = torch.empty(1, MEMORY, width, dtype=dtype, device="meta")
    if model_type == "bert":
        hidden = run_blocks(backbone, backbone.read_memory(ids, memory, (1,)), ROWS - 5, (0, 1 + MEMORY))
        backbone.write_memory(hidden[:, 1:])
        backbone.head(hidden[:, 0])
        return
    hidden = backbone.read_memory(ids, memory, (0, ROWS - MEMORY))
    backbone.write_memory(run_blocks(backbone, hidden, ROWS, (ROWS - MEMORY, ROWS)))
    text = run_blocks(backbone, hidden, ROWS, (MEMORY, ROWS))[:, :-MEMORY]
    backbone.head(text)
    backbone.log_probabilities(text, ids[:, : text.shape[1]])
    shape = (1, backbone.kv_heads, ROWS + 64, backbone.head_dim)
    caches = [KVCache(*(torch.empty(shape, dtype=dtype, device="meta") for _ in "kv")) for _ in backbone.blocks]
    run_blocks(backbone, hidden, ROWS - 3, (ROWS - 4, ROWS - 3), caches)
    backbone.head(run_blocks(backbone, backbone.embed(ids[:, :1], ROWS - 3), 1, (0, 1), caches))


def launches() -> Iterator[tuple[configs.Arch, str, str, Launch]]:
    """(architecture, backbone, dtype, launch), each launch once an architecture."""
    for arch in configs.ARCHS:
        seen: set[Launch] = set()
        for dtype_name, (dtype, names) in DTYPES.items():
            for name in names:
                with configs.assume(arch), recorded() as found:
                    segment_step(name, dtype)
                yield from ((arch, name, dtype_name, launch) for launch in found if launch not in seen)
                seen |= set(found)


def known() -> dict[str, Compiled]:
    """What the table already says, by key."""
    if not TABLE.exists():
        return {}
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {row[0].strip("`"): Compiled(*map(int, row[5 : 5 + len(COLUMNS)])) for row in rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compile and write nothing; fail where the table is stale")
    arguments = parser.parse_args()
    cache, lines, broken = known(), [], []
    missing = [(arch, launch) for arch, _, _, launch in launches() if launch.key(arch) not in cache]
    print(f"{len(missing)} launches are not in the table", file=sys.stderr, flush=True)
    if arguments.check and missing:
        return 1
    try:
        for arch, name, dtype, launch in launches():
            key = launch.key(arch)
            if key not in cache:
                print(f"{arch} {name} {dtype} {launch.name}", file=sys.stderr, flush=True)
                cache[key] = compiled(launch, arch)
            result = cache[key]
            broken += [
                f"{arch} {name} {dtype} {launch.name} {launch.label()}: {words}"
                for words in breaches(launch, result, arch)
            ]
            facts = [arch, dtype, launch.name.removesuffix("_kernel"), f"{name}: {launch.label()}"]
            numbers = [getattr(result, column) for column in COLUMNS]
            lines.append(" | ".join(map(str, [f"`{key}`", *facts, *numbers, result.programs(arch)])))
    finally:  # an hour's work is not lost to an interrupt
        if not arguments.check:
            TABLE.write_text(_document(lines))
    print(f"{len(lines)} launches, {len(broken)} breaches")
    for words in broken:
        print(words, file=sys.stderr)
    return 1 if broken else 0


def _document(lines: list[str]) -> str:
    heads = ["key", "arch", "dtype", "kernel", "backbone: constants", *COLUMNS, "programs"]
    return "\n".join(
        [
            "# Compiled kernels",
            "",
            "Written by `make kernels-report`, without a GPU: every launch of a segment step, compiled for every",
            "architecture. The configurations are defaults whose compilation is checked; none was tuned on a card.",
            "shared: bytes; spills: STL and LDL instructions; wgmma, tcgen05, mma: matrix instructions of Hopper, of",
            "Blackwell and of older cards; programs: how many fit on one multiprocessor, the bound on occupancy.",
            "",
            "| " + " | ".join(heads) + " |",
            "|" + "---|" * len(heads),
            *(f"| {line} |" for line in lines),
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
