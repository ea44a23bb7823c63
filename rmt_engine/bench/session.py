"""One checkpoint in one dtype: every reader is built once, checked once for each batch, then timed row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rmt_engine.bench.card import Floors, better, measured_card
from rmt_engine.bench.peak_memory import peak_memory
from rmt_engine.bench.readers import ENGINE, EngineReader, LoopReader, Reader, random_ids, reader
from rmt_engine.bench.results import FAILED, LEFT_OUT, Result, Row
from rmt_engine.bench.setup import Setup
from rmt_engine.bench.timing import Run, Timing, interleaved, plan, timed
from rmt_engine.engine import Engine, device_of, dtype_of
from rmt_engine.errors import BackendError
from rmt_engine.progress import human

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the memory state, relative
WARM_UPS = 2
STEP_SECONDS = 0.3  # segment steps are repeated until one repetition takes about as long
LEFT_FREE = 0.3  # of the memory that is available


@dataclass(frozen=True)
class Limits:
    """repetitions: at most; budget: seconds for a row; memory: whether it is measured, in one run more."""

    repetitions: int
    budget: float
    memory: bool


@dataclass(frozen=True)
class Checked:
    """A reader that may be timed, or why not. seconds: it took for `Session.prefix`, warm."""

    result: Result
    reader: Reader | None = None
    seconds: float = 0.0


class Session:
    """Raises CheckpointError, BackendError, ValueError."""

    def __init__(self, setup: Setup, title: str, against: Sequence[str], longest: int, folder: Path) -> None:
        self.setup, self.title, self.longest, self.folder = setup, title, longest, folder
        self.names = [ENGINE, *(name for name in against if name != "none")]
        self.loaded = setup.load()
        self.device = device_of(setup.device)
        self.dtype = dtype_of(setup.dtype, self.device)
        self.card = measured_card(self.device, self.dtype)
        self.readers: dict[str, Reader] = {}
        self.engine_reader = self._engine_reader()
        self.engine = self.engine_reader.engine
        self.checked: dict[tuple[str, int], Checked] = {}
        self.truths: dict[int, Tensor] = {}

    def _engine_reader(self) -> EngineReader:
        made = self._reader(ENGINE)
        assert isinstance(made, EngineReader)
        return made

    def _reader(self, name: str) -> Reader:
        if name not in self.readers:
            longest, held, free = self.longest, self._bytes(name, self.longest, 1), _available(self.device)
            if held > free:  # such a text is left out: no positions for it either
                longest = max(longest * free // held, self.prefix)
            self.readers[name] = reader(name, self.setup, self.loaded, self.folder, longest)
        return self.readers[name]

    @property
    def floors(self) -> Floors:
        return Floors(self.loaded.config, self.card, self.dtype)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def has_tokenizer(self) -> bool:
        return self.loaded.tokenizer is not None

    @property
    def segment_size(self) -> int:
        return self.loaded.config.segment_size

    @property
    def prefix(self) -> int:
        """Tokens that are read for the check: two segments and a half."""
        return 2 * self.segment_size + max(self.segment_size // 2, 1)

    # --------------------------------------------------------------------------------------------- rows

    def stream(self, tokens: int, batch: int, limits: Limits) -> Row:
        """The scope `tokens`."""
        row = Row("tokens", self.title, batch, self.dtype_name, tokens, tokens * batch)

        def seconds(who: Checked) -> float:
            return who.seconds * self._work(who, tokens, batch) / self._work(who, self.prefix, batch)

        ids = random_ids(self.loaded, batch, tokens)
        last = (tokens - 1) % self.segment_size + 1

        def prepare(who: Reader) -> Run:
            """Warm in the shape of this row's last segment too: a compiler may have more to do for it."""
            who.stream(ids[:, : self.segment_size + last])(lambda: None)
            return who.stream(ids)

        self._measure(row, self.names, seconds, prepare, limits)
        for result in row.results:
            full = result.name == "full-attention"
            result.floor = (self.floors.full_attention if full else self.floors.stream)(tokens, batch)
            result.holds = self._bytes(result.name, tokens, batch)
            if limits.memory and result.seconds:
                result.memory = peak_memory(self.setup, result.name, batch, tokens)
        return row

    def segment(self, batch: int, limits: Limits) -> Row:
        """The scope `segment`: as many steps a repetition as take a while, for every reader alike."""
        size = self.segment_size
        segments = -(-self.prefix // size)
        engine = self._checked(ENGINE, batch)
        count = max(1, round(STEP_SECONDS / (engine.seconds / segments))) if engine.reader is not None else 1
        row = Row("segment", self.title, batch, self.dtype_name, size, count * size * batch)
        ids = random_ids(self.loaded, batch, size)
        names = [name for name in self.names if name != "full-attention"]
        self._measure(
            row,
            names,
            lambda who: count * who.seconds / segments,
            lambda who: who.segment(ids, count),
            replace(limits, memory=False),
        )
        for result in row.results:
            result.floor = count * self.floors.step(size, batch)
            result.start_ms = [1e3 * seconds / count for seconds in result.seconds]
        return row

    def case(self, row: Row, run: Run, check: Callable[[], str], estimate: float, limits: Limits) -> Row:
        """What only the engine does. check: runs it once, and says what is wrong with its result, if anything."""
        wrong = check()
        result = Result(ENGINE, FAILED, wrong) if wrong else Result(ENGINE)
        row.results.append(result)
        if not wrong:
            self._time(row, {ENGINE: run}, {ENGINE: estimate}, limits)
        return row

    # --------------------------------------------------------------------------------------------- a row

    def _measure(
        self,
        row: Row,
        names: Sequence[str],
        seconds: Callable[[Checked], float],
        prepare: Callable[[Reader], Run],
        limits: Limits,
    ) -> None:
        """Fills the row: every reader that passes its check takes part, as far as memory and budget go."""
        runs, estimates = {}, {}
        for name in names:
            checked = self._checked(name, row.batch)
            row.results.append(replace(checked.result))
            if checked.reader is None:
                continue
            needed = self._bytes(name, row.tokens or 0, row.batch) if row.scope == "tokens" else 0
            if needed > (1 - LEFT_FREE) * _available(self.device):
                self._leave_out(row, name, f"it would hold {needed / 2**30:,.1f} GiB at least")
                continue
            runs[name], estimates[name] = prepare(checked.reader), seconds(checked)
        if ENGINE in runs:
            self._time(row, runs, estimates, limits)
        else:
            for name in runs:
                self._leave_out(row, name, "there is no result of the engine to compare it with")

    def _time(self, row: Row, runs: Mapping[str, Run], estimates: Mapping[str, float], limits: Limits) -> None:
        planned = plan(estimates, limits.budget, limits.repetitions, int(limits.memory))
        for name, takes in planned.left_out.items():
            self._leave_out(
                row, name, f"it would take about {takes:,.0f} s; the budget of a row is {limits.budget:,} s"
            )
        timings = interleaved({name: runs[name] for name in planned.kept}, planned.repetitions, self.device)
        self.card = better(self.card, measured_card(self.device, self.dtype))  # a clock changes, and a load
        for name, timing in timings.items():
            result = row.of(name)
            assert result is not None
            _set(result, timing)
            if self.device.type != "cpu":
                result.cpu_seconds = []

    def _leave_out(self, row: Row, name: str, reason: str) -> None:
        result = row.of(name)
        assert result is not None
        result.status, result.reason = LEFT_OUT, reason

    # --------------------------------------------------------------------------------------------- checks

    def _checked(self, name: str, batch: int) -> Checked:
        key = name, batch
        if key not in self.checked:
            try:
                self.checked[key] = self._check(name, batch)
            except (ValueError, BackendError) as error:
                if name == ENGINE:
                    raise
                self.checked[key] = Checked(Result(name, LEFT_OUT, str(error)))
        return self.checked[key]

    def _check(self, name: str, batch: int) -> Checked:
        """Reads the prefix, warm, and compares the memory state of the first and the last slot with the truth."""
        who = self._reader(name)
        ids = random_ids(self.loaded, batch, self.prefix)
        run = who.stream(ids)
        for _ in range(WARM_UPS):
            once = timed(run, self.device)
        output = once.output
        assert output is not None
        rows = sorted({0, batch - 1})
        if isinstance(who, LoopReader) and name == "full-attention":
            error = relative_error(output[rows], self._whole_logits(who, ids[rows]))
        else:
            error = relative_error(output[rows], self._truth(ids[rows], batch))
        tolerance = TOLERANCES[self.dtype]
        if not error <= tolerance:
            reason = f"its result is off by {error:.2g} of the true one; at most {tolerance:g} was expected"
            return Checked(Result(name, FAILED, reason, error=error))
        return Checked(Result(name, error=error), who, once.seconds)

    def _truth(self, ids: np.ndarray, batch: int) -> Tensor:
        """The memory state of those ids of a batch by the fp32 statements of every operation (backend `ref`)."""
        if batch not in self.truths:
            exact = Engine.from_weights(
                self.loaded.config, self.loaded.weights, device=self.setup.device, dtype="float32", backend="ref"
            )
            self.truths[batch] = exact.forward(torch.from_numpy(ids), output="none").memory_state
        return self.truths[batch]

    @torch.inference_mode()
    def _whole_logits(self, who: LoopReader, ids: np.ndarray) -> Tensor:
        """Of the last part, by the plain model over all of it at once, without a cache."""
        last = self.prefix - 2 * self.segment_size
        logits = who.loop.model(input_ids=torch.from_numpy(ids).to(self.device), use_cache=False).logits
        return logits[:, -last:].clone()

    # --------------------------------------------------------------------------------------------- estimates

    def _work(self, who: Checked, tokens: int, batch: int) -> float:
        if who.result.name == "full-attention":
            return self.floors.full_attention_work(tokens, batch)
        return self.floors.work(tokens, batch)

    def _bytes(self, name: str, tokens: int, batch: int) -> int:
        """What grows with the text, at least."""
        model, size = self.floors.model, self.dtype.itemsize
        if name == "hf" and self.loaded.config.family == "decoder":  # all logits, twice where they are joined
            return batch * tokens * size * (2 * model.vocabulary + (model.layers + 1) * model.width)
        if name == "full-attention":  # keys and values, once more of a layer where they grow
            return batch * tokens * size * 2 * (model.layers + 1) * model.kv_heads * model.head_dim
        return 0


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected; not a number where `found` is not finite."""
    difference = found.double().cpu() - expected.double().cpu()
    return float(difference.norm() / expected.double().norm().cpu())


def _set(result: Result, timing: Timing) -> None:
    if not timing.finite or (result.name == ENGINE and not timing.same):
        what = "its repetitions differ in bits" if timing.finite else "its result is not finite"
        result.status, result.reason = FAILED, what
        return
    result.seconds, result.cpu_seconds = timing.seconds, timing.cpu_seconds
    result.start_ms, result.end_ms = timing.start_ms, timing.end_ms


def _available(device: torch.device) -> int:
    """Bytes that are free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    from rmt_engine.doctor import system_memory

    free = system_memory()["free"]
    return 1 << 62 if free is None else free


def describe(row: Row) -> str:
    """A line for whoever waits."""
    rate = row.rate(row.engine)
    return f"{row.title}: {row.engine.status if rate is None else f'{human(rate)} {row.unit}'}"
