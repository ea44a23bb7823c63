"""A small fresh Llama or BERT, and initial weights from which it soon learns to look things up in its context.

From random weights a model of this size stays for thousands of steps at what the words alone give: it sees which rooms
were named, not who went where. What it lacks is the two-step lookup ("which row has the same name near it? copy its
room"). These changes put it within reach, and hold no answer: all of them are trained on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from rmt_engine.evaluation.facts import OPPOSITE


def small_llama(
    tokenizer: PreTrainedTokenizerBase, *, layers: int, heads: int, width: int, inner: int, positions: int, theta: float
) -> LlamaForCausalLM:
    """A fresh model with these weights; its words are the tokenizer's."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        initializer_range=0.04,
        attention_bias=True,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    prepare(model, tokenizer)
    return model


@torch.no_grad()
def prepare(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Changes the weights of a fresh model with `attention_bias=True` in place."""
    config, embeddings = model.config, model.get_input_embeddings()
    embeddings.weight.normal_(0.0, 0.3)
    join_opposites(embeddings, tokenizer)
    join_words(embeddings, tokenizer)
    model.model.norm.weight.fill_(0.3)  # so that the logits of so large embeddings stay small
    first, *others = (layer.self_attn for layer in model.model.layers)
    look_back(first, config.num_attention_heads, config.rope_parameters["rope_theta"])
    places = torch.nn.init.orthogonal_(torch.empty(config.hidden_size, config.hidden_size))
    copy_what_is_read(first.v_proj, first.o_proj, places)
    for attention in others:
        match_content(attention, places)
        copy_what_is_read(attention.v_proj, attention.o_proj, torch.nn.init.orthogonal_(torch.empty_like(places)))


def look_back(attention: nn.Module, heads: int, theta: float, strength: float = 4.0) -> None:
    """Head h looks at the row h + 1 before its own: constant keys, and queries turned back by as many positions."""
    half = attention.head_dim // 2
    frequencies = theta ** (-torch.arange(half) / half)
    key = torch.cat([torch.ones(half), torch.zeros(half)])
    distances = torch.arange(1, heads + 1)[:, None]
    query = torch.cat([torch.cos(distances * frequencies), -torch.sin(distances * frequencies)], dim=1)
    attention.k_proj.bias.copy_(strength * key.repeat(heads))
    attention.q_proj.bias.copy_(strength * query.flatten())


def copy_what_is_read(values: nn.Linear, output: nn.Linear, places: Tensor, strength: float = 0.7) -> None:
    """Each head adds what it reads in dimensions of its own: rows of `places`, which are orthonormal, are its values,
    and the output projection is their transpose."""
    values.weight.copy_(strength * places)
    output.weight.copy_(strength * places.t())


def match_content(attention: nn.Module, places: Tensor, strength: float = 1.4) -> None:
    """Keys equal queries, and head h compares what the first layer's head h left: rows with the same word h + 1 before
    them look at each other. (Half of this strength takes more than twice the steps, 2.0 finds nothing in 200.)"""
    attention.q_proj.weight.copy_(strength * places)
    attention.k_proj.weight.copy_(strength * places)


def join_opposites(embeddings: nn.Embedding, tokenizer: PreTrainedTokenizerBase, shared: float = 0.8) -> None:
    """North and south, east and west: what they share, and as much less of what tells them apart, once with either
    sign. Directions as random as other words are matched with themselves, but not with their opposites."""
    ids = tokenizer.get_vocab()
    for one, other in OPPOSITE.items():
        if one < other and f"Ġ{one}" in ids and f"Ġ{other}" in ids:
            first, second = ids[f"Ġ{one}"], ids[f"Ġ{other}"]
            same, apart = embeddings.weight[[first, second]].unbind()
            same, apart = shared * same, (1 - shared**2) ** 0.5 * apart
            embeddings.weight[first], embeddings.weight[second] = same + apart, same - apart


def join_words(embeddings: nn.Embedding, tokenizer: PreTrainedTokenizerBase, space: str = "Ġ") -> None:
    """A word with and without the space before it starts with one embedding: a line may begin with a name."""
    ids = tokenizer.get_vocab()
    for token, spaced in ids.items():
        if token.startswith(space) and token[1:] in ids:
            embeddings.weight[ids[token[1:]]] = embeddings.weight[spaced]


@torch.no_grad()
def look_around(model: BertForSequenceClassification, theta: float = 100.0, strength: float = 1.2) -> None:
    """Changes a fresh BERT's weights in place: head h of the first layer looks at the row h + 1 before its own, the
    last two heads at the two rows behind it. Positions are told by sines and cosines in the first dimensions, as many
    as a head has, and words by the others."""
    embeddings, first = model.bert.embeddings, model.bert.encoder.layer[0].attention
    heads, size = first.self.num_attention_heads, first.self.attention_head_size
    frequencies = theta ** (-torch.arange(size // 2) / (size // 2))
    angles = torch.arange(embeddings.position_embeddings.num_embeddings)[:, None] * frequencies
    embeddings.position_embeddings.weight.zero_()
    embeddings.position_embeddings.weight[:, :size] = 2 * torch.cat([angles.cos(), angles.sin()], dim=1)
    embeddings.word_embeddings.weight.normal_(0.0, 0.7)
    embeddings.word_embeddings.weight[:, :size] = 0
    first.self.query.weight.zero_()
    first.self.key.weight.zero_()
    for head, distance in enumerate([*range(1, heads - 1), -1, -2]):
        turn = distance * frequencies
        cos, sin = torch.diag(turn.cos()), torch.diag(turn.sin())
        rows = slice(head * size, (head + 1) * size)
        first.self.query.weight[rows, :size] = strength * torch.cat(
            [torch.cat([cos, sin], dim=1), torch.cat([-sin, cos], dim=1)]
        )
        first.self.key.weight[rows, :size] = strength * torch.eye(size)
    places = torch.nn.init.orthogonal_(torch.empty_like(first.self.value.weight))
    copy_what_is_read(first.self.value, first.output.dense, places)
