"""A small fresh Llama, and initial weights from which it soon learns to look things up in its context.

From random weights a model of this size stays for thousands of steps at what the words alone give: it sees which rooms
were named, not who went where. What it lacks is the two-step lookup ("which row has the same name near it? copy its
room"). These changes put it within reach, and hold no answer: all of them are trained on.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase


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
    config = model.config
    first, *others = (layer.self_attn for layer in model.model.layers)
    look_back(first, config.num_attention_heads, config.rope_parameters["rope_theta"])
    for attention in (first, *others):
        copy_what_is_read(attention)
    for attention in others:
        match_content(attention)
    join_words(model.get_input_embeddings(), tokenizer)


def look_back(attention: nn.Module, heads: int, theta: float, strength: float = 4.0) -> None:
    """Head h looks at the row h + 1 before its own: constant keys, and queries turned back by as many positions."""
    half = attention.head_dim // 2
    frequencies = theta ** (-torch.arange(half) / half)
    key = torch.cat([torch.ones(half), torch.zeros(half)])
    distances = torch.arange(1, heads + 1)[:, None]
    query = torch.cat([torch.cos(distances * frequencies), -torch.sin(distances * frequencies)], dim=1)
    attention.k_proj.bias.copy_(strength * key.repeat(heads))
    attention.q_proj.bias.copy_(strength * query.flatten())


def match_content(attention: nn.Module, std: float = 0.1) -> None:
    """Keys equal queries: rows of like content look at each other."""
    attention.q_proj.weight.normal_(0.0, std)
    attention.k_proj.weight.copy_(attention.q_proj.weight)


def copy_what_is_read(attention: nn.Module, std: float = 0.08) -> None:
    """The output projection is the transpose of the values': what is read is added as it stands."""
    attention.v_proj.weight.normal_(0.0, std)
    attention.o_proj.weight.copy_(attention.v_proj.weight.t())


def join_words(embeddings: nn.Embedding, tokenizer: PreTrainedTokenizerBase, space: str = "Ġ") -> None:
    """A word with and without the space before it starts with one embedding: a line may begin with a name."""
    ids = tokenizer.get_vocab()
    for token, spaced in ids.items():
        if token.startswith(space) and token[1:] in ids:
            embeddings.weight[ids[token[1:]]] = embeddings.weight[spaced]
