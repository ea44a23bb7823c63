"""RoBERTa with a classifier: BERT with other positions and another head.

Names are RobertaForSequenceClassification's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rmt_engine.backbones.bert import BertEncoder, encoder_shapes, num_labels
from rmt_engine.backbones.common import Shapes, Weights

TIED: dict[str, str] = {}
IGNORED = (r"roberta\.embeddings\.(position_ids|token_type_ids)",)


def parameter_shapes(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of a RobertaForSequenceClassification's parameters, memory rows not among the embeddings."""
    width = config["hidden_size"]
    first_position(config)  # a config without it is not whole
    shapes = encoder_shapes(config, "roberta.")
    for name, rows in (("classifier.dense", width), ("classifier.out_proj", num_labels(config))):
        shapes |= {f"{name}.weight": (rows, width), f"{name}.bias": (rows,)}
    return shapes


def first_position(config: Mapping[str, Any]) -> int:
    """Positions begin behind the padding id's; rows given as embeddings count on from there, whatever they hold."""
    return int(config["pad_token_id"]) + 1


class Roberta(BertEncoder):
    """A RobertaForSequenceClassification."""

    def __init__(self, config: Mapping[str, Any], weights: Weights, backend: str):
        head = ("classifier.dense", "classifier.out_proj")
        start = first_position(config)
        super().__init__(config, weights, backend, prefix="roberta.", head=head, first_position=start)


build = Roberta
