"""The folders behind the pages of one server, and the commands whose answers pages show."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tunesmith.pages.chat_engine import ChatEngine
from tunesmith.pages.launches import Wanted, argument
from tunesmith.pages.live import FollowedLog, LiveRuns
from tunesmith.pages.local_files import LocalFiles
from tunesmith.pages.run_list import RunList
from tunesmith.runs.folder import Run
from tunesmith.serve.commands import CommandRunner, Reply
from tunesmith.serve.protocol import RequestError
from tunesmith.serve.sessions import Access
from tunesmith.types import JsonObject

COMMAND = "tunesmith"
"""The module of all commands."""
RESULT_PROCESS = "tunesmith.pages.result_process"
PLAN_AGE_S = 120.0
"""Seconds that a plan is shown again: it names the memory that was free when it was made."""
MOST_RUNS_COMPARED = 8
MOST_AT_WORK = 4
"""Runs at work beyond which pages start none."""


@dataclass
class Site:
    """The folder of runs and the folder of data, and everything that is derived from them."""

    root: Path
    files: LocalFiles
    access: Access
    engine: ChatEngine
    commands: CommandRunner
    offline: bool = False

    def __post_init__(self) -> None:
        self.runs = LiveRuns(self.root)
        self.run_list = RunList(self.runs)
        self._starting = threading.Lock()

    @contextmanager
    def room_for_one(self) -> Iterator[None]:
        """A block in which no other run is started. Raises RequestError 409 where too many are at work."""
        with self._starting:
            if (num_working := len(self.run_list.at_work())) >= MOST_AT_WORK:
                message = f"{num_working} runs are at work, each with a model in memory. Wait, or use a terminal."
                raise RequestError(message, status=409, code="conflict")
            self.commands.end_spare()  # the run has its memory
            yield

    def find(self, name: str) -> Run:
        """Raises RequestError 404."""
        run = self.runs.find(name)
        if run is None:
            message = f"{name[:100]}: there is no such run in {self.root}. It may have been removed."
            raise RequestError(message, status=404, code="not_found", param="run")
        return run

    def log(self, name: str) -> FollowedLog:
        """Raises RequestError 404."""
        return self.runs.log(self.find(name))

    def check(self, path: str, model: str, lines: tuple[int, int] | None = None) -> Reply:
        """The answer of `tunesmith check`: about the whole file, or some of its rows as the model reads them."""
        words = check_words(path, model)
        words += ["--rows", f"{lines[0]}-{lines[1]}"] if lines else []
        files = [Path(path), Path(model or ".") / "tokenizer.json"]
        return self.commands.ask(COMMAND, [*words, *self._common()], files)

    def plan(self, wanted: Wanted, *, measured: bool) -> Reply:
        """The answer of `tunesmith plan`; `measured`: with a trial of the heaviest step."""
        words = ["plan", *wanted.words(), "--probe" if measured else "--no-probe", "--runs", str(self.root)]
        files = [Path(wanted.data), Path(wanted.model) / "config.json"]
        return self.commands.ask(COMMAND, [*words, *self._common()], files, PLAN_AGE_S)

    def train_words(self, wanted: Wanted) -> list[str]:
        """The words to type for the same run."""
        return ["train", *wanted.words(), *([] if str(self.root) == "runs" else ["--runs", str(self.root)])]

    def result(self, run: Run) -> Reply:
        """The sections of the report of a finished run."""
        words = [str(run.path), str(self.files.folder), str(self.root)]
        return self.commands.ask(RESULT_PROCESS, words, [run.report_path, run.events_path])

    def compare(self, names: Sequence[str]) -> Reply:
        """The answer of `tunesmith compare` on 2 to 8 runs by name. Raises RequestError for another number."""
        if not 2 <= len(names) <= MOST_RUNS_COMPARED:
            raise RequestError(f"run: {len(names)} runs: name 2 to {MOST_RUNS_COMPARED}.", param="run")
        runs = [self.find(name) for name in names]
        read = [run.path / "evaluation" / name for run in runs for name in ("after.jsonl", "answers-after.jsonl")]
        files = [*read, *(path for run in runs for path in (run.report_path, run.recipe_path))]
        return self.commands.ask(COMMAND, ["compare", *(str(run.path) for run in runs), "--json"], files)

    def _common(self) -> list[str]:
        return [*(["--offline"] if self.offline else []), "--json"]


def check_words(path: str, model: str) -> list[str]:
    """The words of `tunesmith check`. Raises RequestError."""
    return ["check", argument("file", path), *(["--model", argument("model", model)] if model else [])]


def answer_values(answer: Reply) -> JsonObject:
    """An answer of a command as JSON: {state, values, error, progress}."""
    state = "done" if answer.values is not None else "failed" if answer.error is not None else "working"
    return {"state": state, "values": answer.values, "error": answer.error, "progress": answer.progress}
