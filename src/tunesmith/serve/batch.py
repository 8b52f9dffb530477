"""Asks in, pieces of answers out: every step reads one more token of each answer, and more of the prompts that wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tunesmith.serve.cache import Lane, room_for
from tunesmith.serve.choosing import NO_TOKEN, Chooser, Chosen, Grammar, How, choose_all
from tunesmith.serve.decoder import Decoder, Fill
from tunesmith.serve.protocol import Begun, Ended, Piece, Refused, TokenChance, Told
from tunesmith.serve.writing import Tokens, Writer

FILL_TOKENS = 256
"""Tokens of prompts that are read beside a step of answers, so that those do not wait long."""
FILL_TOKENS_ALONE = 1024
"""The same while nothing is written."""

News = tuple[int, Told | Refused]
"""What is told of an ask, by its key."""


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt and how it is gone on from."""

    key: int
    prompt: tuple[int, ...]
    tokenizer: Any
    adapter: str | None = None
    how: How = field(default_factory=How)
    max_new_tokens: int = 64
    stop_ids: frozenset[int] = frozenset()
    stops: tuple[str, ...] = ()
    n: int = 1
    trims: bool = False
    """See `Writer`."""
    grammar: Callable[[], Grammar] | None = None

    @property
    def room(self) -> int:
        """Tokens of room that its answers take at most, and its prompt while it is read."""
        longest = room_for(len(self.prompt) + self.max_new_tokens)
        # A row is copied to the next pool before it is given back, and a pool grows by doubling its rows.
        return 2 * self.n * longest


@dataclass(slots=True)
class _Filling:
    job: Job
    lane: Lane
    num_read: int = 0

    def next_ids(self, most: int) -> tuple[int, ...]:
        return self.job.prompt[self.num_read : self.num_read + most]


@dataclass(slots=True)
class _Answer:
    job: Job
    index: int
    chooser: Chooser
    writer: Writer
    lane: Lane | None = None
    newest: int = -1
    num_tokens: int = 0


class Batch:
    """Answers under way, at most `streams` together; asks beyond wait in their order."""

    def __init__(self, decoder: Decoder, *, streams: int, room: int | None = None) -> None:
        self.streams = streams
        self.room = room
        """Tokens that all answers under way may come to hold with their prompts; None: any number."""
        self.waiting: deque[Job] = deque()
        self._decoder = decoder
        self._filling: deque[_Filling] = deque()
        self._answers: dict[Lane, _Answer] = {}
        self._tokens: dict[int, Tokens] = {}

    @property
    def running(self) -> int:
        """Answers that have a place."""
        return len(self._answers) + sum(filling.job.n for filling in self._filling)

    @property
    def is_busy(self) -> bool:
        return bool(self.waiting or self._filling or self._answers)

    def add(self, job: Job) -> None:
        """Put an ask at the end of the queue."""
        self.waiting.append(job)

    def could_hold(self, job: Job) -> bool:
        """Whether there is room for an ask when nothing else is under way."""
        return self.room is None or job.room <= self.room

    def cancel(self, key: int) -> None:
        """Forget an ask, wherever it is. Nothing more is told of it."""
        self.waiting = deque(job for job in self.waiting if job.key != key)
        for filling in [filling for filling in self._filling if filling.job.key == key]:
            self._filling.remove(filling)
            self._decoder.leave(filling.lane)
        for lane in [lane for lane, answer in self._answers.items() if answer.job.key == key]:
            self._leave(lane)

    def step(self) -> list[News]:
        """One pass through the model, and what came of it."""
        news = self._admit()
        fills = self._fills()
        if not fills and not self._answers:
            return news
        written = {lane: answer.newest for lane, answer in self._answers.items()}
        lanes, logits_NV = self._decoder.step(written, [fill for _, fill in fills])
        num_written = len(lanes) - len(fills)
        news += self._go_on([self._answers[lane] for lane in lanes[:num_written]], logits_NV[:num_written])
        for (filling, (_, ids)), logits_V in zip(fills, logits_NV[num_written:], strict=True):
            filling.num_read += len(ids)
            if filling.num_read == len(filling.job.prompt):
                self._filling.remove(filling)
                news += self._open(filling, logits_V)
        return news

    def _admit(self) -> list[News]:
        news: list[News] = []
        while self.waiting and self._has_place(self.waiting[0]):
            job = self.waiting.popleft()
            lane = self._decoder.begin(job.adapter, len(job.prompt))
            self._filling.append(_Filling(job, lane))
            news.append((job.key, Begun(len(job.prompt))))
        return news

    def _has_place(self, job: Job) -> bool:
        if self.running + job.n > self.streams:
            return False
        held = sum(filling.job.room for filling in self._filling)
        held += sum(answer.job.room // answer.job.n for answer in self._answers.values())
        return self.room is None or held + job.room <= self.room

    def _fills(self) -> list[tuple[_Filling, Fill]]:
        """The parts of prompts for this step, first come first served."""
        left = FILL_TOKENS if self._answers else FILL_TOKENS_ALONE
        fills: list[tuple[_Filling, Fill]] = []
        for filling in self._filling:
            if left <= 0:
                break
            ids = filling.next_ids(len(filling.job.prompt) if self._decoder.reads_whole else left)
            fills.append((filling, (filling.lane, ids)))
            left -= len(ids)
        return fills

    def _open(self, filling: _Filling, logits_V: Tensor) -> list[News]:
        """The answers of a prompt that has been read, with their first tokens."""
        job = filling.job
        answers = []
        for index in range(job.n):
            chooser = Chooser(job.how, index=index, grammar=job.grammar() if job.grammar else None)
            writer = Writer(job.tokenizer, job.prompt, stops=job.stops, trims=job.trims)
            answers.append(_Answer(job, index, chooser, writer))
        for answer, lane in zip(answers, self._decoder.join(filling.lane, job.n), strict=True):
            answer.lane = lane
            self._answers[lane] = answer
        return self._go_on(answers, logits_V.expand(job.n, -1))

    def _go_on(self, answers: list[_Answer], logits_NV: Tensor) -> list[News]:
        """The next token of each answer, and what is told of it."""
        news: list[News] = []
        if not answers:
            return news
        broken = (~torch.isfinite(logits_NV.amax(-1))).tolist()
        chosen = choose_all([answer.chooser for answer in answers], logits_NV)
        for answer, choice, is_broken in zip(answers, chosen, broken, strict=True):
            if answer.lane not in self._answers:  # another answer of its ask has failed just now
                continue
            if is_broken:
                self.cancel(answer.job.key)
                message = "the model answered with numbers that are not finite: its precision may be too low for it"
                news.append((answer.job.key, Refused(message, status=500, code="non_finite")))
            elif choice.token_id == NO_TOKEN:
                self.cancel(answer.job.key)
                message = "no token may follow here: the schema cannot be met by what this model writes"
                news.append((answer.job.key, Refused(message, status=400, code="invalid_schema")))
            else:
                news += self._write(answer, choice)
        return news

    def _write(self, answer: _Answer, choice: Chosen) -> list[News]:
        job = answer.job
        answer.num_tokens += 1
        answer.newest = choice.token_id
        is_end = choice.token_id in job.stop_ids
        if not is_end:
            answer.chooser.note(choice.token_id)
            answer.writer.add(choice.token_id, self._chance(job, choice))
        grammar = answer.chooser.grammar
        is_end = is_end or answer.writer.is_stopped or (grammar is not None and grammar.is_complete())
        is_last = is_end or answer.num_tokens >= job.max_new_tokens
        if is_last:
            answer.writer.finish()
            is_end = is_end or answer.writer.is_stopped
        text, tokens = answer.writer.take(last=is_last)
        news: list[News] = [(job.key, Piece(answer.index, text, tokens))] if text or tokens else []
        if is_last:
            news.append((job.key, Ended(answer.index, "stop" if is_end else "length", answer.num_tokens)))
            assert answer.lane is not None, "it has joined"
            self._leave(answer.lane)
        return news

    def _chance(self, job: Job, choice: Chosen) -> TokenChance | None:
        if job.how.logprobs is None:
            return None
        tokens = self._tokens.setdefault(id(job.tokenizer), Tokens(job.tokenizer))
        return tokens.chance(choice)

    def _leave(self, lane: Lane) -> None:
        del self._answers[lane]
        self._decoder.leave(lane)
