"""Text for the retrieval recipe: facts, questions, noise and the split that keeps some noise out of training.

A *fact* is one sentence ("Mary went to the garden."), the *noise* is unrelated text that hides it. Noise is tokenized
once; a fact is then put between two tokens. That is exact, not an approximation: it happens only where the tokenizer
splits its input anyway (`fact_places`), so the ids equal those of the tokenized joined text. `tests` check it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rmt_engine.evaluation.facts import NAMES, ROOMS, VERBS
from rmt_engine.evaluation.facts import Fact as Sentence

ASK_TEMPLATE = "\nQuestion: {question}\nAnswer:"
EOS = "<|endoftext|>"

# ---------------------------------------------------------------------------------------------------------- tokenizer


def tokenizer_sentences(repeats: int = 4000) -> Iterator[str]:
    """Facts and asked questions, often enough that each of their words becomes one token."""
    rng = np.random.default_rng(0)
    for _ in range(repeats):
        fact = Sentence(str(rng.choice(NAMES)), str(rng.choice(VERBS)), str(rng.choice(ROOMS)))
        asked = ASK_TEMPLATE.format(question=fact.question)
        yield f"{fact.sentence}\nthe {fact.sentence}{asked} {fact.room}"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE in the manner of GPT-2 with one special token, which ends an answer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, clean_up_tokenization_spaces=False)


def encode_files(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> np.ndarray:
    """All texts joined, as one array of ids. Each is tokenized with the line break that ends it."""
    batch = tokenizer.backend_tokenizer.encode_batch([t if t.endswith("\n") else t + "\n" for t in texts])
    return np.concatenate([np.array(encoding.ids, dtype=np.int32) for encoding in batch])


@dataclass(frozen=True)
class TokenClasses:
    """For each id of the vocabulary, what its text starts or ends with."""

    opens_word: np.ndarray  # bool [V]: a space, then something that is not a space
    opens_line: np.ndarray  # bool [V]: a line break
    ends_in_space: np.ndarray  # bool [V]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> TokenClasses:
        texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
        return cls(
            opens_word=np.array([len(t) > 1 and t[0] == " " and not t[1].isspace() for t in texts]),
            opens_line=np.array([t[:1] == "\n" for t in texts]),
            ends_in_space=np.array([t[-1:].isspace() for t in texts]),
        )


@dataclass(frozen=True)
class Fact:
    name: int  # index in NAMES
    room: int  # index in ROOMS
    inline: np.ndarray  # ids of " Mary went to the garden.", put before a word
    own_line: np.ndarray  # ids of "\nMary went to the garden.", put before a line break
    opening: np.ndarray  # ids of "Mary went to the garden.\n", put at the very start


class FactWriter:
    """Makes facts and puts them into tokenized noise."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.classes = TokenClasses.of(tokenizer)
        self.rooms = np.array([self._ids(" " + room)[-1] for room in ROOMS])
        asked = [Sentence(name, VERBS[0], ROOMS[0]).question for name in NAMES]
        self.questions = [self._ids(ASK_TEMPLATE.format(question=question)) for question in asked]
        for room in ROOMS:
            if len(self._ids(" " + room)) != 1:
                raise ValueError(f"the tokenizer splits {room!r}: train it on more fact sentences")
        self.facts = {
            (n, r): [self._fact(n, r, Sentence(name, verb, room).sentence) for verb in VERBS]
            for n, name in enumerate(NAMES)
            for r, room in enumerate(ROOMS)
        }

    def _ids(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)

    def _fact(self, name: int, room: int, sentence: str) -> Fact:
        return Fact(name, room, self._ids(" " + sentence), self._ids("\n" + sentence), self._ids(sentence + "\n"))

    def random_fact(self, rng: np.random.Generator, name: int | None = None) -> Fact:
        name = int(rng.integers(len(NAMES))) if name is None else name
        verbs = self.facts[name, int(rng.integers(len(ROOMS)))]
        return verbs[int(rng.integers(len(verbs)))]

    def sentence(self, text: str) -> Fact:
        """Any other sentence in the same three forms: a distractor."""
        return self._fact(-1, -1, text)

    def place(self, noise: np.ndarray, at: int, fact: Fact, rng: np.random.Generator) -> tuple[int, np.ndarray]:
        """Where near `at` the fact can stand, and its ids there. Half of the facts stand on a line of their own."""
        if at == 0:
            return 0, fact.opening
        around = slice(max(at - 24, 1), min(at + 24, len(noise)))
        ids, before = noise[around], noise[around.start - 1 : around.stop - 1]
        lines = np.flatnonzero(self.classes.opens_line[ids] & ~self.classes.ends_in_space[before])
        words = np.flatnonzero(self.classes.opens_word[ids])
        own_line = len(lines) > 0 and (len(words) == 0 or rng.random() < 0.5)
        places = lines if own_line else words
        if len(places) == 0:  # noise that is neither lines nor words: between any two tokens
            return at, fact.inline if rng.random() < 0.5 else fact.own_line
        nearest = places[np.argmin(np.abs(places + around.start - at))]
        return int(nearest) + around.start, fact.own_line if own_line else fact.inline


# -------------------------------------------------------------------------------------------------------------- noise

OTHER_NAMES = ("Peter", "Alice", "Bob", "Anna", "Tom", "Lucy", "Fred", "Marie", "Dan", "Johnny", "The user", "It", "He")
THINGS = ("caller", "next line", "end of the list", "server", "file", "user", "park", "house", "office door")


def distractor_sentences(rng: np.random.Generator, count: int) -> list[str]:
    """Sentences with the words of facts that say nothing about where one of NAMES is."""
    made = []
    for _ in range(count):
        name, other, verb = rng.choice(NAMES), rng.choice(OTHER_NAMES), rng.choice(VERBS)
        room, thing = rng.choice(ROOMS), rng.choice(THINGS)
        forms = (
            f"{other} {verb} to the {thing}.",
            f"The {room} is next to the {rng.choice(ROOMS)}.",
            f"{name} and {other} like the {room}.",
            f"{name} wrote this, see the {thing} for more.",
            f"Then control {verb} to the {thing}.",
            f"# {name} {rng.choice(OTHER_NAMES)} <{name.lower()}@{room}.org>",
        )
        made.append(str(forms[int(rng.integers(len(forms)))]))
    return made


class NoiseBank:
    """Endless tokenized noise of many kinds: the corpus as it stands, changed copies of it, and made-up text."""

    def __init__(self, texts: list[str], tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        rng = np.random.default_rng(seed)
        some = [texts[i] for i in rng.permutation(len(texts))[: max(len(texts) // 8, 1)]]
        kinds: list[tuple[float, list[str]]] = [
            (0.60, texts),
            (0.05, [t.upper() for t in some]),
            (0.04, [t.lower() for t in some]),
            (0.08, [" ".join(rng.permutation(t.split()).tolist()) for t in some]),
            (0.05, ["\n".join(rng.permutation(t.splitlines()).tolist()) for t in some]),
            (0.05, [" ".join(t.split()) for t in some]),
            (0.02, ["".join(rng.permutation(list(t)).tolist()) for t in some[: len(some) // 4 + 1]]),
            (0.02, [_random_unicode(rng, 20000) for _ in range(20)]),
        ]
        weights = [*(weight for weight, _ in kinds), 0.05, 0.04]  # the last two: random ids; a few ids repeated
        self._fill([encode_files(tokenizer, kind) for _, kind in kinds], np.array(weights), tokenizer)

    def _fill(self, banks: list[np.ndarray], weights: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> None:
        self.banks, self.weights = banks, weights
        self.cumulative = np.cumsum(weights) / weights.sum()
        self.vocab_size, self.eos = len(tokenizer), tokenizer.eos_token_id
        self.never = np.array([self.eos])  # ids that made-up noise must not hold

    def save(self, path: Path) -> None:
        np.savez(path, weights=self.weights, **{f"bank{i}": bank for i, bank in enumerate(self.banks)})

    @classmethod
    def load(cls, path: Path, tokenizer: PreTrainedTokenizerFast) -> NoiseBank:
        bank, stored = cls.__new__(cls), np.load(path)
        bank._fill([stored[f"bank{i}"] for i in range(len(stored.files) - 1)], stored["weights"], tokenizer)
        return bank

    def sample(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """`length` ids, now and then of two kinds in a row."""
        if length > 60 and rng.random() < 0.25:
            cut = int(rng.integers(1, length))
            return np.concatenate([self._one_kind(rng, cut), self._one_kind(rng, length - cut)])
        return self._one_kind(rng, length)

    def _one_kind(self, rng: np.random.Generator, length: int) -> np.ndarray:
        kind = int(np.searchsorted(self.cumulative, rng.random(), side="right"))
        if kind == len(self.banks):
            return self._ordinary(rng.integers(self.vocab_size, size=length))
        if kind == len(self.banks) + 1:
            few = rng.integers(self.vocab_size, size=int(rng.integers(1, 6)))
            return self._ordinary(np.resize(few, length))
        bank = self.banks[kind]
        if len(bank) <= length:
            return np.resize(bank, length)
        start = int(rng.integers(len(bank) - length))
        return bank[start : start + length]

    def _ordinary(self, ids: np.ndarray) -> np.ndarray:
        return np.where(np.isin(ids, self.never), 1, ids).astype(np.int32)


def _random_unicode(rng: np.random.Generator, length: int) -> str:
    start, stop = [(33, 127), (0xA1, 0x24F), (0x390, 0x450), (0x4E00, 0x9FA0), (0x1F300, 0x1F640)][rng.integers(5)]
    codes = rng.integers(start, stop, size=length)
    spaces = rng.random(length) < 0.15
    return "".join(" " if space else chr(code) for code, space in zip(codes, spaces, strict=True))
