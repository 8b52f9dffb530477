"""Answers that a model writes greedily: a run's before and after, an evaluation's, `predict`'s.

The scheduler that serves writes them, so that an answer is the one that a server gives. Models whose sequences
cannot be decoded together write in padded batches, as `AnswerWriter.why_padded` says.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedModel

from tunesmith.data.renderer import Renderer
from tunesmith.errors import OutOfMemoryError
from tunesmith.generation.adapters import AdapterSet
from tunesmith.generation.decoder import BatchedDecoder, decoding, why_not_batched
from tunesmith.generation.padded import LEAST_CHUNK, GeneratedAnswer, ImagesOf, generate_within, prompt_batches
from tunesmith.generation.requests import Delta, Finished, GenerationRequest, RequestError
from tunesmith.generation.scheduler import PreparedRequest, ResumedAnswer, Scheduler, not_finite, places_room
from tunesmith.models.memory import peak_memory_bytes
from tunesmith.tasks import TASKS

PASSES = 8
"""Tokens of cache, in passes of training: each written token reads all weights, and answers share it. A token's
keys and values are a small part of what the pass of a step keeps of it."""
STREAMS = 256
"""Most answers that are written together."""

Tick = Callable[[int], None]
"""Gets the number of answers that are written."""


def cache_tokens(tokens_per_pass: int, *, recomputed: int = 0) -> int:
    """Tokens of cache that answers may take; `recomputed`: layers that are computed
    again since memory is short."""
    return tokens_per_pass * (2 if recomputed else PASSES)


def written_together(num_tokens: float, cache: int) -> int:
    """Number of answers that are written together, each with its prompt of at most `num_tokens` in all."""
    return max(1, min(STREAMS, cache // places_room(max(1, round(num_tokens)))))


class Writing:
    """Answers that are being written, by their keys. `answers` has the finished ones; it lacks those for which
    memory did not suffice."""

    def __init__(
        self,
        writer: AnswerWriter,
        *,
        answers: dict[int, GeneratedAnswer] | None = None,
        streams: int = STREAMS,
        read: int | None = None,
    ) -> None:
        self.answers = {} if answers is None else answers
        self._writer = writer
        with decoding(writer.model):
            decoder = BatchedDecoder(writer.model, AdapterSet(writer.model))
        self._scheduler = Scheduler(decoder, streams=streams, room=writer.cache, read=read or writer.tokens_per_pass)
        self._texts: dict[int, list[str]] = defaultdict(list)
        self._rooms: dict[int, int] = {}

    @property
    def is_full(self) -> bool:
        """Whether there are more answers than have a place together."""
        streams, room = self._scheduler.streams, self._scheduler.room
        return len(self._rooms) > streams or (room is not None and sum(self._rooms.values()) > room)

    def add(self, key: int, prompt: Sequence[int], resumed: ResumedAnswer | None = None) -> None:
        """Put a prompt at the end of the queue; see `ResumedAnswer` for an answer that started elsewhere."""
        writer = self._writer
        request = PreparedRequest(
            key,
            tuple(prompt),
            writer.renderer.tokenizer,
            GenerationRequest("", temperature=0.0),
            max_new_tokens=writer.new_tokens,
            stop_ids=writer.stop_ids,
            strip=not TASKS[writer.renderer.task_name].raw_text,
            resumed=resumed,
        )
        self._rooms[key] = request.room
        self._scheduler.room = max(self._scheduler.room or 0, request.room)  # one is always written
        self._scheduler.add(request)

    def go_on(self, tick: Tick, *, to_the_end: bool) -> None:
        """Write until there is room for more answers, or until all are written. Raises NonFiniteError for
        logits that are no numbers."""
        scheduler = self._scheduler
        if not (scheduler.is_busy if to_the_end else self.is_full):
            return
        with decoding(self._writer.model):
            while scheduler.is_busy if to_the_end else self.is_full:
                for key, event in scheduler.step():
                    if isinstance(event, RequestError):
                        if event.code != "out_of_memory":
                            raise not_finite(event, "written")
                        del self._rooms[key]
                        self._texts.pop(key, None)
                        scheduler.streams = max(1, scheduler.running)
                    elif isinstance(event, Delta):
                        self._texts[key].append(event.text)
                    elif isinstance(event, Finished):
                        del self._rooms[key]
                        text = "".join(self._texts.pop(key, []))
                        self.answers[key] = GeneratedAnswer(text, stopped=event.reason == "stop")
                        tick(len(self.answers))


@dataclass(frozen=True)
class AnswerWriter:
    """Writes answers of at most `new_tokens` tokens to prompts."""

    model: PreTrainedModel
    renderer: Renderer
    new_tokens: int
    tokens_per_pass: int
    """Most tokens of prompts that are read together."""
    cache: int
    """Most tokens of cache that all answers take, see `cache_tokens`."""
    is_endless: bool = False
    """No token ends an answer of the scheduler."""

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset() if self.is_endless else frozenset(self.renderer.stop_ids)

    @cached_property
    def why_padded(self) -> str:
        """The reason why this model writes in padded batches; "" where the scheduler writes."""
        return why_not_batched(self.model, AdapterSet(self.model))

    def write(
        self, prompts: Sequence[Sequence[int]], tick: Tick = lambda done: None, *, images: ImagesOf = ()
    ) -> list[GeneratedAnswer]:
        """The answer to each prompt; prompts with images are answered in padded batches. Raises
        OutOfMemoryError where not even one at a time fits, and NonFiniteError."""
        answers: dict[int, GeneratedAnswer] = {}
        longest_first = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        with_images = [i for i in longest_first if images and images[i]]
        self._write_padded(prompts, with_images, answers, tick, images)
        left = [i for i in longest_first if i not in answers]
        if left and self.why_padded:
            self._write_padded(prompts, left, answers, tick)
        elif left:
            self._write_together(prompts, left, answers, tick)
        return [answers[i] for i in range(len(prompts))]

    def _write_together(
        self, prompts: Sequence[Sequence[int]], left: list[int], answers: dict[int, GeneratedAnswer], tick: Tick
    ) -> None:
        longest, streams, read = len(prompts[left[0]]), STREAMS, self.tokens_per_pass
        while left:
            writing = Writing(self, answers=answers, streams=streams, read=read)
            for i in left:
                writing.add(i, prompts[i])
            writing.go_on(tick, to_the_end=True)
            left = [i for i in left if i not in answers]
            if left and streams == 1 and read <= LEAST_CHUNK:
                raise self._exhausted([len(prompts[i]) for i in left])
            if streams > 1:
                streams = max(1, min(streams, len(prompts)) // 2)
            else:
                read = min(read, longest) // 2

    def _write_padded(
        self,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[int],
        answers: dict[int, GeneratedAnswer],
        tick: Tick,
        images: ImagesOf = (),
    ) -> None:
        most = self.tokens_per_pass
        for batch in prompt_batches(prompts, numbers, self.new_tokens, most):
            inputs, shown = [prompts[i] for i in batch], [images[i] for i in batch] if images else ()
            written = generate_within(self.model, self.renderer, inputs, self.new_tokens, most=most, images=shown)
            answers |= zip(batch, written, strict=True)
            tick(len(answers))

    def _exhausted(self, lengths: list[int]) -> OutOfMemoryError:
        return OutOfMemoryError(
            f"out of memory while an answer of up to {self.new_tokens:,} tokens was written to a prompt of "
            f"{max(lengths):,}. Shorter prompts, or fewer tokens of an answer, take less.",
            step=0,
            lengths=lengths,
            peak=peak_memory_bytes(self.model.device),
        )
