"""The rows of uploaded files, read before a run as training reads them; faults in OpenAI's words, then ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tunesmith.data.detect_format import inspect_file
from tunesmith.data.examples import examples
from tunesmith.data.problems import refusal
from tunesmith.errors import DataError, InputError
from tunesmith.graders import schema as graders
from tunesmith.jobs.job_request import GRADER
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.types import Example, JsonObject, Problem, Shape, Source, TaskName

FAILED = "The job failed due to an invalid {which} file."
NO_SHAPE = "Unexpected file format, expected either prompt/completion pairs or chat messages."
MAX_NAMED = 10
MAX_LISTED = 100
MAX_CHARS = 1000
"""Longest description of a row's faults."""
MOST_ERRORS = 1000
"""Faults after which a file is read no further: the owner mends the first, and each costs memory and time."""
_TASKS: dict[Shape, TaskName] = {
    "messages": "chat", "prompt_completion": "generate", "preference": "prefer", "prompts": "reinforce",
}  # fmt: skip
_METHODS: dict[TaskName, str] = {"prefer": "dpo", "reinforce": "reinforcement"}
"""Methods of the tasks; of all others supervised."""
_FORMATS: dict[TaskName, str] = {
    "chat": "fine-tune-chat", "generate": "fine-tune-completions", "prefer": "fine-tune-preference",
}  # fmt: skip


@dataclass(frozen=True)
class FileFault(Exception):
    """A file that no job can use, as the job's error has it."""

    code: str
    message: str
    param: str
    lines: Sequence[str] = ()
    """Each fault by itself, 100 at most."""

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class CheckedFile:
    """Facts of a job's files that a run needs."""

    num_rows: int
    task: TaskName
    num_validation: int = 0
    """Rows of the validation file."""

    @property
    def method(self) -> str:
        """OpenAI's name of the way in which these rows are learnt."""
        return _METHODS.get(self.task, "supervised")


class _TooManyErrorsError(Exception):
    """Nothing more is read."""


def check_file(
    path: Path, which: str, *, method: str, min_examples: int, grader: JsonObject | None = None
) -> CheckedFile:
    """Read all rows of a training or validation file of a job of this method, whose grader finds its fields
    in the first. Raises FileFault."""
    if path.is_symlink() or not path.is_file():
        message = f"The {which} file {path.name} was deleted."
        raise FileFault(f"invalid_{which}_file", message, f"{which}_file")
    errors, num, tasks = list[Problem](), 0, set[TaskName | None]()

    def add(problem: Problem) -> None:
        if problem.severity == "error":
            errors.append(problem)
            if len(errors) >= MOST_ERRORS:
                raise _TooManyErrorsError

    with suppress(_TooManyErrorsError):
        try:
            if inspect_file(str(path)).kind == "Excel":  # its parsers are for files of one's own
                raise refusal(str(path), 0, "archive", "an Excel file is not read here.", "Upload JSON lines.")
            named: TaskName | None = "reinforce" if method == "reinforcement" else None  # which is never detected
            for _, example in examples([DataFile(path=str(path))], Data(), add, task=named):
                if grader is not None and not num:
                    _check_fields(grader, example, which)
                num += 1
                tasks.add(_TASKS.get(example.shape))
        except DataError as error:
            for problem in error.problems:
                if problem not in errors:
                    add(problem)
            if not errors:
                why = str(error).replace(f"{path}: ", "").replace(str(path), "the file")  # not where it is here
                message = f"{FAILED.format(which=which)} {why}"
                raise FileFault(f"invalid_{which}_file", message, f"{which}_file") from None
    if errors:
        raise row_fault(errors, which)
    if None in tasks or len(tasks) > 1:
        raise FileFault(f"invalid_{which}_file", f"{FAILED.format(which=which)} {NO_SHAPE}", f"{which}_file")
    checked = CheckedFile(num, next(iter(tasks)) or "chat")
    if method != checked.method:
        message = (
            f"Input file {path.name} is in the {_FORMATS[checked.task]} format, but the specified fine-tuning job is "
            f"not using '{checked.method}' as the training method (provided method={method})."
        )
        raise FileFault(f"invalid_{which}_file", f"{FAILED.format(which=which)} {message}", f"{which}_file")
    if num < min_examples:
        least = f"must have at least {min_examples} examples"
        message = f"{which.capitalize()} file has {num} example(s), but {least}"
        raise FileFault("invalid_n_examples", message, f"{which}_file")
    return checked


def _check_fields(grader: JsonObject, example: Example, which: str) -> None:
    """Raise FileFault for a variable of the grader that a row lacks. A validation file, whose training file
    has it, is at fault itself."""
    try:
        graders.check_variables(graders.from_value(grader, place=GRADER), example.kept, GRADER)
    except InputError as error:
        line = f"Line {example.source.line}: {error}"
        code, param = "invalid_grader", GRADER
        if which == "validation":
            line += " Give its rows the fields that the training file has."
            code, param = "invalid_validation_file", "validation_file"
        raise FileFault(code, f"{FAILED.format(which=which)} {line}", param, [line]) from None


def row_fault(problems: Sequence[Problem], which: str) -> FileFault:
    """All faulty rows by their lines."""
    lines = [
        f"{f'Line {line}: ' if (line := problem.source.line) else ''}{problem.message} {problem.fix}".strip()[
            :MAX_CHARS
        ]
        for problem in problems[:MAX_LISTED]
    ]
    more = f" And {num:,} more" if (num := len(problems) - MAX_NAMED) > 0 else ""
    more += ", behind which the file was not read." if len(problems) >= MOST_ERRORS else "." if more else ""
    message = f"{FAILED.format(which=which)} Invalid file format. {' '.join(lines[:MAX_NAMED])}{more}"
    return FileFault(f"invalid_{which}_file", message, f"{which}_file", lines)


def problems_of(error: JsonObject, path: Path) -> Iterator[Problem]:
    """The problems that a run printed about one file."""
    for problem in error.get("problems", ()):
        if Path(problem["file"]).name == path.name and problem["severity"] == "error":
            yield Problem(Source(problem["file"], problem["line"]), problem["code"], problem["message"], problem["fix"])


def rounds(num_rows: int) -> int:
    """Epochs by OpenAI's published rule: 3; more below 34 rows, so that 100 are seen; fewer above 8,333."""
    if num_rows * 3 < 100:
        return min(25, 100 // num_rows)
    return max(1, 25_000 // num_rows) if num_rows * 3 > 25_000 else 3
