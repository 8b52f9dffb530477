"""Answers of a model to many prompts in this process, by the engine: several samples of each."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tunesmith.data.prompts import begun_answer
from tunesmith.environment.process import resident_bytes
from tunesmith.errors import InputError
from tunesmith.generation.scheduler import Scheduler
from tunesmith.serve.protocol import Delta, EngineOptions, Finished, GenerationRequest, RequestError
from tunesmith.serve.registry import open_registry
from tunesmith.serve.responses import find_calls
from tunesmith.serve.served_model import ServedModel
from tunesmith.serve.worker import free_for_keys


@dataclass(slots=True)
class Sample:
    """One answer of a model."""

    text: str = ""
    calls: Sequence[Mapping[str, Any]] = ()
    """Tool calls in OpenAI's shape; their text is not part of `text`."""
    ended: bool = False
    tokens: int = 0
    prefix: str = ""
    """The beginning of the answer that the chat template writes into the prompt."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question to a model, and the seed from which its samples follow."""

    messages: Sequence[Mapping[str, Any]]
    seed: int
    tools: Sequence[Mapping[str, Any]] = field(default=())


class SampledModel:
    """A run or a model, loaded to answer. Raises what `open_registry` raises, and InputError
    for one that does not write text."""

    def __init__(self, target: str, *, root: Path, offline: bool, streams: int, note: Callable[[str], None]) -> None:
        self._options = EngineOptions(streams=streams, offline=offline, max_new_tokens=sys.maxsize)
        registry = open_registry([target], root=root, options=self._options, note=note)
        written = [model for model in registry.models.values() if isinstance(model, ServedModel)]
        tuned = [model for model in written if not model.card.is_base] or written
        if not tuned:
            raise InputError(f"{target}: it does not write text, so it has no answers to grade. Choose another model.")
        self.model = tuned[0]
        limit = psutil.virtual_memory().available + resident_bytes()
        room = self.model.decoder.token_capacity(free_for_keys(self.model.decoder.model.device, limit))
        self._scheduler = Scheduler(self.model.decoder, streams=streams, room=room)

    def num_tokens(self, text: str) -> int:
        """Tokens of a text as an answer."""
        return len(self.model.renderer.tokenizer(text, add_special_tokens=False).input_ids)

    def answers(
        self,
        questions: Sequence[Question],
        *,
        num: int,
        max_new_tokens: int,
        temperature: float,
        progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> list[list[Sample] | str]:
        """`num` samples of each question, or why it cannot be asked. The same seed draws the same answers."""
        answers: list[list[Sample] | str] = []
        for i, question in enumerate(questions):
            request = GenerationRequest(
                self.model.card.name,
                messages=question.messages,
                tools=question.tools,
                temperature=temperature,
                seed=question.seed,
                n=num,
                max_tokens=max_new_tokens,
            )
            try:
                prepared = self.model.prepare(i, request, self._options)
                self._scheduler.add(prepared)
                prefix = begun_answer(prepared.tokenizer, prepared.prompt)
                answers.append([Sample(prefix=prefix) for _ in range(num)])
            except RequestError as error:
                answers.append(str(error))
        done, total = 0, num * sum(not isinstance(samples, str) for samples in answers)
        texts: dict[tuple[int, int], list[str]] = defaultdict(list)
        while self._scheduler.is_busy:
            for i, event in self._scheduler.step():
                if isinstance(event, RequestError):
                    answers[i], done = str(event), done + num
                elif isinstance(event, Delta):
                    texts[i, event.index].append(event.text)
                elif isinstance(event, Finished) and not isinstance(samples := answers[i], str):
                    tools = {str(tool.get("function", tool).get("name")) for tool in questions[i].tools}
                    prefix, text = samples[event.index].prefix, "".join(texts.pop((i, event.index), []))
                    samples[event.index] = self._sample(text, tools, event, prefix)
                    done += 1
            progress("draw", done, total)
        return answers

    def _sample(self, text: str, tools: set[str], event: Finished, prefix: str) -> Sample:
        form, calls = self.model.card.calls, list[dict[str, Any]]()
        if form and tools:
            calls, text = find_calls(text, form, tools)
        return Sample(text, calls, event.reason != "length", event.completion_tokens, prefix)
