"""Shapes checked once, with named dimensions."""

from __future__ import annotations

from torch import Tensor


def dims(name: str, tensor: Tensor, spec: str, **known: int) -> dict[str, int]:
    """Binds the letters of `spec` ("B T E") to the sizes of `tensor`; a known letter must agree.

    Raises ValueError naming the tensor, the shape expected and the one that came.
    """
    letters = spec.split()
    shape = tuple(tensor.shape)
    wanted = ", ".join(f"{letter}={known[letter]}" if letter in known else letter for letter in letters)
    if len(letters) != len(shape):
        raise ValueError(f"{name}: expected [{wanted}], got {list(shape)}")
    bound = dict(known)
    for letter, size in zip(letters, shape, strict=True):
        if bound.setdefault(letter, size) != size:
            raise ValueError(f"{name}: expected [{wanted}], got {list(shape)}")
    return bound
