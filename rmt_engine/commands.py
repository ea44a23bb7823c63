"""What each command does, and how its results are printed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

import torch

from rmt_engine import checkpoint, many_command
from rmt_engine import doctor as machine
from rmt_engine.asking import check_fits, check_question, decoding_of
from rmt_engine.engine import DTYPES, EMBEDDED, Engine, device_of, dtype_of
from rmt_engine.progress import finish, human, mebibytes
from rmt_engine.run import EARLY_TOKENS, SAMPLE, Checkpoints, Event, Summary
from rmt_engine.run_options import decoding_options
from rmt_engine.scoring import check_scorable
from rmt_engine.stream import Stream


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def run(options: argparse.Namespace) -> int:
    """`rmt-engine run`: reads the input to its end, then prints what was asked for and the summary."""
    if options.checkpoint_every and not options.save_state:
        raise ValueError("--checkpoint-every needs --save-state F, the file to save to")
    if options.score_output and not options.score:
        raise ValueError("--score-output needs --score")
    many_command.check(options)
    engine = _engine(options)
    if many_command.is_many(options):
        return many_command.run_many(engine, options)
    if options.score:
        check_scorable(engine.config)
    if engine.config.family != "decoder" and (options.ask or options.generate):
        raise ValueError("this checkpoint is a classifier: it prints labels; leave out --ask and --generate")
    _check_questions(engine, options.ask, options)
    if options.generate:
        engine.tokenizer  # noqa: B018 - raises where there is none
        check_fits(engine, 1, decoding_of(engine, options.generate, **decoding_options(options)))
    checkpoints = Checkpoints(options.save_state, options.checkpoint_every) if options.save_state else None
    events = engine.run(
        options.input,
        token_dtype=options.token_dtype,
        errors=options.errors,
        field=options.field,
        max_n_segments=options.max_n_segments,
        checkpoints=checkpoints,
        resume=options.resume,
        allow_inexact=options.allow_inexact,
        score=options.score,
    )
    if options.score_output:
        events = _writing_scores(events, options.score_output)
    try:
        summary = finish(events, str(options.input))
    except BaseException:
        if checkpoints is not None and checkpoints.saved_at is not None:
            path = checkpoints.path
            print(f"the state at token {checkpoints.saved_at:,} is saved: go on with --resume {path}", file=sys.stderr)
        raise
    result = _result(summary, options)
    if options.stream and not options.json:
        print(_text(result, engine, options), flush=True)
        _print_pieces(summary.stream, options.ask, options.generate, options)
        return 0
    try:
        result |= _asked(summary.stream, options)
    finally:  # what was read is told even where an answer does not fit
        print(json.dumps(result, ensure_ascii=False) if options.json else _text(result, engine, options))
    return 0


def _writing_scores(events: Generator[Event, None, None], path: str) -> Generator[Event, None, None]:
    """The events, and their scores in the file `path`, a JSON object a line."""
    with closing(events), open(path, "w", encoding="utf-8", buffering=1) as file:
        for event in events:
            if event.scores is not None:
                print(json.dumps(event.scores.to_dict()), file=file)
            yield event


def ask(options: argparse.Namespace) -> int:
    """`rmt-engine ask`: answers from a saved context, in the time of a segment."""
    engine = _engine(options)
    if engine.config.family != "decoder":
        raise ValueError("this checkpoint is a classifier: it answers no questions; rmt-engine run prints its labels")
    _check_questions(engine, options.question, options)
    stream = engine.resume(options.resume, options.allow_inexact)
    if options.stream and not options.json:
        _print_pieces(stream, options.question, None, options)
        return 0
    answers = _answers(stream, options.question, options)
    if options.json:
        print(json.dumps({"state": options.resume, "tokens": stream.position, "answers": answers}, ensure_ascii=False))
    else:
        print("\n".join(map(_answer, answers)))
    return 0


def _engine(options: argparse.Namespace) -> Engine:
    return Engine.from_pretrained(
        options.model,
        device=options.device,
        dtype=options.dtype,
        backend=options.backend,
        executor=options.executor,
        slots=getattr(options, "slots", None) or 1,
        base=options.base,
        segment_size=options.segment_size,
        input_size=options.input_size,
        alignment=options.alignment,
    )


def _check_questions(engine: Engine, questions: Sequence[str], options: argparse.Namespace) -> None:
    """Tells before hours of reading what can never be answered after them."""
    if questions:
        how = decoding_of(engine, options.max_new_tokens, **decoding_options(options))
        for question in questions:
            check_question(engine, question, how)


def _answers(stream: Stream, questions: Sequence[str], options: argparse.Namespace) -> list[dict[str, str]]:
    texts = stream.ask(list(questions), options.max_new_tokens, **decoding_options(options))
    pairs = zip(questions, texts, strict=True)
    return [{"question": question, "answer": text.strip()} for question, text in pairs]


def _print_pieces(stream: Stream, questions: Sequence[str], generate: int | None, options: argparse.Namespace) -> None:
    """Answers one after the other, each piece as soon as it is there."""
    how = decoding_options(options)
    for question in questions:
        print(question, end="  ", flush=True)
        _print_one(stream.ask(question, options.max_new_tokens, stream=True, **how))
    if generate:
        _print_one(stream.generate(generate, stream=True, **how), strip=False)


def _print_one(pieces: Generator[str, None, None], strip: bool = True) -> None:
    with closing(pieces):
        for piece in pieces:
            shown = piece.lstrip() if strip else piece
            strip = strip and not shown
            print(shown, end="", flush=True)
    print(flush=True)


def _result(summary: Summary, options: argparse.Namespace) -> dict[str, Any]:
    """Everything a run found, as `--json` prints it."""
    stream = summary.stream
    result: dict[str, Any] = {
        "input": str(options.input),
        "tokens": summary.tokens,
        "segments": summary.segments,
        "seconds": round(summary.seconds, 3),
        "tokens_per_second": round(summary.tokens_per_second),
        "segment_ms_early": summary.ms_early,
        "segment_ms_late": summary.ms_late,
        "rss_anon_early": summary.memory_early,
        "rss_anon_late": summary.memory_late,
    }
    if summary.total is not None:
        result["score"] = summary.total.to_dict()
    if stream.engine.config.family == "encoder_classifier":
        result["labels"] = [{"label": name, "score": score} for name, score in stream.classify()]
    return result


def _asked(stream: Stream, options: argparse.Namespace) -> dict[str, Any]:
    asked: dict[str, Any] = {}
    if options.ask:
        asked["answers"] = _answers(stream, options.ask, options)
    if options.generate:
        asked["generated"] = stream.generate(options.generate, **decoding_options(options))
    return asked


def _answer(entry: dict[str, str]) -> str:
    return f"{entry['question']}  {entry['answer']}"


def _score(score: dict[str, Any]) -> str:
    perplexity = "too large" if score["perplexity"] is None else f"{score['perplexity']:,.4g}"
    return (
        f"score of {score['tokens']:,} tokens: perplexity {perplexity}, {score['bits_per_token']:.4f} bits per token, "
        f"NLL {score['nll']:,.2f} nats"
    )


def _text(result: dict[str, Any], engine: Engine, options: argparse.Namespace) -> str:
    lines = [
        f"{result['tokens']:,} tokens in {result['segments']:,} segments: {result['seconds']:.1f} s, "
        f"{result['tokens_per_second']:,} tokens/s",
        f"memory state: {engine.config.num_mem_tokens} × {engine.executor.initial.shape[1]}, the same at any length",
    ]
    if result["segment_ms_early"] is not None and result["segments"] > 2 * SAMPLE:
        lines.append(
            f"time per segment: {result['segment_ms_early']:.3f} ms over the first {SAMPLE:,}, "
            f"{result['segment_ms_late']:.3f} ms over the last {SAMPLE:,} (medians)"
        )
    if result["rss_anon_early"] is not None and result["rss_anon_late"] is not None:
        lines.append(
            f"RssAnon: {mebibytes(result['rss_anon_early'])} at {human(EARLY_TOKENS)} tokens, "
            f"{mebibytes(result['rss_anon_late'])} at {human(result['tokens'])}"
        )
    if "score" in result:
        lines.append(_score(result["score"]))
    lines += [f"{entry['score']:.4f}  {entry['label']}" for entry in result.get("labels", [])]
    lines += [_answer(entry) for entry in result.get("answers", [])]
    if "generated" in result:
        lines.append(result["generated"])
    if options.save_state:
        lines.append(f'saved: ask it with rmt-engine ask --resume {options.save_state} "…"')
    elif engine.config.family == "decoder" and not options.ask and not options.generate:
        lines.append('ask about it: --ask "…"; keep it for later: --save-state FILE; continue it: --generate N')
    return "\n".join(lines)


def convert(options: argparse.Namespace) -> int:
    """`rmt-engine convert`: the authors' files -> a folder that needs no argument."""
    done = checkpoint.convert(
        options.source,
        options.out,
        options.base,
        segment_size=options.segment_size,
        input_size=options.input_size,
        alignment=options.alignment,
        ask_template=options.ask_template,
        stop_ids=options.stop_ids,
        dtype=None if options.dtype is None else DTYPES[options.dtype],
        force=options.force,
    )
    config = done.config
    result = {
        "folder": str(done.folder),
        "family": config.family,
        "model_type": config.model_type,
        "num_mem_tokens": config.num_mem_tokens,
        "segment_size": config.segment_size,
        "alignment": config.alignment,
        "parameters": done.parameters,
        "bytes": done.size,
        "files": list(done.files),
    }
    print(json.dumps(result, ensure_ascii=False) if options.json else _table(result))
    return 0


def inspect(options: argparse.Namespace) -> int:
    """`rmt-engine inspect`: what a path is. Exit code 3 for what cannot be run and cannot be converted."""
    report = checkpoint.inspect(options.path)
    if not options.json:
        report.pop("shapes", None)
    print(json.dumps(report, ensure_ascii=False) if options.json else _table(report))
    return 3 if report["error"] else 0


def _table(values: dict[str, Any]) -> str:
    wide = max(len(key) for key in values)
    shown = {key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in values.items()}
    return "\n".join(f"{key.replace('_', ' '):<{wide}}  {value}" for key, value in shown.items() if value is not None)


def doctor(options: argparse.Namespace) -> int:
    """`rmt-engine doctor`: what this machine can do, and the memory of a checkpoint on it."""
    place = device_of(options.device)
    report = machine.examine()
    report["model"] = machine.examine_model(
        EMBEDDED if options.model is None else options.model,
        place,
        dtype_of(options.dtype, place),
        options.slots,
        base=options.base,
        segment_size=options.segment_size,
        input_size=options.input_size,
        alignment=options.alignment,
    )
    print(json.dumps(report, ensure_ascii=False) if options.json else machine.describe(report))
    return 0


def eval(options: argparse.Namespace) -> int:
    """`rmt-engine eval KIND`: see `eval_commands`."""
    from rmt_engine import eval_commands  # no other command needs it, and it takes a while

    return eval_commands.run(options, _engine)


def bench(options: argparse.Namespace) -> int:
    """`rmt-engine bench`: see `bench.command`."""
    from rmt_engine.bench import command

    return command.bench(options)
