"""The settings of the retrieval recipes: stages of a curriculum, and what each kind of checkpoint is trained with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class News:
    """What a row is told that knows nothing. facts: as many names at most, `fewest` at least, but one in a share of
    `lone`; again: how often a name's room changes; links: the share of rows with `chain` links in place of facts;
    apart: how often a second link is left for a later step; distractors: the share of rows with sentences that look
    like statements, also of rows that know something."""

    facts: int = 1
    fewest: int = 1
    lone: float = 0.0
    again: float = 0.0
    links: float = 0.0
    chain: int = 2
    apart: float = 0.0
    distractors: float = 0.25


@dataclass(frozen=True)
class Stage:
    """segments: as many at most are folded before the last; size: tokens of one; enough: right answers, to go on."""

    segments: int
    size: int
    news: News
    enough: float = 0.93


@dataclass
class Recipe:
    kind: str = "decoder"
    seed: int = 7
    data_seed: int = 7  # of the tokenizer and the noise
    segment_size: int = 112
    memory_tokens: int = 8
    layers: int = 3
    heads: int = 8
    width: int = 128
    inner: int = 256
    positions: int = 256
    rope_theta: float = 100.0
    vocab_size: int = 2048
    batch: int = 24
    questions: int = 2
    warmup: int = 50
    curriculum_rate: float = 2e-3
    curriculum_steps: int = 9000  # at most; ends once every stage is learned
    must_learn: bool = True  # a curriculum that is not learned by then is an error
    stages: tuple[Stage, ...] = ()
    pool: News = News()
    pool_rate: float = 1e-3
    pool_steps: int = 4300
    pool_size: int = 192
    patience: float = 0.5  # how often a state that answered wrong stays in the pool
    renewed: float = 0.05  # how often a new state takes another's place where none is free
    blank_size: int = 32
    lived: int = 96  # states that read a segment without gradients, each step, and a third as many that are told news
    hard: int = 5  # rows of a batch for the worst of them
    hard_told: bool = True  # those that were told something may be the worst; else only those that had to hold on
    quiet: float = 0.0  # weight of the squared distance of states that know nothing from their rest
    fear: float = 0.2  # how often noise is some that one of those took badly
    ages_double: float = 100  # steps in which states that know nothing grow twice as old, from 4 segments on
    memory_noise: float = 0.4
    memory_mix: float = 0.25
    noise_from: float = 0.0  # what share of both is there at the start of the pool
    noise_grows: int = 1000  # steps of the pool until both are reached
    grown_rate: float = 0.6  # times the rate: what weights that were trained before are changed with, in a deeper model
    later: float = 0.05  # how often a row that knows facts reads one more
    linked: float = 0.1  # how often a row that knows one link reads the second
    cut: float = 0.3  # how often a statement is put where a border may cut it
    average: float = 0.995
    save_every: int = 100
    max_files: int = 0  # 0: all


# Where people are, in two layers: a look back, then a lookup.
FACTS = Recipe(
    layers=2,
    stages=(
        # Two facts, no fewer: the room of a lone one is known without looking who is asked for.
        Stage(0, 32, News(2, fewest=2, distractors=0.0)),
        Stage(0, 48, News(4, fewest=2, distractors=0.0)),
        Stage(1, 48, News(4, fewest=2, distractors=0.0)),
        Stage(1, 48, News(4)),
        Stage(1, 112, News(4, again=0.1)),
        Stage(2, 112, News(4, again=0.1), enough=0.8),  # the pool teaches the rest
    ),
    pool=News(4, lone=0.6, again=0.05, distractors=0.15),
    cut=0.5,
)
# How rooms lie, in three: two do not learn whether the asked direction is the told one or its opposite. A few texts
# about people keep what a model of people knows, from which it starts.
LINKS = Recipe(
    layers=3,
    stages=(
        Stage(0, 32, News(2, links=0.85, chain=1, distractors=0.0)),
        Stage(1, 48, News(2, lone=0.5, links=0.85, chain=1, distractors=0.0)),
        Stage(1, 48, News(2, lone=0.5, links=0.85, apart=0.2, distractors=0.0)),
        # The second link in a later segment: the memory has to be read while it is written.
        Stage(3, 48, News(2, lone=0.5, links=0.9, apart=0.05), enough=0.97),
        Stage(3, 112, News(2, lone=0.5, links=0.9, apart=0.1), enough=0.95),
    ),
    curriculum_rate=1e-3,
    pool=News(2, lone=0.5, links=0.95, apart=0.4, distractors=0.15),
    pool_steps=3600,
    pool_rate=3e-4,
    patience=0.0,
    lived=72,
    hard=4,
    hard_told=False,  # a first link takes both ends: with many of those a second one does, too
    quiet=1.0,
    memory_mix=0.2,
    noise_from=0.5,
    noise_grows=2500,
    linked=0.3,
)
ENCODER = Recipe(
    kind="encoder", segment_size=117, layers=2, heads=8, width=96, inner=192, positions=128, batch=32,
    curriculum_rate=1e-3, average=0.998, later=0.0, pool_steps=2700,
    stages=tuple(Stage(segments, 117, News()) for segments in range(4)),
)  # fmt: skip
RECIPES = {"facts": FACTS, "links": LINKS, "encoder": ENCODER}
TINY = {
    "layers": 2, "width": 32, "heads": 2, "inner": 48, "vocab_size": 700, "batch": 4, "curriculum_steps": 4,
    "must_learn": False, "pool_steps": 4, "pool_size": 8, "blank_size": 4, "lived": 4, "hard": 1, "save_every": 4,
    "max_files": 24,
}  # fmt: skip
