"""One that can be asked by name: how an ask becomes the prompt it was trained on, and within which limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith.data.renderer import Renderer
from tunesmith.errors import DataError, ModelError
from tunesmith.runs.folder import Run
from tunesmith.serve.batch import Job
from tunesmith.serve.choosing import How
from tunesmith.serve.decoder import Decoder
from tunesmith.serve.grammar import Grammars
from tunesmith.serve.protocol import Ask, EngineOptions, Refused, Served
from tunesmith.tasks import TASKS
from tunesmith.types import Example, Part, Source

MOST_LOGPROBS = 20
HERE = Source("ask", 1)


@dataclass(frozen=True)
class Voice:
    """A base, or a run's adapter on it, that answers in text."""

    served: Served
    renderer: Renderer
    vocab_size: int
    decoder: Decoder
    """What goes on with its texts."""
    adapter: str | None = None
    run: Run | None = None
    grammars: list[Grammars] = field(default_factory=list)
    """At most one: made when it is first needed."""

    def job(self, key: int, ask: Ask, options: EngineOptions, is_wanted: Callable[[], bool] = lambda: True) -> Job:
        """The ask as the batch takes it; given up where it is not wanted any more. Raises Refused."""
        _check(ask, options)
        prompt = self.prompt_ids(ask)
        most = self._room(ask, len(prompt), options)
        how = How(
            ask.temperature, ask.top_p, ask.seed, ask.presence_penalty, ask.frequency_penalty, ask.logprobs
        )  # fmt: skip
        return Job(
            key,
            tuple(prompt),
            self.renderer.tokenizer,
            adapter=self.adapter,
            how=how,
            max_new_tokens=most,
            stop_ids=frozenset(self.renderer.stop_ids),
            stops=tuple(filter(None, ask.stop)),
            n=ask.n,
            trims=not TASKS[self.renderer.task_name].raw_text,
            grammar=None if ask.json_schema is None else self._grammars().compile(ask.json_schema, is_wanted),
        )

    def prompt_ids(self, ask: Ask) -> list[int]:
        """The ids that are fed, by the code that rendered the training rows. Raises Refused."""
        if isinstance(ask.prompt, tuple):
            return self._own_ids(ask.prompt)
        if isinstance(ask.prompt, str) and TASKS[self.renderer.task_name].is_chat:
            # A text to go on with, as it stands: nothing of a conversation is put around it.
            return list(self.renderer.tokenizer(ask.prompt).input_ids)
        try:
            parts = self._parts(ask)
            cuts: list[int] = []
            ids = self.renderer.prompt_ids(parts, ask.tools, on_cut=cuts.append)
            if ask.tools and ids == self.renderer.prompt_ids(parts, (), on_cut=cuts.append):
                raise _refused(f"the chat template of {self.served.name} does not show tools: leave them out", "tools")
        except (DataError, ModelError) as error:  # the template refuses it, or exceeds its bounds on it
            raise _refused(str(error), "messages") from error
        if sum(cuts):
            raise Refused(
                f"the prompt has {sum(cuts):,} tokens more than {self.served.name} reads: shorten it",
                status=400, code="context_length_exceeded", param="messages",
            )  # fmt: skip
        return ids

    def _parts(self, ask: Ask) -> list[Part]:
        if not TASKS[self.renderer.task_name].is_chat:
            if isinstance(ask.prompt, str):
                return [Part("user", ask.prompt, trained=False)]
            if len(ask.messages) != 1 or ask.messages[0].get("role") != "user" or ask.tools:
                raise _refused(
                    f"{self.served.name} was tuned for the task {self.renderer.task_name}, not for conversations: "
                    "send one message of the user, or use /v1/completions",
                    "messages",
                )
            return [Part("user", _content(ask.messages[0]), trained=False)]
        parts = [as_part(message) for message in ask.messages]
        example = Example(tuple(parts), HERE, "messages", ask.tools)
        for problem in self.renderer.control_problems(example):
            raise _refused(problem.message, "messages")
        return parts

    def _own_ids(self, prompt: Sequence[int]) -> list[int]:
        strange = next((token for token in prompt if not 0 <= token < self.vocab_size), None)
        if strange is not None:
            raise _refused(f"token {strange} is none of the {self.vocab_size:,} tokens of this model", "prompt")
        return list(prompt)

    def _room(self, ask: Ask, num_prompt: int, options: EngineOptions) -> int:
        """How many tokens may be written."""
        param = "messages" if ask.prompt is None else "prompt"
        if num_prompt == 0:
            raise _refused("the prompt holds no token: there is nothing to answer", param)
        window = self.served.max_tokens
        apart = self.renderer.kind == "encoder_decoder"
        longest = window if apart else window - 1
        if options.max_prompt_tokens is not None:
            longest = min(longest, options.max_prompt_tokens)
        if num_prompt > longest:
            raise Refused(
                f"the prompt has {num_prompt:,} tokens, at most {longest:,} are read here: shorten it",
                status=400, code="context_length_exceeded", param=param,
            )  # fmt: skip
        room = min(options.max_new_tokens, window if apart else window - num_prompt)
        if ask.max_tokens is None:
            return room
        if ask.max_tokens > options.max_new_tokens:
            raise _refused(f"at most {options.max_new_tokens:,} tokens are written here: lower it", "max_tokens")
        if ask.max_tokens > room:
            raise Refused(
                f"{num_prompt:,} tokens of prompt and {ask.max_tokens:,} of answer are more than the {window:,} that "
                f"{self.served.name} can attend to: shorten the prompt or lower max_tokens",
                status=400, code="context_length_exceeded", param=param,
            )  # fmt: skip
        return ask.max_tokens

    def _grammars(self) -> Grammars:
        if not self.grammars:
            made = Grammars(self.renderer.tokenizer, vocab_size=self.vocab_size, stop_ids=self.renderer.stop_ids)
            self.grammars.append(made)
        return self.grammars[0]


def as_part(message: Mapping[str, Any]) -> Part:
    """A message of a conversation as training rows have it. Raises Refused."""
    fields = {key: value for key, value in message.items() if key not in ("role", "content") and value is not None}
    return Part(str(message.get("role", "")), _content(message), trained=False, fields=fields)


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if content is None:
        return ""
    if not isinstance(content, str):
        raise _refused("the content of a message has to be one text", "messages")
    return content


def _check(ask: Ask, options: EngineOptions) -> None:
    """Whether the numbers of an ask are in their ranges, as OpenAI's."""
    ranges: list[tuple[str, float | None, float, float]] = [
        ("temperature", ask.temperature, 0, math.inf),
        ("top_p", ask.top_p, 0, 1),
        ("n", ask.n, 1, options.streams),
        ("max_tokens", 1 if ask.max_tokens is None else ask.max_tokens, 1, math.inf),
        ("logprobs", ask.logprobs or 0, 0, MOST_LOGPROBS),
        ("presence_penalty", ask.presence_penalty, -2, 2),
        ("frequency_penalty", ask.frequency_penalty, -2, 2),
    ]
    for name, value, low, high in ranges:
        if value is None or not (low <= value <= high and math.isfinite(value)):  # JSON turns infinity into nothing
            limit = f"from {low:g} to {high:g}" if math.isfinite(high) else f"a number from {low:g} up"
            raise _refused(f"{name} is {value}; it has to be {limit}", name)


def _refused(message: str, param: str) -> Refused:
    return Refused(message, status=400, code="invalid_value", param=param)
