"""Tokens of an example before they become rows, and the limit on the length of a row."""

# T tokens, N targets

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.tokenizer import ControlTokens, FastTokenizer
from tunesmith.types import Example, ModelKind, Part, Pooling, Problem, Source

TooLong = Literal["error", "drop", "cut"]


@dataclass(slots=True)
class Draft:
    """An example, or one window of it, as tokens."""

    ids_T: NDArray[np.int32]
    trained_T: NDArray[np.bool_]
    num_unspelled: int = 0
    """Control tokens that are not spelled in its text."""
    warnings: list[Problem] = field(default_factory=list)
    classes_N: tuple[str, ...] | None = None
    """Names of the classes that are learnt at the trained tokens; None: the tokens themselves; empty: any class."""
    second: int = 0
    num_bytes: int = 0
    branches: tuple[int, ...] = ()
    values: tuple[float, ...] = ()


Drafts = list[Draft] | Problem
"""The windows of an example, mostly one, or the problem that makes it unusable."""


Tools = Sequence[Mapping[str, Any]]
"""Descriptions of functions that a chat template may show."""
OnCut = Callable[[int], None]
"""Receives the number of tokens that were cut off a prompt."""


def ignore_cut(num_tokens: int) -> None:
    """An `OnCut`."""


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """Everything that a task's encoder of rows is made from."""

    tokenizer: Any
    fast: FastTokenizer
    limit: LengthLimit
    kind: ModelKind
    stride: int | None
    """Tokens from the start of one window of a document to that of the next."""
    prompt: str | None
    """`data.prompt`."""
    date: str | None
    """The date that a chat template writes; None: today."""
    pooling: Pooling | None = None
    """The pooling of a task whose texts become vectors."""


class RowEncoder:
    """Base of the encoders, one for each kind of task and model: examples to tokens, and prompts for serving."""

    control: ControlTokens
    template_text: str = ""
    stop_ids: tuple[int, ...] = ()
    """Ids that end an answer; empty: the model writes none."""

    def encode(self, examples: Sequence[Example]) -> list[Drafts]:
        """Aligned with `examples`."""
        raise NotImplementedError

    def prompt_ids(
        self, parts: Sequence[Part], tools: Tools, *, max_tokens: int | None = None, on_cut: OnCut = ignore_cut
    ) -> list[int]:
        """The ids that serving feeds to have `parts` answered, see `Renderer.prompt_ids`."""
        raise AssertionError("a model of this task writes nothing")


@dataclass(frozen=True, slots=True)
class LengthLimit:
    """Longest row in tokens (None: no limit), and the treatment of a longer one."""

    max_tokens: int | None
    too_long: TooLong

    def excess(self, num_tokens: int) -> int:
        """Tokens too many."""
        return 0 if self.max_tokens is None else max(0, num_tokens - self.max_tokens)

    def refusal(self, source: Source, what: str) -> Problem:
        """`what` is too long: "its 312 tokens"."""
        fix = "Raise it, shorten the row, or set data.too_long: drop or cut." if self.too_long == "error" else ""
        return Problem(source, "too_long", f"{what} are {self._rule}.", fix)

    def cut_warning(self, source: Source, what: str, *, cost: str) -> Problem:
        """`what` was too long, and was cut at a `cost`."""
        return Problem(source, "cut", f"{what} are {self._rule}: {cost}.", severity="warning")

    def fit(self, source: Source, draft: Draft) -> Drafts:
        """A draft of next tokens within the limit, its end cut off where `too_long` says so.

        Its first token is not trained: nothing predicts it.
        """
        num_tokens = len(draft.ids_T)
        first = int(draft.trained_T.argmax()) if num_tokens else 0
        starts_at = first + 1 if num_tokens and draft.trained_T[first] else None
        draft.trained_T[:1] = False
        if starts_at is not None and starts_at > 1 and not self.excess(num_tokens):
            return [draft]  # nearly every row
        end = num_tokens - self.excess(num_tokens)
        if end < num_tokens:
            if self.too_long != "cut":
                return self.refusal(source, f"its {num_tokens} tokens")
            lost = int(draft.trained_T[end:].sum())
            cost = f"the end was cut off, {lost} of its trained tokens with it"
            draft.warnings.append(self.cut_warning(source, f"its {num_tokens} tokens", cost=cost))
            draft.ids_T, draft.trained_T = draft.ids_T[:end], draft.trained_T[:end]
        return [draft] if draft.trained_T.any() else self._untrained(source, end, starts_at)

    def _untrained(self, source: Source, num_tokens: int, starts_at: int | None) -> Problem:
        if starts_at is None:
            message = f"none of its {num_tokens} tokens is trained: it has no answer that is marked to be trained."
            return Problem(source, "no_target", message, "Give it one, or remove the row.")
        message = (
            f"none of its {num_tokens} tokens is trained: the answer starts at token {starts_at}, but "
            f"data.max_tokens is {self.max_tokens}."
        )
        return Problem(source, "no_target", message, "Raise it, shorten the prompt, or set data.too_long: drop.")

    @property
    def _rule(self) -> str:
        return f"more than data.max_tokens, which is {self.max_tokens}"
