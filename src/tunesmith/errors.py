"""Every error a user can meet.

    TunesmithError            exit 1: something failed
    ├── InputError            exit 2: what was given cannot be used
    │   ├── RecipeError       an option: unknown, of the wrong type, or out of range
    │   ├── DataError         rows: carries one `Problem` a finding
    │   ├── ModelError        a model, tokenizer or template
    │   ├── RunError          a run folder: missing, locked, or not the one to resume
    │   └── DoesNotFitError   a run that needs more memory or disk than there is
    ├── NonFiniteError        a loss or gradient that is not a number; weights are untouched
    ├── TeacherError          a teacher at an address: silent, or its answer cannot be used
    ├── OutOfMemoryError      a micro-batch of one row does not fit; earlier steps are saved
    ├── DeviceError           a card that failed in mid-run; earlier checkpoints are whole
    ├── StorageError          the disk: full, over quota, read-only or broken
    ├── CheckpointError       a checkpoint that cannot be written, or none that can be read
    ├── GroupError            another process of the run's group failed; its message, and its exit code
    ├── ExportError           what was exported is not what was tuned; nothing was kept
    └── Stopped               exit 3: stopped on request; a checkpoint was written, `tunesmith resume` continues

A message names the place, the value, the rule and the way out, in this order.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tunesmith.types import Problem


@dataclass(frozen=True, slots=True)
class WayOut:
    """Options with which a command that was refused, or a run that failed, can go on."""

    settings: Mapping[str, str | int]
    """Values by key, as `--set` takes them."""
    words: str = ""
    """The effect in words, for a button; empty: the options themselves say it."""


_MEMORY_WORDS = (
    "can't allocate memory", "not enough memory", "out of memory", "failed to allocate", "bad_alloc", "alloc_failed",
)  # fmt: skip
"""Phrases of torch's allocators in a RuntimeError: DefaultCPUAllocator, oneDNN, cuBLAS have no class."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is at its end: of Python, of the system, or of torch on any device."""
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__:
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _MEMORY_WORDS)


def one_line(error: BaseException) -> str:
    """An error of another library, for a message."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


class TunesmithWarning(UserWarning):
    """A note of a run that is called from Python: what was left out, chosen or found. Changes nothing."""


class TunesmithError(Exception):
    """Root of every error raised on purpose; its text is meant for the person at the terminal."""

    exit_code = 1
    topic = ""
    """Heading of docs/guide/troubleshooting.md that says more, for `tunesmith explain`."""

    def __init__(self, message: str = "", *, ways: Sequence[WayOut] = ()) -> None:
        """`ways`: the ways on that its words name, where options are ways."""
        super().__init__(message)
        self.ways = tuple(ways)


class InputError(TunesmithError):
    """Input that cannot be used; nothing was changed."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe key is unknown, of the wrong type, or out of range."""

    topic = "options"


class DataError(InputError):
    """Rows that cannot be used. `problems` holds one finding each, in file order.

    Examples:
        >>> try:
        ...     tunesmith.train(model, rows)
        ... except tunesmith.DataError as error:
        ...     lines = [problem.source.line for problem in error.problems]
    """

    topic = "rows"

    def __init__(self, message: str, problems: Sequence[Problem] = (), *, ways: Sequence[WayOut] = ()) -> None:
        by_words = {way.words: way for problem in problems for way in problem.ways}
        super().__init__(message, ways=[*ways, *by_words.values()])
        self.problems = tuple(problems)


class ModelError(InputError):
    """A model, tokenizer or chat template that cannot be used."""

    topic = "model"


class RunError(InputError):
    """A run folder that is missing, in use, or does not match the request."""

    topic = "runs"


class DoesNotFitError(InputError):
    """A run needs more memory, by prediction, or more disk than there is. Both in bytes."""

    topic = "does-not-fit"

    def __init__(self, message: str, *, needed: int, room: int) -> None:
        super().__init__(message)
        self.needed = needed
        self.room = room


class NonFiniteError(TunesmithError):
    """A loss or gradient is NaN or infinite. Raised before the update: weights are as after the last step."""

    topic = "loss-is-nan"


class OutOfMemoryError(TunesmithError):
    """Memory ended in a micro-batch that cannot be made smaller. The weights are as after the step before.

    `lengths`: tokens of the rows of that pass; `peak`: most bytes held until then.
    """

    topic = "out-of-memory"

    def __init__(
        self, message: str, *, step: int, lengths: Sequence[int], peak: int, ways: Sequence[WayOut] = ()
    ) -> None:
        super().__init__(message, ways=ways)
        self.step = step
        self.lengths = tuple(lengths)
        self.peak = peak


class TeacherError(TunesmithError):
    """A teacher at an address that does not answer, or answers what cannot be learnt. The weights are as after
    the step before."""

    topic = "teacher-fails"


class UngradedError(TunesmithError):
    """A grader that fails for more than half of a step's answers. The weights are as after the step before."""

    topic = "grader-fails"


class CheckpointError(TunesmithError):
    """A checkpoint could not be written, or none of those present can be read."""

    topic = "cannot-resume"


class GroupError(TunesmithError):
    """Another process of the group that trains this run failed, with this `exit_code`, or cannot be reached."""

    topic = "several-processes"


class ExportError(TunesmithError):
    """An export that differs from the tuned model, or cannot be loaded. Nothing of it was kept."""

    topic = "export-differs"


class DeviceError(TunesmithError):
    """A card that failed, after which this process cannot compute on it; the last checkpoint is whole."""

    topic = "card-fails"


class StorageError(TunesmithError):
    """A file could not be written: the disk is full, over quota, read-only or broken.

    `bytes_needed` is what the write would have taken, None where it is not known.
    """

    topic = "disk"

    def __init__(self, message: str, *, path: str = "", errno_name: str = "", bytes_needed: int | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.errno_name = errno_name
        self.bytes_needed = bytes_needed


class Stopped(TunesmithError):
    """The run stopped on request, wrote a checkpoint and can be resumed."""

    exit_code = 3
