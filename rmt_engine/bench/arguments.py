"""The options of `rmt-engine bench`. Neither torch nor transformers is imported here."""

from __future__ import annotations

import argparse
from collections.abc import Callable

SCOPES = ("segment", "tokens", "text", "tokenize", "ask", "state")
CONFIGS = ("gpt2", "gpt2-medium", "bert-base", "llama-3.2-1b")
BASELINES = ("hf", "fair", "compile", "full-attention")
FORMATS = ("table", "md", "json", "jsonl", "csv")
DTYPES = ("auto", "float32", "bfloat16", "float16")

DESCRIPTION = """\
Measures how fast a checkpoint reads, over the length of the context. Every result is checked before it is timed; what
fails its check is printed without a speed. Baselines take turns with the engine, repetition by repetition.

scopes: segment    one segment step alone, ids and memory state on the device
        tokens     a token file (--batch 1) or as many documents as slots, to the memory state and the last logits
        text       a text file, tokenized while it streams
        tokenize   the same text file, tokenized alone
        ask        the first token of an answer, after a state file is resumed
        state      save, resume and fork
"""


def add_bench(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    epilog: str,
    count: Callable[[str], int],
    counts: Callable[[str], list[int]],
) -> None:
    """count and counts parse 16k and 4k,32k."""
    bench = commands.add_parser(
        "bench",
        help="measure speed and memory over the length of the context",
        description=DESCRIPTION,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = bench.add_mutually_exclusive_group()
    model.add_argument("--model", metavar="DIR", help="converted folder or hub id (default: the embedded checkpoint)")
    model.add_argument("--config", choices=CONFIGS, help="a shape with random weights; nothing is downloaded")
    bench.add_argument("--segment-size", type=count, metavar="N", help="text tokens of a segment")
    bench.add_argument("--scope", type=_names(SCOPES), default=["tokens"], metavar="S,…", help="(default: tokens)")
    bench.add_argument("--lengths", type=counts, default=[4_000, 32_000], metavar="N,…", help="tokens, as 4k,32k,1M")
    bench.add_argument("--batch", type=counts, default=[1], metavar="B,…", help="documents side by side, as 1,8")
    bench.add_argument("--dtype", type=_names(DTYPES), default=["auto"], metavar="T,…", help="as float32,bfloat16")
    bench.add_argument(
        "--against",
        type=_names((*BASELINES, "none")),
        default=["none"],
        metavar="W,…",
        help=f"{', '.join(BASELINES)}: need a checkout of the sources (default: none)",
    )
    bench.add_argument("--repetitions", type=count, default=5, metavar="N", help="(default: 5)")
    bench.add_argument(
        "--budget",
        type=count,
        default=300,
        metavar="SECONDS",
        help="for each row; what does not fit is left out and named (default: 300)",
    )
    bench.add_argument("--no-memory", action="store_true", help="no run in a process of its own for the peak memory")
    bench.add_argument("--threads", type=count, metavar="N", help="of a CPU (default: torch's)")
    bench.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    bench.add_argument("--backend", default="auto", choices=("auto", "ref", "cpu", "triton", "cuda"))
    bench.add_argument("-o", "--format", choices=FORMATS, default="table", help="of what is printed (default: table)")
    bench.add_argument("--out", metavar="FILE", help="write everything, every repetition, as JSON, after each row")


class _names:
    """Parses a,b,c of known names; argparse shows the mistake."""

    def __init__(self, known: tuple[str, ...]) -> None:
        self.known = known

    def __call__(self, text: str) -> list[str]:
        names = text.split(",")
        wrong = [name for name in names if name not in self.known]
        if wrong:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(self.known)}; got {wrong[0]!r}")
        return list(dict.fromkeys(names))
