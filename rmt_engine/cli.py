"""The command line: what can be said, and the exit code of everything that can go wrong."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from rmt_engine.bench.arguments import add_bench
from rmt_engine.errors import RMTError
from rmt_engine.eval_options import add_eval
from rmt_engine.run_options import add_many, add_sampling

USAGE, OUT_OF_MEMORY, INTERRUPTED = 2, 4, 130
EPILOG = "exit codes: 0 done, 1 failed, 2 usage, 3 bad checkpoint or state file, 4 out of memory, 130 interrupted"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code. Results go to stdout, everything else to stderr."""
    options = parser().parse_args(arguments)
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):  # a name or an answer may hold what an encoding has not
            output.reconfigure(errors="backslashreplace")
    if getattr(options, "json", False) and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    return _flushed(_run(options))


def _run(options: argparse.Namespace) -> int:
    try:
        from rmt_engine import commands  # torch comes with it: not before it is known that there is work to do

        return int(getattr(commands, options.command)(options))
    except RMTError as error:
        return _fail(str(error), error.exit_code)
    except ValueError as error:
        return _fail(str(error), USAGE)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except ModuleNotFoundError as error:
        if error.name not in ("rmt_engine._C", "rmt_kernels._cpu"):
            raise
        return _fail("the C++ extension is not built; build it: make setup, or pip install -e .", 1)
    except BrokenPipeError:
        return 1  # who read our output has left: nobody to say it to
    except OSError as error:
        return _fail(str(error), 1)
    except (MemoryError, RuntimeError) as error:
        from rmt_engine.commands import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        return _fail("out of memory: give fewer or shorter segments at once, or a smaller dtype", OUT_OF_MEMORY)


def _flushed(code: int) -> int:
    """The exit code, once all output is written; 1 where it cannot be."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own last flush fails once more
        return code or (1 if isinstance(error, BrokenPipeError) else _fail(f"cannot write the output: {error}", 1))
    return code


def _fail(message: str, code: int) -> int:
    print(f"rmt-engine: {message}", file=sys.stderr)
    return code


def parser() -> argparse.ArgumentParser:
    """Every command and option."""
    top = argparse.ArgumentParser(
        prog="rmt-engine", description="Reads inputs of any length with Recurrent Memory Transformers.", epilog=EPILOG
    )
    top.add_argument("--version", action="version", version=f"rmt-engine {_version()}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_run(commands)
    _add_ask(commands)
    _add_convert(commands)
    _add_inspect(commands)
    add_eval(commands, EPILOG, _count, _add_eval_shared)
    add_bench(commands, EPILOG, _count, counts)
    _add_doctor(commands)
    return top


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("rmt-engine")
    except PackageNotFoundError:  # run from a source tree that was not installed
        return "0+source"


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = commands.add_parser("run", help="read an input segment by segment, then answer", epilog=EPILOG)
    run.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help="text in UTF-8 (also .gz, .zst, URL, - for stdin), records (.jsonl, .parquet), or tokens (.npy, .bin)",
    )
    run.add_argument(
        "--field", metavar="NAME", help="of records: the field that is read, joined by newlines, or a document each"
    )
    run.add_argument("--ask", action="append", default=[], metavar="Q", help="a question after the text; repeatable")
    run.add_argument("--generate", type=_count, metavar="N", help="continue the text by at most N tokens")
    run.add_argument("--score", action="store_true", help="NLL and perplexity of the text, every token scored once")
    run.add_argument("--score-output", metavar="F", help="write the scores of this run's segments there, as JSON lines")
    run.add_argument("--errors", choices=("strict", "replace"), default="strict", help="bytes that are not UTF-8")
    run.add_argument("--token-dtype", metavar="T", help="type of a raw token file: uint16, uint32, int32, int64")
    run.add_argument("--max-n-segments", type=_count, metavar="N", help="read only the first N segments of tokens")
    run.add_argument("--json", action="store_true", help="print one JSON object")
    add_sampling(run, _count)
    add_many(run, _count)
    state = run.add_argument_group("state")
    state.add_argument("--save-state", metavar="F", help="keep the context in this file: at the end, and on Ctrl-C")
    state.add_argument("--checkpoint-every", type=_count, metavar="N", help="save it every N tokens too")
    state.add_argument("--resume", metavar="F", help="go on from this state, in the middle of an input or after it")
    state.add_argument("--allow-inexact", action="store_true", help="resume under another dtype or device")
    _add_model(run)
    _add_machine(run)


def _add_ask(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    ask = commands.add_parser("ask", help="ask a context that was saved", epilog=EPILOG)
    ask.add_argument("question", nargs="+", metavar="Q")
    ask.add_argument("--resume", required=True, metavar="F", help="state file of run --save-state")
    ask.add_argument("--allow-inexact", action="store_true", help="under another dtype or device")
    ask.add_argument("--json", action="store_true", help="print one JSON object")
    add_sampling(ask, _count)
    _add_model(ask)
    _add_machine(ask)


def _add_model(command: argparse.ArgumentParser) -> None:
    model = command.add_argument_group("checkpoint")
    model.add_argument(
        "--model", metavar="DIR", help="converted folder, authors' file or hub id (default: the embedded one)"
    )
    _add_checkpoint(model)


def _add_checkpoint(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    group.add_argument("--base", metavar="DIR", help="backbone's Hugging Face folder, for the authors' files")
    group.add_argument("--segment-size", type=_count, metavar="N", help="text tokens of a segment")
    group.add_argument("--input-size", type=_count, metavar="N", help="all rows of a segment, instead of the former")
    group.add_argument("--alignment", choices=("left", "right", "center"), help="where the short segment goes")


def _add_machine(command: argparse.ArgumentParser) -> None:
    machine = command.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    machine.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    machine.add_argument("--backend", default="auto", choices=("auto", "ref", "cpu", "triton", "cuda"))
    machine.add_argument("--executor", default="auto", choices=("auto", "eager", "graph"))


def _add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    convert = commands.add_parser("convert", help="make a self-contained folder of the authors' files", epilog=EPILOG)
    convert.add_argument("source", metavar="SRC", help="file or folder that the authors' code wrote")
    convert.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
    _add_checkpoint(convert)
    convert.add_argument("--ask-template", metavar="T", help="how a question is put; holds {question}")
    convert.add_argument("--stop-ids", type=_ids, metavar="I,J", help="token ids that end an answer")
    convert.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="store in this type")
    convert.add_argument("--force", action="store_true", help="replace an existing converted folder")
    convert.add_argument("--json", action="store_true", help="print one JSON object")


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    inspect = commands.add_parser("inspect", help="say what a file or folder is, and how to run it", epilog=EPILOG)
    inspect.add_argument("path", metavar="PATH")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    doctor = commands.add_parser("doctor", help="say what this machine can do, and why not the rest", epilog=EPILOG)
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N: where the memory is planned")
    doctor.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    doctor.add_argument("--slots", type=_count, default=1, metavar="N", help="documents side by side (default: 1)")
    _add_model(doctor)


def _add_eval_shared(kind: argparse.ArgumentParser) -> None:
    _add_model(kind)
    _add_machine(kind)


def _count(text: str) -> int:
    """A whole number above zero; 16k is 16,000, 2M is 2,000,000 and 1G is 1,000,000,000."""
    scale = {"k": 10**3, "M": 10**6, "G": 10**9}.get(text[-1:], 1)
    try:
        number = int(text if scale == 1 else text[:-1]) * scale
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, like 512, 16k or 2M; got {text!r}")
    return number


def counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected token ids like 50256 or 1,2; got {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())
