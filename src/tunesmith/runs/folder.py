"""The run folder: where everything a run knows is kept, and the only thing its processes share.

    runs/support-3f2a/
      run.json         format version, when made            recipe.yaml   complete and resolved
      events.jsonl     one event a line                     rows/         encoded rows
      checkpoints/     step-N/                              evaluation/    the outcome of each held-out row
      adapter/ or model/                                    report.json, report.md, report.html
      result.json      SHA-256 of its files     logs/         output of ranks 1, 2, ...
      lock, lock.json  the writing process                  stop          a request to stop
  progress.json    how far the part of the work is that is under way
      tracking/        what each tracker has                tensorboard/  its event files

One process writes, holding `lock`; any number read.
"""

from __future__ import annotations

import difflib
import os
import re
import secrets
import socket
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import filelock

from tunesmith.environment.version import __version__
from tunesmith.errors import RunError
from tunesmith.phrases import command, listed
from tunesmith.runs import atomic, events
from tunesmith.types import Event, JsonObject, Record

if TYPE_CHECKING:
    from tunesmith.recipe.schema import Recipe

FORMAT = 1
"""Version of the folder's layout; a folder of a newer one is refused."""

State = Literal["new", "running", "stopped", "failed", "done", "interrupted"]

RESULT = "result.json"
_OWN = (
    "evaluation", "checkpoints", "snapshots", "rows", "rows/train", "rows/held_out", "exports", "merged", "tracking",
    "tensorboard", "rollouts", "events.jsonl", "grades.jsonl",
)  # fmt: skip
"""Folders of a run that are written to, and files that grow; others are replaced."""

_LOCK_PATIENCE_S = 1.0  # `state` looks at the lock for an instant: that must not turn a writer away


class _Place:
    """A file or folder of a run, by its name in there."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, run: Run, _: type[Run]) -> Path:
        return run.path / self._name


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder.

    Examples:
        >>> print(tunesmith.Run.open("last").metrics["loss"]["value"])
    """

    path: Path
    base: str | None = None
    """Current place of its base model, if the user gave one."""
    recipe_path = _Place("recipe.yaml")
    events_path = _Place("events.jsonl")
    report_path = _Place("report.json")
    rows_path = _Place("rows")
    checkpoints_path = _Place("checkpoints")
    snapshots_path = _Place("snapshots")
    evaluation_path = _Place("evaluation")
    adapter_path = _Place("adapter")
    model_path = _Place("model")
    merged_path = _Place("merged")
    """The result as a whole model, made when another run starts from it."""

    @classmethod
    def create(
        cls,
        root: Path,
        name: str,
        recipe_yaml: str,
        *,
        out: Path | None = None,
        recipe: Recipe | None = None,
        more: Record = MappingProxyType({}),
    ) -> Run:
        """Make a new folder `<name>-<4 hex digits>` in `root`, or `out`; complete or absent. It records the
        places of the files that `recipe` names, and `more` facts.

        Raises RunError if `out` exists and is not empty: a run never overwrites.
        """
        parent = root if out is None else out.parent
        places = [parent / f"{slug(name)}-{secrets.token_hex(2)}" for _ in range(100)] if out is None else [out]
        atomic.clean(parent, name="new-run", older_than_s=3600)
        temporary = atomic.temporary_folder(parent, "new-run")
        facts = {"format": FORMAT, "created": time.time(), "tunesmith": __version__, **more}
        if recipe is not None:
            from tunesmith.recipe.origin import record, typed_places

            facts["made"] = record(typed_places(recipe), parent)
        try:
            atomic.write_atomic(temporary / "recipe.yaml", recipe_yaml.encode())
            atomic.write_atomic(temporary / "run.json", atomic.to_json(facts, indent=True) + b"\n")
            for path in places:
                with suppress(OSError):
                    path.rmdir()  # which takes an empty folder only
                with suppress(FileExistsError):
                    atomic.replace_folder(temporary, path)
                    return cls(path)
        except BaseException:
            atomic.remove(temporary)
            raise
        atomic.remove(temporary)
        refuse_taken(out)
        raise RunError(f"{root}: 100 names such as {places[0].name} are taken, and a run never overwrites anything.")

    @classmethod
    def open(cls, path_or_name: str | Path, root: str | Path = "runs", *, base: str | None = None) -> Run:
        """Find a run by its path, or in `root` by its name, the beginning of its name, or "last". `base`: the
        place of its model, if it was moved.

        Raises:
            RunError: there is none; it names the near matches.

        Examples:
            >>> run = tunesmith.Run.open("last")
        """
        text, root = str(path_or_name), Path(root)
        if (Path(text) / "run.json").is_file():
            return _known_format(cls(Path(text), base))
        present = {run.path.name: replace(run, base=base) for run in runs(root)}
        if text == "last" and present:
            return _known_format(max(present.values(), key=lambda run: (run.created, run.path.name)))
        matches = [text] if text in present else [name for name in present if text and name.startswith(text)]
        if len(matches) == 1:
            return _known_format(present[matches[0]])
        if matches:
            several = f"the names of {len(matches)} runs in {root} begin with it: {listed(matches)}"
            raise RunError(f"{text}: {several}. Give more of the name.")
        raise RunError(no_such_run(text, root))

    @property
    def created(self) -> float:
        """Seconds since the epoch."""
        return float(self.read_json("run.json").get("created", 0.0))

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Metrics of the tuned model on held-out rows, each {"value", "low", "high"} with its 95 % interval.

        {"loss": {"value": 1.2, "low": 1.1, "high": 1.3}, ...}; names: docs/reference/measures.md. `report` has
        the base's. Empty if nothing was held out. Raises RunError if the run has not ended.

        Examples:
            >>> low, high = (run.metrics["loss"][end] for end in ("low", "high"))
        """
        after = self.report["metrics"]["after"]
        return {} if after is None else dict(after["measures"])

    @property
    def report(self) -> JsonObject:
        """The content of report.json, see docs/guide/report.md. Raises RunError if the run has not ended."""
        if not self.report_path.exists():
            raise RunError(f"{self.path}: it has no report yet: it is {self.state()}. Its measures come when it ends.")
        return dict(self.read_json("report.json"))

    @property
    def notes(self) -> list[str]:
        """Notes of the run so far, in their order: left out, chosen, found. Raises RunError for a bad log."""
        notes: list[str] = []
        for event in self.events():
            notes += event.values.get("warnings", ()) if event.kind == "plan" else ()
            notes += [event.values["text"]] if event.kind == "note" and not event.values.get("detail") else []
        return list(dict.fromkeys(notes))

    def recipe(self) -> Recipe:
        """Read the complete recipe of this run, with the current places of its files."""
        from tunesmith.recipe import load

        return self.place(load.load(str(self.recipe_path)))

    def place(self, recipe: Recipe) -> Recipe:
        """Give a recipe of this run the current places of its files."""
        from tunesmith.recipe.origin import Origin

        facts: Any = {}
        with suppress(RunError):
            facts = self.read_json("run.json")
        return Origin.of(self.path, facts, base=self.base).put(recipe)

    def started_from(self) -> Run | None:
        """The run whose merged result this one was tuned on; None: it was tuned on another model."""
        place = Path(self.recipe().place)
        parent = Run(place.parent)
        return parent if place == parent.merged_path and (parent.path / "run.json").is_file() else None

    def write_json(self, name: str, value: object) -> None:
        """Write `value` to the file `name` of this folder, atomically."""
        atomic.write_atomic(self.path / name, atomic.to_json(value, indent=True) + b"\n")

    def read_json(self, name: str) -> Any:
        """Read a value written by `write_json`. Raises RunError if the file is missing or broken."""
        path = self.path / name
        try:
            return atomic.from_json(path.read_bytes())
        except OSError as error:
            raise RunError(f"{path}: cannot be read: {error.strerror}.") from error
        except ValueError as error:
            raise RunError(f"{path}: is not JSON: {error}.") from error

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Become the one writer of this folder. The system ends the lock with the process that holds it.

        Leftovers of a killed writer are removed first. Raises RunError naming the holder.
        """
        lock = filelock.FileLock(self.path / "lock", timeout=_LOCK_PATIENCE_S, thread_local=False)
        with atomic.storing(self.path / "lock"):
            try:
                lock.acquire()
            except filelock.Timeout:
                raise RunError(f"{self.path}: in use by {self._holder()}. Wait for it, or stop it.") from None
        try:
            self.refuse_links()
            atomic.clean(self.path)
            for name in ("checkpoints", "evaluation", "snapshots", "rows/train", "rows/held_out"):
                atomic.clean(self.path / name)
            self.write_json("lock.json", {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()})
            yield
        finally:
            with suppress(OSError):
                (self.path / "lock.json").unlink(missing_ok=True)
            lock.release()

    def refuse_links(self) -> None:
        """Raise RunError if a folder or log of the run is a link: it would be written elsewhere."""
        for name in _OWN:
            path = self.path / name
            if path.is_symlink():
                raise RunError(
                    f"{path}: a link to {os.readlink(path)}: a run writes into its own folder alone. Put what it "
                    "leads to in its place."
                )

    def result(self) -> Path:
        """The folder of its adapter or model. Raises RunError where there is none yet."""
        for path in (self.model_path, self.adapter_path):
            if path.exists():
                return path
        way = command("resume", self.path)
        raise RunError(f"{self.path}: no result yet, so nothing to export or to start from. Go on with: {way}")

    def export_path(self, word: str) -> Path:
        """The folder of an export by a word of `export.to`, TARGET or TARGET:VALUE, unless another is named."""
        target, _, value = word.partition(":")
        return self.path / "exports" / (f"{target}-{value or 'f16'}" if target in ("gguf", "ollama") else target)

    def keep_hashes(self, result: Path) -> None:
        """Record the SHA-256 of every file of the result; loading checks them."""
        self.write_json(RESULT, _hashes(result))

    def check_result(self, result: Path) -> str:
        """Check the files of the result against the recorded hashes; return a note if there are none, else "".

        Raises RunError naming a file that has changed.
        """
        path = self.path / RESULT
        if not path.is_file():
            return (
                f"{self.path.name}: a run of an earlier version, which noted no hashes: the files of its "
                f"{result.name} were not checked"
            )
        then, now = self.read_json(RESULT), _hashes(result)
        for name in then:
            if now.get(name) != then[name]:
                raise RunError(
                    f"{result / name}: not as the run left it (its SHA-256 is {now.get(name, 'absent')[:16]}, "
                    f"was {str(then[name])[:16]}). Put the file back from a copy. If you changed it yourself, "
                    f"remove {path}: the result is then loaded as it is."
                )
        return ""

    def _holder(self) -> str:
        try:
            facts = self.read_json("lock.json")
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts["since"]))
            return f"process {facts['pid']} on {facts['host']} since {since}"
        except (RunError, KeyError, TypeError):
            return "another process"

    def is_locked(self) -> bool:
        """Whether a living process writes here. Needs no right to write, and never turns a writer away."""
        try:
            descriptor = os.open(self.path / "lock", os.O_RDONLY)
        except OSError:
            return False
        try:
            return not _could_lock(descriptor)
        finally:
            os.close(descriptor)

    def append(self, event: Event) -> None:
        """Add one event; for the holder of the lock alone."""
        events.append(self.events_path, event)

    def note_progress(self, what: str, done: int, total: int) -> None:
        """Say how far a phase is; a full disk does not end the run for it."""
        note, temporary = {"what": what, "done": done, "total": total}, self.path / f"{atomic.TEMPORARY}progress"
        with suppress(OSError):  # without a sync: twice a second it would hold the run up
            temporary.write_bytes(atomic.to_json({**note, "time": time.time()}))
            os.replace(temporary, self.path / "progress.json")

    def events(self) -> Iterator[Event]:
        """Every event so far, oldest first; see events.read."""
        return events.read(self.events_path)

    def follow(self, stop: Callable[[], bool] | None = None) -> Iterator[Event]:
        """Yield the events so far and each new one as it comes, until `stop()` holds; without `stop`, until the
        run is no longer running.

        Examples:
            >>> for event in tunesmith.Run.open("last").follow():
            ...     print(event.kind, event.step)
        """
        return events.follow(self.events_path, stop or (lambda: self.state() != "running"))

    def identity(self) -> dict[str, str]:
        """Hashes and settings that the run logged when it started; empty if it did not get so far."""
        return next((dict(event.values["identity"]) for event in self.events() if event.kind == "start"), {})

    def ask_stop(self) -> None:
        """Ask the writer to stop after its step."""
        atomic.write_atomic(self.path / "stop", b"")

    def stop_asked(self) -> bool:
        return (self.path / "stop").exists()

    def clear_stop(self) -> None:
        """Forget the request."""
        with atomic.storing(self.path / "stop"):
            (self.path / "stop").unlink(missing_ok=True)

    def state(self) -> State:
        """ "running" if a living process holds the lock; else the state by its events.

        "interrupted": it started and logged no end: it was killed, or the machine went down.
        """
        return "running" if self.is_locked() else events.logged_state(self.events_path)


class FollowedRun(Run):
    """A run whose folder another rank of the group owns: nothing is written, and no request is read."""

    def append(self, event: Event) -> None:
        return None

    def note_progress(self, what: str, done: int, total: int) -> None:
        return None

    def stop_asked(self) -> bool:
        return False


def runs(root: Path) -> list[Run]:
    """List every run folder in `root`, by name; other folders are skipped."""
    if not root.is_dir():
        return []
    return [Run(path) for path in sorted(root.iterdir()) if (path / "run.json").is_file() and path.name[0] != "."]


def made_from(run: Run) -> dict[str, str]:
    """Files and folders that a run was made from: as typed → where; empty if it did not record them."""
    try:
        return dict(run.read_json("run.json")["made"]["places"])
    except (RunError, KeyError, TypeError, ValueError):
        return {}


def refuse_taken(out: Path | None) -> None:
    """Raise RunError for a folder that holds something."""
    if out is not None and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        raise RunError(f"{out}: already exists, and a run never overwrites. Take another, or resume the run in it.")


def refuse_done(run: Run) -> None:
    """Raise RunError for a run that has ended well."""
    if run.state() == "done":
        raise RunError(f"{run.path}: this run is done: nothing is left to resume. `tunesmith show` prints its report.")


def is_run(target: str, root: Path) -> bool:
    """Whether a word that can mean a run or a model means a run: its folder, "last", or a name in `root`."""
    if Path(target).exists():
        return (Path(target) / "run.json").is_file()
    if "/" in target:
        return False
    return target == "last" or any(run.path.name.startswith(target) for run in runs(root))


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a folder, by its path in there."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): atomic.sha256_file(path) for path in files}


def slug(name: str) -> str:
    """Turn a name into one that is safe as a folder name on every system."""
    plain = unicodedata.normalize("NFKC", name).lower()
    return re.sub(r"[\W_]+", "-", plain).strip("-")[:40].strip("-") or "run"


def _known_format(run: Run) -> Run:
    version = run.read_json("run.json").get("format")
    if version != FORMAT:
        raise RunError(f"{run.path}: format {version}, this version of tunesmith knows {FORMAT}. Use a newer version.")
    return run


def model_shown(place: str) -> str:
    """The name of a model for a person; a model that is the result of a run has that run's name."""
    path = Path(place)
    is_result = path.name in ("merged", "model") and (path.parent / "run.json").is_file()
    return f"{path.parent.name} ({path.name})" if is_result else place


def no_such_run(text: str, root: Path) -> str:
    """Message for a name that no run in `root` has."""
    names = [run.path.name for run in runs(root)]
    if text and Path(text).is_dir():
        return f"{text}: not a run folder: it has no run.json."
    if not names:
        return f"{text}: no such run: {root} holds none. Start one with `tunesmith train`."
    near = difflib.get_close_matches(Path(text).name, [*names, "last"], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"{root} holds {listed(names)}."
    return f"{text}: no such run in {root}: {hint}"


def _could_lock(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows: its lock is mandatory, so that a byte which cannot be read is held
        try:
            return os.read(descriptor, 1) is not None
        except PermissionError:
            return False
    try:
        # Shared: two readers looking at once do not take each other for a writer.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
