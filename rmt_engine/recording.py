"""Work that is recorded once and replayed over the same tensors: CUDA graphs, and the same without a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from rmt_engine._C import HostGraph, load_cuda_driver
from rmt_engine.errors import BackendError

Work = Callable[[], tuple[Tensor, ...]]


class Recording(Protocol):
    """result: the tensors that every replay writes anew."""

    result: tuple[Tensor, ...]

    def replay(self) -> None: ...


class Recorder(Protocol):
    """driver: the name under which the C++ runner launches what is recorded."""

    driver: str

    def record(self, work: Work, pool: str = "") -> Recording:
        """Runs `work` (so what it touches changes) and records it. Raises what `work` raises.

        pool: recordings with one name never run at the same time, and share the memory that they work in.
        """

    def handle(self, recording: Any) -> tuple[int, object]:
        """What the C++ runner launches, and an object that must live as long."""

    def stream(self) -> int:
        """The CUDA stream that replays go to."""

    def on_device(self) -> AbstractContextManager[object]:
        """The device is current in it."""


class HostRecording:
    """A function that is called again."""

    def __init__(self, work: Work) -> None:
        self.work = work
        with torch.inference_mode():
            self.result = work()

    @torch.inference_mode()
    def replay(self) -> None:
        for kept, new in zip(self.result, self.work(), strict=True):
            kept.copy_(new)


class HostRecorder:
    """Recordings without a device: the executor's buffers, lengths and slots are checked with them on a CPU."""

    driver = "host"

    def record(self, work: Work, pool: str = "") -> HostRecording:
        return HostRecording(work)

    def handle(self, recording: HostRecording) -> tuple[int, object]:
        graph = HostGraph(recording.replay)
        return graph.handle, graph

    def stream(self) -> int:
        return 0

    def on_device(self) -> AbstractContextManager[object]:
        return nullcontext()


class CudaRecording:
    """A captured and instantiated CUDA graph."""

    def __init__(self, graph: torch.cuda.CUDAGraph, result: tuple[Tensor, ...]) -> None:
        self.graph, self.result = graph, result

    def replay(self) -> None:
        self.graph.replay()


class CudaRecorder:
    """CUDA graphs of one device.

    Raises BackendError where graphs cannot be captured or their driver cannot be called.
    """

    driver = "cuda"

    def __init__(self, device: torch.device) -> None:
        if reason := why_no_graphs(device):
            raise BackendError(f"executor 'graph' cannot run: {reason}")
        self.device = device
        self.pools: dict[str, Any] = {}
        self.side = torch.cuda.Stream(device)

    @torch.inference_mode()
    def record(self, work: Work, pool: str = "") -> CudaRecording:
        handle = self.pools.setdefault(pool, torch.cuda.graph_pool_handle())
        with self.on_device():
            self._warm_up(work)
            graph = torch.cuda.CUDAGraph()
            with (
                out_of_memory_first(),
                torch.cuda.graph(graph, pool=handle, stream=self.side, capture_error_mode="thread_local"),
            ):
                result = work()
            graph.replay()  # the first one uploads the graph: not in the middle of a stream
        return CudaRecording(graph, result)

    def _warm_up(self, work: Work) -> None:
        """Compiles kernels and makes what is made once: neither may happen in a capture."""
        here = torch.cuda.current_stream()
        self.side.wait_stream(here)
        try:
            with torch.cuda.stream(self.side):
                work()
        finally:  # what failed half-way may still write into memory that `here` gives away
            here.wait_stream(self.side)

    def handle(self, recording: CudaRecording) -> tuple[int, object]:
        return recording.graph.raw_cuda_graph_exec(), recording

    def stream(self) -> int:
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def on_device(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device)


@contextmanager
def out_of_memory_first() -> Iterator[None]:
    """Where memory ends in a capture, ending the capture fails too; who asked must hear of the memory."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, torch.OutOfMemoryError):
            raise error.__context__ from error
        raise


def why_no_graphs(device: torch.device) -> str | None:
    """What keeps CUDA graphs from being used on `device`; None when nothing does."""
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type!r}; use executor='eager' or 'auto'"
    if not hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph_exec"):
        return f"torch {torch.__version__} does not tell the handle of a graph; use a newer one, or executor='eager'"
    try:
        load_cuda_driver()
    except BackendError as error:
        return str(error)
    return None
