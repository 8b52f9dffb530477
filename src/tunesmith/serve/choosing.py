"""Which token comes next: from what the model says, what was asked for, and what was written."""

# V vocabulary, K likeliest tokens

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

LIKELIEST = 1024
"""Tokens among which a share of the probability is looked for first: sorting the whole vocabulary takes longer than
many a model."""

NO_TOKEN = -1


class Grammar(Protocol):
    """What may be written, token by token."""

    def bar(self, logits_V: Tensor) -> None:
        """Give the tokens that may not come next the logit -inf, in place."""
        ...

    def accept(self, token_id: int) -> None: ...

    def is_complete(self) -> bool:
        """Whether nothing more may be written."""
        ...


@dataclass(frozen=True, slots=True)
class How:
    """How tokens are chosen, as `asking.Ask` says it."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is wanted, and nothing is told of it."""
        return not (self.temperature or self.presence_penalty or self.frequency_penalty) and self.logprobs is None


@dataclass(frozen=True, slots=True)
class Chosen:
    """A token, and of the probabilities before temperature and penalties its own and the highest."""

    token_id: int
    logprob: float = math.nan
    top: tuple[tuple[int, float], ...] = ()


class Chooser:
    """The choices of one answer: the same for the same seed and logits, whatever is answered beside it."""

    def __init__(self, how: How, *, index: int, grammar: Grammar | None) -> None:
        self.how = how
        self.grammar = grammar
        self._counts: Counter[int] = Counter()
        self._random = torch.Generator()
        seed = secrets.randbits(63) if how.seed is None else how.seed
        # Answers of one ask are different ones: each has the random numbers of its own index.
        self._random.manual_seed((seed * 1_000_003 + index) % 2**63)

    @property
    def is_plain(self) -> bool:
        """Whether the choice is the highest logit."""
        return self.how.is_plain and self.grammar is None

    def note(self, token_id: int) -> None:
        """A token was written."""
        self._counts[token_id] += 1
        if self.grammar is not None:
            self.grammar.accept(token_id)

    def choose(self, logits_V: Tensor) -> Chosen:
        """The next token; float32 logits, which are left alone. `NO_TOKEN` where the grammar bars all."""
        barred_V = self._penalized(logits_V)
        if self.grammar is not None:
            barred_V = barred_V.clone() if barred_V is logits_V else barred_V
            self.grammar.bar(barred_V)
            if float(barred_V.amax()) == -math.inf:
                return Chosen(NO_TOKEN)
        token_id = int(barred_V.argmax()) if self.how.temperature == 0 else self._drawn(barred_V)
        if self.how.logprobs is None:
            return Chosen(token_id)
        logprobs_V = logits_V.log_softmax(-1)
        best = logprobs_V.topk(min(self.how.logprobs, len(logprobs_V)))
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Chosen(token_id, float(logprobs_V[token_id]), top)

    def _penalized(self, logits_V: Tensor) -> Tensor:
        """As OpenAI defines it: logit - presence, if the token was written, - frequency × how often it was."""
        if not self._counts or not (self.how.presence_penalty or self.how.frequency_penalty):
            return logits_V
        ids = torch.tensor(list(self._counts), device=logits_V.device)
        times = torch.tensor(list(self._counts.values()), dtype=logits_V.dtype, device=logits_V.device)
        less = self.how.presence_penalty + self.how.frequency_penalty * times
        return logits_V.index_add(0, ids, -less)

    def _drawn(self, logits_V: Tensor) -> int:
        """A token drawn by its probability, among the likeliest that together have the share `top_p`.

        Holtzman et al., "The Curious Case of Neural Text Degeneration", arXiv 1904.09751, section 3.1.
        """
        # Above all float32 can hold, a temperature makes all tokens equal; below, the likeliest is left.
        chances_V = (logits_V.double() / self.how.temperature).softmax(-1)
        point = float(torch.rand((), generator=self._random, dtype=torch.float64))
        if self.how.top_p >= 1:
            return _at(chances_V, point)
        best_K, ids_K = chances_V.topk(min(LIKELIEST, len(chances_V)))
        if float(best_K.sum()) < self.how.top_p:
            best_K, ids_K = chances_V.sort(descending=True)
        before_K = best_K.cumsum(0) - best_K
        num = max(1, int((before_K < self.how.top_p).sum()))
        return int(ids_K[_at(best_K[:num], point)])


def _at(chances_K: Tensor, point: float) -> int:
    """Which of the chances lies at a point in [0, 1) of their sum."""
    sums_K = chances_K.cumsum(0)
    place = int(torch.searchsorted(sums_K, point * float(sums_K[-1]), right=True))
    return min(place, len(chances_K) - 1)


def choose_all(choosers: Sequence[Chooser], logits_NV: Tensor) -> list[Chosen]:
    """The next token of each answer, [N, V]."""
    best = logits_NV.argmax(-1).tolist()
    return [
        Chosen(token_id) if chooser.is_plain else chooser.choose(logits_V)
        for chooser, logits_V, token_id in zip(choosers, logits_NV, best, strict=True)
    ]
