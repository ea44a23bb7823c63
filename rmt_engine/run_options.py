"""What can be said to `run` and `ask` about answers and about many documents. No torch in here: `--help` is quick."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty", "seed", "stop", "roll")


def add_sampling(command: argparse.ArgumentParser, count: Callable[[str], int]) -> None:
    """How answers are decoded. Greedy where nothing is said."""
    answers = command.add_argument_group("answers")
    answers.add_argument(
        "--max-new-tokens", type=count, default=16, metavar="N", help="longest answer to a question (default: 16)"
    )
    answers.add_argument("--temperature", type=float, metavar="T", help="draw tokens, from logits divided by T")
    answers.add_argument("--top-k", type=count, metavar="K", help="draw from the K likeliest")
    answers.add_argument("--top-p", type=float, metavar="P", help="draw from the smallest set that holds so much")
    answers.add_argument("--repetition-penalty", type=float, metavar="X", help="over 1: tokens come again less often")
    answers.add_argument("--seed", type=int, metavar="N", help="the same seed draws the same answer")
    answers.add_argument("--stop", action="append", metavar="TEXT", help="ends an answer and is left out; repeatable")
    answers.add_argument("--roll", action="store_true", default=None, help="go on in a new segment when one is full")
    answers.add_argument("--stream", action="store_true", help="print answers piece by piece, as they come")


def add_many(run: argparse.ArgumentParser, count: Callable[[str], int]) -> None:
    """A folder, a pattern, or records each of which is a document."""
    many = run.add_argument_group(
        "many documents", "with --slots or --output, --input is a folder, a pattern like 'books/*.txt', or records"
    )
    many.add_argument("--slots", type=count, metavar="N", help="documents read side by side (default: measured)")
    many.add_argument("--output", metavar="DIR", help="results there, a JSON line each; again: only what is not done")
    many.add_argument("--order", choices=("completed", "input"), default="completed", help="of the lines, at the end")
    many.add_argument(
        "--pooling",
        choices=("none", "mean", "first", "last", "flat"),
        help="add the memory state as features",
    )
    many.add_argument("--save-states", action="store_true", help="keep each document's context in DIR/states")
    many.add_argument("--batch-invariant", action="store_true", help="the same bits whatever --slots is; slower")


def decoding_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `Stream.ask` that were given."""
    return {name: value for name in SAMPLING if (value := getattr(options, name)) is not None}
