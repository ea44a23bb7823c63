"""`generate` as transformers has it, so that its streamers, logits processors and stopping criteria fit.

Nothing of transformers is imported: what is given is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from rmt_engine.sampler import Sampling, filtered, penalized
from rmt_engine.sampling import Answer, DecodeSlots, Decoding, Prompt

if TYPE_CHECKING:
    from rmt_engine.engine import Engine


class Streamer(Protocol):
    """transformers' BaseStreamer."""

    def put(self, value: Tensor) -> None: ...
    def end(self) -> None: ...


Processor = Callable[[Tensor, Tensor], Tensor]  # (input_ids [B, N], scores [B, V]) -> scores [B, V]
Criterion = Callable[[Tensor, Tensor], Any]  # (input_ids [B, N], scores [B, V]) -> bool [B], or one for all


class RMTGenerator:
    """An engine with the `generate` of a transformers model. Made by `Engine.as_generator`."""

    def __init__(self, engine: Engine) -> None:
        if engine.config.family != "decoder":
            raise ValueError("this checkpoint is a classifier: it generates no text; use Engine.forward")
        self.engine = engine

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @property
    def dtype(self) -> torch.dtype:
        return self.engine.dtype

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        streamer: Streamer | None = None,
        logits_processor: Sequence[Processor] | None = None,
        stopping_criteria: Sequence[Criterion] | None = None,
        seed: int | None = None,
        roll: bool = False,
    ) -> Tensor:
        """ids [B, N] of any length -> [B, N + new]: the ids, the answer and what ends it, then padding.

        As in the authors' `generate` the ids are cut from the left, and new tokens stay in the last segment, or with
        `roll` go on in further ones. Scores pass the repetition penalty (over all ids of the row), logits_processor,
        and, with do_sample, temperature, top-k and top-p. attention_mask: 0 where a row holds padding. eos_token_id: by
        default the checkpoint's stop ids; pad_token_id: by default the first of them. seed: a generator of its own for
        every row; None draws from torch's. stopping_criteria end a row, or all. A streamer is given the ids and then
        each token, and needs B = 1. Raises ValueError.
        """
        if input_ids.dim() != 2 or not len(input_ids):
            raise ValueError(f"input_ids: expected [B, N], got {list(input_ids.shape)}")
        if streamer is not None and len(input_ids) > 1:
            raise ValueError("a streamer takes one row: give input_ids [1, N]")
        chosen = Sampling(temperature if do_sample else 0.0, top_k, top_p, repetition_penalty, seed)
        ends = self.engine.config.stop_ids if eos_token_id is None else eos_token_id
        ends = (ends,) if isinstance(ends, int) else tuple(ends)
        padding = pad_token_id if pad_token_id is not None else (ends or (0,))[0]
        rows = _Rows(self.engine, input_ids, attention_mask, chosen, max_new_tokens, roll)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        for _ in range(max_new_tokens):
            scores = rows.scores(logits_processor or ())
            tokens = rows.drawn(scores).masked_fill(done, padding)
            rows.append(tokens)
            if streamer is not None:
                streamer.put(tokens)
            done |= torch.isin(tokens, torch.tensor(ends, dtype=torch.int64))
            for criterion in stopping_criteria or ():
                done |= torch.as_tensor(criterion(rows.ids, scores)).cpu()
            if done.all():
                break
            rows.advance(done)
        if streamer is not None:
            streamer.end()
        return rows.ids


class _Rows:
    """The rows of one call, decoded in step; their logits are those of the next token."""

    def __init__(
        self, engine: Engine, ids: Tensor, mask: Tensor | None, sampling: Sampling, most: int, roll: bool
    ) -> None:
        self.engine, self.sampling = engine, sampling
        self._all = torch.cat([ids, ids.new_zeros(len(ids), most)], dim=1).to(engine.device, torch.int64)
        self._read = ids.shape[1]
        how = Decoding(most, roll=roll)
        self.answers = [Answer(prompt, how, None) for prompt in self._prompts(ids, mask)]
        longest = max(len(answer.segment) for answer in self.answers)
        if not roll:
            engine.check_answer_fits(longest, most)
        size = engine.config.segment_size
        self.slots = DecodeSlots(engine.executor, len(ids), size + 1 if roll else longest + most)
        self.logits = [self.slots.start(i, answer.segment, answer.memory) for i, answer in enumerate(self.answers)]
        seeds = [sampling.seed] * len(ids)
        self.generators = [None if seed is None else torch.Generator().manual_seed(seed) for seed in seeds]

    @property
    def ids(self) -> Tensor:
        return self._all[:, : self._read]

    def _prompts(self, ids: Tensor, mask: Tensor | None) -> list[Prompt]:
        """What stands in the last segments; the others are folded side by side."""
        rows = [row if mask is None else row[mask[i].bool().to(row.device)] for i, row in enumerate(ids)]
        prompts = []
        for result in self.engine.run_many([row.cpu() for row in rows], slots=len(rows), alignment="left"):
            if result.stream is None:
                raise ValueError(f"input_ids, row {result.index}: {result.error}")
            prompts.append(Prompt(result.stream.rest, result.stream.place.memory))
        return prompts

    def scores(self, processors: Sequence[Processor]) -> Tensor:
        """The scores [B, V], fp32, after the penalty and what the user gave."""
        scores = torch.stack(self.logits).float()
        if self.sampling.repetition_penalty != 1:
            pairs = zip(scores, self.ids, strict=True)
            scores = torch.stack([penalized(row, i.unique(), self.sampling.repetition_penalty) for row, i in pairs])
        for processor in processors:
            scores = processor(self.ids, scores)
        return scores

    def drawn(self, scores: Tensor) -> Tensor:
        """The next token of each row, [B] on the CPU."""
        if self.sampling.temperature == 0:
            return scores.argmax(-1).cpu()
        chances = [filtered(row, self.sampling).softmax(-1) for row in scores.cpu()]
        pairs = zip(chances, self.generators, strict=True)
        return torch.cat([torch.multinomial(chance, 1, generator=generator) for chance, generator in pairs])

    def append(self, tokens: Tensor) -> None:
        self._all[:, self._read] = tokens.to(self._all.device)
        self._read += 1

    def advance(self, done: Tensor) -> None:
        """Computes the logits behind the last tokens of the rows that are not done."""
        tokens: dict[int, int] = {}
        for i, answer in enumerate(self.answers):
            if bool(done[i]):
                continue
            token = int(self._all[i, self._read - 1])
            answer.ids.append(token)
            if answer.rolled(self.engine.executor, self.engine.config.segment_size):
                self.logits[i] = self.slots.start(i, answer.segment, answer.memory)
            else:
                tokens[i] = token
        if tokens:
            rows = self.slots.step(tokens)
            for i in tokens:
                self.logits[i] = rows[i]
