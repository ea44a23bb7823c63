"""Train the small checkpoints that answer about statements hidden in millions of tokens of other text.

    python recipes/train_retrieval.py --kind facts --out DIR     # a decoder that answers where Mary is
    python recipes/train_retrieval.py --kind links --from rmt_engine/embedded/people --out DIR   # ... which room is
                                                                 # furthest north, grown from the one of facts
    python recipes/train_retrieval.py --kind encoder --out DIR   # a classifier with six labels, the rooms
    python recipes/train_retrieval.py --kind facts --out DIR --from MODEL   # the pool alone, from a checkpoint
    python recipes/train_retrieval.py --kind facts --out DIR --smoke  # a few steps on a tiny corpus

Writes `DIR/model_best/pytorch_model.bin` (the authors' names), `DIR/base/` (config, tokenizer) and `DIR/recipe.json`;
`DIR/training/` is what a run that was cut off goes on from.

1. Curriculum: stages of more statements, longer segments and more of them, from the initial memory, each until learned.
2. Pool: memory states that live on. Each step takes most of its batch from a pool, disturbs half of them, reads 1 to 3
   more segments of noise with gradients and asks after each. A state that still answers goes back, so training sees
   ever older states; a second pool of states that have read nothing but noise supplies old memories into which
   something is then written. Between two steps many states read a segment without gradients: those that then answer
   worst read it once more in the next step, and what they read is read by others too. Forgetting is rare, and what is
   learned about it is learned there. Where what is told depends on what is known (`links`), states that know nothing
   are also kept where the first noise puts them: `blank.py`.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blank import Blank
from episodes import EpisodeMaker, Row
from facts_data import (
    ASK_TEMPLATE,
    NoiseBank,
    Statement,
    StatementWriter,
    World,
    tokenizer_sentences,
    train_tokenizer,
)
from growing import directions_named, grown, layers_of
from learners import Decoder, Encoder, Reading, note
from pool import Hard, Lived, Pool, disturbed
from retrieval_settings import RECIPES, TINY, News, Recipe, Stage
from rmt_training import (
    MovingAverage,
    OneRun,
    RecipeError,
    load_converted,
    log,
    reported,
    save_checkpoint,
    save_tokenizer,
    save_whole,
)
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rmt_engine import checkpoint
from rmt_engine.evaluation.facts import NAMES, ROOMS
from rmt_engine.evaluation.noise import is_held_out, python_sources


def build_tokenizer_and_noise(recipe: Recipe, source: Path | None) -> tuple[PreTrainedTokenizerFast, NoiseBank]:
    """source: a folder whose tokenizer is taken."""
    texts = [content.decode() for content in python_sources() if not is_held_out(content)]
    if recipe.max_files:
        texts = sorted(texts, key=len)[len(texts) // 2 :][: recipe.max_files]
    rng = np.random.default_rng(recipe.data_seed)
    shown = [texts[i] for i in rng.permutation(len(texts))[: max(len(texts) // 2, 1)]]
    if source is not None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    else:
        tokenizer = train_tokenizer([*shown, *tokenizer_sentences()], recipe.vocab_size)
    return tokenizer, NoiseBank(texts, tokenizer, recipe.data_seed)


class Trainer:
    def __init__(self, recipe: Recipe, out: Path, source: Path | None = None) -> None:
        """source: a converted decoder of the recipe's sizes, from whose weights the pool goes on."""
        torch.manual_seed(recipe.seed)
        self.recipe, self.out, self.started = recipe, out, time.time()
        self.work = out / "training"
        self.work.mkdir(parents=True, exist_ok=True)
        run = OneRun(self.work / "run.json", asdict(recipe), "pool_steps", {"--from": source})
        kept_noise = self.work / "noise.npz"
        if kept_noise.exists():
            self.tokenizer = PreTrainedTokenizerFast.from_pretrained(self.work)
            bank = NoiseBank.load(kept_noise, self.tokenizer)
        else:
            self.tokenizer, bank = build_tokenizer_and_noise(recipe, source)
        self.maker = EpisodeMaker(StatementWriter(self.tokenizer), bank, recipe.seed)
        kind = {"decoder": Decoder, "encoder": Encoder}[recipe.kind]
        self.learner: Decoder | Encoder = kind(recipe, self.maker, self.tokenizer)
        self.model = self.learner.model
        self.average = MovingAverage(self.model, recipe.average)
        self.step, self.stage = 0, 0
        self.pool_states = Pool(recipe.pool_size, recipe.patience, recipe.renewed)
        self.hard: list[Hard] = []
        self.pool_steps_done = 0
        self.before: set[str] = set()  # parameters that were trained before the model grew
        kept = self.work / "state.pt"
        if kept.exists():
            self.resume(torch.load(kept, weights_only=True))
        else:
            if source is not None:
                self.go_on_from(source)
            self.optimizer = self.new_optimizer()
        run.keep()
        if not kept_noise.exists():  # the source was good: what was made of it may stay
            save_tokenizer(self.tokenizer, self.work)
            bank.save(kept_noise)
        log(event="start", step=self.step, noise_tokens=[len(b) for b in bank.banks], seconds=self.seconds())

    def seconds(self) -> float:
        """Of all runs that led here."""
        return round(time.time() - self.started, 1)

    def keep(self) -> None:
        """What a later run with the same `--out` goes on from. Memory states are grown anew."""
        state = {
            "step": self.step,
            "stage": self.stage,
            "pool_steps_done": self.pool_steps_done,
            "before": sorted(self.before),
            "model": self.model.state_dict(),
            "average": self.average.values,
            "averaged": self.average.steps,
            "optimizer": self.optimizer.state_dict(),
            "seconds": self.seconds(),
        }
        save_whole(state, self.work / "state.pt")

    def resume(self, state: dict[str, Any]) -> None:
        self.step, self.stage, self.pool_steps_done = state["step"], state["stage"], state["pool_steps_done"]
        self.started -= state["seconds"]
        self.average.values, self.average.steps = state["average"], state["averaged"]
        self.model.load_state_dict(state["model"])
        self.before = set(state["before"])
        self.optimizer = self.new_optimizer()
        self.optimizer.load_state_dict(state["optimizer"])
        self.maker.rng = np.random.default_rng([self.recipe.seed, self.step])

    def new_optimizer(self) -> torch.optim.Optimizer:
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, values in self.model.named_parameters():
            kind = 0.01 if values.ndim == 2 else 0.0, self.recipe.grown_rate if name in self.before else 1.0
            groups.setdefault(kind, []).append(values)
        described = [{"params": some, "weight_decay": decay, "scale": scale} for (decay, scale), some in groups.items()]
        return torch.optim.AdamW(described, lr=self.recipe.curriculum_rate, betas=(0.9, 0.98))

    def go_on_from(self, source: Path) -> None:
        """Takes the source's weights. Where it has fewer layers it grows, and the curriculum is still to be learned."""
        weights = dict(checkpoint.load(source)[1])
        self.stage = len(self.recipe.stages)
        if self.recipe.kind == "decoder" and 0 < layers_of(weights) != self.recipe.layers:
            old, new = grown(weights, self.model.memory_cell.model.state_dict())
            weights = directions_named(old | new, self.tokenizer.get_vocab())
            self.before = set(self.model.named(old))
            self.stage = 0
        load_converted(self.model, weights)
        self.average = MovingAverage(self.model, self.recipe.average)
        self.average.steps = round(10 / (1 - self.recipe.average))  # the source is an average already

    def update(self, loss: Tensor, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.step += 1
        self.average.update(self.model)

    # ------------------------------------------------------------------------------------------------ 1. curriculum

    def curriculum(self) -> None:
        recipe = self.recipe
        accuracy = 0.0  # a running mean that begins at none, so a stage takes some batches
        while self.step < recipe.curriculum_steps and self.stage < len(recipe.stages):
            stage = recipe.stages[self.stage]
            reading, hardest = self.curriculum_step(stage)
            self.update(reading.loss, recipe.curriculum_rate * min(1.0, (self.step + 1) / recipe.warmup))
            if hardest and reading.asked.any():
                accuracy += 0.06 * (float(reading.right[reading.asked].float().mean()) - accuracy)
            if self.step % 25 == 0:
                loss, right = round(float(reading.loss.detach()), 3), round(accuracy, 3)
                log(phase=1, step=self.step, stage=self.stage, loss=loss, right=right, seconds=self.seconds())
            if accuracy > stage.enough:
                log(phase=1, step=self.step, learned=asdict(stage), seconds=self.seconds())
                self.stage, accuracy = self.stage + 1, 0.0
                self.keep()
            elif self.step % recipe.save_every == 0:
                self.keep()
        if not self.pool_steps_done:  # a run that goes on in the pool has more to say already
            self.save({"phase": 1, "steps": self.step})
        if self.stage < len(recipe.stages) and recipe.must_learn:
            left = f"stage {self.stage + 1} of {len(recipe.stages)} of the curriculum was not learned"
            raise RecipeError(f"{left} in {self.step} steps: the log says how far it came; try another --seed")

    def curriculum_step(self, stage: Stage) -> tuple[Reading, bool]:
        """One batch from the initial memory, and whether it is of the stage's full length."""
        rng, batch = self.maker.rng, self.recipe.batch
        count = stage.segments if rng.random() < 0.7 else int(rng.integers(stage.segments + 1))
        lengths = self.segment_lengths(count + (self.recipe.kind == "encoder"), stage.size)
        rests = self.rests(stage.size, 0.3) if lengths else np.full(batch, stage.size)
        total = sum(lengths) + stage.size
        rows = [
            self.maker.row(total, World(), self.news(lengths, int(rest), stage.news), stage.news.distractors)
            for rest in rests
        ]
        return self.learner.read(self.model.initial_memory(batch), rows, lengths, rests), count == stage.segments

    def segment_lengths(self, count: int, size: int, short: float = 0.15) -> list[int]:
        """Lengths of the segments to fold; one of them is short now and then."""
        lengths, rng = [size] * count, self.maker.rng
        if count and rng.random() < short:
            lengths[int(rng.integers(count))] = int(rng.integers(1, size))
        return lengths

    def rests(self, size: int, share: float) -> np.ndarray:
        """Lengths of the rests of a batch, any that fits beside a question, in a share of cases; else there are none.
        An encoder has none: it is asked within its segments."""
        rng, batch = self.maker.rng, self.recipe.batch
        if self.recipe.kind == "encoder" or rng.random() >= share:
            return np.zeros(batch, dtype=np.int64)
        return rng.integers(0, size - 16, size=batch)

    def news(self, lengths: list[int], rest: int, news: News) -> list[tuple[int, Statement]]:
        """What a row is told that knows nothing yet: wanted position and statement."""
        rng, writer = self.maker.rng, self.maker.writer
        if rng.random() < news.links:
            said = writer.chain(rng, 1 if rng.random() < news.apart else news.chain)
            return [(self.somewhere(lengths, rest), link) for link in said]
        count = 1 if rng.random() < news.lone else int(rng.integers(news.fewest, news.facts + 1))
        names = rng.permutation(len(NAMES))[:count].tolist()
        if rng.random() < news.again:
            names.append(names[0])
        said = [writer.fact(rng, name, int(rng.integers(len(ROOMS)))) for name in names]
        places = [0 if rng.random() < 0.08 else self.somewhere(lengths, rest) for _ in said]
        return list(zip(places, said, strict=True))

    def somewhere(self, lengths: list[int], rest: int) -> int:
        """A place in segments and a rest, often so that a statement there is cut by a border."""
        rng, length = self.maker.rng, sum(lengths) + rest
        borders = [end for end in np.cumsum(lengths).tolist() if end < length]
        if borders and rng.random() < self.recipe.cut:
            return max(int(rng.choice(borders)) - int(rng.integers(1, 9)), 0)
        return int(rng.integers(max(length - 12, 1)))

    # ------------------------------------------------------------------------------------------------------ 2. pool

    def pool(self) -> None:
        recipe = self.recipe
        right: dict[str, float] = {}
        self.maker.fear = recipe.fear
        self.begin_pool()
        while self.pool_steps_done < recipe.pool_steps:
            done = self.pool_steps_done / recipe.pool_steps
            reading = self.pool_step(right, min(1.0, (self.pool_steps_done + 1) / 20) * min(1.0, 2 * (1 - done)))
            self.pool_steps_done += 1
            if self.step % 25 == 0:
                ages = [age // recipe.segment_size for age in self.pool_states.ages()]
                log(
                    phase=2, step=self.step, loss=round(float(reading.loss.detach()), 4),
                    right={k: round(v, 4) for k, v in right.items()}, pool=len(ages),
                    age=[int(np.median(ages)), max(ages)] if ages else [], seconds=self.seconds(),
                )  # fmt: skip
            if self.step % recipe.save_every == 0 or self.pool_steps_done == recipe.pool_steps:
                self.save({"phase": 2, "steps": self.step, "right_in_training": dict(right)})

    def begin_pool(self) -> None:
        if not self.pool_steps_done:  # the curriculum's rate shakes the weights: their average is the better start
            self.model.load_state_dict(self.average.values, strict=False)
        self.blank = Blank(self.model.initial_memory(self.recipe.blank_size))

    def pool_step(self, right: dict[str, float], scale: float) -> Reading:
        """One batch of fresh, blank and old states. `right` keeps a running share of right answers of each kind, and of
        states that know nothing and are at rest."""
        recipe, rng, pool = self.recipe, self.maker.rng, self.pool_states
        hard, self.hard = self.hard, []
        n_blank = max(recipe.batch // 4, 1)
        old = pool.draw(rng, recipe.batch - n_blank - len(hard) - max(recipe.batch // 8, 1))
        n_fresh = recipe.batch - n_blank - len(hard) - len(old)
        lengths = self.segment_lengths(int(rng.integers(1, 4)), recipe.segment_size)
        rests = self.rests(recipe.segment_size, 0.4)
        places: list[int | None] = [*[None] * (n_fresh + n_blank), *old]
        worlds = [World() if place is None else pool.at(place).world for place in places]
        length = sum(lengths) + recipe.segment_size
        rows = []
        for world, rest in zip(worlds, rests[: len(worlds)], strict=True):
            said = self.more_news(world, lengths, int(rest))
            rows.append(self.maker.row(length, world, said, recipe.pool.distractors))
        rows += [self.maker.read_on(one.row, length) for one in hard]
        blank = self.blank.draw(rng, n_blank)
        lived = torch.stack([pool.at(place).memory for place in old]) if old else blank[:0]
        grown = min(1.0, self.pool_steps_done / recipe.noise_grows)
        strong = recipe.noise_from + (1 - recipe.noise_from) * grown
        noise, mix = strong * recipe.memory_noise, strong * recipe.memory_mix
        memory = torch.cat(
            [
                self.model.initial_memory(n_fresh),
                disturbed(blank, noise, 0.0),
                disturbed(lived, noise, mix),
                *(one.memory[None] for one in hard),
            ]
        )
        reading = self.learner.read(memory, rows, lengths, rests)
        read = sum(lengths)
        loss = reading.loss + recipe.quiet * self.unrest(noise) if recipe.quiet else reading.loss
        self.update(loss, recipe.pool_rate * scale)
        self.settle(reading, rows[: len(places)], places, read)  # hard ones stand behind, and stay out
        self.live_on(right)
        self.age_blank(right)
        for kind, part in (
            ("fresh", slice(0, n_fresh)),
            ("blank", slice(n_fresh, n_fresh + n_blank)),
            ("old", slice(n_fresh + n_blank, len(places))),
            ("hard", slice(len(places), None)),
        ):
            note(right, kind, reading.right[part], reading.asked[part])
        return reading

    @torch.no_grad()
    def live_on(self, right: dict[str, float]) -> None:
        """One more segment for many states, and news for some that know nothing; the next step has those that took it
        worst."""
        recipe, rng, pool = self.recipe, self.maker.rng, self.pool_states
        known = pool.draw(rng, recipe.lived)
        blank = self.blank.draw(rng, recipe.lived // 3)
        places: list[int | None] = [*known, *[None] * len(blank)]
        memory = torch.stack([*(pool.at(place).memory for place in known), *blank])
        worlds = [*(pool.at(place).world for place in known), *[World()] * len(blank)]
        size = recipe.segment_size
        rows = [self.maker.row(size, w, self.more_news(w, [size], 0), recipe.pool.distractors) for w in worlds]
        reading = self.learner.live(memory, rows)
        self.settle(reading, rows, places, size)
        for kind, part in (("lived", slice(0, len(known))), ("told", slice(len(known), None))):
            note(right, kind, reading.right[part], reading.asked[part], 0.01)
        may_be = torch.tensor([recipe.hard_told or not (row.said or row.world == World()) for row in rows])
        badly = reading.loss.masked_fill(~may_be, -1.0)
        for i in badly.topk(min(recipe.hard, int(may_be.sum()))).indices.tolist():
            self.hard.append(Hard(memory[i], rows[i]))
            if not rows[i].said:
                self.maker.feared.append(rows[i].ids)

    def more_news(self, world: World, lengths: list[int], rest: int) -> list[tuple[int, Statement]]:
        """Always something where nothing is known yet; now and then another or a changed fact, or the second link."""
        rng, writer = self.maker.rng, self.maker.writer
        if world == World():
            return self.news(lengths, rest, self.recipe.pool)
        if len(world.links) == 1 and rng.random() < self.recipe.linked:
            return [(self.somewhere(lengths, rest), writer.another_link(rng, world.links[0]))]
        if not world.names or rng.random() >= self.recipe.later:
            return []
        fact = writer.fact(rng, int(rng.integers(len(NAMES))), int(rng.integers(len(ROOMS))))
        return [(self.somewhere(lengths, rest), fact)]

    def oldest(self) -> float:
        """Segments that states that know nothing read on average, at this point of the pool."""
        return min(4 * 2 ** (self.pool_steps_done / self.recipe.ages_double), 1600)

    def settle(self, reading: Reading, rows: list[Row], places: list[int | None], read: int) -> None:
        """Puts what the states have become into the pool, the new ones last: they may take a place."""
        memory, new = reading.memory.detach(), []
        for i, (row, place) in enumerate(zip(rows, places, strict=True)):
            if not reading.asked[i] or row.cut_at(read):
                continue
            age = read if place is None else self.pool_states.at(place).age + read
            state, right = Lived(memory[i].clone(), row.known(read), age), bool(reading.right[i])
            # A state that knows one link stays as it was: what it becomes with a second is a new one.
            if place is None or len(row.world.links) < len(state.world.links):
                new.append((state, right))
            else:
                self.pool_states.settle(self.maker.rng, place, state, right)
        for state, right in new:
            self.pool_states.settle(self.maker.rng, None, state, right)

    def noise(self, count: int, distracted: float) -> Tensor:
        """A segment without statements for each of `count` states: int64 [count, S]."""
        size = self.recipe.segment_size
        rows = [self.maker.row(size, World(), [], distracted).ids for _ in range(count)]
        return torch.from_numpy(np.stack(rows)).long()

    def unrest(self, noise: float, count: int = 8) -> Tensor:
        """How far states that know nothing go from their rest in a segment: some near it, those that went furthest."""
        blank = self.blank
        with torch.no_grad():
            blank.rest_is(self.model.fold(self.model.initial_memory(count), self.noise(count, 0.15)))
        near, moved = disturbed(blank.near(self.maker.rng, count), noise, 0.0), blank.moved
        blank.moved = []
        memory = torch.cat([near, *(one.memory[None] for one in moved)])
        if not len(memory):  # at the start all are where nothing has been read yet
            return memory.sum()
        ids = torch.cat([self.noise(count, 0.3)[: len(near)], *(one.ids[None] for one in moved)])
        return blank.far(self.model.fold(memory, ids)).mean()

    @torch.no_grad()
    def age_blank(self, right: dict[str, float]) -> None:
        """One more segment of noise for the states that know nothing; some start again."""
        blank, recipe = self.blank, self.recipe
        ids = self.noise(recipe.blank_size, recipe.pool.distractors)
        read = self.model.fold(blank.states, ids)
        if blank.rest is not None:
            stays = blank.keep_worst(read, ids, 6)
            note(right, "at rest", stays, torch.ones_like(stays))
        blank.states = read
        anew = blank.leaving(self.maker.rng, self.oldest())
        blank.states[anew] = self.model.initial_memory(int(anew.sum()))

    def save(self, figures: dict[str, object]) -> None:
        recipe = self.recipe
        figures = {**figures, "seconds": self.seconds()}
        described = {
            "command": shlex.join(["python", "recipes/train_retrieval.py", *sys.argv[1:]]),
            "seed": recipe.seed,
            "segment_size": recipe.segment_size,
            "num_mem_tokens": recipe.memory_tokens,
            "ask_template": ASK_TEMPLATE,
            "stop_ids": [self.tokenizer.eos_token_id],
            "figures": figures,
            "recipe": asdict(recipe),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        save_checkpoint(self.out, self.model, self.average.values, self.learner.base_config, self.tokenizer, described)
        self.keep()
        log(event="saved", **figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=RECIPES, default="facts")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="MODEL",
        help="the pool goes on from this converted checkpoint; one with fewer layers grows, the curriculum comes first",
    )
    parser.add_argument("--smoke", action="store_true", help="a few steps of a much smaller model on a few files")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--pool-steps", type=int, metavar="N", help="in place of the recipe's")
    parser.add_argument("--pool-rate", type=float, metavar="RATE", help="learning rate, in place of the recipe's")
    parser.add_argument("--threads", type=int, default=1, help="1 is no slower than 2 where other work runs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = replace(RECIPES[arguments.kind], seed=arguments.seed, **(TINY if arguments.smoke else {}))
    given = {name: value for name in ("pool_steps", "pool_rate") if (value := getattr(arguments, name)) is not None}
    recipe = replace(recipe, **given)
    trainer = Trainer(recipe, arguments.out, arguments.source)
    if trainer.pool_steps_done >= recipe.pool_steps:
        log(event="nothing is left to do", pool_steps=trainer.pool_steps_done)
    trainer.curriculum()
    trainer.pool()


if __name__ == "__main__":
    reported(main)
