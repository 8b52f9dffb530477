"""The next token: greedy, drawn, penalized, and what is told of its probability."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from transformers.generation.logits_process import TopPLogitsWarper

from tunesmith.generation import sampling
from tunesmith.generation.sampling import Sampler
from tunesmith.serve.protocol import GenerationRequest

V = 50
params = partial(GenerationRequest, "", temperature=0.0)


def logits(seed: int = 0, num: int = V) -> torch.Tensor:
    return torch.randn(num, generator=torch.Generator().manual_seed(seed)) * 3


def drawn(how: GenerationRequest, logits_V: torch.Tensor, num: int = 4000) -> Counter[int]:
    chooser = Sampler(how, index=0, grammar=None)
    return Counter(chooser.sample(logits_V).token_id for _ in range(num))


def test_temperature_zero_is_the_likeliest() -> None:
    assert drawn(params(), logits(), 3) == Counter({int(logits().argmax()): 3})


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_by_their_probability(temperature: float) -> None:
    found = drawn(params(temperature=temperature, seed=1), logits())
    chances = (logits().double() / temperature).softmax(-1)
    for token_id, chance in enumerate(chances.tolist()):
        # Four standard deviations of a binomial of 4,000 draws, and one draw.
        assert abs(found[token_id] - 4000 * chance) <= 4 * math.sqrt(4000 * chance * (1 - chance)) + 1


@pytest.mark.parametrize(("top_p", "likeliest"), [(0.01, 2), (0.5, 1024), (0.9, 2), (0.999, 1024)])
def test_a_share_is_that_of_transformers(top_p: float, likeliest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "MOST_LIKELY", likeliest)
    warped = TopPLogitsWarper(top_p)(None, logits()[None])[0]
    allowed = set(torch.isfinite(warped).nonzero()[:, 0].tolist())
    assert set(drawn(params(temperature=1.0, top_p=top_p, seed=2), logits())) <= allowed
    flat = torch.zeros(4)
    assert len(drawn(params(temperature=1.0, top_p=0.6, seed=3), flat)) == 3  # 0.25 + 0.25 is less than 0.6


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_extreme_temperatures_are_their_limits(temperature: float) -> None:
    found = drawn(params(temperature=temperature, seed=4), logits())
    assert set(found) == {int(logits().argmax())} if temperature < 1 else len(found) == V


def test_penalties_are_taken_from_what_was_written() -> None:
    """presence once, frequency each time; the told probability is that before both."""
    logits_V = torch.tensor([2.0, 1.9, 1.0, -5.0])
    chooser = Sampler(params(presence_penalty=0.2, frequency_penalty=0.5, logprobs=2), index=0, grammar=None)
    written = []
    for _ in range(5):
        chosen = chooser.sample(logits_V)
        chooser.accept(chosen.token_id)
        written.append(chosen.token_id)
        assert chosen.logprob == pytest.approx(float(logits_V.log_softmax(-1)[chosen.token_id]), abs=1e-6)
        assert [token_id for token_id, _ in chosen.top] == [0, 1]
    # 2.0, 1.9 | 1.3, 1.9 | 1.3, 1.2 | 0.8, 1.2 | 0.8, 0.7, 1.0
    assert written == [0, 1, 0, 1, 2]


def test_no_logprobs_but_the_tokens_own() -> None:
    chosen = Sampler(params(logprobs=0), index=0, grammar=None).sample(logits())
    assert chosen.top == ()
    assert chosen.logprob == pytest.approx(float(logits().log_softmax(-1).max()))


def test_a_seed_gives_each_index_its_own_numbers() -> None:
    def first(seed: int | None, index: int) -> list[int]:
        chooser = Sampler(params(temperature=3.0, seed=seed), index=index, grammar=None)
        return [chooser.sample(logits()).token_id for _ in range(20)]

    assert first(5, 0) == first(5, 0)
    assert len({tuple(first(seed, index)) for seed in (5, 6, -1, 2**63) for index in (0, 1)}) == 8
    assert first(None, 0) != first(None, 0)


def test_a_grammar_bars_tokens_and_logits_stay() -> None:
    class Only:
        accepted: list[int]

        def __init__(self) -> None:
            self.accepted = []

        def mask(self, logits_V: torch.Tensor) -> None:
            logits_V[torch.arange(V) != 7] = float("-inf")

        def accept(self, token_id: int) -> None:
            self.accepted.append(token_id)

        def is_complete(self) -> bool:
            return False

    grammar: Any = Only()
    given = torch.stack([logits(), logits(1)])
    before = given.clone()
    choosers = [Sampler(params(), index=0, grammar=grammar), Sampler(params(), index=0, grammar=None)]
    assert [one.sample(logits_V).token_id for one, logits_V in zip(choosers, given, strict=True)] == [
        7,
        int(logits(1).argmax()),
    ]
    assert torch.equal(given, before)
    choosers[0].accept(7)
    assert grammar.accepted == [7]
