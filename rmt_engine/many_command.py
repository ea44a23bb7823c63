"""`rmt-engine run` over many documents."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from rmt_engine.document_lists import documents_in
from rmt_engine.document_run import FAILURES_SHOWN, DocumentRun, Tally, Wanted
from rmt_engine.engine import Engine
from rmt_engine.progress import counting
from rmt_engine.run_options import decoding_options
from rmt_engine.scoring import check_scorable

ONE_INPUT = ("generate", "save_state", "resume", "checkpoint_every", "max_n_segments", "score_output", "stream")


def is_many(options: argparse.Namespace) -> bool:
    return bool(options.output or options.slots)


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for options that do not go together."""
    unused = [name for name in decoding_options(options) if not (options.ask or options.generate)]
    if unused:
        raise ValueError(f"--{unused[0].replace('_', '-')} is for answers: give --ask Q or --generate N")
    if is_many(options):
        for name in ONE_INPUT:
            if getattr(options, name):
                raise ValueError(f"--{name.replace('_', '-')} is for one input, not with --slots or --output")
        if options.save_states and not options.output:
            raise ValueError("--save-states needs --output DIR, the folder to keep them in")
    else:
        for name in ("pooling", "save_states", "batch_invariant"):
            if getattr(options, name):
                raise ValueError(f"--{name.replace('_', '-')} is for many documents: give --output DIR or --slots N")


def run_many(engine: Engine, options: argparse.Namespace) -> int:
    """Reads them side by side; the exit code is 1 where some failed."""
    if options.score:
        check_scorable(engine.config)
    documents = documents_in(options.input, field=options.field, errors=options.errors)
    wanted = Wanted(options.ask, options.score, options.pooling, options.save_states)
    with counting(None, str(options.input)) as on_step:
        run = DocumentRun(engine, wanted, {**_how_to_read(options), "on_step": on_step})
        if options.output:
            tally = run.into(documents, options.output, options.order)
        else:
            tally = run.onto(documents, lambda line: print(json.dumps(line, ensure_ascii=False), flush=True))
    _print(tally, options)
    return 1 if tally.failed else 0


def _how_to_read(options: argparse.Namespace) -> dict[str, Any]:
    how: dict[str, Any] = {
        "slots": options.slots,
        "order": options.order if not options.output else "completed",
        "batch_invariant": options.batch_invariant,
        "errors": options.errors,
        "token_dtype": options.token_dtype,
    }
    if options.ask:
        how |= {"max_new_tokens": options.max_new_tokens, **decoding_options(options)}
    return how


def _print(tally: Tally, options: argparse.Namespace) -> None:
    """The tally, on stdout where the results went to a folder."""
    output = sys.stdout if options.output else sys.stderr
    if options.json and options.output:
        print(json.dumps({"output": options.output, **vars(tally)}, ensure_ascii=False), file=output)
        return
    before = f", {tally.skipped:,} done before" if tally.skipped else ""
    failed = f", {tally.failed:,} failed" if tally.failed else ""
    print(
        f"{tally.done:,} documents{before}{failed}: {tally.tokens:,} tokens in {tally.seconds:.1f} s, "
        f"{tally.tokens / tally.seconds if tally.seconds else 0:,.0f} tokens/s",
        file=output,
    )
    for line in tally.failures:
        print(f"rmt-engine: {line['id']}: {line['error']}", file=sys.stderr)
    if tally.failed > FAILURES_SHOWN:
        print(f"rmt-engine: and {tally.failed - FAILURES_SHOWN:,} more", file=sys.stderr)
    if options.output:
        print(f"results: {options.output}/results.jsonl", file=output)
