"""A fast, exact inference engine for Recurrent Memory Transformers.

>>> engine = rmt_engine.Engine.from_pretrained()
>>> with engine.stream() as stream:
...     stream.feed(text)
...     stream.ask("Where is Mary?")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rmt_engine.config import RMTConfig
    from rmt_engine.documents import Document
    from rmt_engine.engine import Engine, ForwardOutput, SegmentOutput
    from rmt_engine.errors import (
        BackendError,
        CheckpointError,
        InputError,
        NumericalError,
        RMTError,
        StateError,
        TokenizerError,
    )
    from rmt_engine.run import Checkpoints, Progress, Summary
    from rmt_engine.scoring import SegmentScores, Total
    from rmt_engine.slots import DocumentResult
    from rmt_engine.stream import Stream

_HOME = {
    "Engine": "engine",
    "ForwardOutput": "engine",
    "SegmentOutput": "engine",
    "RMTConfig": "config",
    "Stream": "stream",
    "Document": "documents",
    "DocumentResult": "slots",
    "Checkpoints": "run",
    "Progress": "run",
    "Summary": "run",
    "SegmentScores": "scoring",
    "Total": "scoring",
    "RMTError": "errors",
    "BackendError": "errors",
    "CheckpointError": "errors",
    "InputError": "errors",
    "NumericalError": "errors",
    "StateError": "errors",
    "TokenizerError": "errors",
}

__all__ = [  # noqa: RUF022 - the order of use
    "Engine",
    "Stream",
    "RMTConfig",
    "ForwardOutput",
    "SegmentOutput",
    "Checkpoints",
    "Document",
    "DocumentResult",
    "Progress",
    "Summary",
    "SegmentScores",
    "Total",
    "RMTError",
    "BackendError",
    "CheckpointError",
    "InputError",
    "NumericalError",
    "StateError",
    "TokenizerError",
]


def __getattr__(name: str) -> Any:
    """Loads what is asked for: torch takes a second that `rmt-engine --help` should not pay."""
    if name not in _HOME:
        raise AttributeError(f"module 'rmt_engine' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"rmt_engine.{_HOME[name]}"), name)
