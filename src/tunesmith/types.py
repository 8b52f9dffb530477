"""The types that travel between modules: one example's way from a line of a file to a weight update.

    train.jsonl:812 → Example → Row → Batch → Event

Standard library only at run time; arrays and tensors are named for the type checker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

# B rows, T tokens, N targets

IGNORE = -100
"""Target id where nothing is trained, as in torch.nn.functional.cross_entropy."""

Shape = Literal["messages", "sharegpt", "alpaca", "prompt_completion"]
Layout = Literal["ragged", "padded"]
TaskName = Literal["chat", "generate"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a row was read: a file and its 1-based line (JSON arrays and Parquet: 1-based row)."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding about one row. An `error` makes the row unusable, a `warning` does not."""

    source: Source
    code: str
    message: str
    fix: str = ""
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        return f"{self.source}: {self.code}: {self.message}" + (f" {self.fix}" if self.fix else "")


@dataclass(frozen=True, slots=True)
class Part:
    """One turn of a conversation, or the prompt or completion of a pair."""

    role: str
    text: str
    trained: bool
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What else the message carried (`tool_calls`, `name`, ...), handed to the template as it is."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row of data in the one shape every task understands."""

    parts: tuple[Part, ...]
    source: Source
    shape: Shape
    tools: tuple[Mapping[str, Any], ...] = ()
    """Tool definitions that came with the row, handed to the template as they are."""
    plain: bool = False
    """Text and its continuation, which no template is put around, rather than a conversation."""


@dataclass(frozen=True, slots=True)
class Row:
    """One encoded example: T token ids and, for each, whether it is a target. Not yet shifted."""

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    source: Source


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of one pass, ragged (one flat row of whole examples) or padded (one row an example).

    The shift to next-token targets has happened: the logits at flat position `predict_N[n]` predict `targets_N[n]`.
    No target crosses from one example into the next.
    """

    layout: Layout
    ids_BT: Tensor
    """int64; ragged: [1, T], padded: [B, T]."""
    positions_BT: Tensor
    """int64, restarting at 0 with every example."""
    mask_BT: Tensor | None
    """int64, 1 on real tokens; None when ragged: a mask beside restarting positions would join the examples."""
    lengths: tuple[int, ...]
    """Tokens of each example, in the order they stand."""
    predict_N: Tensor
    """int64, positions in the flattened [B * T] tokens."""
    targets_N: Tensor
    """int64, token ids."""
    row_indices: tuple[int, ...]
    """Rows of the store that this pass holds, in order."""

    @property
    def num_tokens(self) -> int:
        """Real tokens: padding does not count."""
        return sum(self.lengths)

    @property
    def num_targets(self) -> int:
        return int(self.targets_N.numel())


@dataclass(frozen=True, slots=True)
class Measured:
    """Sums over the targets of one batch; divide by `count` after adding batches, never before."""

    loss_sum: Tensor
    """float32 scalar, nats."""
    correct: Tensor
    """int64 scalar: targets whose most likely token was right."""
    count: int


@dataclass(frozen=True, slots=True)
class Task:
    """What is trained and how it is counted."""

    name: TaskName
    doc: str
    shapes: tuple[Shape, ...]
    """Data shapes the task accepts."""
    loss_sum: Callable[[nn.Module, Batch], Tensor]
    """Sum of -log p(target) over the batch, float32, nats; with gradient."""
    measure: Callable[[nn.Module, Batch], Measured]
    """The same sum without gradient, and what else an evaluation counts."""
    count: Callable[[Batch], int]
    """What the loss is divided by, summed over the passes of a step."""


class Attachment(Protocol):
    """What a method put on a model: the tensors it trains and how they become a result."""

    method: str
    trained: Mapping[str, Tensor]
    """float32 leaves that the optimizer updates, by stable name, in a stable order."""
    notes: tuple[str, ...]
    """What a person should know about what is trained, such as layers that could not be adapted."""

    def collect_gradients(self) -> None:
        """Add this pass's gradients to those of `trained` in float32. Call after every backward."""
        ...

    def publish(self) -> None:
        """Copy `trained` into the model that computes. Call after an update or a load."""
        ...


@dataclass(frozen=True, slots=True)
class Event:
    """One line of events.jsonl. `values` repeat bit for bit when a run is repeated; `timing` does not."""

    kind: Literal[
        "start", "plan", "evaluation", "step", "checkpoint", "sample", "note", "resume", "stopped", "failed", "end"
    ]
    step: int
    time: float
    """Seconds since the epoch."""
    values: Mapping[str, Any]
    timing: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Choice:
    """A setting that was decided for the user, and why."""

    key: str
    value: Any
    reason: str
