"""What `rmt-engine eval` can be told. Nothing heavy is imported: `--help` must not wait for torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable

Subparsers = argparse._SubParsersAction  # argparse gives it no public name
Count = Callable[[str], int]
Shared = Callable[[argparse.ArgumentParser], None]
FORMATS = ("table", "md", "csv", "json")


def add_eval(commands: Subparsers[argparse.ArgumentParser], epilog: str, count: Count, add_shared: Shared) -> None:
    """The command and its kinds. count: the type of a whole number; add_shared: adds checkpoint and machine options."""
    evaluate = commands.add_parser("eval", help="measure what a checkpoint's memory holds", epilog=epilog)
    kinds = evaluate.add_subparsers(dest="kind", metavar="KIND", required=True)
    for add in (_add_retrieval, _add_drift, _add_babilong, _add_perplexity):
        kind = add(kinds, epilog, count)
        kind.add_argument("-o", "--output", choices=FORMATS, default="table", help="how the result is printed")
        kind.add_argument("--json", action="store_const", const="json", dest="output", help="the same as -o json")
        add_shared(kind)


def _add_retrieval(kinds: Subparsers[argparse.ArgumentParser], epilog: str, count: Count) -> argparse.ArgumentParser:
    kind = kinds.add_parser("retrieval", help="is a fact found again after so much noise?", epilog=epilog)
    _add_trials(kind, count, [(16_000, ""), (128_000, ""), (2_000_000, "")], 100)
    kind.add_argument("--plot", metavar="FILE", help="draw a heat map, length × place of the fact (needs matplotlib)")
    return kind


def _add_drift(kinds: Subparsers[argparse.ArgumentParser], epilog: str, count: Count) -> argparse.ArgumentParser:
    kind = kinds.add_parser("drift", help="does a lower precision forget more? paired trials", epilog=epilog)
    kind.add_argument(
        "--dtypes",
        type=_names,
        default=["float32", "bfloat16"],
        metavar="A,B",
        help="what is compared (default: float32,bfloat16)",
    )
    _add_trials(kind, count, [(2_000_000, "")], 30)
    return kind


def _add_trials(kind: argparse.ArgumentParser, count: Count, lengths: list[tuple[int, str]], trials: int) -> None:
    """What a measurement of hidden facts can be told."""
    kind.add_argument(
        "--lengths",
        type=lambda text: [_length(part, count) for part in text.split(",")],
        default=lengths,
        metavar="N,…",
        help="of the text, in tokens or segments: 16k,64seg,2M",
    )
    kind.add_argument(
        "--tasks",
        type=_names,
        default=["memorize", "detect"],
        metavar="T,…",
        help="memorize (facts at the start), detect (anywhere), reasoning (two relations, both needed)",
    )
    kind.add_argument("--facts", type=count, default=1, metavar="N", help="names that are told apart, 1 to 4")
    kind.add_argument("--trials", type=count, default=trials, metavar="N", help=f"texts a cell (default: {trials})")
    kind.add_argument("--slots", type=count, default=100, metavar="N", help="texts read side by side (default: 100)")
    kind.add_argument("--noise", metavar="PATH", help="text file or folder (default: held-out Python sources)")
    kind.add_argument("--seed", type=int, default=0, metavar="N")
    kind.add_argument(
        "--answer",
        choices=("auto", "generate", "score", "classify"),
        default="auto",
        help="a decoder generates or scores the possible answers, an encoder classifies",
    )
    kind.add_argument("--labels", type=_names, metavar="A,…", help="answers of a classifier's classes, in their order")
    kind.add_argument("--resume-dir", metavar="DIR", help="keep answers there; what it holds is not asked again")


def _add_babilong(kinds: Subparsers[argparse.ArgumentParser], epilog: str, count: Count) -> argparse.ArgumentParser:
    kind = kinds.add_parser("babilong", help="BABILong's samples, scored by its rules", epilog=epilog)
    kind.add_argument(
        "--data",
        required=True,
        metavar="PATH",
        help="a sample file, or a folder of them: data/qa1/4k.json, 4k/qa1-….parquet",
    )
    kind.add_argument("--tasks", type=_names, metavar="T,…", help="of those that are there: qa1,qa2")
    kind.add_argument("--lengths", type=_names, metavar="L,…", help="of those that are there: 0k,4k,1M")
    kind.add_argument("--limit", type=count, metavar="N", help="the first N samples of each file")
    kind.add_argument("--prompt", metavar="T", help="how a sample is put; holds {context} and {question}")
    kind.add_argument("--instructions", metavar="FILE", help="JSON: task -> instruction, examples, post_prompt")
    kind.add_argument("--max-new-tokens", type=count, default=20, metavar="N", help="longest answer (default: 20)")
    kind.add_argument("--slots", type=count, default=16, metavar="N", help="samples read side by side (default: 16)")
    kind.add_argument("--resume-dir", metavar="DIR", help="keep answers there; what it holds is not asked again")
    return kind


def _add_perplexity(kinds: Subparsers[argparse.ArgumentParser], epilog: str, count: Count) -> argparse.ArgumentParser:
    kind = kinds.add_parser("perplexity", help="does reading more before help to predict?", epilog=epilog)
    kind.add_argument("--input", required=True, metavar="PATH", help="held-out text: a file, or a folder of documents")
    kind.add_argument("--field", metavar="NAME", help="of records (.jsonl, .parquet): the field that is read")
    kind.add_argument(
        "--segments",
        type=lambda text: [count(part) for part in text.split(",")],
        default=[1, 2, 4, 8, 16, 32, 64],
        metavar="N,…",
        help="segments read before the target (default: 1,2,4,8,16,32,64)",
    )
    kind.add_argument("--targets", type=count, default=200, metavar="N", help="segments predicted (default: 200)")
    kind.add_argument("--slots", type=count, default=16, metavar="N", help="targets side by side (default: 16)")
    kind.add_argument("--plot", metavar="FILE", help="draw perplexity over segments (needs matplotlib)")
    return kind


def _length(text: str, count: Count) -> tuple[int, str]:
    """16k -> (16000, ""), 64seg -> (64, "seg")."""
    return (count(text[:-3]), "seg") if text.endswith("seg") else (count(text), "")


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]
