"""Give a causal language model memory tokens: truncated backpropagation, a curriculum over segments.

    python recipes/train_lm.py --out DIR                     # a small fresh Llama
    python recipes/train_lm.py --from gpt2/ --text books/ --out DIR --device cuda   # a pre-trained Hugging Face folder
    python recipes/train_lm.py --out DIR --smoke             # a few steps of a tiny model

Writes `DIR/model_best/pytorch_model.bin` (the authors' names), `DIR/base/` (config, tokenizer), `DIR/held_out/` (texts
that training never saw) and `DIR/recipe.json`; `DIR/training/` is what a run that was cut off goes on from.

Documents are read side by side, `--bptt` segments a step with gradients; the memory state is carried on to the next
step without them, until the horizon of the curriculum: 1, 2, 4, ... segments. The loss is that of every token.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from copying_init import small_llama
from facts_data import train_tokenizer
from lm_data import DocumentStreams, documents, encode
from rmt_training import OneRun, RecurrentDecoder, log, reported, save_checkpoint, save_tokenizer, save_whole
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)


@dataclass(frozen=True)
class Recipe:
    seed: int = 7
    segment_size: int = 16  # short, so that what the memory holds is more than the text at hand
    memory_tokens: int = 8
    batch: int = 16
    bptt: int = 8  # segments with gradients in one step, at most
    horizons: tuple[int, ...] = (1, 2, 4, 8, 32)
    shares: tuple[float, ...] = (0.1, 0.1, 0.15, 0.4, 0.25)  # of the steps, for each horizon
    steps: int = 4000
    rate: float = 2e-3
    warmup: int = 100
    save_every: int = 200
    # of a fresh model
    layers: int = 3
    heads: int = 8
    width: int = 128
    inner: int = 256
    vocab_size: int = 2048

    def horizon(self, step: int) -> int:
        ends = np.cumsum(self.shares) * self.steps
        return self.horizons[min(int(np.searchsorted(ends, step, side="right")), len(self.horizons) - 1)]

    def rate_at(self, step: int) -> float:
        """Warm-up, then a cosine down to a tenth."""
        done = min(step / self.steps, 1.0)
        return self.rate * min(1.0, (step + 1) / self.warmup) * (0.55 + 0.45 * math.cos(math.pi * done))


TINY = {
    "segment_size": 16, "memory_tokens": 4, "batch": 4, "bptt": 2, "horizons": (1, 2, 4, 8),
    "shares": (0.25, 0.25, 0.25, 0.25), "steps": 8, "save_every": 4, "layers": 2, "heads": 2, "width": 32, "inner": 48,
    "vocab_size": 400,
}  # fmt: skip


def fresh_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return small_llama(
        tokenizer,
        layers=recipe.layers,
        heads=recipe.heads,
        width=recipe.width,
        inner=recipe.inner,
        positions=recipe.segment_size + 2 * recipe.memory_tokens,
        theta=100.0,
    )


def segment_losses(model: RecurrentDecoder, memory: Tensor, ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Reads the segments of ids [B, K·S]: the loss of every token [B, K, S], and the memory state after them.

    A segment predicts its first token from the read memory alone.
    """
    losses = []
    for start in range(0, ids.shape[1], size):
        text = ids[:, start : start + size]
        hidden, memory = model.segment(memory, text)
        logits = model.logits(hidden[:, model.memory_tokens - 1 : -1])
        losses.append(F.cross_entropy(logits.flatten(0, 1).float(), text.flatten(), reduction="none").view(text.shape))
    return torch.stack(losses, dim=1), memory


class Trainer:
    def __init__(
        self, recipe: Recipe, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
        training: list[np.ndarray], out: Path, device: str,
    ) -> None:  # fmt: skip
        self.recipe, self.tokenizer, self.out, self.device = recipe, tokenizer, out, device
        self.base_config = json.loads(backbone.config.to_json_string(use_diff=False))
        self.model = RecurrentDecoder(backbone, recipe.memory_tokens).to(device).train()
        self.streams = DocumentStreams(training, recipe.batch, recipe.segment_size, recipe.seed)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.01
        )
        self.memory = self.model.initial_memory(recipe.batch).detach()
        self.step, self.started = 0, time.time()
        self.work = out / "training"
        self.work.mkdir(parents=True, exist_ok=True)
        if (self.work / "state.pt").exists():
            self.resume()

    def seconds(self) -> float:
        """Of all runs that led here."""
        return round(time.time() - self.started, 1)

    def train(self) -> None:
        recipe, mean, seen = self.recipe, 0.0, 0
        while self.step < recipe.steps:
            loss = float(self.train_step())
            seen += 1  # in this run: one that goes on begins its mean anew
            mean += (loss - mean) * max(0.02, 1 / seen)
            if self.step % 25 == 0:
                log(step=self.step, horizon=recipe.horizon(self.step), loss=round(mean, 4), seconds=self.seconds())
            if self.step % recipe.save_every == 0 or self.step == recipe.steps:
                self.save()

    def train_step(self) -> Tensor:
        recipe = self.recipe
        horizon = recipe.horizon(self.step)
        ids, new = self.streams.next(min(recipe.bptt, horizon), horizon)
        first = self.model.initial_memory(recipe.batch)
        memory = torch.where(torch.from_numpy(new).to(self.device)[:, None, None], first, self.memory)
        losses, memory = segment_losses(self.model, memory, torch.from_numpy(ids).to(self.device), recipe.segment_size)
        loss = losses.mean()
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate_at(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.memory = memory.detach()
        self.step += 1
        return loss.detach()

    def save(self) -> None:
        described = {
            "command": shlex.join(["python", "recipes/train_lm.py", *sys.argv[1:]]),
            "segment_size": self.recipe.segment_size,
            "num_mem_tokens": self.recipe.memory_tokens,
            "steps": self.step,
            "seconds": self.seconds(),
            "recipe": asdict(self.recipe),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        save_checkpoint(self.out, self.model, {}, self.base_config, self.tokenizer, described)
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "seconds": self.seconds(),
        }
        save_whole(state, self.work / "state.pt")

    def resume(self) -> None:
        state = torch.load(self.work / "state.pt", weights_only=True, map_location=self.device)
        self.step = state["step"]
        self.started -= state["seconds"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.streams.rng = np.random.default_rng([self.recipe.seed, self.step])


@torch.no_grad()
def perplexities(
    model: RecurrentDecoder, held_out: list[np.ndarray], size: int, counts: tuple[int, ...], windows: int, seed: int
) -> dict[str, object]:
    """Perplexity of the same target segments after each count of segments read before, and after a reset memory.

    Each window is one document's: max(counts) segments, then the target. After a reset the memory holds nothing of
    them: the target alone is read. The interval is that of the mean paired difference in nats between the first count
    and the last.
    """
    rng, most = np.random.default_rng(seed), max(counts)
    length = (most + 1) * size
    longest = [document for document in held_out if len(document) >= length]
    losses: dict[int, list[Tensor]] = {count: [] for count in (0, *counts)}
    device = model.memory_cell.memory.device
    for _ in range(math.ceil(windows / 32)):
        rows = []
        for _ in range(32):
            document = longest[int(rng.integers(len(longest)))]
            start = int(rng.integers(len(document) - length + 1))
            rows.append(document[start : start + length])
        ids = torch.from_numpy(np.stack(rows)).to(device)
        for count in losses:
            read = segment_losses(model, model.initial_memory(32), ids[:, (most - count) * size :], size)[0]
            losses[count].append(read[:, -1].mean(dim=1))
    means = {count: torch.cat(parts).double() for count, parts in losses.items()}
    gain = means[counts[0]] - means[counts[-1]]
    half = 1.96 * float(gain.std()) / math.sqrt(len(gain))
    return {
        "windows": len(gain),
        "perplexity_after": {count: round(math.exp(float(mean.mean())), 3) for count, mean in means.items() if count},
        "perplexity_after_reset": round(math.exp(float(means[0].mean())), 3),
        "lower_by_percent": [round(100 * (1 - math.exp(-x)), 2) for x in _around(float(gain.mean()), half)],
    }


def _around(mean: float, half: float) -> tuple[float, float, float]:
    return mean - half, mean, mean + half


def keep_held_out(folder: Path, texts: list[str], shortest: int, most: int = 200) -> None:
    """The longest held-out documents as text files, for `rmt-engine eval perplexity`."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(sorted((t for t in texts if len(t) >= shortest), key=len, reverse=True)[:most]):
        (folder / f"{i:03d}.txt").write_text(text)


def load_backbone(
    arguments: argparse.Namespace, recipe: Recipe, texts: list[str], work: Path
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The backbone and its tokenizer: those of `--from`, or fresh ones."""
    if arguments.source is not None:
        # fp32 whatever it was saved in: memory tokens are, and so are the optimizer's steps
        backbone = AutoModelForCausalLM.from_pretrained(arguments.source, dtype=torch.float32)
        return backbone, AutoTokenizer.from_pretrained(arguments.source)
    if (work / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(work)
    else:
        tokenizer = train_tokenizer(texts[::4] if len(texts) > 400 else texts, recipe.vocab_size)
    return fresh_model(recipe, tokenizer), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument(
        "--from", dest="source", type=Path, help="a Hugging Face causal LM folder (default: a small fresh Llama)"
    )
    parser.add_argument(
        "--text", type=Path, help="a folder of texts, or one long text (default: the docstrings of what is installed)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="a few steps of a tiny model on a few documents")
    for name in ("seed", "segment_size", "memory_tokens", "batch", "bptt", "steps", "rate"):
        default = getattr(Recipe, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), help=f"default {default}")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    given = {k: v for k, v in vars(arguments).items() if k in Recipe.__dataclass_fields__ and v is not None}
    recipe = replace(Recipe(), **{**(TINY if arguments.smoke else {}), **given})
    torch.manual_seed(recipe.seed)
    training, held_out = documents(arguments.text)
    if arguments.smoke:
        training, held_out = training[:40], held_out[:40]
    work = arguments.out / "training"
    work.mkdir(parents=True, exist_ok=True)
    sources = {"--from": arguments.source, "--text": arguments.text}
    this_run = OneRun(work / "run.json", asdict(recipe), "steps", sources)
    backbone, tokenizer = load_backbone(arguments, recipe, training, work)
    size = recipe.segment_size
    ids = encode(tokenizer, training, recipe.bptt * size, "to train on")
    held_out_ids = encode(tokenizer, held_out, (max(recipe.horizons) + 1) * size, "held out")
    log(event="start", documents=len(ids), tokens=sum(map(len, ids)), held_out=len(held_out_ids))
    this_run.keep()
    if arguments.source is None:
        save_tokenizer(tokenizer, work)
    trainer = Trainer(recipe, backbone, tokenizer, ids, arguments.out, arguments.device)
    trainer.train()
    keep_held_out(arguments.out / "held_out", held_out, shortest=size * 32)
    trainer.model.eval()
    log(
        **perplexities(trainer.model, held_out_ids, size, recipe.horizons, 64 if arguments.smoke else 2048, recipe.seed)
    )


if __name__ == "__main__":
    reported(main)
