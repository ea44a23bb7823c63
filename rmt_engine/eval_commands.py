"""What each kind of `rmt-engine eval` does: say the cost, read with a progress bar, print the result."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

from rmt_engine.bench.record import about
from rmt_engine.engine import Engine
from rmt_engine.evaluation import babilong, cost, drift, perplexity, plots, report, retrieval
from rmt_engine.evaluation.answers import way_of
from rmt_engine.evaluation.noise import Noise, noise_text
from rmt_engine.evaluation.store import Store
from rmt_engine.progress import counting, human

MakeEngine = Callable[[argparse.Namespace], Engine]


def run(options: argparse.Namespace, make_engine: MakeEngine) -> int:
    """`rmt-engine eval KIND`. make_engine: builds the engine that the options name."""
    kinds = {"retrieval": _retrieval, "drift": _drift, "babilong": _babilong, "perplexity": _perplexity}
    _process()
    try:
        return kinds[options.kind](options, make_engine)
    except KeyboardInterrupt:
        if getattr(options, "resume_dir", None):
            print(f"what was answered is kept in {options.resume_dir}: the same command goes on", file=sys.stderr)
        raise


def _retrieval(options: argparse.Namespace, make_engine: MakeEngine) -> int:
    """Accuracy over length; in the plain table each cell is printed as soon as it is complete."""
    if options.plot:
        plots.check_plot(options.plot)
    engine = make_engine(options)
    noise = _noise(engine, options)
    plan = retrieval.Plan(engine, noise, _settings(engine, options))
    store = _store(options.resume_dir, plan, noise)
    _say_cost(engine, plan.loads(store, options.slots), f"up to {options.slots} texts side by side")
    cells = []
    for cell in _with_bar(plan, store, options.slots, "retrieval"):
        cells.append(cell)
        if options.output == "table":
            print(report.cell_line(cell), flush=True)
    cells = plan.cells(store)  # in the order in which they were asked for
    if options.output != "table":
        print(report.retrieval(cells, options.output, _about(engine, options)))
    elif maps := report.heat_maps(cells):
        print(f"\n{maps}")
    if options.plot:
        plots.draw_heat_maps(cells, options.plot)
    return 0


def _drift(options: argparse.Namespace, make_engine: MakeEngine) -> int:
    """The same trials under two dtypes."""
    if len(options.dtypes) != 2 or len(set(options.dtypes)) != 2:
        raise ValueError(f"--dtypes expects two that differ, like float32,bfloat16; got {','.join(options.dtypes)}")
    engines = [make_engine(argparse.Namespace(**{**vars(options), "dtype": dtype})) for dtype in options.dtypes]
    noise = _noise(engines[0], options)
    stores = []
    for dtype, engine in zip(options.dtypes, engines, strict=True):
        plan = retrieval.Plan(engine, noise, _settings(engine, options))
        store = _store(options.resume_dir and f"{options.resume_dir}/{dtype}", plan, noise)
        _say_cost(engine, plan.loads(store, options.slots), dtype)
        for cell in _with_bar(plan, store, options.slots, dtype):
            print(f"{dtype}: {report.cell_line(cell)}", file=sys.stderr)
        stores.append(store)
    found = drift.compare(plan, (options.dtypes[0], options.dtypes[1]), stores)
    print(report.drift(found, options.output, _about(engines[0], options)))
    return 0


def _babilong(options: argparse.Namespace, make_engine: MakeEngine) -> int:
    """BABILong's samples; in the plain table each file is printed as soon as it is read."""
    if options.prompt and options.instructions:
        raise ValueError("--instructions comes with BABILong's own layout: leave out --prompt")
    files = babilong.find_files(options.data, options.tasks, options.lengths)
    instructions = babilong.read_instructions(options.instructions) if options.instructions else None
    prompts = babilong.Prompts(babilong.check_template(options.prompt or babilong.PLAIN), instructions)
    engine = make_engine(options)
    settings = {"prompt": prompts.template, "instructions": instructions, "max_new_tokens": options.max_new_tokens}
    store = Store(options.resume_dir, {**_origin(engine), **settings} if options.resume_dir else None)
    loads = babilong.loads(engine, files, store, options.limit, options.slots)
    _say_cost(engine, loads, f"{len(files)} files, {options.slots} samples side by side")
    scores = []
    with counting(sum(load.tokens for load in loads), "babilong") as on_step:
        for score in babilong.evaluate(
            engine,
            files,
            prompts,
            store,
            limit=options.limit,
            max_new_tokens=options.max_new_tokens,
            slots=options.slots,
            on_step=on_step,
        ):
            scores.append(score)
            if options.output == "table":
                print(report.score_line(score), flush=True)
    if options.output != "table":
        print(report.babilong(scores, options.output, _about(engine, options)))
    return 0


def _perplexity(options: argparse.Namespace, make_engine: MakeEngine) -> int:
    """Perplexity over the segments read before, beside its controls."""
    if options.plot:
        plots.check_plot(options.plot)
    engine = make_engine(options)
    plan = perplexity.plan(engine, options.input, options.segments, options.targets, options.field)
    loads = plan.loads(engine, options.slots)
    _say_cost(engine, loads, f"{plan.targets} segments to predict, {options.slots} side by side")
    with counting(sum(load.tokens for load in loads), "perplexity") as on_step:
        result = perplexity.measure(engine, plan, options.slots, on_step)
    print(report.perplexity(result, options.output, _about(engine, options)))
    if options.output in ("table", "md"):
        print(f"\n{report.perplexity_note(result)}")
    if options.plot:
        plots.draw_perplexity(result.columns, options.plot)
    return 0


def _settings(engine: Engine, options: argparse.Namespace) -> retrieval.Settings:
    size = engine.config.segment_size
    lengths = [number * size if unit else number for number, unit in options.lengths]
    tasks = list(dict.fromkeys(options.tasks))
    return retrieval.Settings(
        tasks, lengths, options.trials, options.facts, options.seed, options.answer, options.labels
    )


def _noise(engine: Engine, options: argparse.Namespace) -> Noise:
    return Noise(noise_text(options.noise), engine.tokenizer, engine.config.drop_ids)


def _store(folder: str | None, plan: retrieval.Plan, noise: Noise) -> Store:
    if not folder:
        return Store()
    settings, engine = plan.settings, plan.engine
    asked = {"noise": noise.digest, "seed": settings.seed, "answer": way_of(engine, settings.answer)}
    return Store(folder, {**_origin(engine), **asked, "labels": settings.labels})


def _origin(engine: Engine) -> dict[str, Any]:
    """What decides an answer besides the text."""
    origin = vars(engine.origin)
    return {**origin, "ask_template": engine.config.ask_template, "stop_ids": list(engine.config.stop_ids)}


def _say_cost(engine: Engine, loads: Sequence[cost.Load], how: str) -> None:
    told = cost.estimate(engine, loads)
    print(f"reading {human(told.tokens)} tokens, {how}: about {duration(told.seconds)}", file=sys.stderr)


def _with_bar(plan: retrieval.Plan, store: Store, slots: int, title: str) -> Iterator[retrieval.Cell]:
    total = sum(load.tokens for load in plan.loads(store, slots))
    with counting(total, title) as on_step:
        yield from retrieval.evaluate(plan, store, slots=slots, on_step=on_step)


def duration(seconds: float) -> str:
    """90 -> 1 min 30 s."""
    whole = max(round(seconds), 1)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


@cache
def _process() -> dict[str, Any]:
    """Command, commit, machine and versions, as they were when it was asked first."""
    return about()


def _about(engine: Engine, options: argparse.Namespace) -> dict[str, Any]:
    """What a result was measured with, as JSON says it."""
    kept = {name: value for name, value in vars(options).items() if name not in ("command", "output", "plot")}
    return {**_process(), **kept, "dtype": str(engine.dtype).removeprefix("torch."), "device": engine.device.type}
