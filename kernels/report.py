"""Compiles every launch of a segment step for every architecture and writes kernels/REPORT.md. Needs no GPU.

`make kernels-report` runs it: registers, shared memory, instructions. A spill, a stack, too much shared memory or a
16-bit matrix product without tensor cores is a breach, and fails. A row whose key has not changed (source of the
kernel, launch, architecture, Triton) is not compiled again: the table is its own cache, and an interrupt keeps it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from rmt_kernels import configs, segment_attention
from rmt_kernels.aot import Compiled, Launch, breaches, compiled, recorded
from rmt_kernels.segment_attention import AttentionSpec
from transformers import BertConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen3Config

from rmt_engine.backbones import module_of
from rmt_engine.config import RMTConfig
from rmt_engine.executors import EagerExecutor

TABLE = Path(__file__).parent / "REPORT.md"
ROWS, MEMORY, SLOTS, NEW_TOKENS = 512, 16, 2, 64  # with one slot, Triton would make constants of counts

LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA_1B |= {"head_dim": 64, "max_position_embeddings": 4096, "vocab_size": 128256, "tie_word_embeddings": True}
PYTHIA = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "vocab_size": 50304}
QWEN3 = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
QWEN3 |= {"head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True}
# Mistral's and Qwen2's blocks are Llama's, RoBERTa's are BERT's.
BACKBONES: dict[str, tuple[str, Any]] = {
    "gpt2": ("gpt2", GPT2Config(n_layer=2)),
    "llama-1b": ("llama", LlamaConfig(num_hidden_layers=2, **LLAMA_1B)),
    "bert-base": ("bert", BertConfig(num_hidden_layers=2)),
    "pythia-160m": ("gpt_neox", GPTNeoXConfig(num_hidden_layers=2, **PYTHIA)),
    "qwen3-0.6b": ("qwen3", Qwen3Config(num_hidden_layers=2, **QWEN3)),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Which steps of which dtypes; fp16 and fp32 launch what bf16 does, with another type and (fp32) other tiles.
STEPS = {"bf16": tuple(BACKBONES), "fp16": ("gpt2",), "fp32": ("gpt2",)}
ONE_LENGTH = {("gpt2", "bf16")}  # also with one length for all slots, which no engine launches on a card
HEAD_DIMS, LONGEST = (32, 80, 96, 128), 4096  # attention beside that of the backbones
COLUMNS = ("registers", "stack", "shared", "warps", "spills", "wgmma", "tcgen05", "mma", "async_copies", "tma")
Wanted = tuple[configs.Arch, str, str, Launch]
HEADS = ("key", "arch", "dtype", "kernel", "backbone: constants", *COLUMNS, "programs", "occupancy")


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

    per_slot: with lengths on the device, one for each slot, as an engine on a card has them.
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


def long_attention(dtype: torch.dtype) -> None:
    """The longest segment, at widths of a head that no backbone above has."""
    table = torch.empty(LONGEST, 128, device="meta")
    specs = [AttentionSpec(8, 8, head_dim, causal, 1.0) for head_dim, causal in product(HEAD_DIMS, (True, False))]
    for spec in (*specs, AttentionSpec(8, 8, 128, True, 1.0, (table, table))):
        head_dim, attend = spec.head_dim, segment_attention.plan(spec, backend="triton")
        q, k, v = torch.empty(2, LONGEST, 24 * head_dim, dtype=dtype, device="meta").split(8 * head_dim, -1)
        attend(q, k, v, length=LONGEST)
        attend(q[:, -MEMORY:], k, v, length=LONGEST, start=LONGEST - MEMORY)


def steps() -> Iterator[tuple[str, str, Callable[[], None]]]:
    """(name, dtype, what launches it)."""
    for dtype, names in STEPS.items():
        for name in names:
            for per_slot in (True, False) if (name, dtype) in ONE_LENGTH else (True,):
                yield name, dtype, partial(segment_step, name, DTYPES[dtype], per_slot)
    yield f"{LONGEST} rows", "bf16", partial(long_attention, torch.bfloat16)


def launches() -> Iterator[Wanted]:
    """(architecture, backbone, dtype, launch), each launch once an architecture."""
    for arch in configs.ARCHS:
        seen: set[Launch] = set()
        for name, dtype, step in steps():
            with configs.assume(arch), recorded() as found:
                step()
            yield from ((arch, name, dtype, launch) for launch in found if launch not in seen)
            seen |= set(found)


def known() -> dict[str, Compiled]:
    """What the table already says, by key."""
    if not TABLE.exists():
        return {}
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    whole = (row for row in rows if len(row) == len(HEADS))  # not those of an older table
    return {row[0].strip("`"): Compiled(*map(int, row[5 : 5 + len(COLUMNS)])) for row in whole}


def compile_missing(wanted: Sequence[Wanted], cache: dict[str, Compiled]) -> None:
    """Fills the cache; an interrupt keeps what is there."""
    missing = [(arch, name, dtype, launch) for arch, name, dtype, launch in wanted if launch.key(arch) not in cache]
    try:
        for done, (arch, name, dtype, launch) in enumerate(missing):
            print(f"{done} of {len(missing)}: {arch} {name} {dtype} {launch.name}", file=sys.stderr, flush=True)
            cache[launch.key(arch)] = compiled(launch, arch)
    except KeyboardInterrupt:
        print("interrupted; the next run goes on here", file=sys.stderr)


def row(arch: configs.Arch, name: str, dtype: str, launch: Launch, result: Compiled) -> str:
    facts = [arch, dtype, launch.name.removesuffix("_kernel"), f"{name}: {launch.label()}"]
    numbers = [getattr(result, column) for column in COLUMNS]
    shares = [result.programs(arch), f"{result.occupancy(arch):.0%}"]
    return " | ".join(map(str, [f"`{launch.key(arch)}`", *facts, *numbers, *shares]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compile and write nothing; fail where the table is stale")
    parser.add_argument("--arch", choices=configs.ARCHS, help="compile what is missing for this one alone")
    arguments = parser.parse_args()
    cache, wanted = known(), list(launches())
    if not arguments.check:
        compile_missing([launch for launch in wanted if arguments.arch in (None, launch[0])], cache)
    there = [(arch, name, dtype, launch) for arch, name, dtype, launch in wanted if launch.key(arch) in cache]
    results = [(*facts, cache[facts[3].key(facts[0])]) for facts in there]
    broken = [
        f"{arch} {name} {dtype} {launch.name} {launch.label()}: {words}"
        for arch, name, dtype, launch, result in results
        for words in breaches(launch, result, arch)
    ]
    missing = len(wanted) - len(there)
    if not arguments.check:
        TABLE.write_text(_document([row(*result) for result in results], missing))
    print(f"{len(there)} launches, {missing} not compiled yet, {len(broken)} breaches")
    for words in broken:
        print(words, file=sys.stderr)
    return 1 if broken or missing else 0


def _document(lines: list[str], missing: int) -> str:
    return "\n".join(
        [
            "# Compiled kernels",
            "",
            "Written by `make kernels-report`, without a GPU: every launch of a segment step, compiled for every",
            f"architecture by Triton {triton.__version__}. {configs.provenance()}",
            "Lengths lie on the device, one for each slot, as an engine on a card has them. Mistral and Qwen2 launch",
            "what Llama does, at their own sizes, and RoBERTa what BERT does.",
            "shared: bytes; spills: STL and LDL instructions; wgmma, tcgen05, mma: matrix instructions of Hopper, of",
            "Blackwell and of older cards; async_copies: LDGSTS; tma: UTMALDG, loads through descriptors; programs:",
            "how many fit on one multiprocessor; occupancy: the share of its threads that they are, at most.",
            *(
                [f"{missing} launches are not compiled yet: the next `make kernels-report` goes on here."]
                * bool(missing)
            ),
            "",
            "| " + " | ".join(HEADS) + " |",
            "|" + "---|" * len(HEADS),
            *(f"| {line} |" for line in lines),
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
