"""The trackers, each by its own library, which is imported where it is used, and the check of one before a run."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tunesmith.environment import install_command
from tunesmith.errors import InputError, RunError
from tunesmith.recipe.docs import flat
from tunesmith.recipe.yaml_io import dump
from tunesmith.runs.folder import Run
from tunesmith.trackers.run_reader import RunReader, StepMetrics

SETTINGS = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}
"""Variables of the sending process: nothing is sent to the makers of these libraries, and no server is waited for."""


class Tracker:
    """A run that is open in a tracker, found again if it was there.

    Everything may raise whatever the library raises; the caller tries again later.
    """

    title: str
    way_out: str
    """Advice where the tracker cannot be used."""
    place: str
    """The address or folder where a person finds the run."""
    last_step = -1
    """Newest step that the tracker holds; -1: none."""
    _run: Any

    def __init__(self, run: Run, reader: RunReader) -> None:
        raise NotImplementedError

    @staticmethod
    def check(offline: bool) -> None:
        """Raise anything if it cannot be used: no server, no login, or no network allowed."""

    def log(self, steps: Sequence[StepMetrics]) -> None:
        """Store values of new steps, in order."""
        for step in steps:
            self._run.log(dict(step.values), step=step.step)

    def describe(self, reader: RunReader) -> None:
        """Store facts and notes."""

    def keep(self, path: Path, name: str, kind: str) -> None:
        """Store a report, or the folder of a model."""
        self._run.log_artifact(str(path), name=name, type=kind)

    def close(self, state: str = "") -> None:
        """Close the run, which ended in this state of `RunReader`; empty: it goes on, or an error came."""
        self._run.finish()


class TensorBoard(Tracker):
    """Event files in the folder `tensorboard` of the run, written anew whenever it is opened: they follow from events.

    Values are rounded to float32, the only kind of scalar that every reader of such files shows.
    """

    title = "TensorBoard"
    way_out = "Install the package tensorboard again."

    @staticmethod
    def check(offline: bool) -> None:
        from tensorboard.summary.writer import event_file_writer  # noqa: F401

    def __init__(self, run: Run, reader: RunReader) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = run.path / "tensorboard"
        for earlier in folder.glob("events.out.tfevents.*"):
            earlier.unlink()
        self.place = str(folder)
        self._run = EventFileWriter(self.place)
        self._add(0, time.time(), session_log=SessionLog(status=SessionLog.START))  # a viewer drops what it has read

    def _add(self, step: int, wall_time: float, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._run.add_event(Event(wall_time=wall_time, step=step, **content))

    def log(self, steps: Sequence[StepMetrics]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        for step in steps:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in step.values.items()]
            self._add(step.step, step.time, summary=Summary(value=values))
        self._run.flush()

    def describe(self, reader: RunReader) -> None:
        for tag, tree in {"recipe": reader.recipe, "facts": reader.facts, "notes": reader.notes}.items():
            self._text(tag, f"```\n{dump(tree)}\n```")

    def keep(self, path: Path, name: str, kind: str) -> None:
        self._text(f"files/{path.name}", str(path.absolute()))

    def _text(self, tag: str, text: str) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._add(0, time.time(), summary=text_pb(tag, text))

    def close(self, state: str = "") -> None:
        self._run.close()


OFFLINE = ("offline", "dryrun")


class Wandb(Tracker):
    """A run of its own id, resumed by it. Offline it is one folder, written anew whenever the run is opened, until
    `wandb sync` has sent it."""

    title = "Weights & Biases"
    way_out = "Set WANDB_API_KEY, call `wandb login`, or work without the network: WANDB_MODE=offline."

    @staticmethod
    def check(offline: bool) -> None:
        import wandb

        settings = wandb.setup().settings
        if settings.mode == "disabled":
            raise InputError("WANDB_MODE=disabled: nothing would be tracked. Unset it, or leave the tracker out.")
        if settings.mode not in OFFLINE:
            _reach(settings.base_url, offline, "Check it, or work without the network: WANDB_MODE=offline.")
            if not wandb.login(verify=True, timeout=1):
                raise InputError(f"there is no login. {Wandb.way_out}")

    def __init__(self, run: Run, reader: RunReader) -> None:
        import wandb

        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, x_disable_stats=True, x_disable_meta=True,
            x_save_requirements=False,
        )  # fmt: skip
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "tunesmith"),
            id=reader.key,
            name=os.environ.get("WANDB_NAME", reader.name),
            resume="allow",
            config={**reader.recipe, **reader.facts},
            settings=settings,
        )
        if self._run.settings.mode in OFFLINE:
            own = Path(self._run.dir).parent
            self.place, self.last_step = str(own), _sent_before(own, run, reader.key)
        else:
            self.place = str(self._run.url)
            self.last_step = int(self._run.step) - 1 if self._run.resumed else -1

    def log(self, steps: Sequence[StepMetrics]) -> None:
        for step in steps:
            self._run.log({**step.values, "_timestamp": step.time}, step=step.step, commit=True)

    def describe(self, reader: RunReader) -> None:
        self._run.notes = "\n".join(reader.notes)

    def close(self, state: str = "") -> None:
        self._run.finish(exit_code=0 if state in ("end", "stopped") else 1)


def _sent_before(own: Path, run: Run, key: str) -> int:
    """The newest step in other folders of the run once `wandb sync` has sent one; else -1, and they are removed."""
    others = [folder for folder in own.parent.glob(f"offline-run-*-{key}") if folder != own]
    if any(path for folder in others for path in folder.glob("*.synced")):
        with suppress(RunError):
            return int(run.read_json("tracking/wandb.json")["step"])
    for folder in others:
        shutil.rmtree(folder, ignore_errors=True)
    return -1


class Mlflow(Tracker):
    """A run found by its tag, on a server, in a database or in files, as MLFLOW_TRACKING_URI says."""

    title = "MLflow"
    way_out = "Check MLFLOW_TRACKING_URI; sqlite:///mlflow.db is a file that needs no server."

    @staticmethod
    def check(offline: bool) -> None:
        import mlflow

        _reach(mlflow.get_tracking_uri(), offline, Mlflow.way_out)
        mlflow.MlflowClient().search_experiments(max_results=1)

    def __init__(self, run: Run, reader: RunReader) -> None:
        import mlflow

        self._client = client = mlflow.MlflowClient()
        experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "tunesmith"))
        of_it, tags = [experiment.experiment_id], {"tunesmith.run": reader.key}
        found = client.search_runs(of_it, f"tags.`tunesmith.run` = '{reader.key}'", max_results=1)
        self._run = found[0] if found else client.create_run(*of_it, run_name=reader.name, tags=tags)
        self._id = self._run.info.run_id
        client.update_run(self._id, status="RUNNING")
        self.place = f"{mlflow.get_tracking_uri()}, experiment {experiment.name}, run {self._id}"
        # Every step is stored in one transaction, and each but 0 has a training loss.
        history = client.get_metric_history(self._id, "train/loss")
        self.last_step = max([0 if self._run.data.metrics else -1, *(metric.step for metric in history)])

    def log(self, steps: Sequence[StepMetrics]) -> None:
        from mlflow.entities import Metric

        at = [(key, value, int(one.time * 1000), one.step) for one in steps for key, value in one.values.items()]
        self._client.log_batch(self._id, metrics=[Metric(*values) for values in at])

    def describe(self, reader: RunReader) -> None:
        from mlflow.entities import Param, RunTag

        known = self._run.data.params  # a parameter of a run cannot change
        params = [Param(key, value) for key, value in _flat(reader.recipe).items() if key not in known]
        tags = {**_flat(reader.facts), "mlflow.note.content": "\n\n".join(reader.notes)}
        self._client.log_batch(self._id, params=params, tags=[RunTag(key, value) for key, value in tags.items()])

    def keep(self, path: Path, name: str, kind: str) -> None:
        if path.is_dir():
            self._client.log_artifacts(self._id, str(path), path.name)
        else:
            self._client.log_artifact(self._id, str(path))

    def close(self, state: str = "") -> None:
        self._client.set_terminated(self._id, {"end": "FINISHED", "failed": "FAILED"}.get(state, "KILLED"))


def _flat(tree: Mapping[str, Any]) -> dict[str, str]:
    """Dotted keys of the characters that MLflow allows, and values as text."""
    return {re.sub(r"[^\w\-. /]", "_", key)[:250]: str(value)[:5000] for key, value in flat(tree).items()}


class Trackio(Tracker):
    """A run by its name, in the local store, on a server of one's own, or in a Space."""

    title = "Trackio"
    way_out = "Without TRACKIO_SERVER_URL and TRACKIO_SPACE_ID the run stays on this machine."

    @staticmethod
    def check(offline: bool) -> None:
        import trackio  # noqa: F401
        from huggingface_hub import get_token

        space, server = (os.environ.get(f"TRACKIO_{name}", "") for name in ("SPACE_ID", "SERVER_URL"))
        address = f"https://huggingface.co/spaces/{space}" if space and (offline or get_token()) else server
        _reach(address, offline, Trackio.way_out)
        if space and not get_token():
            raise InputError(f"{space}: there is no login for it. Set HF_TOKEN, or call `hf auth login`.")

    def __init__(self, run: Run, reader: RunReader) -> None:
        import trackio
        from trackio.utils import TRACKIO_DIR

        project, config = os.environ.get("TRACKIO_PROJECT", "tunesmith"), {**reader.recipe, **reader.facts}
        self._markdown = trackio.Markdown
        self._run = trackio.init(
            project=project, name=reader.key, resume="allow", config=config,
            embed=False, auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip
        where = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL") or TRACKIO_DIR
        self.place = f"{where}, project {project}, run {reader.key}"
        self.last_step = int(self._run._next_step) - 1

    def describe(self, reader: RunReader) -> None:
        if reader.state == "end" and reader.notes and self._run._next_step <= reader.newest + 1:  # once
            self._run.log({"notes": self._markdown("\n\n".join(reader.notes))}, step=reader.newest + 1)


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio}
"""By their names, which are those of packages too."""
PATIENCE_S = 10.0
"""Longest wait for the first answer of a server."""


def check_names(names: Sequence[str]) -> list[str]:
    """The trackers of these names, each once; "none" alone means no tracker.

    Raises InputError for an unknown one, or one whose package is not installed.
    """
    chosen = [] if "none" in names else list(dict.fromkeys(names))
    for name in chosen:
        if name not in TRACKERS:
            raise InputError(f"track: {name}: there is no such tracker. One of {', '.join(TRACKERS)}, or none.")
        if importlib.util.find_spec(name) is None:
            raise InputError(f"track: {name}: the package {name} is missing. Install it: {install_command(name)}")
    return chosen


def check(name: str, *, offline: bool) -> None:
    """Raise InputError if a tracker cannot be used: a broken package, no server, no login, or no network allowed."""
    try:
        TRACKERS[name].check(offline)
    except InputError as error:  # with its own advice
        raise InputError(f"track: {name}: {' '.join(str(error).split())}") from error
    except Exception as error:  # of the library, of a database or of the network
        cause = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise InputError(f"track: {name}: {cause}. {TRACKERS[name].way_out}") from error


def _reach(address: str, offline: bool, way: str) -> None:
    """Raise InputError if the server at an HTTP address does not answer, with a way out, or must not be asked."""
    if not address.startswith("http"):
        return
    if offline:
        raise InputError(f"{address} needs the network, and --offline forbids it. Drop one of the two.")
    try:
        urllib.request.urlopen(address, timeout=PATIENCE_S).close()
    except urllib.error.HTTPError:  # any answer will do
        return
    except (OSError, ValueError) as error:
        why = f"{address}: no server answers: {getattr(error, 'reason', error)}"
        raise InputError(f"{why}. {way}") from error
