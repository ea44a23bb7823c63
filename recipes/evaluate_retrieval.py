"""Measure how often a checkpoint still answers after so many segments of noise, many streams side by side.

    python recipes/evaluate_retrieval.py --checkpoint DIR --segments 16 256 4096 17857 --trials 100
    python recipes/evaluate_retrieval.py --checkpoint DIR --noise /usr/share/perl --suffixes .pm .pl .pod

The noise is the held-out part of Python's standard library or the text files of a folder. `start`: the fact opens the
text. `anywhere`: it stands at a random place. The question comes after the last segment and a rest of random length.
Trials of one kind share noise in groups (`--share`): what lies before a fact is then read once for the group.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from facts_data import ROOMS, FactWriter, encode_files, is_held_out, python_sources, text_files
from rmt_training import RecurrentMemoryModel
from torch import Tensor
from transformers import GPT2Config, PreTrainedTokenizerFast

NOWHERE = 1 << 60


def load_checkpoint(folder: Path, dtype: torch.dtype) -> tuple[RecurrentMemoryModel, PreTrainedTokenizerFast]:
    weights = torch.load(folder / "model_best" / "pytorch_model.bin", weights_only=True)
    config = GPT2Config.from_pretrained(folder / "base")
    model = RecurrentMemoryModel(config, len(weights["memory_cell.memory"]), dtype)
    model.load_state_dict(weights)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder / "base")


class Streams:
    """Endless texts: noise from an offset on, a fact put in at one place. Reads any part of any of them."""

    def __init__(self, noise: np.ndarray) -> None:
        self.noise = noise
        self.offset: list[int] = []
        self.place: list[int] = []
        self.fact: list[np.ndarray] = []

    def add(self, offset: int, place: int = NOWHERE, fact: np.ndarray | None = None) -> int:
        self.offset.append(offset)
        self.place.append(place)
        self.fact.append(np.zeros(0, dtype=np.int32) if fact is None else fact)
        return len(self.offset) - 1

    def read(self, stream: int, start: int, length: int) -> np.ndarray:
        at = np.arange(start, start + length)
        place, fact = self.place[stream], self.fact[stream]
        inside = at - place
        behind = np.where(inside >= len(fact), len(fact), 0)
        ids = self.noise[(self.offset[stream] + at - behind) % len(self.noise)]
        if len(fact):
            ids = np.where((inside >= 0) & (inside < len(fact)), fact[inside.clip(0, len(fact) - 1)], ids)
        return ids


class Evaluation:
    def __init__(
        self,
        model: RecurrentMemoryModel,
        writer: FactWriter,
        noise: np.ndarray,
        segment_size: int,
        trials: int,
        lengths: list[int],
        kinds: list[str],
        share: int,
        seed: int,
    ) -> None:
        self.model, self.writer, self.size = model, writer, segment_size
        self.rng = np.random.default_rng(seed)
        self.streams = Streams(noise)
        self.memory: dict[int, Tensor] = {}
        self.born: dict[int, list[tuple[int, int]]] = {}  # segment -> (stream, the stream whose memory it starts from)
        self.asked_at: dict[int, dict[int, str]] = {}  # segment -> stream -> kind
        self.answer: dict[int, tuple[int, int]] = {}  # stream -> name, room
        self.last_use: dict[int, int] = {}
        self.longest_rest = segment_size - max(len(q) for q in writer.questions)
        if "start" in kinds:
            for _ in range(trials):
                fact = writer.random_fact(self.rng)
                stream = self.streams.add(self._offset(), 0, fact.opening)
                self._plan(stream, (fact.name, fact.room), None, 0, lengths, "start")
        if "anywhere" in kinds:
            for length in lengths:
                for first in range(0, trials, share):
                    self._group(min(share, trials - first), length)

    def _offset(self) -> int:
        return int(self.rng.integers(len(self.streams.noise)))

    def _group(self, count: int, length: int) -> None:
        offset = self._offset()
        blank = self.streams.add(offset)
        self.born.setdefault(0, []).append((blank, -1))
        for _ in range(count):
            fact = self.writer.random_fact(self.rng)
            wanted = int(self.rng.integers(1, length * self.size - 10))
            around = self.streams.read(blank, max(wanted - 30, 0), 60)
            place, ids = self.writer.place(around, wanted - max(wanted - 30, 0), fact, self.rng)
            place = min(place + max(wanted - 30, 0), length * self.size - len(ids))
            stream = self.streams.add(offset, place, ids)
            segment = place // self.size
            self._plan(stream, (fact.name, fact.room), blank if segment else None, segment, [length], "anywhere")
            self.last_use[blank] = max(self.last_use.get(blank, 0), segment)

    def _plan(
        self, stream: int, answer: tuple[int, int], parent: int | None, born: int, lengths: list[int], kind: str
    ) -> None:
        self.answer[stream] = answer
        self.born.setdefault(born, []).append((stream, -1 if parent is None else parent))
        self.last_use[stream] = max(lengths)
        for length in lengths:
            self.asked_at.setdefault(length, {})[stream] = kind

    @torch.no_grad()
    def run(self, report_every: float = 60.0) -> dict[str, dict[int, list[bool]]]:
        """For each kind and length, whether each trial was answered right."""
        right: dict[str, dict[int, list[bool]]] = {}
        active: list[int] = []
        memory = self.model.initial_memory(0)
        started = reported = time.time()
        for segment in range(max(self.asked_at) + 1):
            if segment in self.asked_at:
                for kind, answers in self._ask(segment, active, memory).items():
                    right.setdefault(kind, {})[segment] = answers
                    print(json.dumps({kind: sum(answers), "of": len(answers), "segments": segment}), flush=True)
            keep = [i for i, stream in enumerate(active) if self.last_use[stream] > segment]
            newborn = self.born.get(segment, [])
            starts = [memory[active.index(p)][None] if p >= 0 else self.model.initial_memory(1) for _, p in newborn]
            # a stream whose blank parent ends here was copied above, before the parent goes
            if len(keep) < len(active) or newborn:
                memory = torch.cat([memory[keep], *starts])
                active = [active[i] for i in keep] + [stream for stream, _ in newborn]
            if active:
                ids = np.stack([self.streams.read(s, segment * self.size, self.size) for s in active])
                memory = self.model.fold(memory, torch.from_numpy(ids.astype(np.int64)))
            if time.time() - reported > report_every:
                reported = time.time()
                print(json.dumps({"segment": segment, "rows": len(active), "s": int(reported - started)}), flush=True)
        return right

    def _ask(self, segment: int, active: list[int], memory: Tensor) -> dict[str, list[bool]]:
        asked = self.asked_at[segment]
        answers: dict[str, list[bool]] = {}
        for i, stream in enumerate(active):
            if stream not in asked:
                continue
            name, room = self.answer[stream]
            rest = self.streams.read(stream, segment * self.size, int(self.rng.integers(self.longest_rest + 1)))
            ids = np.concatenate([rest, self.writer.questions[name], [self.writer.rooms[room]]])
            rows = torch.tensor([[len(ids) - 2, len(ids) - 1]])
            logits = self.model.answer_logits(memory[i : i + 1], torch.from_numpy(ids.astype(np.int64))[None], rows)
            expected = [int(self.writer.rooms[room]), self.writer.tokenizer.eos_token_id]
            answers.setdefault(asked[stream], []).append(logits[0].argmax(1).tolist() == expected)
        return answers


def read_noise(tokenizer: PreTrainedTokenizerFast, folder: Path | None, suffixes: tuple[str, ...]) -> np.ndarray:
    if folder is None:
        contents = [content for content in python_sources() if is_held_out(content)]
    else:
        contents = list(text_files(folder, suffixes))
    order = np.random.default_rng(0).permutation(len(contents))
    return encode_files(tokenizer, [contents[i].decode() for i in order])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder that train_retrieval.py wrote")
    parser.add_argument("--segments", type=int, nargs="+", default=[16, 256, 4096])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--kinds", nargs="+", choices=["start", "anywhere"], default=["start", "anywhere"])
    parser.add_argument("--noise", type=Path, help="folder of text files; default: held-out standard library")
    parser.add_argument("--suffixes", nargs="+", default=[".txt"])
    parser.add_argument("--segment-size", type=int, default=112)
    parser.add_argument("--share", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load_checkpoint(arguments.checkpoint, getattr(torch, arguments.dtype))
    noise = read_noise(tokenizer, arguments.noise, tuple(arguments.suffixes))
    print(json.dumps({"noise_tokens": len(noise), "rooms": len(ROOMS)}), flush=True)
    started = time.time()
    evaluation = Evaluation(
        model, FactWriter(tokenizer), noise, arguments.segment_size, arguments.trials, sorted(arguments.segments),
        arguments.kinds, arguments.share, arguments.seed,
    )  # fmt: skip
    right = evaluation.run()
    accuracy = {kind: {n: sum(a) / len(a) for n, a in of.items()} for kind, of in right.items()}
    print(json.dumps({"accuracy": accuracy, "seconds": round(time.time() - started, 1)}))


if __name__ == "__main__":
    main()
