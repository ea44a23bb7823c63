"""Checkpoints: any container their authors' code writes, or our own folder -> RMTConfig and named weights.

`read_tensors` opens a file or folder, `load` makes sense of it, `convert` writes the self-contained folder that needs
no argument any more, `inspect` says what something is.
"""

from rmt_engine.checkpoint.containers import Container, read_tensors
from rmt_engine.checkpoint.conversion import Converted, convert
from rmt_engine.checkpoint.inspection import inspect
from rmt_engine.checkpoint.loading import load, tokenizer_folder

__all__ = ["Container", "Converted", "convert", "inspect", "load", "read_tensors", "tokenizer_folder"]
