"""The Python face of a run: the words of `tunesmith train` as arguments."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.data.in_memory import is_rows, write_rows
from tunesmith.data.problems import SKIP
from tunesmith.errors import DataError, InputError, RecipeError, RunError, TunesmithWarning
from tunesmith.evaluation.bootstrap import Interval
from tunesmith.evaluation.metrics import refuse_no_answers
from tunesmith.evaluation.series import RunSeries
from tunesmith.export.export_run import Exported
from tunesmith.graders.child import MODULE
from tunesmith.inference.load import load_any, load_run
from tunesmith.inference.measure import evaluate_file
from tunesmith.inference.predict import Predictor, predict_list
from tunesmith.parallel.child import run_words, train_in_child
from tunesmith.phrases import plural, visible
from tunesmith.recipe.load import load as load_recipe
from tunesmith.recipe.load import validate
from tunesmith.recipe.schema import USUAL, Recipe
from tunesmith.runs.folder import Run
from tunesmith.summaries.words import PHASES
from tunesmith.training.job import Watcher, resume_run, train_run
from tunesmith.training.progress import Listener
from tunesmith.types import Event, JsonObject, Record, TaskName

Files = str | PathLike[str] | Record | Sequence[str | PathLike[str] | Record]
"""A path, {"path", "weight"}, or several of them; or rows: a list of mappings, a pandas or `datasets` table."""

MOST_PROBLEMS = 5
"""Rows that the text of a refusal names."""


def train(
    model: str | PathLike[str] | None = None,
    data: Files | Any = (),
    *,
    eval: Files | Any = (),
    recipe: Recipe | str | PathLike[str] | None = None,
    root: str | PathLike[str] = "runs",
    out: str | PathLike[str] | None = None,
    offline: bool = False,
    progress: bool | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
    **options: Any,
) -> Run:
    """Tune `model` on `data`; the finished run. Its notes arrive as `TunesmithWarning`, and are in `run.notes`.
    On several devices (devices=2, or all CUDA cards here) each has a process of its own, as their agent has.

    Args:
        data: one or several paths or {"path", "weight"}; or rows: a list of mappings, a pandas or `datasets`
            table, written to `root`/data as JSONL, where a resumed run finds them. `eval` is the same.
        recipe: a recipe or its file; `options`, sections or keys of it, win: method="lora", optim={"lr": 1e-4}.
            Task reinforce takes grader=..., here or in reinforce={...}: a function of a file, or what `--grader` takes.
        progress: whether a bar is shown; None: in notebooks and on terminals.
        should_stop: called before the first step and after each.

    Raises:
        InputError: recipe, data or model cannot be used; nothing was written.
        Stopped: a stop was requested; `tunesmith.resume(run)` continues.

    Examples:
        >>> run = tunesmith.train("HuggingFaceTB/SmolLM2-135M-Instruct", "support.jsonl", train={"epochs": 2})
    """
    changes = dict(options) if model is None else {**options, "model": fspath(model)}
    changes |= _graded_by(changes.pop("grader", None), changes.get("reinforce", {}))
    for key, files in (("train", _files(data, Path(root))), ("eval", _files(eval, Path(root)))):
        if files:
            changes["data"] = {**changes.get("data", {}), key: files}
    base = recipe.model_dump() if isinstance(recipe, Recipe) else {}
    path = None if recipe is None or isinstance(recipe, Recipe) else fspath(recipe)
    start = load_recipe(path, base=base).model_dump()
    try:
        chosen = validate(_over(start, changes), where="tunesmith.train")
    except RecipeError as error:  # train.epochs is written train={"epochs": ...} here
        text = re.sub(r"did you mean (\w+)\.(\w+)\?", r'did you mean \1={"\2": ...}?', str(error))
        raise RecipeError(text) from None
    if not chosen.model or not chosen.data.train:
        missing = "model" if not chosen.model else "data"
        raise RecipeError(f"tunesmith.train: {missing}: nothing was given: tunesmith.train(model, data)")
    place = Path(out) if out else None
    watch = partial(_watch, progress=progress, on_event=on_event, should_stop=should_stop)

    def several(devices: int) -> Run:
        with watch(True) as watcher:
            listener = watcher.listener(lambda run: None)
            return train_in_child(
                chosen, root=Path(root), out=place, offline=offline, listener=listener, on_note=watcher.say
            )

    with _problems_named():
        return train_run(chosen, watch=watch, several=several, root=Path(root), out=place, offline=offline)


def _graded_by(grader: Any, options: Record) -> JsonObject:
    if MODULE in sys.modules:  # else each process of the grader would start one more, without end
        raise RecipeError("grader: its file trains when it is loaded. Do that below `if __name__ == '__main__':`")
    grader = options.get("grader") if grader is None and isinstance(options, Mapping) else grader
    return {} if grader is None else {"reinforce": {**options, "grader": _word_of(grader)}}


def _word_of(grader: Any) -> str:
    """The word for a function in `reinforce.grader`."""
    if not callable(grader):
        return str(fspath(grader))
    file, name = getattr(getattr(grader, "__code__", None), "co_filename", ""), getattr(grader, "__name__", "")
    if not Path(file).is_file() or getattr(grader, "__qualname__", "") != name or not name.isidentifier():
        raise RecipeError(
            f"tunesmith.train: grader: {name or grader}: graders run in processes of their own, which load "
            "them from a file. Write the function into grader.py, and give grader='grader.py'"
        )
    return f"{file}:{name}"


def resume(
    run: Run | str | PathLike[str],
    *,
    root: str | PathLike[str] = "runs",
    model: str | PathLike[str] | None = None,
    offline: bool = False,
    progress: bool | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Run:
    """Go on with a stopped or broken run, named as on the command line, as if it had never stopped. `model`:
    where its model is now, if it was moved.

    Raises:
        RunError: the run is finished or in use, or its data, tokenizer, template, model or settings changed.

    Examples:
        >>> run = tunesmith.resume("last")
    """
    opened = _opened(run, root, model)
    watch = partial(_watch, progress=progress, on_event=on_event, should_stop=should_stop)

    def several(devices: int) -> Run:
        words = ["resume", str(opened.path), *(["--model", opened.base] if opened.base is not None else [])]
        with watch(True) as watcher:
            return run_words(words, offline=offline, listener=watcher.listener(lambda run: None), on_note=watcher.say)

    return resume_run(opened, watch=watch, several=several, offline=offline)


def predict(
    target: Run | str | PathLike[str],
    rows: str | Record | Sequence[str | Record],
    *,
    base: bool = False,
    task: TaskName | None = None,
    threshold: float | None = None,
    max_new_tokens: int = 256,
    root: str | PathLike[str] = "runs",
    model: str | PathLike[str] | None = None,
    offline: bool = False,
) -> list[JsonObject]:
    """Answers to texts, or rows with the fields of the task, in order: as lines of `tunesmith predict --bare`.

    A row that cannot be used has {"error": ...} in its place.

    Args:
        target: a run or a model. `base` asks the untouched model of a run, `task` says what to ask of a model.
        model: where the model that a run was made from is now, if it was moved.

    Raises:
        InputError: the run or the model cannot be used.

    Examples:
        >>> answers = tunesmith.predict("last", ["How do I reset it?"])
    """
    listed = [rows] if isinstance(rows, (str, Mapping)) else rows
    where = _where(target, model)
    loaded = load_any(_name(target), root=Path(root), base=base, task=task, model=where, offline=offline)
    return predict_list(Predictor(loaded, max_new_tokens, threshold), listed, bare=True)


def evaluate(
    target: Run | str | PathLike[str],
    data: str | PathLike[str] | Any,
    *,
    base: bool = False,
    task: TaskName | None = None,
    samples: int | None = None,
    judge: Run | str | PathLike[str] | None = None,
    root: str | PathLike[str] = "runs",
    model: str | PathLike[str] | None = None,
    offline: bool = False,
) -> dict[str, Interval]:
    """The measures of the task on answered rows, each as {"value", "low", "high"}: its 95 % interval.

    Args:
        data: a file, or rows: a list of mappings, a pandas or a `datasets` table.
        samples: number of rows to be answered and measured; None: 50 for the tasks chat, generate, summarize.
        judge: a run of task reward or a model that writes; it gives nothing but the rates at which answers of
            the run win against those from before. Rows may be prompts then.
        model: where the model that a run was made from is now, if it was moved.

    Raises:
        InputError: run, model or judge cannot be used; of it DataError: rows cannot be.

    Examples:
        >>> loss = tunesmith.evaluate("last", "test.jsonl")["loss"]
    """
    if not isinstance(data, (str, PathLike)) and not is_rows(data):
        raise InputError(
            f"tunesmith.evaluate: data: {data!r:.60} is neither a path nor rows. Give one file, or a list of rows."
        )
    refuse_no_answers(samples, judge, ("tunesmith.evaluate: judge", "samples=0"))
    where = _where(target, model)
    loaded = load_any(_name(target), root=Path(root), base=base, task=task, model=where, offline=offline)
    arbiter = None if judge is None else load_any(_name(judge), root=Path(root), offline=offline)
    with _problems_named(), TemporaryDirectory(prefix="tunesmith-") as folder:
        path = str(write_rows(data, Path(folder))) if is_rows(data) else fspath(data)
        return evaluate_file(loaded, path, samples=samples, judge=arbiter, offline=offline).measures


def load(
    run: Run | str | PathLike[str],
    *,
    root: str | PathLike[str] = "runs",
    model: str | PathLike[str] | None = None,
    offline: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The tuned model of a run and its tokenizer, as `transformers` uses them. `model`: where the model that it
    was made from is now, if it was moved.

    Raises:
        InputError: of it RunError: there is no such run; ModelError: its model cannot be used.

    Examples:
        >>> model, tokenizer = tunesmith.load("last")
    """
    opened = _opened(run, root, model)
    loaded = load_run(opened, offline=offline)
    return loaded.model, loaded.renderer.tokenizer


def _opened(run: Run | str | PathLike[str], root: str | PathLike[str], model: str | PathLike[str] | None) -> Run:
    opened = run if isinstance(run, Run) else Run.open(fspath(run), Path(root))
    return opened if model is None else replace(opened, base=fspath(model))


def _where(target: Run | str | PathLike[str], model: str | PathLike[str] | None) -> str | None:
    """The place of a run's base now: the one given here, or the one the run was opened with."""
    if model is not None:
        return fspath(model)
    return target.base if isinstance(target, Run) else None


def _name(target: Run | str | PathLike[str]) -> str:
    return str(target.path) if isinstance(target, Run) else fspath(target)


def _tell(text: str) -> None:
    """Warn, as if at the line of the caller's own code that called us."""
    depth, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        depth, frame = depth + 1, frame.f_back
    warnings.warn(visible(text), TunesmithWarning, stacklevel=depth)


_OURS = ("tunesmith", "contextlib")


def _notes_of(event: Event) -> list[str]:
    """The notes of an event that a terminal prints: `Run.notes` has more, which need no action."""
    values = event.values
    if event.kind == "plan":
        return [note for note in values.get("warnings", ()) if note not in values.get("asides", ())]
    is_aside = values.get("detail") or values.get("aside")
    return [values["text"]] if event.kind == "note" and not is_aside else []


@contextmanager
def _problems_named() -> Iterator[None]:
    """A refusal of rows names the first of them, as the command line does, and options as written here."""
    try:
        yield
    except DataError as error:
        alike: dict[str, list[str]] = {}
        for problem in error.problems:
            cause = str(problem).replace(str(problem.source), problem.source.path, 1)
            alike.setdefault(cause, []).append(str(problem))
        listed = [
            first + (f" The same is wrong in {plural(len(rest), 'more row')}." if rest else "")
            for first, *rest in alike.values()
            if first not in str(error)
        ]
        lines = [str(error), *listed[:MOST_PROBLEMS]]
        if len(listed) > MOST_PROBLEMS:
            lines.append(f"... and {len(listed) - MOST_PROBLEMS:,} more: see .problems")
        text = "\n".join(lines)
        raise DataError(_as_python(text), error.problems) from None


def _as_python(text: str) -> str:
    """A message with the options of the command line as arguments of `train`, whose `data` are the rows."""
    text = text.replace(SKIP, 'recipe=tunesmith.Recipe(data={"bad_rows": "skip"})')
    text = re.sub(r"--set 'data\.columns=\{(.*?)\}'", _columns, text)
    text = re.sub(r"--set task=(\w+)", r"--task \1", text)
    text = re.sub(r"--task (\w+)(?= recipe=)", r'task="\1",', text)
    return re.sub(r"--task (\w+)", r'task="\1"', text)


def _columns(match: re.Match[str]) -> str:
    named = dict(word.partition(": ")[::2] for word in match[1].split(", "))
    return f'recipe=tunesmith.Recipe(data={{"columns": {json.dumps(named, ensure_ascii=False)}}})'


@contextmanager
def _watch(
    is_first: bool,
    *,
    progress: bool | None,
    on_event: Callable[[Event], None],
    should_stop: Callable[[], bool],
) -> Iterator[Watcher]:
    """The caller's program as the watcher of a run: notes become warnings, and one bar shows how far it is."""
    line = ProgressLine() if is_first and (is_wanted() if progress is None else progress) else None

    def hear(event: Event) -> None:
        if line is not None:
            line.event(event)
        for text in _notes_of(event):
            _tell(text)
        on_event(event)

    def listener(on_run: Callable[[Run], None]) -> Listener:
        if line is None:
            return Listener(on_event=hear, should_stop=should_stop, on_run=on_run)

        def begin(run: Run) -> None:
            line.run(run)
            on_run(run)

        return Listener(on_event=hear, on_progress=line.tick, should_stop=should_stop, on_run=begin)

    def tracked(is_sent: bool, text: str) -> None:
        if not is_sent:
            _tell(text)

    def exported(done: Exported) -> None:
        for note in done.notes:
            _tell(note)

    try:
        silent = nullcontext(lambda what, done, total: None)
        yield Watcher(
            listener, tracked, say=_tell, exported=exported, export_note=_tell, export_progress=lambda: silent
        )
    finally:
        if line is not None:
            line.close()


def _files(files: Files | Any, root: Path) -> list[Any]:
    if is_rows(files):
        return [str(write_rows(files, root / "data"))]
    is_one = isinstance(files, (str, PathLike, Mapping)) or not isinstance(files, Iterable)
    several: list[Any] = [files] if is_one else list(cast(Iterable[Any], files))
    if not all(isinstance(file, (str, PathLike)) or (isinstance(file, Mapping) and "path" in file) for file in several):
        shown = " ".join(repr(files).split())
        raise InputError(
            f"data: {type(files).__name__} {shown:.60} is neither files nor rows. Give a path or several, a "
            "list of mappings, or a pandas or a datasets table; of a dictionary of tables, one of them."
        )
    return [file if isinstance(file, Mapping) else fspath(file) for file in several]


def _over(start: Record, given: Record) -> JsonObject:
    """`given` laid over `start`, section by section; another method or optimizer brings its own defaults."""
    result = dict(start)
    for key, value in given.items():
        before = start.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            is_other = value.get("name", before.get("name")) != before.get("name")
            if is_other and key == "optim":
                usual = USUAL[before["name"]]
                before = {option: setting for option, setting in before.items() if setting != usual.get(option)}
            result[key] = value if is_other and key == "method" else {**before, **value}
        else:
            result[key] = value
    return result


def is_wanted() -> bool:
    """Whether somebody watches: in a notebook, or where stderr is a terminal."""
    return "ipykernel" in sys.modules or bool(sys.stderr is not None and sys.stderr.isatty())


@dataclass
class ProgressLine:
    """One bar that moves on from phase to phase; `run`, `event` and `tick` are what a `Listener` takes."""

    make: Callable[..., Any] = tqdm
    _bar: Any = None
    _phase: str = ""
    _series: RunSeries = field(default_factory=RunSeries)

    def tick(self, what: str, done: int, total: int) -> None:
        """`done` of `total` of a phase."""
        if what != self._phase or self._bar is None:
            self.close()
            self._phase = what
            self._bar = self.make(total=total, desc=PHASES.get(what, what), leave=False)
        if total != self._bar.total:
            self._bar.total = total
        self._bar.update(done - self._bar.n)

    def run(self, run: Run) -> None:
        """Take what a resumed run has measured."""
        with suppress(RunError):  # a damaged log is put right and heard later
            self._series = RunSeries.of(run.events())

    def event(self, event: Event) -> None:
        """Steps and their losses, held-out losses."""
        self._series.add(event)
        if event.kind == "step":
            self.tick("train", event.step, self._series.total_steps)
            facts = {"loss": f"{event.values['loss']:.3f}"}
            if self._series.evaluations:
                facts["held-out loss"] = f"{self._series.evaluations[-1][1]['loss']:.3f}"
            self._bar.set_postfix(facts, refresh=False)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None
