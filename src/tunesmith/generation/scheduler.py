"""Continuous batching: each step decodes one more token of every answer, and reads
more of the waiting prompts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

from torch import Tensor

from tunesmith.errors import NonFiniteError, is_out_of_memory
from tunesmith.generation.decoder import Decoder, PromptPart, SeeingDecoder
from tunesmith.generation.kv_cache import SequenceSlot, room_for
from tunesmith.generation.requests import Delta, Finished, GenerationRequest, RequestError, Started, StreamEvent
from tunesmith.generation.sampling import (
    Grammar,
    SampledToken,
    Sampler,
    StreamingDecoder,
    sample_together,
    with_text,
)
from tunesmith.models.memory import free_cached_memory
from tunesmith.types import BatchImage

PREFILL_TOKENS = 256
"""Prompt tokens read in a step that also decodes, so that answers do not wait long."""
PREFILL_TOKENS_ALONE = 1024
"""Prompt tokens read in a step that decodes nothing."""

T = TypeVar("T")
KeyedEvent = tuple[int, StreamEvent | RequestError]
"""An event and the key of its request."""


def places_room(num_tokens: int, num_answers: int = 1) -> int:
    """Most tokens of cache that answers take which have at most `num_tokens` tokens, each with its prompt."""
    # A row is copied to the next pool before its old place is free, and a pool grows by doubling its rows.
    return 2 * num_answers * room_for(num_tokens)


@dataclass(frozen=True, slots=True)
class ResumedAnswer:
    """An answer that started elsewhere. The prompt of its request ends with the answer's first tokens; all of
    it but the last token was read."""

    slot: SequenceSlot
    """The tokens that were read, with a place for one more."""
    written: int
    """Tokens of the answer at the end of the prompt."""
    on_logits: Callable[[Tensor], None]
    """Gets the logits [V] behind the prompt before the answer goes on from them."""


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request that has been rendered and tokenized."""

    key: int
    prompt: tuple[int, ...]
    tokenizer: Any
    sampling: GenerationRequest
    adapter: str | None = None
    max_new_tokens: int = 64
    stop_ids: frozenset[int] = frozenset()
    strip: bool = False
    """Whether white space around an answer is left out."""
    grammar: Callable[[], Grammar] | None = None
    images: tuple[BatchImage, ...] = ()
    """Images of its prompt, in order; where there are any, the decoder is a `SeeingDecoder`."""
    keeps: bool = False
    """Whether `Finished` has the tokens of an answer and their log-probabilities."""
    resumed: ResumedAnswer | None = None
    """None: nothing of the prompt was read before."""

    @property
    def room(self) -> int:
        """Most tokens of cache that its answers take, with the prompt."""
        return places_room(len(self.prompt) + self.max_new_tokens, self.sampling.n)


@dataclass(slots=True)
class _Prefill:
    request: PreparedRequest
    slot: SequenceSlot
    num_read: int = 0


@dataclass(slots=True)
class _Answer:
    request: PreparedRequest
    index: int
    sampler: Sampler
    text: StreamingDecoder
    slot: SequenceSlot
    last_token: int = -1
    num_tokens: int = 0
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)


def not_finite(error: RequestError, work: str) -> NonFiniteError:
    """The error of a run for an answer that failed, but not by memory. `work`: what was done to answers."""
    way = "Set precision: float32, or lower optim.lr if steps were made."
    return NonFiniteError(f"while answers were {work}: {error}. {way}")


class Scheduler:
    """At most `streams` answers are decoded together; further requests wait in order.

    `room`: most tokens of cache that all answers may take; None: no limit. `read`: most tokens of prompts that
    a step reads; None: few where answers would wait for them.
    """

    def __init__(self, decoder: Decoder, *, streams: int, room: int | None = None, read: int | None = None) -> None:
        self.streams = streams
        self.room = room
        self.read = read
        self.waiting: deque[PreparedRequest] = deque()
        self._decoder = decoder
        self._prefills: deque[_Prefill] = deque()
        self._answers: dict[SequenceSlot, _Answer] = {}

    @property
    def running(self) -> int:
        """Answers that have a place."""
        return len(self._answers) + sum(prefill.request.sampling.n for prefill in self._prefills)

    @property
    def is_busy(self) -> bool:
        return bool(self.waiting or self._prefills or self._answers)

    def add(self, request: PreparedRequest) -> None:
        """Put a request at the end of the queue. Raises RequestError if there is never room for it."""
        if self.room is not None and request.room > self.room:
            raise RequestError(
                f"{request.sampling.n} answers of up to {request.max_new_tokens:,} tokens to a prompt of "
                f"{len(request.prompt):,} do not fit into the memory of this server: lower max_tokens or n",
                code="context_length_exceeded",
                param="max_tokens",
            )
        self.waiting.append(request)

    def cancel(self, key: int) -> None:
        """Drop a request, queued or running; it has no further events."""
        self.waiting = deque(request for request in self.waiting if request.key != key)
        for prefill in [prefill for prefill in self._prefills if prefill.request.key == key]:
            self._prefills.remove(prefill)
            self._decoder.close(prefill.slot)
        for slot in [slot for slot, answer in self._answers.items() if answer.request.key == key]:
            self._close(slot)

    def step(self) -> list[KeyedEvent]:
        """One forward pass, and its events."""
        events = self._admit()
        parts = self._prompt_parts()
        if not parts and not self._answers:
            return events
        last_tokens = {slot: answer.last_token for slot, answer in self._answers.items()}
        done = self._within_memory(lambda: self._decoder.step(last_tokens, [part for _, part in parts]))
        if done is None:
            return [*events, *self._give_way()]
        slots, logits_NV = done
        num_decoded = len(slots) - len(parts)
        events += self._sample([self._answers[slot] for slot in slots[:num_decoded]], logits_NV[:num_decoded])
        for (prefill, (_, ids)), logits_V in zip(parts, logits_NV[num_decoded:], strict=True):
            prefill.num_read += len(ids)
            if prefill.num_read == len(prefill.request.prompt):
                started = self._within_memory(partial(self._start_answers, prefill, logits_V))
                events += self._fail(prefill.request.key) if started is None else started
        return events

    def _within_memory(self, work: Callable[[], T]) -> T | None:
        """Call `work` and return its result; None if memory ran out."""
        try:
            return work()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        free_cached_memory()  # outside of the handler, whose traceback holds the tensors
        return None

    def _give_way(self) -> list[KeyedEvent]:
        """Fail the newest request to free memory for the others; fail all if their step cannot be repeated."""
        keys = {prefill.request.key for prefill in self._prefills}
        keys |= {answer.request.key for answer in self._answers.values()}
        youngest = [max(keys)] if self._decoder.can_redo else sorted(keys)
        return [event for key in youngest for event in self._fail(key)]

    def _fail(self, key: int) -> list[KeyedEvent]:
        self.cancel(key)
        message = "the memory of this server ended: ask for fewer tokens, or for fewer answers at once, or try later"
        return [(key, RequestError(message, status=503, code="out_of_memory"))]

    def _admit(self) -> list[KeyedEvent]:
        events: list[KeyedEvent] = []
        while self.waiting and self._has_place(self.waiting[0]):
            request = self.waiting.popleft()
            resumed = request.resumed
            slot = self._decoder.open(request.adapter, len(request.prompt)) if resumed is None else resumed.slot
            if request.images and isinstance(self._decoder, SeeingDecoder):
                self._decoder.show(slot, request.images)
            self._prefills.append(_Prefill(request, slot, slot.length))
            events.append((request.key, Started(len(request.prompt))))
        return events

    def _has_place(self, request: PreparedRequest) -> bool:
        if self.running + request.sampling.n > self.streams:
            return False
        held = sum(prefill.request.room for prefill in self._prefills)
        held += sum(answer.request.room // answer.request.sampling.n for answer in self._answers.values())
        return self.room is None or held + request.room <= self.room

    def _prompt_parts(self) -> list[tuple[_Prefill, PromptPart]]:
        """The parts of prompts read in this step, first come first served."""
        left = self.read or (PREFILL_TOKENS if self._answers else PREFILL_TOKENS_ALONE)
        parts: list[tuple[_Prefill, PromptPart]] = []
        for prefill in self._prefills:
            if left <= 0:
                break
            prompt = prefill.request.prompt
            most = len(prompt) if self._decoder.reads_whole else left
            ids = prompt[prefill.num_read : prefill.num_read + most]
            parts.append((prefill, (prefill.slot, ids)))
            left -= len(ids)
        return parts

    def _start_answers(self, prefill: _Prefill, logits_V: Tensor) -> list[KeyedEvent]:
        """The answers to a prompt that has been read, with their first tokens."""
        request, answers = prefill.request, []
        if request.resumed is not None:
            request.resumed.on_logits(logits_V)
        slots = self._decoder.fork(prefill.slot, request.sampling.n)
        self._prefills.remove(prefill)
        prefill.slot.pool.layers.clear()  # which were copied; a request that started elsewhere still has the slot
        for index, slot in enumerate(slots):
            self._answers[slot] = _begin(request, index, slot)
            answers.append(self._answers[slot])
        return self._sample(answers, logits_V.expand(request.sampling.n, -1))

    def _sample(self, answers: list[_Answer], logits_NV: Tensor) -> list[KeyedEvent]:
        """The next token of each answer, and its events."""
        events: list[KeyedEvent] = []
        tokens = sample_together([answer.sampler for answer in answers], logits_NV)
        for answer, token in zip(answers, tokens, strict=True):
            if answer.slot not in self._answers:  # another answer of its request has just failed
                continue
            if isinstance(token, RequestError):
                self.cancel(answer.request.key)
                events.append((answer.request.key, token))
            else:
                events += self._write(answer, token)
        return events

    def _write(self, answer: _Answer, token: SampledToken) -> list[KeyedEvent]:
        request, text, grammar = answer.request, answer.text, answer.sampler.grammar
        answer.num_tokens += 1
        answer.last_token = token.token_id
        if request.keeps:
            answer.ids.append(token.token_id)
            answer.logps.append(token.logprob)
        is_end = token.token_id in request.stop_ids
        if not is_end:
            answer.sampler.accept(token.token_id)
            is_listed = request.sampling.logprobs is not None
            text.add(token.token_id, with_text(request.tokenizer, token) if is_listed else None)
        is_end = is_end or text.is_stopped or (grammar is not None and grammar.is_complete())
        is_last = is_end or answer.num_tokens >= request.max_new_tokens
        if is_last:
            text.finish()
            is_end = is_end or text.is_stopped
        piece, tokens = text.take(last=is_last)
        events: list[KeyedEvent] = []
        if piece or tokens:
            events.append((request.key, Delta(answer.index, piece, tokens)))
        if is_last:
            reason: Literal["stop", "length"] = "stop" if is_end else "length"
            finished = Finished(answer.index, reason, answer.num_tokens, answer.ids, answer.logps)
            events.append((request.key, finished))
            self._close(answer.slot)
        return events

    def _close(self, slot: SequenceSlot) -> None:
        del self._answers[slot]
        self._decoder.close(slot)


def _begin(request: PreparedRequest, index: int, slot: SequenceSlot) -> _Answer:
    """An answer to a prompt that has been read, with the tokens that it has already."""
    grammar = request.grammar() if request.grammar else None
    sampler = Sampler(request.sampling, index=index, grammar=grammar, keeps=request.keeps)
    num_written = 0 if request.resumed is None else request.resumed.written
    start = len(request.prompt) - num_written
    stops = request.sampling.stop
    text = StreamingDecoder(request.tokenizer, request.prompt[:start], stops=stops, strip=request.strip)
    for token_id in request.prompt[start:]:
        text.add(token_id)
    return _Answer(request, index, sampler, text, slot, num_tokens=num_written)
