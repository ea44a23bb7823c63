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
from transformers import BertConfig, GPT2Config, LlamaConfig

from rmt_engine.backbones import module_of
from rmt_engine.config import RMTConfig
from rmt_engine.executors import EagerExecutor

TABLE = Path(__file__).parent / "REPORT.md"
ROWS, MEMORY, SLOTS, NEW_TOKENS = 512, 16, 2, 64  # with one slot, Triton would make constants of counts

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


def executor_of(name: str, dtype: torch.dtype) -> EagerExecutor:
    """One over weights that take no memory."""
    model_type, config = BACKBONES[name]
    module, facts = module_of(model_type), config.to_dict()
    weights = {
        key: torch.empty(shape, dtype=dtype, device="meta") for key, shape in module.parameter_shapes(facts).items()
    }
    encoder = model_type == "bert"
    text = ROWS - (MEMORY + 3 if encoder else 2 * MEMORY)
    ids = {"cls_id": 101, "sep_id": 102} if encoder else {}
    rmt = RMTConfig("encoder_classifier" if encoder else "decoder", facts, MEMORY, text, **ids)
    width = facts.get("n_embd") or facts["hidden_size"]
    memory = torch.empty(MEMORY, width, dtype=dtype, device="meta")
    return EagerExecutor(rmt, module.build(facts, weights, "triton"), memory)


def segment_step(name: str, dtype: torch.dtype, per_slot: bool) -> None:
    """Everything an engine launches: fold a segment, score it, prefill an answering one and decode.

    per_slot: with lengths on the device, one for each slot.
    """
    executor = executor_of(name, dtype)
    text = ROWS - len(executor.layout.frame().before) - len(executor.layout.frame().after)
    ids = torch.empty(SLOTS, text, dtype=torch.int64, device="meta")
    memory = executor.initial_memory(SLOTS)
    lengths = torch.empty(SLOTS, dtype=torch.int32, device="meta") if per_slot else None
    executor.fold(ids, memory, lengths)
    executor.fold_with_logits(ids, memory, lengths)
    if name.startswith("bert"):
        executor.logits(ids, memory, lengths)
        return
    executor.fold_with_scores(ids, memory, None, lengths)
    logits, caches = executor.prefill(ids, memory, NEW_TOKENS, lengths)
    executor.decode(logits.argmax(-1)[:, None], caches)


def launches() -> Iterator[tuple[configs.Arch, str, str, Launch]]:
    """(architecture, backbone, dtype, launch), each launch once an architecture."""
    for arch in configs.ARCHS:
        seen: set[Launch] = set()
        for dtype_name, (dtype, names) in DTYPES.items():
            for name in names:
                with configs.assume(arch), recorded() as found:
                    segment_step(name, dtype, per_slot=False)
                    segment_step(name, dtype, per_slot=True)
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
