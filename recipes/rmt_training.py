"""A Recurrent Memory Transformer decoder for training: a recurrent wrapper around Hugging Face's GPT2LMHeadModel.

One segment is `[memory][text][the same memory]` at positions 0..T-1 under a plain causal mask; the new memory state is
the output of the final norm at the last M rows. The answering segment is `[memory][text]`, read at chosen rows.
The parameters live in the Hugging Face model; the forward pass is ours, because it needs the last layer at a few rows
only and because plain bf16 matmuls are the fastest way through so small a model on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel


class MemoryCell(nn.Module):
    def __init__(self, model: GPT2LMHeadModel, memory_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.memory = nn.Parameter(torch.randn(memory_tokens, model.config.n_embd) * 0.02)


class RecurrentMemoryModel(nn.Module):
    """State dict keys are those of the authors' decoder: `memory_cell.memory`, `memory_cell.model.<GPT-2 keys>`."""

    def __init__(self, config: GPT2Config, memory_tokens: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.memory_cell = MemoryCell(GPT2LMHeadModel(config), memory_tokens)
        self.dtype = dtype
        self.heads = config.n_head
        self.eps = config.layer_norm_epsilon

    def initial_memory(self, batch: int) -> Tensor:
        return self.memory_cell.memory.expand(batch, -1, -1)

    def fold(self, memory: Tensor, ids: Tensor) -> Tensor:
        """The memory state after one segment: memory [B, M, E] fp32, ids [B, S] -> [B, M, E] fp32."""
        text = self._embed(ids)
        x = torch.cat([memory, text, memory], dim=1)
        rows = torch.arange(x.shape[1] - memory.shape[1], x.shape[1])
        return self._backbone(x, rows.expand(len(ids), -1))

    def answer_logits(self, memory: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
        """Logits [B, R, V] of the answering segment at rows [B, R] of its text. Text behind a row is not seen by it."""
        x = torch.cat([memory, self._embed(ids)], dim=1)
        hidden = self._backbone(x, rows + memory.shape[1])
        return F.linear(hidden.to(self.dtype), self.memory_cell.model.lm_head.weight.to(self.dtype)).float()

    def _embed(self, ids: Tensor) -> Tensor:
        return self.memory_cell.model.transformer.wte(ids)

    def _backbone(self, x: Tensor, rows: Tensor) -> Tensor:
        """Final hidden state in fp32 at the given rows: x [B, T, E], rows [B, R] -> [B, R, E]."""
        transformer = self.memory_cell.model.transformer
        x = (x + transformer.wpe.weight[: x.shape[1]]).to(self.dtype)
        every_row = torch.arange(x.shape[1])
        for block in transformer.h[:-1]:
            x = self._layer(block, x, x, every_row[None])
        picked = x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[2]))
        x = self._layer(transformer.h[-1], x, picked, rows)
        return self._norm(transformer.ln_f, x).float()

    def _layer(self, block: nn.Module, x: Tensor, x_query: Tensor, rows: Tensor) -> Tensor:
        """One layer for the rows `x_query` of `x`, each of which sees the rows of `x` up to its own."""
        length, width = x.shape[1:]
        weight, bias = block.attn.c_attn.weight, block.attn.c_attn.bias
        if x_query is x:
            query, key, value = self._linear(self._norm(block.ln_1, x), weight, bias).split(width, dim=2)
        else:
            key, value = self._linear(self._norm(block.ln_1, x), weight[:, width:], bias[width:]).split(width, dim=2)
            query = self._linear(self._norm(block.ln_1, x_query), weight[:, :width], bias[:width])
        query, key, value = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (query, key, value))
        if x_query is x and not torch.is_grad_enabled():
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:  # for training, written out: faster backwards than the fused CPU attention at this length
            hidden_from = torch.arange(length) > rows[:, :, None]  # [B or 1, R, T]
            mask = torch.zeros(hidden_from.shape, dtype=self.dtype).masked_fill(hidden_from, float("-inf"))
            scores = query @ key.transpose(2, 3) * query.shape[3] ** -0.5 + mask[:, None]
            mixed = scores.softmax(dim=3) @ value
        mixed = mixed.transpose(1, 2).flatten(2)
        x_query = x_query + self._linear(mixed, block.attn.c_proj.weight, block.attn.c_proj.bias)
        inner = self._linear(self._norm(block.ln_2, x_query), block.mlp.c_fc.weight, block.mlp.c_fc.bias)
        inner = F.gelu(inner, approximate="tanh")
        return x_query + self._linear(inner, block.mlp.c_proj.weight, block.mlp.c_proj.bias)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight.to(self.dtype).t(), bias.to(self.dtype))  # GPT-2 keeps its weights as [in, out]

    def _norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], norm.weight.to(self.dtype), norm.bias.to(self.dtype), self.eps)
