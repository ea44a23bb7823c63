"""Damage to files, the same for the same seed."""

from __future__ import annotations

import random


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One change, mostly near the beginning or the end, where formats keep what they say of themselves."""
    place = rng.randrange(min(len(data), rng.choice([16, 200, 2000, len(data)])))
    if rng.randrange(4) == 0:
        place = len(data) - 1 - place
    some = rng.randrange(1, 40)
    kind = rng.randrange(7)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
    if kind == 2:
        return data[:place] + rng.randbytes(some) + data[place:]
    if kind == 3:
        return data[:place] + data[place + some :]
    if kind == 4:
        return data[:place] + rng.randbytes(4) + data[place + 4 :]
    if kind == 5:  # a size that lies
        return (
            data[:place] + rng.choice([0, 1, 2**31, 2**40, 2**63, 2**64 - 1]).to_bytes(8, "little") + data[place + 8 :]
        )
    return data[:place] + data[place : place + some] * rng.randrange(2, 9) + data[place + some :]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to three changes that leave something else than `data`."""
    came = data
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        came = mutate(came, rng) if came else came
    return came if came != data else data[:-1]
