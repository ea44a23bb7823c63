"""A decoder and an encoder that read batches of episodes, are asked, and say how right they are."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import torch
from copying_init import look_around, small_llama
from episodes import NOT_ASKED, EpisodeMaker, Row
from retrieval_settings import Recipe
from rmt_training import RecurrentDecoder, RecurrentEncoder
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, LlamaForCausalLM, PreTrainedTokenizerFast

from rmt_engine.evaluation.facts import ROOMS


def build_decoder(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return small_llama(
        tokenizer,
        layers=recipe.layers,
        heads=recipe.heads,
        width=recipe.width,
        inner=recipe.inner,
        positions=recipe.positions,
        theta=recipe.rope_theta,
    )


def build_encoder(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.inner,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=recipe.positions,
        pad_token_id=tokenizer.pad_token_id,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(ROOMS)),
        label2id={room: i for i, room in enumerate(ROOMS)},
    )
    model = BertForSequenceClassification(config)
    look_around(model)
    return model


@dataclass
class Reading:
    loss: Tensor
    memory: Tensor  # [B, M, E] after the segments
    right: Tensor  # bool [B]: every question after the last segment answered right
    asked: Tensor  # bool [B]


class Decoder:
    """Folds segments and asks after each, then once more behind the rests."""

    def __init__(self, recipe: Recipe, maker: EpisodeMaker, tokenizer: PreTrainedTokenizerFast) -> None:
        backbone = build_decoder(recipe, tokenizer)
        self.base_config = json.loads(backbone.config.to_json_string(use_diff=False))
        self.model = RecurrentDecoder(backbone, recipe.memory_tokens)
        self.maker, self.questions = maker, recipe.questions

    def read(self, memory: Tensor, rows: list[Row], lengths: list[int], rests: np.ndarray) -> Reading:
        texts = torch.from_numpy(np.stack([row.ids for row in rows]).astype(np.int64))
        nothing, position, losses = np.zeros_like(rests), 0, []
        right = asked = torch.zeros(len(rows), dtype=torch.bool)
        for length in lengths:
            memory = self.model.fold(memory, texts[:, position : position + length])
            position += length
            loss, right, asked = self._ask(memory, rows, position, nothing, self.questions)
            losses.append(loss.sum())
        if rests.any() or not lengths:
            loss, right_behind, asked_behind = self._ask(memory, rows, position, rests, self.questions)
            losses.append(loss.sum())
            if not lengths:
                right, asked = right_behind, asked_behind
        return Reading(torch.stack(losses).mean(), memory, right, asked)

    def live(self, memory: Tensor, rows: list[Row]) -> Reading:
        """One segment, and questions after it; the losses are those of each row [B]."""
        ids = torch.from_numpy(np.stack([row.ids for row in rows]).astype(np.int64))
        memory = self.model.fold(memory, ids)
        nothing = np.zeros(len(rows), dtype=np.int64)
        loss, right, asked = self._ask(memory, rows, ids.shape[1], nothing, self.questions)
        return Reading(loss, memory, right, asked)

    def _ask(
        self, memory: Tensor, rows: list[Row], position: int, rests: np.ndarray, questions: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        asks = self.maker.asks(rows, position, rests, questions)
        if not len(asks.ids):
            nobody = torch.zeros(len(rows), dtype=torch.bool)
            return memory.sum((1, 2)) * 0, nobody, nobody
        logits = self.model.answering(memory[asks.of], asks.ids, asks.rows)
        return graded(logits, asks.targets, asks.of, len(rows))


class Encoder:
    """Folds segments, some of which end in a question, and has each classified."""

    def __init__(self, recipe: Recipe, maker: EpisodeMaker, tokenizer: PreTrainedTokenizerFast) -> None:
        backbone = build_encoder(recipe, tokenizer)
        self.base_config = json.loads(backbone.config.to_json_string(use_diff=False))
        self.model = RecurrentEncoder(backbone, recipe.memory_tokens, tokenizer.cls_token_id, tokenizer.sep_token_id)
        self.maker = maker

    def read(self, memory: Tensor, rows: list[Row], lengths: list[int], rests: np.ndarray) -> Reading:
        losses, position = [], 0
        right = asked = torch.zeros(len(rows), dtype=torch.bool)
        for length in lengths:
            loss, memory, right, asked = self._segment(memory, rows, position, position + length)
            position += length
            losses.append(loss.sum())
        return Reading(torch.stack(losses).mean(), memory, right, asked)

    def live(self, memory: Tensor, rows: list[Row]) -> Reading:
        """One segment, some of which end in a question; the losses are those of each row [B]."""
        return Reading(*self._segment(memory, rows, 0, len(rows[0].ids)))

    def _segment(self, memory: Tensor, rows: list[Row], start: int, end: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        made = [self.maker.asked_in_text(row, start, end, share=0.6) for row in rows]
        logits, memory = self.model.segment(memory, torch.from_numpy(np.stack([ids for ids, _ in made])).long())
        targets = torch.tensor([[label] for _, label in made])
        loss, right, asked = graded(logits[:, None], targets, torch.arange(len(rows)), len(rows))
        return loss, memory, right, asked


def graded(logits: Tensor, targets: Tensor, of: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """What is asked of row `of` [A] of a batch, logits [A, R, V], targets [A, R], NOT_ASKED where nothing is.

    -> what each row adds to the mean loss over the targets [rows], rows that have them all right, rows that were asked
    at all (bool [rows] each).
    """
    wanted = targets != NOT_ASKED
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NOT_ASKED, reduction="none")
    losses = torch.zeros(rows).index_add(0, of, each.view_as(targets).sum(1))
    wrong = (wanted & (logits.argmax(2) != targets)).any(1)
    asked = torch.zeros(rows, dtype=torch.long).index_add_(0, of, wanted.any(1).long()) > 0
    failed = torch.zeros(rows, dtype=torch.long).index_add_(0, of, wrong.long()) > 0
    return losses / wanted.sum().clamp(min=1), asked & ~failed, asked


def note(right: dict[str, float], kind: str, rows: Tensor, asked: Tensor, weight: float = 0.03) -> None:
    """Keeps a running share of the rows that are right, of those that were asked."""
    if asked.any():
        now = float(rows[asked].float().mean())
        right[kind] = right.get(kind, now) + weight * (now - right.get(kind, now))
