"""Examples to rows: which tokens, and which of them are trained. How: docs/rendering.md."""

# T tokens

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from tunesmith.data.conversations import Conversations, Draft
from tunesmith.data.pairs import Pairs
from tunesmith.data.tokens import Encoder, fingerprint
from tunesmith.types import Example, Part, Problem, Row, TaskName

Encoded = Row | list[Problem]


class Renderer:
    """Turns examples into rows for one task, with the ids that serving will feed.

    `max_tokens`: longest row, None for no limit. `too_long` and `control_tokens` are the knobs of `data`.
    Raises `ModelError` for a tokenizer or template that cannot be trained with.
    """

    def __init__(
        self,
        tokenizer: Any,
        task_name: TaskName,
        *,
        max_tokens: int | None,
        too_long: Literal["error", "drop", "cut"],
        control_tokens: Literal["error", "allow"],
    ) -> None:
        encoder = Encoder(tokenizer)
        self.tokenizer = tokenizer
        self.tokenizer = tokenizer
        self.task_name = task_name
        self.max_tokens = max_tokens
        self.too_long = too_long
        self.control_tokens = control_tokens
        self._task: Conversations | Pairs = (Conversations if task_name == "chat" else Pairs)(tokenizer, encoder)
        self._control = self._task.control
        self.stop_ids: tuple[int, ...] = self._task.stop_ids
        """Ids that end an answer: of the chat template, found by rendering, or EOS."""
        self.fingerprint: str = fingerprint(tokenizer, self._task.template_text)
        """SHA-256 of the template and of what the tokenizer does to a probe text."""

    def encode(
        self, examples: Sequence[Example], *, on_warning: Callable[[Problem], None] | None = None
    ) -> list[Encoded]:
        """A row for each example, or the problems that make it unusable. About 512 examples at a time are fast.

        `on_warning` hears of rows that can be used but were cut, or are not what serving shows (codes `cut`,
        `context_rewritten`).
        """
        results: list[Encoded] = [list(self._control_problems(example)) for example in examples]
        clean = [i for i, problems in enumerate(results) if not problems]
        for i, draft in zip(clean, self._task.encode([examples[i] for i in clean]), strict=True):
            results[i] = self._finish(examples[i], draft, on_warning)
        return results

    def prompt_ids(self, parts: Sequence[Part], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """The ids that serving feeds to have `parts` answered; the same code as training.

        Raises `DataError` when the template refuses the parts.
        """
        return self._task.prompt_ids(parts, tools)

    def _finish(
        self, example: Example, draft: Draft | Problem, on_warning: Callable[[Problem], None] | None
    ) -> Encoded:
        if isinstance(draft, Problem):
            return [draft]
        problems = [*self._spelled_otherwise(example, draft), *self._too_long(example, draft)]
        problems = problems or self._untrained(example, draft)
        if problems:
            return problems
        if on_warning is not None:
            for warning in draft.warnings:
                on_warning(warning)
        end = self.max_tokens
        return Row(draft.ids_T[:end], draft.trained_T[:end], example.source)

    def _too_long(self, example: Example, draft: Draft) -> list[Problem]:
        num_tokens = len(draft.ids_T)
        if self.max_tokens is None or num_tokens <= self.max_tokens:
            return []
        limit = f"more than data.max_tokens, which is {self.max_tokens}"
        if self.too_long == "cut":
            lost = int(draft.trained_T[self.max_tokens :].sum())
            draft.warnings.append(
                Problem(
                    example.source,
                    "cut",
                    f"its {num_tokens} tokens are {limit}: the end was cut off, {lost} of its trained tokens with it.",
                    severity="warning",
                )
            )
            return []
        fix = "Raise it, shorten the row, or set data.too_long: drop or cut." if self.too_long == "error" else ""
        return [Problem(example.source, "too_long", f"its {num_tokens} tokens are {limit}.", fix)]

    def _untrained(self, example: Example, draft: Draft) -> list[Problem]:
        """A row is useless when nothing is left of its targets: the first token is never one, nothing predicts it."""
        end = min(self.max_tokens or len(draft.ids_T), len(draft.ids_T))
        if draft.trained_T[1:end].any():
            return []
        if not draft.trained_T.any():
            return [
                Problem(
                    example.source,
                    "no_target",
                    f"none of its {end} tokens is trained: it has no answer that is marked to be trained.",
                    "Give it one, or remove the row.",
                )
            ]
        starts_at = int(np.argmax(draft.trained_T)) + 1
        return [
            Problem(
                example.source,
                "no_target",
                f"none of its {end} tokens is trained: the answer starts at token {starts_at}, but data.max_tokens is "
                f"{self.max_tokens}.",
                "Raise it, shorten the prompt, or set data.too_long: drop.",
            )
        ]

    def _control_problems(self, example: Example) -> Iterator[Problem]:
        """Text of a row that would act as structure, such as an <|im_end|> that closes the user's turn."""
        if self.control_tokens == "allow":
            return
        places = [
            (f"messages[{i}] ({part.role})", [part.role, part.text, part.fields])
            for i, part in enumerate(example.parts)
        ]
        for place, value in [*places, ("a tool definition", list(example.tools))]:
            found = next((token for text in _strings(value) if (token := self._control.in_text(text))), None)
            if found:
                yield Problem(
                    example.source,
                    "control_token",
                    f"{place} contains {found}, a control token of this model.",
                    "Remove it, or set data.control_tokens: allow when the text can be trusted.",
                )

    def _spelled_otherwise(self, example: Example, draft: Draft) -> list[Problem]:
        """Control tokens that the tokenizer made of text that does not spell them."""
        if self.control_tokens == "allow" or not draft.num_unspelled:
            return []
        return [
            Problem(
                example.source,
                "control_token",
                f"the tokenizer makes {draft.num_unspelled} control tokens of text that does not spell them.",
                "Remove it, or set data.control_tokens: allow when the text can be trusted.",
            )
        ]


def _strings(value: Any) -> Iterator[str]:
    """Every string in JSON-like data, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)
