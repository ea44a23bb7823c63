"""Decoding inside the answering segment."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from rmt_engine.executors import EagerExecutor


def generate(
    executor: EagerExecutor, ids: Tensor, memory: Tensor, max_new_tokens: int, stop_ids: Collection[int]
) -> list[list[int]]:
    """Greedy decoding of rows side by side. ids [B, L], memory [B, M, E] -> the new ids of each row, without the stop.

    New tokens stay within the answering segment, as in the authors' `generate`.
    """
    logits, caches = executor.prefill(ids, memory, max_new_tokens)
    answers: list[list[int]] = [[] for _ in range(ids.shape[0])]
    open_rows = set(range(ids.shape[0]))
    for step in range(max_new_tokens):
        chosen = logits.argmax(-1)  # [B]
        for row, token in enumerate(chosen.tolist()):
            if row in open_rows:
                if token in stop_ids:
                    open_rows.remove(row)
                else:
                    answers[row].append(token)
        if not open_rows or step == max_new_tokens - 1:
            break
        logits = executor.decode(chosen[:, None], caches)
    return answers
