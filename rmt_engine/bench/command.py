"""What `rmt-engine bench` does: every row of every dtype, one after the other."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from rmt_engine.bench import cases
from rmt_engine.bench.readers import ENGINE, check_baselines
from rmt_engine.bench.record import about, state
from rmt_engine.bench.results import LEFT_OUT, Report, Result, Row
from rmt_engine.bench.session import Limits, Session, describe
from rmt_engine.bench.setup import Setup, write_random
from rmt_engine.engine import device_of
from rmt_engine.errors import BackendError
from rmt_engine.memory import write_atomically


def bench(options: argparse.Namespace) -> int:
    """Exit code 1 where a result failed its check."""
    device = device_of(options.device)
    check_baselines(options.against)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    report = Report({**about(), "device": str(device), "threads": torch.get_num_threads(), "before": state(device)})
    with tempfile.TemporaryDirectory(prefix="rmt-bench-") as folder:
        for row in _rows(options, report, Path(folder)):
            report.rows.append(row)
            report.about["after"] = state(device)
            print(describe(row), file=sys.stderr, flush=True)
            if options.out:
                data = json.dumps(report.to_dict(), ensure_ascii=False, indent=1) + "\n"
                write_atomically(Path(options.out), data.encode())
    print(report.text(options.format))
    return 1 if report.failed else 0


def _rows(options: argparse.Namespace, report: Report, folder: Path) -> Iterator[Row]:
    """The rows, dtype by dtype; a session is dropped before the next one is made."""
    title, model = options.config or options.model or "embedded", options.model
    if options.config:
        model = str(folder / options.config)
        write_random(options.config, Path(model))
    cards = report.about.setdefault("cards", {})
    for dtype in options.dtype:
        setup = Setup(model, options.segment_size, options.device, dtype, options.backend, options.threads)
        try:
            session = Session(setup, title, options.against, max(options.lengths), folder)
        except BackendError as error:
            yield Row("all", title, 1, dtype, results=[Result(ENGINE, LEFT_OUT, str(error))])
            continue
        for row in _session_rows(options, session):
            cards[session.dtype_name] = session.floors.to_dict()
            yield row


def _session_rows(options: argparse.Namespace, session: Session) -> Iterator[Row]:
    limits = Limits(options.repetitions, options.budget, not options.no_memory)
    for scope in options.scope:
        if scope == "segment":
            yield from (session.segment(batch, limits) for batch in options.batch)
        elif scope == "tokens":
            for batch in options.batch:
                yield from (session.stream(tokens, batch, limits) for tokens in options.lengths)
        elif scope == "text":
            yield from (cases.text(session, tokens, limits) for tokens in options.lengths)
        elif scope == "tokenize":
            yield from (cases.tokenize(session, tokens, limits) for tokens in options.lengths)
        elif scope == "ask":
            yield cases.ask(session, limits)
        else:
            yield from cases.state(session, limits)
