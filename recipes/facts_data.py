"""Text for the retrieval recipe: what is said and asked, the noise that hides it, the tokenizer.

A *fact* says where somebody went ("Mary went to the garden."), a *link* how two rooms lie ("The hallway is east of the
bathroom."), the *noise* is unrelated text. Noise is tokenized once; a statement is then put between two tokens where
the tokenizer splits its input anyway (`StatementWriter.place`), so that the ids equal those of the tokenized joined
text; `tests` check it. They may differ in noise without words or lines, and before a text that begins with spaces.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rmt_engine.evaluation.facts import DIRECTIONS, NAMES, OPPOSITE, ROOMS, VERBS, Fact, Relation, furthest_question
from rmt_engine.memory import write_atomically

ASK_TEMPLATE = "\nQuestion: {question}\nAnswer:"
EOS = "<|endoftext|>"
FRAME = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}  # what an encoder has besides
BACK = tuple(DIRECTIONS.index(OPPOSITE[way]) for way in DIRECTIONS)


@dataclass(frozen=True)
class World:
    """What a text has said. rooms: of each name, -1 where unknown. links: (x, d, y), x lies in direction d of y."""

    rooms: tuple[int, ...] = (-1,) * len(NAMES)
    links: tuple[tuple[int, int, int], ...] = ()

    def told(self, says: tuple[int, ...]) -> World:
        """After a fact (name, room), a link (x, d, y) or a sentence that says nothing ()."""
        if len(says) == 2:
            return World(tuple(says[1] if n == says[0] else r for n, r in enumerate(self.rooms)), self.links)
        return World(self.rooms, (*self.links, (says[0], says[1], says[2]))) if says else self

    @property
    def names(self) -> list[int]:
        return [name for name, room in enumerate(self.rooms) if room >= 0]

    def ends(self, way: int) -> tuple[int, int]:
        """The rooms furthest in direction `way` and in the opposite one, on the line that the links make."""
        turned = [(x, y) if d == way else (y, x) for x, d, y in self.links]
        ahead, behind = ({pair[side] for pair in turned} for side in (0, 1))
        (first,), (last,) = ahead - behind, behind - ahead
        return first, last

    @property
    def known(self) -> list[tuple[int, ...]]:
        """Who is where, and which room a link puts how."""
        facts = [(name, self.rooms[name]) for name in self.names]
        return facts + [(way, *pair) for near, way, far in self.links for pair in ((0, near), (1, far))]


# ---------------------------------------------------------------------------------------------------------- tokenizer


def tokenizer_sentences(repeats: int = 4000) -> Iterator[str]:
    """Facts and asked questions, often enough that each of their words becomes one token."""
    rng = np.random.default_rng(0)
    for _ in range(repeats):
        fact = Fact(str(rng.choice(NAMES)), str(rng.choice(VERBS)), str(rng.choice(ROOMS)))
        asked = ASK_TEMPLATE.format(question=fact.question)
        yield f"{fact.sentence}\nthe {fact.sentence}{asked} {fact.room}"
        relation = Relation(*(str(rng.choice(words)) for words in (ROOMS, DIRECTIONS, ROOMS)))
        asked = ASK_TEMPLATE.format(question=furthest_question(relation.direction))
        yield f"{relation.sentence}\n{relation.sentence}{asked} {relation.other}"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE in the manner of GPT-2. One special token ends an answer, three frame an encoder's segment."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, *FRAME.values()],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, **FRAME, clean_up_tokenization_spaces=False)


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
class Statement:
    """One sentence. says: what it tells the World; inline and own_line stand before a word or line, opening at 0."""

    says: tuple[int, ...]
    inline: np.ndarray
    own_line: np.ndarray
    opening: np.ndarray


class StatementWriter:
    """Makes statements and questions as ids, and puts statements into tokenized noise."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.classes = TokenClasses.of(tokenizer)
        self.answers = np.array([self._word(room) for room in ROOMS])
        where = [Fact(name, VERBS[0], ROOMS[0]).question for name in NAMES]
        self.asked_where = [self._asked(question) for question in where]
        self.asked_plainly = [self.statement(question) for question in where]
        self.asked_furthest = [self._asked(furthest_question(way)) for way in DIRECTIONS]
        self.facts = {
            (n, r): [self.statement(Fact(name, verb, room).sentence, (n, r)) for verb in VERBS]
            for n, name in enumerate(NAMES)
            for r, room in enumerate(ROOMS)
        }
        self.links = {
            (x, way, y): self.statement(Relation(ROOMS[x], DIRECTIONS[way], ROOMS[y]).sentence, (x, way, y))
            for x, way, y in itertools.product(range(len(ROOMS)), range(len(DIRECTIONS)), range(len(ROOMS)))
        }

    def _ids(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)

    def _asked(self, question: str) -> np.ndarray:
        return self._ids(ASK_TEMPLATE.format(question=question))

    def _word(self, word: str) -> int:
        ids = self._ids(f" {word}")
        if len(ids) != 1:
            raise ValueError(f"the tokenizer splits {word!r}: train it on more sentences")
        return int(ids[0])

    def statement(self, text: str, says: tuple[int, ...] = ()) -> Statement:
        return Statement(says, self._ids(f" {text}"), self._ids(f"\n{text}"), self._ids(f"{text}\n"))

    def fact(self, rng: np.random.Generator, name: int, room: int) -> Statement:
        verbs = self.facts[name, room]
        return verbs[int(rng.integers(len(verbs)))]

    def chain(self, rng: np.random.Generator, count: int = 2) -> list[Statement]:
        """`count` links, each of which shares a room with the one before: rooms in a line, each link said from either
        side, in any order."""
        rooms = [int(room) for room in rng.permutation(len(ROOMS))[: count + 1]]
        way = int(rng.integers(len(DIRECTIONS)))
        said = []
        for near, far in itertools.pairwise(rooms):
            said.append(self._told(rng, near, way, far))
        return [said[i] for i in rng.permutation(count)]

    def another_link(self, rng: np.random.Generator, link: tuple[int, int, int]) -> Statement:
        """A link that puts a third room at either end of a told one's line."""
        near, way, far = link
        third = int(rng.choice([room for room in range(len(ROOMS)) if room not in (near, far)]))
        ahead, behind = (third, near) if rng.random() < 0.5 else (far, third)
        return self._told(rng, ahead, way, behind)

    def _told(self, rng: np.random.Generator, near: int, way: int, far: int) -> Statement:
        """A link, told from either end."""
        return self.links[(far, BACK[way], near) if rng.random() < 0.5 else (near, way, far)]

    def questions(self, world: World) -> list[tuple[np.ndarray, int]]:
        """Everything that can be asked, with the id of the answer: where each name is, which rooms end the line."""
        asked = [(self.asked_where[name], world.rooms[name]) for name in world.names]
        if world.links:
            way = world.links[0][1]
            first, last = world.ends(way)
            asked.append((self.asked_furthest[way], first))
            asked.append((self.asked_furthest[BACK[way]], last))
        return [(question, int(self.answers[room])) for question, room in asked]

    def place(self, noise: np.ndarray, at: int, said: Statement, rng: np.random.Generator) -> tuple[int, np.ndarray]:
        """Where near `at` the statement can stand, and its ids there. Half of them stand on a line of their own."""
        if at == 0:
            return 0, said.opening
        around = slice(max(at - 24, 1), min(at + 24, len(noise)))
        ids, before = noise[around], noise[around.start - 1 : around.stop - 1]
        lines = np.flatnonzero(self.classes.opens_line[ids] & ~self.classes.ends_in_space[before])
        words = np.flatnonzero(self.classes.opens_word[ids])
        own_line = len(lines) > 0 and (len(words) == 0 or rng.random() < 0.5)
        places = lines if own_line else words
        if len(places) == 0:  # noise that is neither lines nor words: between any two tokens
            return at, said.inline if rng.random() < 0.5 else said.own_line
        nearest = places[np.argmin(np.abs(places + around.start - at))]
        return int(nearest) + around.start, said.own_line if own_line else said.inline


# -------------------------------------------------------------------------------------------------------------- noise

OTHER_NAMES = ("Peter", "Alice", "Bob", "Anna", "Tom", "Lucy", "Fred", "Marie", "Dan", "Johnny", "The user", "It", "He")
BESIDE = ("sink", "door", "location", "is", "size", "and", "of", "suite", "table")
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
            f"{room}",
            f"the {room} {rng.choice(BESIDE)}",
            f"See {name}, {room}.",
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
        self.never = np.array(tokenizer.all_special_ids)  # ids that made-up noise must not hold

    def save(self, path: Path) -> None:
        """The file replaced in one move."""
        stored = io.BytesIO()
        np.savez(stored, weights=self.weights, **{f"bank{i}": bank for i, bank in enumerate(self.banks)})
        write_atomically(path, stored.getvalue())

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
        allowed = np.setdiff1d(np.arange(self.vocab_size), self.never)
        return np.where(np.isin(ids, self.never), allowed[ids % len(allowed)], ids).astype(np.int32)


def _random_unicode(rng: np.random.Generator, length: int) -> str:
    start, stop = [(33, 127), (0xA1, 0x24F), (0x390, 0x450), (0x4E00, 0x9FA0), (0x1F300, 0x1F640)][rng.integers(5)]
    codes = rng.integers(start, stop, size=length)
    spaces = rng.random(length) < 0.15
    return "".join(" " if space else chr(code) for code, space in zip(codes, spaces, strict=True))
