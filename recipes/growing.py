"""A trained decoder's weights as the start of a deeper one that has to hold as much, under other names.

What is hard to learn is to hold something for thousands of segments. A model of people does: memory says who is in
which room. Two links say no more than that ("furthest north" is in the garden, "furthest south" in the office), so
directions start with the embeddings of names, and what is to be learned is to read links and to write them where facts
stand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from rmt_training import RecipeError
from torch import Tensor

from rmt_engine.evaluation.facts import DIRECTIONS, NAMES

EMBEDDINGS = "model.embed_tokens.weight"
SILENT = ("self_attn.o_proj.weight", "mlp.down_proj.weight")  # with these at 0 a layer adds nothing


def layers_of(weights: Mapping[str, Tensor]) -> int:
    """How many layers a Hugging Face decoder's weights have; 0 for those of anything else."""
    places = (re.match(r"model\.layers\.(\d+)\.", name) for name in weights)
    return max((1 + int(place[1]) for place in places if place), default=0)


def grown(
    weights: Mapping[str, Tensor], fresh: Mapping[str, Tensor], at: int = 1
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of a model as deep as `fresh` that computes what `weights` do, the old ones and the new ones: the
    layers that are missing come from `fresh`, stand before layer `at`, and add nothing yet."""
    more = layers_of(fresh) - layers_of(weights)
    if more < 0:
        raise RecipeError(f"a model of {layers_of(weights)} layers does not grow to {layers_of(fresh)}")

    def moved(found: re.Match[str]) -> str:
        place = int(found[1])
        return f"model.layers.{place + more if place >= at else place}."

    old = {re.sub(r"^model\.layers\.(\d+)\.", moved, name): value for name, value in weights.items()}
    new = {
        name: torch.zeros_like(value) if name.endswith(SILENT) else value.clone()
        for name, value in fresh.items()
        if name not in old and name.startswith("model.layers.")
    }
    return old, new


def directions_named(weights: Mapping[str, Tensor], vocabulary: Mapping[str, int]) -> dict[str, Tensor]:
    """The same weights, each direction with the embedding of a name. vocabulary: token -> id."""
    words = weights[EMBEDDINGS].clone()
    for direction, name in zip(DIRECTIONS, NAMES, strict=True):
        for spaced in ("Ġ", ""):
            if spaced + direction in vocabulary:
                words[vocabulary[spaced + direction]] = words[vocabulary[f"Ġ{name}"]]
    return {**weights, EMBEDDINGS: words}
