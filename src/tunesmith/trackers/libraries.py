"""The trackers, each by its own library, which is imported where it is used."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tunesmith.environment.packages import install_command
from tunesmith.errors import InputError, RunError
from tunesmith.phrases import did_you_mean
from tunesmith.recipe.docs import flat
from tunesmith.recipe.yaml_io import dump
from tunesmith.runs.folder import Run
from tunesmith.trackers.run_reader import RunReader, StepMetrics, plainly_named

SETTINGS = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}
"""Variables of the sending process: nothing is sent to these libraries' makers, no server is waited for."""


class Tracker:
    """A library that can be used, and a run that is open in it. `__init__` raises anything if it cannot: no
    server, no login, or no network allowed.

    Everything may raise whatever the library raises; the caller opens the run again later.
    """

    way_out: str
    """Advice where the tracker cannot be used."""
    where: Sequence[str] = ()
    """Address or folder, without secrets, and project: a run that is done here may not be elsewhere."""
    place: str
    """The address or folder where a person finds the run."""
    last_step = -1
    """Newest step that the tracker holds; -1: none."""
    _run: Any

    def __init__(self, offline: bool) -> None:
        """Import the library, and check that it can be used."""

    def open(self, run: Run, reader: RunReader) -> None:
        """Open the run, found again if it was there."""

    def log(self, steps: Sequence[StepMetrics]) -> None:
        """Store values of new steps, in order."""

    def describe(self, reader: RunReader, results: Sequence[Path]) -> None:
        """Store facts and notes, and results: reports, and the folder of an adapter."""
        for path in results:
            kind = "model" if path.is_dir() else "report"
            self._run.log_artifact(str(path), name=f"{reader.key}-{path.name}", type=kind)

    def close(self, state: str = "") -> None:
        """Close the run, which ended in this state of `RunReader`; empty: it continues, or an error came."""
        self._run.finish()


class TensorBoard(Tracker):
    """Event files in the folder `tensorboard` of the run, written anew each time: they follow from events.

    Values are rounded to float32, the only kind of scalar that every reader of such files shows.
    """

    way_out = "Install the package tensorboard again."

    def __init__(self, offline: bool) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._text_pb, self._writer = Event, text_pb, EventFileWriter

    def open(self, run: Run, reader: RunReader) -> None:
        self.place = str(run.path / "tensorboard")
        for earlier in Path(self.place).glob("events.out.tfevents.*"):
            earlier.unlink()
        self._run = self._writer(self.place)
        self._add(0, time.time(), session_log={"status": 1})  # START: a viewer drops what it has read

    def _add(self, step: int, wall_time: float, **content: Any) -> None:
        self._run.add_event(self._event(wall_time=wall_time, step=step, **content))

    def log(self, steps: Sequence[StepMetrics]) -> None:
        for step in steps:
            values = [{"tag": tag, "simple_value": value} for tag, value in step.values.items()]
            self._add(step.step, step.time, summary={"value": values})
        self._run.flush()

    def describe(self, reader: RunReader, results: Sequence[Path]) -> None:
        trees = {"recipe": reader.recipe, "facts": reader.facts, "notes": reader.notes}
        texts = {tag: f"```\n{dump(tree)}\n```" for tag, tree in trees.items()}
        for tag, text in (texts | {f"files/{path.name}": str(path.absolute()) for path in results}).items():
            self._add(0, time.time(), summary=self._text_pb(tag, text))

    def close(self, state: str = "") -> None:
        self._run.close()


class Wandb(Tracker):
    """A run of its own id, resumed by it. Offline it is one folder, written anew whenever the run is opened,
    until `wandb sync` has sent it."""

    way_out = "Check WANDB_BASE_URL, WANDB_API_KEY or `wandb login`, or go without the network: WANDB_MODE=offline."

    def __init__(self, offline: bool) -> None:
        import wandb

        self._wandb, settings = wandb, wandb.setup().settings
        if settings.mode == "disabled":
            raise InputError("WANDB_MODE=disabled: nothing would be tracked. Unset it, or leave the tracker out.")
        self._project = os.environ.get("WANDB_PROJECT", "tunesmith")
        self.where = [os.path.abspath(settings.root_dir), self._project]
        if settings.mode not in ("offline", "dryrun"):
            self.where = [without_secrets(f"{settings.base_url}/{settings.entity or ''}"), self._project]
            _reach(settings.base_url, offline)
            if not wandb.login(verify=True, timeout=1):
                raise PermissionError("there is no login")

    def open(self, run: Run, reader: RunReader) -> None:
        settings = self._wandb.Settings(
            console="off", disable_git=True, x_disable_stats=True, x_disable_meta=True, x_save_requirements=False
        )
        self._run = self._wandb.init(
            project=self._project,
            id=reader.key,
            name=os.environ.get("WANDB_NAME", reader.name),
            resume="allow",
            config={**reader.recipe, **reader.facts},
            settings=settings,
        )
        if self._run.offline:
            folder = Path(self._run.dir).parent
            self.place, self.last_step = str(folder), _sent_before(folder, run, reader.key)
        else:
            self.place = str(self._run.url)
            self.last_step = int(self._run.step) - 1 if self._run.resumed else -1

    def log(self, steps: Sequence[StepMetrics]) -> None:
        for step in steps:
            self._run.log({**step.values, "_timestamp": step.time}, step=step.step, commit=True)

    def describe(self, reader: RunReader, results: Sequence[Path]) -> None:
        self._run.notes = "\n".join(reader.notes)
        super().describe(reader, results)

    def close(self, state: str = "") -> None:
        self._run.finish(exit_code=0 if state in ("end", "stopped") else 1)


def _sent_before(own: Path, run: Run, key: str) -> int:
    """Newest step in other folders of the run once `wandb sync` has sent one; else -1; they are removed."""
    others = [folder for folder in own.parent.glob(f"offline-run-*-{key}") if folder != own]
    if any(path for folder in others for path in folder.glob("*.synced")):
        with suppress(RunError):
            return int(run.read_json("tracking/wandb.json")["step"])
    for folder in others:
        shutil.rmtree(folder, ignore_errors=True)
    return -1


class Mlflow(Tracker):
    """A run found by its tag, on a server, in a database or in files, as MLFLOW_TRACKING_URI says."""

    way_out = "Check MLFLOW_TRACKING_URI; sqlite:///mlflow.db is a file that needs no server."

    def __init__(self, offline: bool) -> None:
        import mlflow

        address, name = mlflow.get_tracking_uri(), os.environ.get("MLFLOW_EXPERIMENT_NAME", "tunesmith")
        _reach(address, offline)
        self._entities, self._client = mlflow.entities, mlflow.MlflowClient()
        known = self._client.get_experiment_by_name(name)
        if known is not None and not known.name:  # other servers answer too
            raise ConnectionError(f"{address}: what answers is no MLflow server")
        self._experiment = mlflow.set_experiment(name)
        _, sqlite, path = address.rpartition("sqlite:///")
        is_server = not sqlite and ("://" in address or address == "databricks")
        self.where = [without_secrets(address) if is_server else sqlite + Path(path).absolute().as_posix(), name]

    def open(self, run: Run, reader: RunReader) -> None:
        client = self._client
        of_it, tags = [self._experiment.experiment_id], {"tunesmith.run": reader.key}
        earlier = client.search_runs(of_it, f"tags.`tunesmith.run` = '{reader.key}'", max_results=1)
        self._run = earlier[0] if earlier else client.create_run(*of_it, run_name=reader.name, tags=tags)
        self._id = self._run.info.run_id
        client.update_run(self._id, status="RUNNING")
        self.place = f"{self.where[0]}, experiment {self.where[1]}, run {self._id}"
        # Each step but 0 has a training loss, which is stored last: see `log`.
        history = client.get_metric_history(self._id, "train/loss")
        self.last_step = max([0 if self._run.data.metrics else -1, *(metric.step for metric in history)])

    def log(self, steps: Sequence[StepMetrics]) -> None:
        # The library stores 1,000 values in one transaction, so that a kill may cut a step in two.
        order = [(step, key) for step in steps for key in sorted(step.values, key="train/loss".__eq__)]
        at = [(key, step.values[key], int(step.time * 1000), step.step) for step, key in order]
        self._client.log_batch(self._id, metrics=[self._entities.Metric(*values) for values in at])

    def describe(self, reader: RunReader, results: Sequence[Path]) -> None:
        known = self._run.data.params  # a parameter of a run cannot change
        recipe, facts = (plainly_named(flat(tree)) for tree in (reader.recipe, reader.facts))
        unknown = [item for item in recipe.items() if item[0] not in known]
        params = [self._entities.Param(key, str(value)[:5000]) for key, value in unknown]
        facts["mlflow.note.content"] = "\n\n".join(reader.notes)
        tags = [self._entities.RunTag(key, str(value)) for key, value in facts.items()]
        self._client.log_batch(self._id, params=params, tags=tags)
        for path in results:
            if path.is_dir():
                self._client.log_artifacts(self._id, str(path), path.name)
            else:
                self._client.log_artifact(self._id, str(path))

    def close(self, state: str = "") -> None:
        self._client.set_terminated(self._id, {"end": "FINISHED", "failed": "FAILED"}.get(state, "KILLED"))


class Trackio(Tracker):
    """A run by its name, in the local store, on a server of one's own, or in a Space."""

    way_out = "Without TRACKIO_SERVER_URL and TRACKIO_SPACE_ID the run stays on this machine."

    def __init__(self, offline: bool) -> None:
        import trackio
        from huggingface_hub import get_token

        self._trackio, space = trackio, os.environ.get("TRACKIO_SPACE_ID")
        server = f"https://huggingface.co/spaces/{space}" if space else os.environ.get("TRACKIO_SERVER_URL", "")
        if space and not (offline or get_token()):
            raise InputError(f"{space}: there is no login for it. Set HF_TOKEN, or call `hf auth login`.")
        _reach(server, offline)
        if server and not (space or "write_token=" in server or os.environ.get("TRACKIO_WRITE_TOKEN")):
            raise InputError(f"{without_secrets(server)}: there is no write token for it. Set TRACKIO_WRITE_TOKEN.")
        where = space or without_secrets(server) or str(Path(trackio.utils.TRACKIO_DIR).absolute())
        self.where = [where, os.environ.get("TRACKIO_PROJECT", "tunesmith")]

    def open(self, run: Run, reader: RunReader) -> None:
        where, project = self.where
        self._run = self._trackio.init(
            project=project, name=reader.key, resume="allow", config={**reader.recipe, **reader.facts},
            embed=False, auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip
        self.place = f"{where}, project {project}, run {reader.key}"
        self.last_step = int(self._run._next_step) - 1

    def log(self, steps: Sequence[StepMetrics]) -> None:
        for step in steps:
            self._run.log(dict(step.values), step=step.step)

    def describe(self, reader: RunReader, results: Sequence[Path]) -> None:
        if reader.state == "end" and reader.notes and self._run._next_step <= reader.newest + 1:  # once
            notes = self._trackio.Markdown("\n\n".join(reader.notes))
            self._run.log({"notes": notes}, step=reader.newest + 1)
        super().describe(reader, results)


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio}
"""By their names, which packages have too."""
DRIVERS = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
"""Packages of modules that have other names."""


def check_names(names: Sequence[str]) -> list[str]:
    """The trackers of these names, each once; "none" alone means no tracker.

    Raises InputError for an unknown one, or for all whose packages are not installed.
    """
    chosen = [] if "none" in names else list(dict.fromkeys(names))
    if unknown := [name for name in chosen if name not in TRACKERS]:
        raise InputError(
            f"track: {unknown[0]}: there is no such tracker.{did_you_mean(unknown[0], TRACKERS)} One of "
            f"{', '.join(TRACKERS)}, or none."
        )
    if missing := [name for name in chosen if importlib.util.find_spec(name) is None]:
        all_of_them, are = ", ".join(missing), "packages are" if len(missing) > 1 else "package is"
        raise InputError(f"track: {all_of_them}: the {are} missing. To install: {install_command(*missing)}")
    return chosen


def problem_of(name: str, error: BaseException) -> str:
    """The reason why a tracker cannot be used, with a way out, in one line."""
    cause = line_of(error)
    if isinstance(error, InputError):  # with its own advice
        return f"track: {name}: {cause}"
    way_out = TRACKERS[name].way_out
    if lacking := re.search(r"No module named '(\w+)'", cause):  # of a database
        package = DRIVERS.get(lacking[1], lacking[1])
        way_out = f"Install it: {shlex.quote(sys.executable)} -m pip install {shlex.quote(package)}"
    return f"track: {name}: {cause[:300].rstrip('.') or type(error).__name__}. {way_out}"


def line_of(error: BaseException) -> str:
    """The text of an error in one line, without the secrets of addresses."""
    return without_secrets(" ".join(str(error).split()))


def without_secrets(text: str) -> str:
    """A text whose addresses have lost user, password and query, and whose headers their credentials."""
    text = re.sub(r"(?i)\b(basic|bearer)\s+[\w.~+/=-]{6,}", r"\1 (hidden)", text)
    return re.sub(r"(?<=://)[^/\s]*@|\?[\w.-]+=[^\s'\")]*", "", text)


def _reach(address: str, offline: bool) -> None:
    """Raise InputError if the server at an HTTP address may not be called, ConnectionError if it is silent."""
    if not address.startswith("http"):
        return
    address = without_secrets(address)
    if offline:
        raise InputError(f"{address} needs the network, and --offline forbids it. Drop one of the two.")
    try:
        with suppress(urllib.error.HTTPError):  # any answer will do
            urllib.request.urlopen(address, timeout=10).close()
    except (OSError, ValueError) as error:
        raise ConnectionError(f"{address}: no server answers: {getattr(error, 'reason', error)}") from error
