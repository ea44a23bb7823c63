"""The errors a user can meet, each with the exit code the command line gives it.

A mistake in an argument is a plain `ValueError` (exit code 2); what stands here is about files and machines.
"""


class RMTError(Exception):
    """Base of our own errors: something failed at run time."""

    exit_code = 1


class InputError(RMTError):
    """The input cannot be read: a missing file, bytes that are not UTF-8, a token outside the vocabulary."""


class TokenizerError(RMTError):
    """A tokenizer that is missing, or that cannot be run over a stream exactly."""


class BackendError(RMTError):
    """A backend or executor that was asked for cannot run on this machine."""


class DeviceError(RMTError):
    """A call of the GPU's driver failed; the message names it."""


class DeviceOutOfMemory(DeviceError, MemoryError):
    """The GPU has no memory left."""

    exit_code = 4


class NumericalError(RMTError):
    """The memory state is no longer finite."""


class CheckpointError(RMTError):
    """A checkpoint that is damaged, incomplete, or of a family this engine does not run."""

    exit_code = 3


class StateError(RMTError):
    """A state file that is damaged or belongs to another model, tokenizer or dtype."""

    exit_code = 3
