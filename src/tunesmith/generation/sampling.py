"""The next token of an answer: greedy or drawn, with penalties, and only what a JSON
schema allows; and its text."""

# V vocabulary, K most likely tokens

from __future__ import annotations

import json
import math
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tunesmith.generation.requests import GenerationRequest, RequestError, Token
from tunesmith.types import JsonObject, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT = 16
"""Prompt tokens decoded with an answer's first ones: for some tokenizers they decide
about its first white space."""
LONGEST_CHARACTER = 6
"""Tokens after which bytes that are not a character are taken as they are; UTF-8 needs four."""
_BROKEN = "\N{REPLACEMENT CHARACTER}"
MOST_LIKELY = 1024
"""Tokens among which top-p looks first: sorting the whole vocabulary takes longer than many a model."""
MIN_LOGPROB = -9999.0
"""OpenAI's value for the logarithm of a probability of 0."""
ROWS_TOGETHER = 32
"""Answers whose tokens are drawn together: their probabilities are float64."""
MAX_SCHEMA_CHARS = 32_768
_JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "coerce_one_of": False}


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token, its log probability before temperature and penalties, and the most likely tokens with theirs. Of
    an answer that is kept: the log probability in the distribution that it was drawn from."""

    token_id: int
    logprob: float = math.nan
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Samples one answer: the same tokens for the same seed and logits, whatever else is in the batch.

    `keeps`: its log-probabilities are found too.
    """

    def __init__(self, params: GenerationRequest, *, index: int, grammar: Grammar | None, keeps: bool = False) -> None:
        self.params = params
        self.grammar = grammar
        self.keeps = keeps
        self._counts: Counter[int] = Counter()
        self._random = torch.Generator()
        seed = secrets.randbits(63) if params.seed is None else params.seed
        self._random.manual_seed((seed * 1_000_003 + index) % 2**63)  # answers of one request differ

    @property
    def is_plain(self) -> bool:
        """Whether the next token is the likeliest, or drawn from all tokens by their
        probability, and nothing else is asked."""
        params = self.params
        alters = self.grammar is not None or params.presence_penalty or params.frequency_penalty
        return not alters and params.logprobs is None and (self.is_greedy or params.top_p >= 1)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.params.temperature == 0 and not self.keeps

    def point(self) -> float:
        """The next random number in [0, 1)."""
        return float(torch.rand((), generator=self._random, dtype=torch.float64))

    def accept(self, token_id: int) -> None:
        """Record a token that was written."""
        self._counts[token_id] += 1
        if self.grammar is not None:
            self.grammar.accept(token_id)

    def sample(self, logits_V: Tensor) -> SampledToken:
        """The next token, from float32 logits, which are not changed.

        Raises RequestError for logits that are not finite, and where the grammar allows no token.
        """
        if not math.isfinite(float(logits_V.amax())):
            message = "the model's logits are not finite: its precision may be too low for it"
            raise RequestError(message, status=500, code="non_finite")
        masked_V = self._penalized(logits_V)
        if self.grammar is not None:
            masked_V = masked_V.clone() if masked_V is logits_V else masked_V
            self.grammar.mask(masked_V)
            if float(masked_V.amax()) == -math.inf:
                message = "no token may follow here: the schema cannot be met by what this model writes"
                raise RequestError(message, code="invalid_schema")
        token_id = int(masked_V.argmax()) if self.params.temperature == 0 else self._draw(masked_V)
        if self.keeps:
            return SampledToken(token_id, float((logits_V / self.params.temperature).log_softmax(-1)[token_id]))
        if self.params.logprobs is None:
            return SampledToken(token_id)
        logprobs_V = logits_V.log_softmax(-1)
        best = logprobs_V.topk(min(self.params.logprobs, len(logprobs_V)))
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return SampledToken(token_id, float(logprobs_V[token_id]), top)

    def _penalized(self, logits_V: Tensor) -> Tensor:
        """As OpenAI defines it: logit - presence, if the token was written, - frequency x number of times."""
        params = self.params
        if not self._counts or not (params.presence_penalty or params.frequency_penalty):
            return logits_V
        ids = torch.tensor(list(self._counts), device=logits_V.device)
        times = torch.tensor(list(self._counts.values()), dtype=logits_V.dtype, device=logits_V.device)
        return logits_V.index_add(0, ids, -(params.presence_penalty + params.frequency_penalty * times))

    def _draw(self, logits_V: Tensor) -> int:
        """A token drawn by its probability, among the most likely ones that together have `top_p`.

        Holtzman et al., "The Curious Case of Neural Text Degeneration", arXiv 1904.09751, section 3.1.
        """
        # Temperatures beyond float32 make all tokens equal, or leave the most likely one.
        logits_V = logits_V.cpu() if logits_V.is_mps else logits_V  # which has no float64
        probs_V = (logits_V.double() / self.params.temperature).softmax(-1)
        point = self.point()
        if self.params.top_p >= 1:
            return _at(probs_V, point)
        best_K, ids_K = probs_V.topk(min(MOST_LIKELY, len(probs_V)))
        if float(best_K.sum()) < self.params.top_p:
            best_K, ids_K = probs_V.sort(descending=True)
        before_K = best_K.cumsum(0) - best_K
        num = max(1, int((before_K < self.params.top_p).sum()))
        return int(ids_K[_at(best_K[:num], point)])


def _at(probs_K: Tensor, point: float) -> int:
    """The index at a point in [0, 1) of the cumulated probabilities."""
    sums_K = probs_K.cumsum(0)
    place = int(torch.searchsorted(sums_K, point * float(sums_K[-1]), right=True))
    return min(place, len(probs_K) - 1)


def sample_together(samplers: Sequence[Sampler], logits_NV: Tensor) -> list[SampledToken | RequestError]:
    """The next token of each answer, or why there is none: the tokens, bit for bit, that each draws by itself.

    Likeliest tokens and plain draws are found together, so that a device is waited for once for
    all of them and not once for each.
    """
    tokens: dict[int, SampledToken | RequestError] = {}
    plain = [n for n, sampler in enumerate(samplers) if sampler.is_plain]
    finite = logits_NV.amax(-1).isfinite().tolist() if len(plain) > 1 else ()
    plain = [n for n in plain if finite and finite[n]]
    if likeliest := [n for n in plain if samplers[n].is_greedy]:
        best_N = logits_NV.argmax(-1).tolist()
        tokens |= {n: SampledToken(best_N[n]) for n in likeliest}
    drawn = [n for n in plain if n not in tokens]
    for at in range(0, len(drawn), ROWS_TOGETHER):
        here = drawn[at : at + ROWS_TOGETHER]
        tokens |= zip(here, _draw_plain([samplers[n] for n in here], logits_NV[here]), strict=True)
    for n, sampler in enumerate(samplers):
        if n not in tokens:
            try:
                tokens[n] = sampler.sample(logits_NV[n])
            except RequestError as error:
                tokens[n] = error
    return [tokens[n] for n in range(len(samplers))]


def _draw_plain(samplers: Sequence[Sampler], logits_NV: Tensor) -> list[SampledToken]:
    device = torch.device("cpu") if logits_NV.is_mps else logits_NV.device  # which has no float64
    points_N1, heat_N1 = (
        torch.tensor([[value] for value in values], dtype=torch.float64, device=device)
        for values in (
            [sampler.point() for sampler in samplers],
            [sampler.params.temperature for sampler in samplers],
        )
    )
    sums_NV = (logits_NV.to(device).double() / heat_N1).softmax(-1).cumsum(-1)
    ids_N1 = torch.searchsorted(sums_NV, points_N1 * sums_NV[:, -1:], right=True).clamp_(max=sums_NV.shape[1] - 1)
    logps = [math.nan] * len(samplers)
    if any(sampler.keeps for sampler in samplers):
        logits_NV = logits_NV / heat_N1.to(logits_NV)
        logps = logits_NV.log_softmax(-1).gather(1, ids_N1.to(logits_NV.device))[:, 0].tolist()
    return [SampledToken(*drawn) for drawn in zip(ids_N1[:, 0].tolist(), logps, strict=True)]


class JsonGrammars:
    """Grammars of JSON schemas for one tokenizer, by the library llguidance (the extra `json`).

    Keywords that it cannot enforce are refused, never ignored.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int, stop_ids: Sequence[int]) -> None:
        try:
            import llguidance.hf

            eos = list(stop_ids) or None
            self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=eos)
        except (ImportError, ValueError) as error:
            why = "is not installed on the server"
            why = f"cannot read this model's tokenizer: {error}" if isinstance(error, ValueError) else why
            message = f"answers in JSON need the package llguidance, which {why}"
            raise RequestError(message, code="unsupported_parameter", param="response_format") from error
        self._matcher = llguidance.LLMatcher

    def compile(self, schema: Record) -> Callable[[], Grammar]:
        """A function that makes the grammar of one answer. Raises RequestError for an unsupported schema."""
        if "x-guidance" in schema:
            raise _invalid("the schema cannot be enforced: x-guidance would change how it is enforced: leave it out")
        text = json.dumps(schema or {"type": "object"})
        if len(text) > MAX_SCHEMA_CHARS:
            raise _invalid(f"the schema has {len(text):,} characters, at most {MAX_SCHEMA_CHARS:,} are taken")
        grammar = self._matcher.grammar_from_json_schema(text, overrides=_JSON_STYLE)
        is_error, messages = self._matcher.validate_grammar_with_warnings(grammar, self._tokenizer)
        if is_error or messages:
            raise _invalid(f"the schema cannot be enforced: {'; '.join(messages)[:500]}")
        first = self._matcher(self._tokenizer, grammar, log_level=0)
        return lambda: Grammar(first.deep_copy())


class Grammar:
    """The tokens an answer may continue with."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def mask(self, logits_V: Tensor) -> None:
        """Set the logits of tokens that may not come next to -inf, in place."""
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        if self._matcher.is_error():  # a limit of the library: the answer cannot be continued
            logits_V.fill_(-math.inf)
        else:
            logits_V[allowed[: len(logits_V)].to(logits_V.device) == 0] = -math.inf

    def accept(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)

    def is_complete(self) -> bool:
        """Whether nothing more may be written."""
        return bool(self._matcher.is_stopped() and not self._matcher.is_error())


def _invalid(message: str) -> RequestError:
    return RequestError(message, code="invalid_schema", param="response_format")


def with_text(tokenizer: PreTrainedTokenizerBase, token: SampledToken) -> Token:
    """A sampled token for its client, with a replacement character where it is a part of one."""
    before = list(tokenizer("a", add_special_tokens=False).input_ids)  # some tokenizers drop white space at the start
    length = len(tokenizer.decode(before))

    def one(token_id: int, logprob: float) -> JsonObject:
        text = tokenizer.decode([*before, token_id])[length:]
        spelling = None if _BROKEN in text else list(text.encode())
        return {"token": text, "logprob": max(logprob, MIN_LOGPROB), "bytes": spelling}

    return {**one(token.token_id, token.logprob), "top_logprobs": [one(*listed) for listed in token.top]}


class StreamingDecoder:
    """The text of one answer. `strip`: without white space around the whole of it."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], *, stops: Sequence[str], strip: bool
    ) -> None:
        self.is_stopped = False
        """Whether a stop text was written."""
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._longest_stop = max(map(len, stops), default=0)
        self._strip = strip
        self._ids = list(prompt)
        self._read = len(self._ids)
        self._start = max(0, self._read - CONTEXT)
        if not self._decode(self._start, self._read):  # all of it control tokens
            self._start = 0
        self._text = ""
        self._sent = 0
        self._tokens: list[tuple[int, int, Token | None]] = []
        """Start and end in the text of each token that was not returned yet."""

    def add(self, token_id: int, logprob: Token | None = None) -> None:
        """Append one token."""
        self._ids.append(token_id)
        start, new = len(self._text), self._new_text()
        if new and (not new.endswith(_BROKEN) or len(self._ids) - self._read > LONGEST_CHARACTER):
            self._append(new)
        self._tokens.append((start, len(self._text), logprob))
        self._find_stop(start)

    def finish(self) -> None:
        """Take text that was held back: no token follows."""
        if not self.is_stopped:
            start = len(self._text)
            self._append(self._new_text())
            self._find_stop(start)

    def take(self, *, last: bool = False) -> tuple[str, tuple[Token, ...]]:
        """The text that is certain since the last call, and its tokens. `last`: after `finish`."""
        end = len(self._text)
        if not last and not self.is_stopped:
            end -= self._partial_stop()
        if self._strip:
            end = len(self._text[:end].rstrip())
        end = max(end, self._sent)
        if self._strip and not self._sent:
            self._sent = min(len(self._text) - len(self._text.lstrip()), end)
        text = self._text[self._sent : end]
        if not (text or last):
            return "", ()
        self._sent = max(self._sent, end)
        taken = [token for token in self._tokens if token[1] <= end or (last and token[0] < len(self._text))]
        self._tokens = [token for token in self._tokens if token[1] > end and not last]
        return text, tuple(logprob for _, _, logprob in taken if logprob is not None)

    def _partial_stop(self) -> int:
        """Characters at the end of the text that may be the start of a stop."""
        for num in range(min(self._longest_stop - 1, len(self._text)), 0, -1):
            if any(stop.startswith(self._text[-num:]) for stop in self._stops if len(stop) > num):
                return num
        return 0

    def _find_stop(self, start: int) -> None:
        if self.is_stopped:
            return
        first = max(0, start - self._longest_stop + 1)
        if places := [place for stop in self._stops if (place := self._text.find(stop, first)) >= 0]:
            self._text = self._text[: min(places)]
            self.is_stopped = True

    def _append(self, new: str) -> None:
        self._text += new
        self._start, self._read = self._read, len(self._ids)

    def _new_text(self) -> str:
        """The text of tokens that were not appended yet."""
        before, decoded = self._decode(self._start, self._read), self._decode(self._start, len(self._ids))
        if decoded.startswith(before):
            return decoded[len(before) :]
        return self._decode(self._read, len(self._ids))

    def _decode(self, start: int, end: int) -> str:
        return str(self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True))
