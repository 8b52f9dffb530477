"""Tasks: what every task has, the parts that only some have, and the losses that follow for one run.

Task ── losses(Terms) ──▶ Losses       `tasks.bind` joins both into the `BoundTask` that is trained
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tunesmith.recipe.schema import Loss, Recipe
from tunesmith.types import JsonObject

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from tunesmith.data.dataset import RowStore
    from tunesmith.data.renderer import EncoderSettings, RowEncoder
    from tunesmith.models.fused_loss import OutputLayer
    from tunesmith.models.resolve_model import ModelRef
    from tunesmith.parallel.world import World
    from tunesmith.types import Batch, Choice, HeadName, Labels, LossSum, Measured, ModelKind, Shape, TaskName

    Side = tuple[RowStore, NDArray[np.int64]]
    """A store, and the rows of it that are trained on or measured."""

PLAIN_LOSS = Loss()


class Measure(Protocol):
    """The losses of a batch target by target, without gradient, and the model's outputs."""

    def __call__(self, model: nn.Module, batch: Batch, /) -> Measured: ...


class Prepass(Protocol):
    """Finds what the rows of a step have in common, before its first backward, without gradient and over all
    processes; returns the loss of the step's micro-batches."""

    def __call__(self, model: nn.Module, batches: Iterable[Batch], world: World, /) -> LossSum: ...


class RecordOf(Protocol):
    """A text as a row of the user's file, with its answer if there is one."""

    def __call__(self, text: str, answer: str | None = None) -> JsonObject: ...


@dataclass(frozen=True, slots=True)
class Terms:
    """Inputs of the losses of a task, known once rows are encoded and the model is loaded."""

    labels: Labels | None = None
    """None: the task learns no labels."""
    loss: Loss = PLAIN_LOSS
    """Additions to the loss that is trained; what is measured keeps the plain one."""
    output: OutputLayer | None = None
    """The output layer of a model that learns tokens, if losses can be computed in pieces."""
    recipe: Recipe = field(default_factory=Recipe)
    """Has the section of a task with options of its own."""
    vocabulary: int = 0
    """Tokens of the tokenizer, beyond which a model may have more for padding."""


@dataclass(frozen=True, slots=True)
class Losses:
    """The losses of a task for one run."""

    loss_sum: LossSum
    """Sum of the targets' losses over the batch (nats, or squared error), float32; with gradient."""
    measure: Measure
    prepass: Prepass | None = None
    """None: each row is learnt by itself, by `loss_sum`."""
    text_measure: Measure | None = None
    """`measure` of the tokens of a text, where `measure` itself compares rows; None: `measure` does it."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Usual peak learning rates, each of a model below and of one from `large` weights on."""

    adapter: tuple[float, float]
    full: tuple[float, float]
    large: float = 1e9


@dataclass(frozen=True, slots=True)
class LabelHead:
    """The part of a task that learns labels: a new head gives them."""

    by_word: bool = False
    """The head answers for each word."""
    takes_pairs: bool = False
    """A row may hold two texts."""


@dataclass(frozen=True, slots=True)
class OwnSection:
    """The part of a task with options of its own: a section of the recipe that only
    it has, and what decides it."""

    name: str
    """The key of the section."""
    from_model: Callable[[Recipe, ModelRef], Sequence[Choice]] = lambda recipe, located: ()
    """Returns the options that follow from the model's files."""
    from_rows: Callable[[Any, Sequence[Side]], list[Choice]] = lambda options, sides: []
    """Gets the section and rows, training rows first; returns the options that follow. Raises DataError for
    rows that these options cannot learn from."""
    has_prepass: Callable[[Any], bool] = lambda options: False
    """Whether a step has a `Prepass` with these options of the section."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task and everything that other files need to know about it: a row of `tasks.TASKS`."""

    name: TaskName
    doc: str
    shapes: tuple[Shape, ...]
    """Data shapes the task accepts."""
    heads: Mapping[ModelKind, HeadName]
    """The kinds of model that can learn it, and the head each needs."""
    losses: Callable[[Terms], Losses]
    encoder: str | Callable[[EncoderSettings], RowEncoder]
    """Makes token ids and targets of the task's examples; or its name, "module:function", which is
    imported when rows are encoded."""
    record: RecordOf
    purpose: str = ""
    """The aim of tuning, as a report says it: "continue texts"; empty: the name."""
    is_chat: bool = False
    """Rows are conversations in the model's chat template."""
    shows_images: bool = False
    """A user's turn may have images, for a model that sees."""
    raw_text: bool = False
    """No template is put around the text, and white space of answers counts."""
    in_windows: bool = False
    """Rows are documents, learnt whole: a long one in several windows."""
    has_prompt: bool = False
    """`data.prompt` is put in front of the text."""
    writes_answers: bool = False
    """The model answers a prompt with text that is compared with a reference."""
    input_role: str = "user"
    """Role of what is answered, as `Example.parts` name it."""
    answer_key: str = ""
    """Key of the answer in a line that `predict` writes; empty: the head's own keys."""
    detected: str = ""
    """Why rows of its shape choose this task, in words."""
    on_overlong: tuple[Literal["error", "cut"], str] = ("error", "a cut answer would teach the model to break off")
    """The value that `data.too_long: auto` takes, and why."""
    headline_metrics: tuple[str, ...] = ()
    """The metrics that say most, in order."""
    next_commands: tuple[tuple[str, ...], ...] = (("eval", "FILE"), ("show",))
    """Commands for a finished run, without its name: the verb, and what follows the run."""
    outcome: str = ""
    """Key of its metrics in `HEAD_METRICS`; empty: the head's, or that of the labels."""
    rows_per_step: int = 16
    """Most rows that `train.rows_per_step: auto` takes."""
    rates: Rates | None = None
    """None: the method's."""
    sees_rows: bool = False
    """`loss_sum` adds up losses of single targets, and leaves them in `Batch.losses`."""
    compares: bool = False
    """Rows have branches, and the model is compared with the one that it was at step 1: its reference. Dropout
    is off in training, since two passes must find the same."""
    samples: bool = False
    """Rows are prompts, whose answers are drawn, graded and learnt. Dropout is off in training: what draws and
    what learns must find the same."""
    pools: bool = False
    """The trained tokens of a line are pooled, not predicted: targets are not shifted."""
    head: LabelHead | None = None
    """None: tokens or vectors are learnt."""
    section: OwnSection | None = None
    """None: the loss of a target follows from its own row alone."""

    @property
    def learns_classes(self) -> bool:
        """Whether a new head learns the labels of the data."""
        return self.head is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundTask(Task):
    """A task with the losses of one run: see `Losses`."""

    loss_sum: LossSum
    measure: Measure
    prepass: Prepass | None
    text_measure: Measure | None

    @classmethod
    def of(cls, task: Task, terms: Terms) -> BoundTask:
        """The task with the losses that follow from these terms."""
        parts = (task, task.losses(terms))
        return cls(**{entry.name: getattr(part, entry.name) for part in parts for entry in fields(part)})
