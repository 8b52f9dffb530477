"""tunesmith predict"""

from __future__ import annotations

import shutil
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.options import (
    PREDICTED_KEYS,
    Base,
    BaseAt,
    Json,
    Offline,
    PredictedAs,
    Root,
    Target,
    TaskOf,
    as_task,
    named,
    reading_of,
    reading_options,
    refuse_missing,
    refuse_unreadable,
)
from tunesmith.cli.streams import console, data_line, json_line
from tunesmith.errors import InputError, Stopped
from tunesmith.phrases import plural, visible
from tunesmith.runs.atomic import refuse_existing, storing
from tunesmith.types import Record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tunesmith.inference.predict import Predictor
    from tunesmith.inference.rows import Counts

Threshold = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Least probability of a class where a row has any number of them (default: 0.5), or of the second of two "
        "classes.",
    ),
]


def predict(
    target: Target,
    data: Annotated[
        str | None,
        typer.Argument(metavar="FILE", help="Data file, with or without answers; - reads the standard input."),
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="Predict this one text.")] = None,
    pair: Annotated[str | None, typer.Option(metavar="TEXT", help="Second text of a pair, with --text.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Output file; an interrupted call continues in FILE.part.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start --out from the beginning.")] = False,
    bare: Annotated[bool, typer.Option("--bare", help="Write predictions without their input.")] = False,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN[,COLUMN]", help="Columns of the data to copy into the output, such as an id."),
    ] = None,
    threshold: Threshold = None,
    max_new_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens of an answer.")] = 256,
    base: Base = False,
    model: BaseAt = None,
    task: TaskOf = None,
    settings: PredictedAs = None,
    root: Root = Path("runs"),
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Predict rows: one JSON line each, with label and probabilities, tags, a number, or text.

    tunesmith predict last unlabelled.csv --out labelled.jsonl

    tunesmith predict last --text "The parcel never came."
    """
    _refuse_mixed(data, text, pair, keep, out)
    if out is not None and str(out) != data:
        refuse_existing(out, overwrite=overwrite)
    reading = reading_options(settings, PREDICTED_KEYS)
    refuse_unreadable([data] if data not in (None, "-") else [], reading_of(target, root, reading))
    refuse_missing(target, root, offline=offline)
    screen = console(stderr=True)

    def say(words: str) -> None:
        screen.print(visible(words), style="bright_black")

    options = {"root": root, "base": base, "model": model, "task": as_task(task), "offline": offline}
    predictor = _predictor(target, threshold, max_new_tokens, say, options, reading)
    if text is not None:
        _one(predictor, text, pair, bare)
    else:
        assert data is not None, "one of both was given"
        output: dict[str, Any] = {"bare": bare, "keep": _columns(keep or []), "overwrite": overwrite}
        with _as_file(data) as path:
            counts = _file(predictor, path, out, say, output, offline=offline, shown="stdin" if data == "-" else path)
        _summarize(counts, out, say, as_json=as_json)


def _refuse_mixed(
    data: str | None, text: str | None, pair: str | None, keep: Sequence[str] | None, out: Path | None
) -> None:
    """Raise InputError for options of a FILE with --text or -, and the reverse."""
    if data == "-" and out is not None:
        raise InputError("--out: it continues the rows of a FILE, and - is none. Write answers with > FILE.")
    if (text is None) == (data is None):
        raise InputError("predict: give one of FILE and --text.")
    if keep and text is not None:
        raise InputError("predict: --keep names columns of a FILE; --text has none.")
    if pair is not None and text is None:
        raise InputError("predict: --pair goes with --text; in a file the second text is the field text_pair.")


@contextmanager
def _as_file(data: str) -> Iterator[str]:
    """The path of the rows; the standard input is first written to a temporary file, to its end."""
    if data != "-":
        yield data
        return
    with TemporaryDirectory() as folder:
        path = Path(folder, "stdin.jsonl")
        with storing(path), path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield str(path)


def _columns(words: Sequence[str]) -> list[str]:
    """Each column once, without the reference, which is kept anyway."""
    names = dict.fromkeys(name.strip() for word in words for name in word.split(","))
    return [name for name in names if name not in ("", "reference")]


def _predictor(
    target: str,
    threshold: float | None,
    max_new_tokens: int,
    say: Callable[[str], None],
    options: dict[str, Any],
    reading: Record,
) -> Predictor:
    from tunesmith.inference.load import load_any
    from tunesmith.inference.predict import Predictor

    loaded = load_any(named(target, options["root"]), **options).read_by(reading)
    if loaded.note:
        say(f"note: {loaded.note}")
    predictor = Predictor(loaded, max_new_tokens, threshold)
    if predictor.is_many:
        say(f"a class holds where its probability is above {predictor.holds_above:g} (--threshold)")
    elif threshold is not None:
        say(f"{predictor.positive} is answered where its probability is {threshold:g} or more (--threshold)")
    return predictor


def _one(predictor: Predictor, text: str, pair: str | None, bare: bool) -> None:
    from tunesmith.inference.predict import predict_list
    from tunesmith.inference.rows import record_of
    from tunesmith.tasks import TASKS

    if pair is not None and not ((head := TASKS[predictor.task].head) and head.takes_pairs):
        raise InputError(f"--pair: the task {predictor.task} of this model takes one text. Leave it out.")
    [line] = predict_list(predictor, [record_of(predictor.task, text, pair)], bare=bare)
    if "error" in line:
        raise InputError(f"--text: {line['error']}")
    data_line(line)


def _file(
    predictor: Predictor,
    data: str,
    out: Path | None,
    say: Callable[[str], None],
    options: dict[str, Any],
    *,
    offline: bool,
    shown: str,
) -> Counts:
    from tunesmith.cli.display import phases, pinned
    from tunesmith.inference.predict import predict_file, predict_to
    from tunesmith.recipe.schema import Data, DataFile

    data = pinned(Data(train=(DataFile(path=data),)), offline=offline).train[0].path
    with phases(console(stderr=True), {"rows": "answering rows"}) as tick:
        progress = partial(tick, "rows")
        if out is not None:
            try:
                return predict_to(out, predictor, data, progress=progress, say=say, **options)
            except KeyboardInterrupt:
                raise Stopped(f"{out}: stopped; the same command continues it") from None

        def write(lines: Any) -> None:
            for line in lines:
                if "source" in line:
                    line["source"] = line["source"].replace(data, shown)
                data_line(line)

        bare, keep = options["bare"], options["keep"]
        return predict_file(predictor, data, write, bare=bare, keep=keep, progress=progress)


def _summarize(counts: Counts, out: Path | None, say: Callable[[str], None], *, as_json: bool) -> None:
    """Print counts and warnings; exit code 2 if no row could be answered."""
    for note in counts.notes():
        say(f"note: {note}")
    if not counts.answered:
        reasons = [f" The first: {problem}" for problem in counts.first.values() if problem.severity == "error"]
        nothing = "no row could be answered" + (f", so {out} was not written" if out is not None else "")
        raise InputError("".join([f"{nothing}.", *reasons[:1]]))
    if out is not None and as_json:
        json_line({"kind": "result", "out": str(out), "answered": counts.answered, "errors": counts.errors})
    done = plural(counts.answered, "row") + " answered" + (f", in {out}" if out is not None else "")
    if counts.errors:
        verb = "says" if counts.errors == 1 else "say"
        done += f"; {plural(counts.errors, 'row')} could not be, and {verb} why"
    say(done)
