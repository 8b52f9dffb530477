"""A run on several devices for a Python program: `tunesmith` in a process, whose lines are its events."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Protocol

from tunesmith import errors
from tunesmith.environment.children import for_child, python_words
from tunesmith.recipe.docs import as_yaml
from tunesmith.recipe.schema import Recipe
from tunesmith.runs.atomic import from_json
from tunesmith.runs.folder import Run
from tunesmith.types import Event, JsonObject

MOST_PLACES = 5
"""Rows that an error names."""


def train_in_child(
    recipe: Recipe,
    *,
    root: Path,
    out: Path | None,
    offline: bool,
    listener: Hears,
    on_note: Callable[[str], None] = lambda text: None,
) -> Run:
    """Run `tunesmith train` for a recipe, see `run_words`; raises what it failed with."""
    with TemporaryDirectory(prefix="tunesmith-") as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(as_yaml(recipe, comments=False), "utf-8")
        place = ["--out", str(out)] if out is not None else []
        words = ["train", "--recipe", str(file), "--runs", str(root), *place]
        return run_words(words, offline=offline, listener=listener, on_note=on_note)


class Hears(Protocol):
    """A listener, as far as a run in another process can tell it anything."""

    @property
    def on_event(self) -> Callable[[Event], None]: ...
    @property
    def should_stop(self) -> Callable[[], bool]: ...


def run_words(
    words: Sequence[str], *, offline: bool, listener: Hears, on_note: Callable[[str], None] = lambda text: None
) -> Run:
    """Run `tunesmith WORDS` to its end, and return its run. `should_stop` is called after every event;
    `on_note` gets the notes of exports, and what trackers did not get.

    Raises the error that it ends with, a TunesmithError.
    """
    command = [*python_words("tunesmith"), *words, "--json", *(["--offline"] if offline else [])]
    last: JsonObject = {}
    result: JsonObject = {}
    with (
        TemporaryFile() as error_output,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=error_output, env=for_child()) as child,
    ):
        assert child.stdout is not None
        is_stopping = False
        try:
            for line in child.stdout:
                if not line.startswith(b'{"') or not line.endswith(b"\n"):  # a library's, or cut off by a kill
                    continue
                last = from_json(line)
                result = last if last.get("kind") == "result" else result  # lines of exports may follow
                notes = [last["text"]] if last.get("kind") == "tracking" else last.get("notes", ())
                for note in notes if last.get("kind") in ("tracking", "export") else ():
                    on_note(note)
                if "step" in last:
                    listener.on_event(Event(**last))
                if not is_stopping and listener.should_stop():
                    is_stopping = True
                    child.send_signal(signal.SIGTERM)
            code = child.wait()
        except BaseException:  # of the listener, or Ctrl-C: the run saves a checkpoint and ends
            child.send_signal(signal.SIGTERM)
            raise
        if code == 0 and result:
            return Run(Path(result["run"]))
        error_output.seek(0)
        text = error_output.read().decode("utf-8", "replace").strip()
    raise as_error(last, text, code)


def as_error(last: JsonObject, text: str, code: int) -> errors.TunesmithError:
    """The error that another process named in `last`, {"kind", "code", "message"}; without that one of its
    `text`, after what it said of its progress, and its exit code."""
    kind = getattr(errors, str(last.get("code", "")), None) if last.get("kind") == "error" else None
    message = str(last.get("message", "")) if kind is not None else re.split(r"^error: ", text, flags=re.M)[-1]
    message = message or f"the process of the run ended with code {code}"
    places = [
        (f"{problem['file']}:{problem['line']}".removesuffix(":0"), problem["message"])
        for problem in last.get("problems", [])
    ]
    listed = [
        f"{at}: {reason}" for at, reason in places[:MOST_PLACES] if f"{at}: " not in message or reason not in message
    ]
    message = "\n".join([message, *listed])
    if kind is None or kind in (errors.DoesNotFitError, errors.OutOfMemoryError):  # which carry numbers
        kind = errors.InputError if code == errors.InputError.exit_code else errors.GroupError
    error: errors.TunesmithError = kind(message)
    return error
