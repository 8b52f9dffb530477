"""Examples to rows: token ids, and which of them are trained; see docs/inside/rendering.md."""

# T tokens, N targets

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.drafts import Draft, Drafts
from tunesmith.data.images import batch_images
from tunesmith.data.read_json import strings
from tunesmith.data.tokenizer import ControlTokens, FastTokenizer, fingerprint
from tunesmith.types import (
    IGNORE,
    BatchImage,
    Example,
    ImageRef,
    ModelKind,
    Part,
    Placeholders,
    Pooling,
    Problem,
    Record,
    Row,
    Source,
)

if TYPE_CHECKING:
    from tunesmith.tasks.task import Task

TooLong = Literal["error", "drop", "cut"]


Tools = Sequence[Record]
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
    """Tokens from the start of one window of a document to the start of the next."""
    prompt: str | None
    """`data.prompt`."""
    date: str | None
    """The date that a chat template writes; None: today."""
    pooling: Pooling | None = None
    """The pooling of a task whose texts become vectors."""
    placeholders: Placeholders | None = None
    """The places of images, for a model that sees; None: rows with images are refused."""


class RowEncoder:
    """Base of the encoders, one for each kind of task and model: examples to tokens, prompts for serving."""

    control: ControlTokens
    template_text: str = ""
    stop_ids: tuple[int, ...] = ()
    """Ids that end an answer; empty: the model writes none."""

    def encode(self, examples: Sequence[Example]) -> list[Drafts]:
        """Aligned with `examples`."""
        raise NotImplementedError

    def prompt_ids(self, parts: Sequence[Part], tools: Tools, max_tokens: int | None, on_cut: OnCut) -> list[int]:
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
        fix = ""
        if self.too_long == "error":
            fix = "Raise it, shorten the row, or set data.too_long: drop or cut."
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


Encoded = list[Row] | list[Problem]


@dataclass(eq=False, repr=False)
class Renderer:
    """Turns examples into rows for one task and kind of model, with the ids that serving will feed.

    `max_tokens`: longest row, None for no limit. `too_long`, `control_tokens`, `stride` and `prompt` are the
    options of `data`; None: as the option's "auto" or null. `pooling`: for texts that become vectors. Raises
    `ModelError` for a tokenizer or template that cannot be trained with, `RecipeError` for options that leave a
    row no room.
    """

    tokenizer: Any
    task: InitVar[Task]
    _: KW_ONLY
    kind: ModelKind = "causal"
    max_tokens: int | None
    too_long: TooLong
    control_tokens: Literal["error", "allow"]
    stride: int | None = None
    prompt: str | None = None
    date: str | None = None
    """The day that the chat template writes; None: none, or today."""
    pooling: Pooling | None = None
    placeholders: Placeholders | None = None
    """See `EncoderSettings`."""

    def __post_init__(self, task: Task) -> None:
        fast, limit = FastTokenizer(self.tokenizer), LengthLimit(self.max_tokens, self.too_long)
        self.task_name, self._shows_images = task.name, task.shows_images
        encoder = resolve_name(task.encoder) if isinstance(task.encoder, str) else task.encoder
        options = (self.kind, self.stride, self.prompt, self.date, self.pooling, self.placeholders)
        self._encoder: RowEncoder = encoder(EncoderSettings(self.tokenizer, fast, limit, *options))
        self.date = self.date if "strftime_now" in self._encoder.template_text else None
        self._control = self._encoder.control
        self.stop_ids: tuple[int, ...] = self._encoder.stop_ids
        """Ids that end an answer: of the chat template, by rendering, or EOS. Empty: nothing is written."""
        self.fingerprint: str = fingerprint(self.tokenizer, self._encoder.template_text)
        """SHA-256 of the template and of what makes ids of text."""

    def is_of(self, known: str) -> bool:
        """Whether a run with that fingerprint has this template and tokenizer, as far as the version that began
        it could tell."""
        return known in (
            self.fingerprint,
            fingerprint(self.tokenizer, self._encoder.template_text, vocabulary=False),
        )

    def encode(
        self,
        examples: Sequence[Example],
        *,
        on_warning: Callable[[Problem], None] | None = None,
        vocabulary: dict[str, int] | None = None,
    ) -> list[Encoded]:
        """One or more rows for each example, or the problems that make it unusable. 512 at a time are fast.

        `on_warning` receives the warnings about rows that were cut, or differ from what serving shows
        (codes `cut`, `context_rewritten`, ...). `vocabulary` gives each class an id by its first
        appearance; classes that it does not have are added, and `Row.labels` holds these ids. A row without
        an answer has `IGNORE` in their place.
        """
        results: list[Encoded] = [
            [*_empty(example), *self.control_problems(example), *self._image_problems(example)] for example in examples
        ]
        clean = [i for i, problems in enumerate(results) if not problems]
        known = {} if vocabulary is None else vocabulary
        for i, drafted in zip(clean, self._encoder.encode([examples[i] for i in clean]), strict=True):
            if isinstance(drafted, Problem):
                results[i] = [drafted]
                continue
            results[i] = [_row(examples[i], draft, known) for draft in drafted]
            for warning in (warning for draft in drafted for warning in draft.warnings):
                if on_warning is not None:
                    on_warning(warning)
        return results

    def prompt_ids(
        self, parts: Sequence[Part], tools: Tools = (), *, max_tokens: int | None = None, on_cut: OnCut = ignore_cut
    ) -> list[int]:
        """The ids that serving feeds to have `parts` answered, or a document continued; by training's code.

        Where `data.too_long` is cut, a document that a causal model summarizes is cut down to `max_tokens`,
        which leaves room for the summary, and the source of an encoder–decoder as in training; `on_cut`
        receives the number of tokens that were cut off. Raises `DataError` when the template refuses the parts.
        """
        return self._encoder.prompt_ids(parts, tools, max_tokens, on_cut)

    def _image_problems(self, example: Example) -> list[Problem]:
        """The problem of a row whose images this task or model has no place for."""
        if not example.images:
            return []
        fix = "Use a model that sees, or remove the image."
        if not self._shows_images:
            message = f"it has an image, and the task {self.task_name} has no place for images."
            return [Problem(example.source, "no_images_here", message, "Use task: chat, or remove it.")]
        if self.placeholders is None:
            message = "it has an image, and this model reads text alone."
            return [Problem(example.source, "no_images_here", message, fix)]
        return []

    def batch_images(self, rows: Iterable[Sequence[ImageRef]]) -> tuple[BatchImage, ...]:
        """The images of rows for a pass of the model, see `data.images.batch_images`."""
        assert self.placeholders is not None, "rows and prompts with images are refused without them"
        return batch_images(rows, self.placeholders)

    def control_problems(self, example: Example) -> list[Problem]:
        """Text of a row that would act as structure, such as an <|im_end|> that closes the user's turn."""
        if self.control_tokens == "allow" or not (spelled := self._spelled(example)):
            return []
        message = f"its text contains {spelled}, a control token of this model."
        fix = "Remove it, or set data.control_tokens: allow when the text can be trusted."
        return [Problem(example.source, "control_token", message, fix)]

    def _spelled(self, example: Example) -> str | None:
        """The first control token that a text of a row spells."""
        parts = (*example.parts, *(part for branch in example.branches for part in branch))
        texts = []
        for part in parts:
            texts += [part.role, part.text, *(strings(part.fields) if part.fields else ())]
        texts += strings(list(example.tools)) if example.tools else ()
        if self._control.in_text("\n".join(texts)) is None:  # nearly always: looking text by text takes long
            return None
        return next((token for text in texts if (token := self._control.in_text(text))), None)


def _empty(example: Example) -> Iterator[Problem]:
    """A text that is to be read, and says nothing."""
    if example.shape in ("text", "document_summary", "text_label", "tokens_tags"):
        read = example.parts if example.shape == "tokens_tags" else example.parts[:1]
        if not any(part.text.strip() for part in read):
            message = f"its {'words are' if example.shape == 'tokens_tags' else read[0].role + ' is'} empty."
            yield Problem(example.source, "empty", message, "Fill it in, or remove the row.")


def _row(example: Example, draft: Draft, vocabulary: dict[str, int]) -> Row:
    labels_N: NDArray[np.int64] | None = None
    if draft.classes_N is not None:
        ids = [vocabulary.setdefault(name, len(vocabulary)) for name in draft.classes_N]
        is_answered = bool(example.labels or example.branches) or example.many
        labels_N = np.array(ids, np.int64) if is_answered else np.full(draft.trained_T.sum(), IGNORE, np.int64)
    return Row(
        draft.ids_T,
        draft.trained_T,
        example.source,
        labels=labels_N,
        second=draft.second,
        num_bytes=draft.num_bytes,
        branches=draft.branches,
        values=draft.values,
        keys=draft.keys,
        images=draft.images,
    )
