"""Train the small decoder that answers "Where is Mary?" about a fact hidden in millions of tokens of other text.

    python recipes/train_retrieval.py --out DIR          # ten minutes on one core
    python recipes/train_retrieval.py --out DIR --smoke  # a few steps on a tiny corpus, to see that it runs

Writes `DIR/model_best/pytorch_model.bin` (memory_cell.* keys), `DIR/base/` (config, tokenizer) and `DIR/recipe.json`;
`DIR/training/` is what a run that was cut off goes on from.

1. Curriculum: a fact and its question 0, 1, 2, ... segments apart, from the initial memory, until each is learned.
2. Pool: memory states that live on. Each step takes most of its batch from a pool, reads 1 to 3 more segments of noise
   with gradients and asks after each. A state that still answers goes back, so training sees ever older states; a
   second pool of states that have read nothing but noise supplies old memories into which a fact is then written.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from episodes import UNKNOWN, Asks, EpisodeMaker, Row, nothing_known
from facts_data import (
    ASK_TEMPLATE,
    FactWriter,
    NoiseBank,
    tokenizer_sentences,
    train_tokenizer,
)
from rmt_training import RecurrentMemoryModel
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, PreTrainedTokenizerFast

from rmt_engine.evaluation.noise import is_held_out, python_sources


@dataclass
class Recipe:
    seed: int = 7
    segment_size: int = 112
    memory_tokens: int = 8
    layers: int = 4
    heads: int = 4
    width: int = 128
    positions: int = 160
    vocab_size: int = 2048
    batch: int = 32
    warmup: int = 60
    curriculum_rate: float = 1e-3
    curriculum_steps: int = 2400  # at most; ends early once `curriculum_segments` are learned
    curriculum_segments: int = 4
    pool_rate: float = 8e-4
    pool_steps: int = 1000
    pool_size: int = 64
    blank_size: int = 32
    memory_noise: float = 0.15
    distractors: float = 0.0  # share of rows with sentences that look like facts
    later_fact: float = 0.0  # how often a row that knows one fact reads another
    ema: float = 0.995
    save_every: int = 100
    max_files: int = 0  # 0: all


SMOKE = Recipe(
    layers=2, heads=2, width=32, vocab_size=700, batch=4, curriculum_steps=4, pool_steps=4, pool_size=8,
    blank_size=4, save_every=4, max_files=24,
)  # fmt: skip


def log(**values: object) -> None:
    print(json.dumps(values), flush=True)


def build_tokenizer_and_noise(recipe: Recipe) -> tuple[PreTrainedTokenizerFast, NoiseBank]:
    texts = [content.decode() for content in python_sources() if not is_held_out(content)]
    if recipe.max_files:
        texts = sorted(texts, key=len)[len(texts) // 2 :][: recipe.max_files]
    rng = np.random.default_rng(recipe.seed)
    shown = [texts[i] for i in rng.permutation(len(texts))[: max(len(texts) // 2, 1)]]
    tokenizer = train_tokenizer([*shown, *tokenizer_sentences()], recipe.vocab_size)
    return tokenizer, NoiseBank(texts, tokenizer, recipe.seed)


def build_model(recipe: Recipe, eos: int, dtype: torch.dtype) -> RecurrentMemoryModel:
    config = GPT2Config(
        vocab_size=recipe.vocab_size,
        n_positions=recipe.positions,
        n_embd=recipe.width,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        bos_token_id=eos,
        eos_token_id=eos,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return RecurrentMemoryModel(config, recipe.memory_tokens, dtype)


class Trainer:
    def __init__(self, recipe: Recipe, out: Path) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.out = out
        self.started = time.time()
        self.work = out / "training"
        self.work.mkdir(parents=True, exist_ok=True)
        if (self.work / "noise.npz").exists():
            self.tokenizer = PreTrainedTokenizerFast.from_pretrained(self.work)
            bank = NoiseBank.load(self.work / "noise.npz", self.tokenizer)
        else:
            self.tokenizer, bank = build_tokenizer_and_noise(recipe)
            self.tokenizer.save_pretrained(self.work)
            bank.save(self.work / "noise.npz")
        writer = FactWriter(self.tokenizer)
        self.maker = EpisodeMaker(writer, bank, recipe.segment_size, recipe.distractors, recipe.seed)
        self.model = build_model(recipe, self.tokenizer.eos_token_id, torch.bfloat16)
        self.average = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        decayed = [p for p in self.model.parameters() if p.ndim == 2]
        plain = [p for p in self.model.parameters() if p.ndim != 2]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.curriculum_rate, betas=(0.9, 0.98), fused=True)
        self.step, self.level = 0, 0
        if (self.work / "state.pt").exists():
            self.resume()
        log(event="start", step=self.step, noise_tokens=[len(b) for b in bank.banks], seconds=self.seconds())

    def seconds(self) -> float:
        return round(time.time() - self.started, 1)

    def keep(self) -> None:
        """What a later run with the same `--out` goes on from."""
        state = {"step": self.step, "level": self.level, "model": self.model.state_dict(), "average": self.average}
        torch.save({**state, "optimizer": self.optimizer.state_dict()}, self.work / "state.tmp")
        os.replace(self.work / "state.tmp", self.work / "state.pt")

    def resume(self) -> None:
        state = torch.load(self.work / "state.pt", weights_only=True)
        self.step, self.level, self.average = state["step"], state["level"], state["average"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.maker.rng = np.random.default_rng([self.recipe.seed, self.step])

    def update(self, loss: Tensor, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.step += 1
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                self.average[name].lerp_(value, 1 - decay)

    def ask(self, memory: Tensor, asks: Asks) -> tuple[Tensor, Tensor]:
        """Loss over the rows that can be asked, and which rows answered right [B] (wrong where not asked)."""
        logits = self.model.answer_logits(memory, asks.ids, asks.rows)
        losses = F.cross_entropy(logits.flatten(0, 1), asks.targets.flatten(), reduction="none").view(-1, 2)
        losses = losses[:, 0] + 0.2 * losses[:, 1]
        loss = (losses * asks.weight).sum() / asks.weight.sum().clamp(min=1)
        right = (logits.argmax(2) == asks.targets).all(1) & (asks.weight > 0)
        return loss, right

    def read(self, memory: Tensor, rows: list[Row], lengths: list[int], rests: np.ndarray) -> Reading:
        """Folds the segments and asks after each, then once more behind the rests, if there are any."""
        texts = torch.from_numpy(np.stack([row.ids for row in rows]).astype(np.int64))
        losses, position = [], 0
        right = asked = torch.zeros(len(rows), dtype=torch.bool)
        for length in lengths:
            memory = self.model.fold(memory, texts[:, position : position + length])
            position += length
            asks = self.maker.asks(rows, position, np.zeros_like(rests))
            loss, right = self.ask(memory, asks)
            asked = asks.weight > 0
            losses.append(loss)
        if rests.any() or not lengths:
            asks = self.maker.asks(rows, position, rests)
            loss, right_behind = self.ask(memory, asks)
            losses.append(loss)
            if not lengths:
                right, asked = right_behind, asks.weight > 0
        return Reading(torch.stack(losses).mean(), memory, right, asked)

    # ------------------------------------------------------------------------------------------------ 1. curriculum

    def curriculum(self) -> None:
        recipe, maker = self.recipe, self.maker
        rng = maker.rng
        accuracy, seen = 0.0, 0
        while self.step < recipe.curriculum_steps and self.level <= recipe.curriculum_segments:
            level = self.level
            count = level if rng.random() < 0.6 else int(rng.integers(level + 1))
            lengths = maker.segment_lengths(count)
            rests = maker.rests(recipe.batch, 0.5 if count else 1.0)
            rows = []
            for rest in rests:
                place = int(rng.integers(max(sum(lengths) + int(rest) - 10, 1)))
                place = 0 if rng.random() < 0.1 else place
                rows.append(maker.row(sum(lengths) + maker.longest_rest, nothing_known(), [(place, None)]))
            reading = self.read(self.model.initial_memory(recipe.batch), rows, lengths, rests)
            self.update(reading.loss, recipe.curriculum_rate * min(1.0, (self.step + 1) / recipe.warmup))
            if count == level and reading.asked.any():
                accuracy += 0.1 * (float(reading.right[reading.asked].float().mean()) - accuracy)
                seen += 1
            if self.step % 25 == 0:
                loss = round(float(reading.loss.detach()), 3)
                log(phase=1, step=self.step, level=level, loss=loss, right=round(accuracy, 3), seconds=self.seconds())
            if seen >= 15 and accuracy > 0.9:
                log(phase=1, step=self.step, learned=level, seconds=self.seconds())
                self.level, accuracy, seen = level + 1, 0.0, 0
                self.keep()
            elif self.step % recipe.save_every == 0:
                self.keep()
        self.save({"phase": 1, "steps": self.step})

    # ------------------------------------------------------------------------------------------------------ 2. pool

    def pool(self) -> None:
        recipe, maker = self.recipe, self.maker
        rng = maker.rng
        pool = Pool(recipe.pool_size)
        blank = self.model.initial_memory(recipe.blank_size).detach().clone()
        first, by_kind = self.step, {"fresh": 0.0, "blank": 0.0, "old": 0.0}
        end = first + recipe.pool_steps
        while self.step < end:
            n_fresh, n_blank = max(recipe.batch // 8, 1), max(recipe.batch // 4, 1)
            old = pool.draw(rng, recipe.batch - n_fresh - n_blank)
            n_fresh = recipe.batch - n_blank - len(old)
            lengths = maker.segment_lengths(int(rng.integers(1, 4)))
            rests = maker.rests(recipe.batch, 0.4)
            rows = []
            for i, rest in enumerate(rests):
                rooms = pool.rooms[old[i - n_fresh - n_blank]] if i >= n_fresh + n_blank else nothing_known()
                facts = self.new_facts(rooms, sum(lengths) + int(rest) - 10)
                rows.append(maker.row(sum(lengths) + maker.longest_rest, rooms, facts))
            chosen_blank = torch.from_numpy(rng.permutation(recipe.blank_size)[:n_blank])
            lived = torch.cat([blank[chosen_blank], pool.memory(old, blank)])
            lived = lived + self.noise(len(lived)) * lived.std()
            memory = torch.cat([self.model.initial_memory(n_fresh), lived])
            reading = self.read(memory, rows, lengths, rests)
            done = (self.step - first) / recipe.pool_steps
            rate = recipe.pool_rate * min(1.0, (self.step - first + 1) / 20) * min(1.0, 2 * (1 - done))
            self.update(reading.loss, rate)

            state = reading.memory.detach()
            for i, row in enumerate(rows):
                from_pool = i >= n_fresh + n_blank
                slot = int(old[i - n_fresh - n_blank]) if from_pool else None
                if reading.asked[i] and not row.cut_at(sum(lengths)):
                    pool.settle(rng, slot, state[i], row.known(sum(lengths)), sum(lengths), bool(reading.right[i]))
            kinds = {"fresh": slice(0, n_fresh), "blank": slice(n_fresh, n_fresh + n_blank)}
            kinds["old"] = slice(n_fresh + n_blank, None)
            for kind, part in kinds.items():
                asked = reading.asked[part]
                if asked.any():
                    rate_right = float(reading.right[part][asked].float().mean())
                    by_kind[kind] += 0.03 * (rate_right - by_kind[kind])
            self.age_blank(blank)
            if self.step % 25 == 0:
                ages = [s.age // recipe.segment_size for s in pool.states if s is not None]
                log(
                    phase=2, step=self.step, loss=round(float(reading.loss.detach()), 4),
                    right={k: round(v, 4) for k, v in by_kind.items()}, pool=len(ages),
                    age=[int(np.median(ages)), max(ages)] if ages else [], seconds=self.seconds(),
                )  # fmt: skip
            if (self.step - first) % recipe.save_every == 0 or self.step == end:
                self.save({"phase": 2, "steps": self.step, "right_in_training": dict(by_kind)})

    def new_facts(self, rooms: np.ndarray, room_for: int) -> list[tuple[int, int | None]]:
        """Facts to hide in a row: always one where nothing is known yet; now and then a second or a later one."""
        rng = self.maker.rng
        names = np.flatnonzero(rooms != UNKNOWN)
        place = 0 if rng.random() < 0.05 else int(rng.integers(max(room_for, 1)))
        if len(names) == 0:
            facts: list[tuple[int, int | None]] = [(place, None)]
            return facts
        if rng.random() >= self.recipe.later_fact:
            return []
        name = int(rng.choice(names)) if len(names) > 1 or rng.random() < 0.5 else int(rng.integers(len(rooms)))
        return [(place, name)]

    def noise(self, batch: int) -> Tensor:
        """Noise for memory states that makes what they hold robust; half of the rows get none."""
        size = torch.rand(batch, 1, 1) * self.recipe.memory_noise * (torch.rand(batch, 1, 1) < 0.5)
        return size * torch.randn(batch, self.recipe.memory_tokens, self.recipe.width)

    @torch.no_grad()
    def age_blank(self, blank: Tensor) -> None:
        """One more segment of noise for half of the states that know nothing; one starts again now and then."""
        rng = self.maker.rng
        some = torch.from_numpy(rng.permutation(len(blank))[: max(len(blank) // 2, 1)])
        rows = [self.maker.row(self.recipe.segment_size, nothing_known(), []).ids for _ in some]
        blank[some] = self.model.fold(blank[some], torch.from_numpy(np.stack(rows).astype(np.int64)))
        if rng.random() < 0.05:
            blank[int(rng.integers(len(blank)))] = self.model.memory_cell.memory

    def save(self, figures: dict[str, object]) -> None:
        figures = {**figures, "seconds": self.seconds()}
        save_checkpoint(self.out, self.model, self.average, self.tokenizer, self.recipe, figures)
        self.keep()
        log(event="saved", **figures)


@dataclass
class Reading:
    loss: Tensor
    memory: Tensor  # [B, M, E] after the folded segments
    right: Tensor  # bool [B]: the last question put right after the folded segments
    asked: Tensor  # bool [B]


@dataclass
class Lived:
    memory: Tensor  # [M, E]
    rooms: np.ndarray
    age: int  # tokens read since the first step it was in


class Pool:
    """Memory states that have answered so far, each with what it knows."""

    def __init__(self, size: int) -> None:
        self.states: list[Lived | None] = [None] * size

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        filled = np.array([i for i, state in enumerate(self.states) if state is not None], dtype=np.int64)
        return rng.permutation(filled)[:count]

    @property
    def rooms(self) -> list[np.ndarray]:
        return [nothing_known() if state is None else state.rooms for state in self.states]

    def memory(self, slots: np.ndarray, like: Tensor) -> Tensor:
        states = [self.states[int(slot)] for slot in slots]
        return torch.stack([s.memory for s in states if s is not None]) if states else like[:0]

    def settle(
        self, rng: np.random.Generator, slot: int | None, memory: Tensor, rooms: np.ndarray, read: int, right: bool
    ) -> None:
        """Puts a state back if it answered right; drops a wrong one half of the time. New ones fill gaps."""
        if slot is not None:
            state = self.states[slot]
            if right and state is not None:
                self.states[slot] = Lived(memory.clone(), rooms, state.age + read)
            elif rng.random() < 0.5:
                self.states[slot] = None
        elif right:
            empty = [i for i, state in enumerate(self.states) if state is None]
            if empty:
                self.states[empty[0]] = Lived(memory.clone(), rooms, read)
            elif rng.random() < 0.05:
                self.states[int(rng.integers(len(self.states)))] = Lived(memory.clone(), rooms, read)


def save_checkpoint(
    out: Path,
    model: RecurrentMemoryModel,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    figures: dict[str, object],
) -> None:
    """The authors' container beside the backbone's config and tokenizer. Each file is replaced in one move."""
    base, best = out / "base", out / "model_best"
    for folder in (base, best):
        folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.clone() for name, value in weights.items()}
    weights["memory_cell.model.lm_head.weight"] = weights["memory_cell.model.transformer.wte.weight"]  # tied
    torch.save(weights, best / "pytorch_model.bin.tmp")
    os.replace(best / "pytorch_model.bin.tmp", best / "pytorch_model.bin")
    model.memory_cell.model.config.save_pretrained(base)
    tokenizer.save_pretrained(base)
    described = {
        "command": f"python recipes/train_retrieval.py --out DIR{' --smoke' if recipe.max_files else ''}",
        "seed": recipe.seed,
        "segment_size": recipe.segment_size,
        "num_mem_tokens": recipe.memory_tokens,
        "ask_template": ASK_TEMPLATE,
        "stop_ids": [tokenizer.eos_token_id],
        "figures": figures,
        "recipe": asdict(recipe),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    (out / "recipe.json.tmp").write_text(json.dumps(described, indent=2) + "\n")
    os.replace(out / "recipe.json.tmp", out / "recipe.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a much smaller model on a few files")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--threads", type=int, default=1, help="1 is no slower than 2 where other work runs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = SMOKE if arguments.smoke else Recipe()
    recipe.seed = arguments.seed
    trainer = Trainer(recipe, arguments.out)
    trainer.curriculum()
    trainer.pool()


if __name__ == "__main__":
    main()
