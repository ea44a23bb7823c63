"""The engine: a checkpoint ready to read. The loop over segments is `Engine.segments`; everything else calls it."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rmt_kernels import dispatch
from rmt_kernels.checks import dims
from torch import Tensor

from rmt_engine import checkpoint
from rmt_engine.backbones import module_of
from rmt_engine.backbones.common import Backbone
from rmt_engine.config import RMTConfig
from rmt_engine.errors import BackendError, TokenizerError
from rmt_engine.executors import EagerExecutor
from rmt_engine.graph_executor import GraphExecutor
from rmt_engine.layouts import Cut, drop
from rmt_engine.memory import Origin, fingerprint
from rmt_engine.recording import CudaRecorder, why_no_graphs
from rmt_engine.tokens import Tokenizer

if TYPE_CHECKING:
    from rmt_engine.documents import AnyDocument
    from rmt_engine.hf import RMTGenerator
    from rmt_engine.run import Event
    from rmt_engine.scoring import SegmentScores
    from rmt_engine.slots import DocumentResult
    from rmt_engine.stream import Stream

Output = Literal["last", "all", "none"]
EMBEDDED = Path(__file__).parent / "embedded" / "people"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_LOGITS_BYTES = 4 << 30  # what `output="all"` may hold; more belongs to `Engine.segments`


@dataclass(frozen=True)
class ForwardOutput:
    """logits: what `output` asked for, a list where the rows differ in length; memory_state: [B, M, E]."""

    logits: Tensor | list[Tensor] | None
    memory_state: Tensor


@dataclass(frozen=True)
class SegmentOutput:
    """One segment of `Engine.segments`. logits [B, L, V] of its text (a classifier: [B, C]) or None."""

    index: int
    start: int
    end: int
    logits: Tensor | None
    memory_state: Tensor


class Engine:
    """Reads inputs of any length with one checkpoint; build it with `Engine.from_pretrained`."""

    def __init__(self, config: RMTConfig, executor: EagerExecutor, tokenizer: Tokenizer | None, backend: str):
        self.config = config
        self.executor = executor
        self._tokenizer = tokenizer
        self.backend = backend
        self._weights: Mapping[str, Tensor] = {}  # as loaded, for the fingerprint: mapped from the file, not copied

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | Path | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        backend: str = "auto",
        executor: str = "auto",
        slots: int = 1,
        **checkpoint_arguments: Any,
    ) -> Engine:
        """Loads a converted folder, the authors' files (with `base=`, `segment_size=`, …) or a hub id.

        None is the small checkpoint that ships inside the package. dtype: auto (float32 on a CPU, bfloat16 on a GPU),
        float32, bfloat16, float16. executor: eager runs op after op; graph replays captured CUDA graphs, with the same
        bits; auto takes graphs where the Triton kernels run. slots: streams side by side for which graphs are captured
        now; more are captured when they are first needed. Raises CheckpointError, BackendError, ValueError.
        """
        where = device_of(device)  # a mistake here is told before gigabytes are read
        dtype_of(dtype, where)
        _executor_name(executor, where, _backend(backend, where))
        path = EMBEDDED if path_or_name is None else path_or_name
        config, weights = checkpoint.load(path, **checkpoint_arguments)
        folder = checkpoint.tokenizer_folder(path, checkpoint_arguments.get("base"))
        tokenizer = None if folder is None else Tokenizer.from_folder(folder)
        choices = {"device": device, "dtype": dtype, "backend": backend, "executor": executor}
        return cls.from_weights(config, weights, tokenizer, slots=slots, **choices)

    @classmethod
    def from_weights(
        cls,
        config: RMTConfig,
        weights: Mapping[str, Tensor],
        tokenizer: Tokenizer | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        backend: str = "auto",
        executor: str = "auto",
        slots: int = 1,
    ) -> Engine:
        """An engine over tensors under their Hugging Face names, and `memory` [M, E]."""
        if slots < 1:
            raise ValueError(f"slots must be at least 1; got {slots}")
        where = device_of(device)
        precision = dtype_of(dtype, where)
        backend = _backend(backend, where)
        placed = {name: tensor.to(where, precision) for name, tensor in weights.items()}
        backbone = module_of(config.model_type).build(config.backbone, placed, backend)
        runs = _executor(executor, config, backbone, placed["memory"], backend, slots)
        engine = cls(config, runs, tokenizer, backend)
        engine._weights = weights
        return engine

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer. Raises TokenizerError when it came without one."""
        if self._tokenizer is None:
            raise TokenizerError("this checkpoint has no tokenizer.json: give token ids, or convert it with --base DIR")
        return self._tokenizer

    @property
    def device(self) -> torch.device:
        return self.executor.initial.device

    @property
    def dtype(self) -> torch.dtype:
        return self.executor.initial.dtype

    @cached_property
    def origin(self) -> Origin:
        """What a state of this engine belongs to; reads all weights once, when a state is first saved or resumed."""
        tokenizer = None if self._tokenizer is None else self._tokenizer.hash
        dtype = str(self.dtype).removeprefix("torch.")
        return Origin(fingerprint(self.config, self._weights), tokenizer, dtype, self.device.type)

    @cached_property
    def thread(self) -> ThreadPoolExecutor:
        """The thread of all that is awaited of this engine."""
        return ThreadPoolExecutor(1, thread_name_prefix="rmt-answers")

    @property
    def vocab_size(self) -> int:
        return int(self.config.backbone["vocab_size"])

    def initial_memory(self, batch: int = 1) -> Tensor:
        """The learned memory state every input starts from, [B, M, E]."""
        return self.executor.initial_memory(batch)

    def segments(
        self, input_ids: Tensor, output: Output = "all", memory_state: Tensor | None = None
    ) -> Iterator[SegmentOutput]:
        """Reads ids [B, N] segment by segment: the recurrence. Logits are computed where `output` asks for them.

        start and end count without the ids that the checkpoint drops. Raises ValueError as `forward` does, and for
        rows that differ in length.
        """
        _check_output(output)
        whole = _even(self._rows(input_ids, None))
        memory = self.initial_memory(len(whole)) if memory_state is None else memory_state
        count, width = self.executor.initial.shape
        dims("memory_state", memory, "B M E", B=len(whole), M=count, E=width)
        bounds = Cut.of(whole.shape[1], self.config.segment_size, self.config.alignment).bounds(whole.shape[1])
        for index, (start, end) in enumerate(bounds):
            ids, logits = whole[:, start:end], None
            if output == "all" or (output == "last" and index == len(bounds) - 1):
                memory, logits = self.executor.fold_with_logits(ids, memory)
            else:
                memory = self.executor.fold(ids, memory)
            yield SegmentOutput(index, start, end, logits, memory)

    def forward(
        self,
        input_ids: Tensor | Sequence[Tensor],
        output: Output = "last",
        max_n_segments: int | None = None,
    ) -> ForwardOutput:
        """What the authors' `forward` gives. input_ids: int64 [B, N], or a list of 1-D tensors of any lengths.

        output: "last" -> logits of the last segment [B, L, V]; "all" -> of the whole text [B, N, V]; "none" -> None.
        A classifier gives [B, C] ("last") or [B, segments, C] ("all"). Rows that differ in length (after the ids that
        the checkpoint drops) give a list. max_n_segments keeps that many segments of tokens from the start.
        """
        _check_output(output)
        rows = self._rows(input_ids, max_n_segments)
        if output == "all":
            self._check_size(rows)
        lengths = [len(row) for row in rows]
        if len(set(lengths)) == 1:
            return ForwardOutput(*self._forward_even(torch.stack(rows), output))
        results: list[ForwardOutput | None] = [None] * len(rows)
        for length in sorted(set(lengths)):  # rows of one length run side by side, as each would alone
            members = [i for i, n in enumerate(lengths) if n == length]
            logits, memory = self._forward_even(torch.stack([rows[i] for i in members]), output)
            for place, i in enumerate(members):
                results[i] = ForwardOutput(None if logits is None else logits[place], memory[place])
        done = [result for result in results if result is not None]
        return ForwardOutput(_join([result.logits for result in done]), torch.stack([r.memory_state for r in done]))

    def _forward_even(self, ids: Tensor, output: Output) -> tuple[Tensor | None, Tensor]:
        kept: list[Tensor] = []
        whole: Tensor | None = None
        for segment in self.segments(ids, output):
            memory, logits = segment.memory_state, segment.logits
            if logits is None:
                continue
            if output == "last" or logits.dim() == 2:
                kept.append(logits)
            else:  # put in its place at once: never the whole text's logits twice
                whole = logits.new_empty(*ids.shape, logits.shape[-1]) if whole is None else whole
                whole[:, segment.start : segment.end] = logits
        if output == "all":
            return (torch.stack(kept, 1) if whole is None else whole), memory
        return (kept[0] if kept else None), memory

    def _rows(self, input_ids: Tensor | Sequence[Tensor], max_n_segments: int | None) -> list[Tensor]:
        """Checked 1-D rows without the dropped ids."""
        if max_n_segments is not None and max_n_segments < 1:
            raise ValueError(f"max_n_segments must be at least 1; got {max_n_segments}")
        rows = []
        for i, row in enumerate(input_ids):
            row = torch.as_tensor(row)
            if row.dim() != 1 or row.is_floating_point() or row.dtype == torch.bool:
                raise ValueError(f"input_ids, row {i}: expected 1-D integer ids, got {row.dtype} {list(row.shape)}")
            row = drop(row.to(self.device, torch.int64), self.config.drop_ids)
            if max_n_segments is not None:
                row = row[: max_n_segments * self.config.segment_size]
            if not len(row):
                raise ValueError(f"input_ids, row {i} holds no tokens: there is nothing to read")
            if int(row.min()) < 0 or int(row.max()) >= self.vocab_size:
                raise ValueError(f"input_ids, row {i}: ids must lie in 0..{self.vocab_size - 1} (vocab_size)")
            rows.append(row)
        if not rows:
            raise ValueError("input_ids is empty: expected at least one row of ids")
        return rows

    def _check_size(self, rows: list[Tensor]) -> None:
        if self.config.family != "decoder":
            return
        size = sum(len(row) for row in rows) * self.vocab_size * 4
        if size > MAX_LOGITS_BYTES:
            raise ValueError(
                f'output="all" would hold {size / 2**30:.1f} GiB of logits, over {MAX_LOGITS_BYTES / 2**30:.0f} GiB; '
                "iterate over engine.segments(input_ids) instead"
            )

    def check_answer_fits(self, text: int, max_new_tokens: int) -> None:
        """Raises ValueError unless an answering segment of `text` tokens leaves room for `max_new_tokens`."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
        limit, count = self.config.max_positions, self.config.num_mem_tokens
        if limit is not None and count + text + max_new_tokens > limit:
            raise ValueError(
                f"max_new_tokens={max_new_tokens} does not fit: {count} memory tokens and {text} tokens of text and "
                f"question leave {max(limit - count - text, 0)} of {limit} positions"
            )

    def stream(self, length: int | None = None, alignment: str | None = None, score: bool = False) -> Stream:
        """An unbounded input to feed piece by piece. `length` (tokens in all) is needed unless left-aligned.

        score: keep the log-probability of every token, for `Stream.scores`; a decoder only.
        """
        from rmt_engine.stream import Stream

        return Stream(self, length, alignment, score)

    def resume(self, path: str | Path, allow_inexact: bool = False) -> Stream:
        """The stream that `Stream.save` wrote: it goes on with the same bits as if it had never stopped.

        allow_inexact: also under another dtype or device. Raises StateError.
        """
        from rmt_engine.stream import resume

        return resume(self, path, allow_inexact)[0]

    def run(self, source: Any, **options: Any) -> Generator[Event, None, None]:
        """Reads a file, `-` or a token file; yields progress and then the summary. See `rmt_engine.run.run`."""
        from rmt_engine.run import run

        return run(self, source, **options)

    def run_many(self, documents: Iterable[AnyDocument], **options: Any) -> Generator[DocumentResult, None, None]:
        """Reads many documents side by side; yields a result for each. See `rmt_engine.slots.run_many`."""
        from rmt_engine.slots import run_many

        return run_many(self, documents, **options)

    def encode(self, documents: Iterable[AnyDocument], **options: Any) -> Tensor:
        """The memory states of many documents, [N, M, E] or pooled. See `rmt_engine.slots.encode`."""
        from rmt_engine.slots import encode

        return encode(self, documents, **options)

    def as_generator(self) -> RMTGenerator:
        """This decoder with the `generate` of a transformers model: streamers, logits processors, stopping criteria."""
        from rmt_engine.hf import RMTGenerator

        return RMTGenerator(self)

    def score(self, source: Any, **options: Any) -> Iterator[SegmentScores]:
        """Log-probabilities of every token of a file or of ids, segment by segment. See `rmt_engine.run.score`."""
        from rmt_engine.run import score

        return score(self, source, **options)


def _join(logits: list[Any]) -> Tensor | list[Tensor] | None:
    if logits[0] is None:
        return None
    same = all(part.shape == logits[0].shape for part in logits)
    return torch.stack(logits) if same else logits


def _check_output(output: str) -> None:
    if output not in ("last", "all", "none"):
        raise ValueError(f"output must be last, all or none; got {output!r}")


def _even(rows: list[Tensor]) -> Tensor:
    """Rows of one length as [B, N]."""
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise ValueError(f"the rows hold from {lengths[0]} to {lengths[-1]} tokens of content: give one row at a time")
    return torch.stack(rows)


def _executor_name(executor: str, device: torch.device, backend: str) -> str:
    """eager or graph. Raises ValueError, BackendError where graphs cannot run and were asked for."""
    if executor not in ("auto", "eager", "graph"):
        raise ValueError(f"executor must be auto, eager or graph; got {executor!r}")
    if executor == "auto":
        return "graph" if backend == "triton" and why_no_graphs(device) is None else "eager"
    if executor == "graph" and (reason := why_no_graphs(device)):
        raise BackendError(f"executor 'graph' cannot run: {reason}")
    return executor


def _executor(
    executor: str, config: RMTConfig, backbone: Backbone, memory: Tensor, backend: str, slots: int
) -> EagerExecutor:
    """On a GPU both executors compute in the same shapes, so that their bits are the same."""
    on_gpu = memory.device.type == "cuda"
    if _executor_name(executor, memory.device, backend) == "eager":
        return EagerExecutor(config, backbone, memory, fixed=on_gpu)
    return GraphExecutor(config, backbone, memory, CudaRecorder(memory.device), slots)


def _backend(backend: str, device: torch.device) -> str:
    try:
        return dispatch.choose(backend, device)
    except RuntimeError as error:
        raise BackendError(str(error)) from error


def device_of(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N; got {device!r}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"device {device!r} was asked for, but this torch sees no CUDA device; use device='cpu'")
    return chosen


def dtype_of(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}; got {dtype!r}")
    return DTYPES[dtype]
