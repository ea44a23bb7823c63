"""Sampling: the distributions of transformers' processors in their order; a seed of its own for each row."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from rmt_engine.sampler import Sampler, Sampling, filtered, penalized

VOCABULARY = 40


def theirs(logits: Tensor, seen: list[int], sampling: Sampling) -> Tensor:
    """What transformers' `generate` makes of them, its processors in its order."""
    chain = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        chain.append(logits_process.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    chain.append(logits_process.TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        chain.append(logits_process.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(logits_process.TopPLogitsWarper(sampling.top_p))
    return chain(torch.tensor([seen], dtype=torch.int64), logits[None].clone())[0]


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.floats(0.05, 4),
    top_k=st.integers(0, VOCABULARY + 5),
    top_p=st.floats(0.01, 1),
    repetition_penalty=st.sampled_from([1.0, 1.3, 2.0, 0.7]),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(sampling=SAMPLINGS, seed=st.integers(0, 10**6), ties=st.booleans())
def test_distributions_are_those_of_transformers(sampling: Sampling, seed: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(VOCABULARY, generator=generator) * 4
    if ties:
        logits = logits.round()
    seen = torch.randint(0, VOCABULARY, (7,), generator=generator)
    ours = filtered(penalized(logits, seen.unique(), sampling.repetition_penalty), sampling)
    assert torch.equal(ours.softmax(-1), theirs(logits, seen.tolist(), sampling).softmax(-1))


def test_a_seed_draws_what_transformers_draws() -> None:
    """`torch.multinomial` of the same distributions from a generator with the same seed."""
    sampling = Sampling(temperature=1.2, top_k=20, top_p=0.9, repetition_penalty=1.4, seed=11)
    steps = torch.randn(50, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 3
    sampler, seen = Sampler(sampling, [3, 4]), [3, 4]
    torch.manual_seed(11)
    for logits in steps:
        seen.append(int(torch.multinomial(theirs(logits, seen, sampling).softmax(-1), 1)))
        assert sampler(logits) == seen[-1]


def test_greedy_takes_the_likeliest_and_minds_the_penalty() -> None:
    logits = torch.tensor([1.0, 3.0, 2.9, -1.0])
    assert Sampler(Sampling())(logits) == 1
    assert Sampler(Sampling(repetition_penalty=1.5))(logits) == 1
    penalized_row = Sampler(Sampling(repetition_penalty=1.5), [1])
    assert [penalized_row(logits) for _ in range(2)] == [2, 1]  # each is seen now: 3 / 1.5 is over 2.9 / 1.5
    assert Sampling().is_greedy and not Sampling(repetition_penalty=1.5).is_greedy


def test_frequencies_are_the_distribution() -> None:
    logits = torch.tensor([0.6, 0.3, 0.1]).log()
    sampler = Sampler(Sampling(temperature=1, seed=1))
    counts = Counter(sampler(logits) for _ in range(6000))
    assert [counts[i] / 6000 for i in range(3)] == pytest.approx([0.6, 0.3, 0.1], abs=0.03)


def test_without_a_seed_each_is_another() -> None:
    logits = torch.zeros(1000)
    drawn = {tuple(sampler(logits) for _ in range(4)) for sampler in (Sampler(Sampling(1.0)) for _ in range(3))}
    assert len(drawn) == 3


@pytest.mark.parametrize(
    "options, words",
    [
        ({"temperature": -0.1}, "temperature must be at least 0; got -0.1"),
        ({"temperature": math.nan}, "temperature must be at least 0; got nan"),
        ({"top_k": -1}, "top_k must be at least 0; got -1"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1; got 0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1; got 1.1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0; got 0"),
    ],
)
def test_what_cannot_be_sampled_from(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        Sampling(**options)
