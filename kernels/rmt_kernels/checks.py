"""Shapes checked once, with named dimensions."""

from __future__ import annotations

from torch import Tensor


def dims(name: str, tensor: Tensor, spec: str, **known: int) -> dict[str, int]:
    """Binds the letters of `spec` ("B T E") to the sizes of `tensor`; a known letter must agree.

    Raises ValueError naming the tensor, the shape expected and the one that came.
    """
    letters, bound = spec.split(), dict(known)
    if len(letters) == tensor.dim() and all(
        bound.setdefault(letter, size) == size for letter, size in zip(letters, tensor.shape, strict=True)
    ):
        return bound
    wanted = ", ".join(f"{letter}={known[letter]}" if letter in known else letter for letter in letters)
    raise ValueError(f"{name}: expected [{wanted}], got {list(tensor.shape)}")
