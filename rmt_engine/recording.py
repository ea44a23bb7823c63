"""Work that is recorded once and replayed over the same tensors: CUDA graphs, and the same without a device."""

from __future__ import annotations

from collections.abc import Callable
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

    def record(self, work: Work) -> Recording:
        """Runs `work` (so what it touches changes) and records it. Raises what `work` raises."""

    def handle(self, recording: Any) -> tuple[int, object]:
        """What the C++ runner launches, and an object that must live as long."""

    def stream(self) -> int:
        """The CUDA stream that replays go to."""


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

    def record(self, work: Work) -> HostRecording:
        return HostRecording(work)

    def handle(self, recording: HostRecording) -> tuple[int, object]:
        graph = HostGraph(recording.replay)
        return graph.handle, graph

    def stream(self) -> int:
        return 0


class CudaRecording:
    """A captured and instantiated CUDA graph."""

    def __init__(self, graph: torch.cuda.CUDAGraph, result: tuple[Tensor, ...]) -> None:
        self.graph, self.result = graph, result

    def replay(self) -> None:
        self.graph.replay()


class CudaRecorder:
    """CUDA graphs of one device, whose memory inside is shared: only one of them runs at a time.

    Raises BackendError where graphs cannot be captured or their driver cannot be called.
    """

    driver = "cuda"

    def __init__(self, device: torch.device) -> None:
        if reason := why_no_graphs(device):
            raise BackendError(f"executor 'graph' cannot run: {reason}")
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.side = torch.cuda.Stream(device)

    @torch.inference_mode()
    def record(self, work: Work) -> CudaRecording:
        with torch.cuda.device(self.device):
            here = torch.cuda.current_stream()
            self.side.wait_stream(here)
            with torch.cuda.stream(self.side):
                work()  # compiles kernels and makes what is made once: neither may happen in a capture
            here.wait_stream(self.side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.side, capture_error_mode="thread_local"):
                result = work()
        return CudaRecording(graph, result)

    def handle(self, recording: CudaRecording) -> tuple[int, object]:
        return recording.graph.raw_cuda_graph_exec(), recording

    def stream(self) -> int:
        return int(torch.cuda.current_stream(self.device).cuda_stream)


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
