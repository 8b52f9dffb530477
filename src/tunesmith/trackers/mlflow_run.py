"""MLflow: a run found by its tag, on a server, in a database or in files, as MLFLOW_TRACKING_URI says."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.errors import InputError
from tunesmith.recipe.docs import flat
from tunesmith.runs.folder import Run
from tunesmith.trackers.tracker import PATIENCE_S, RunReader, StepMetrics, refuse_offline, refuse_unreachable

MOST_VALUES, MOST_PARAMS, LONGEST_PARAM, LONGEST_TAG = 1000, 100, 6000, 5000
"""Bounds of one call and one value, see MLflow's REST API."""
_STATUS = {"end": "FINISHED", "stopped": "KILLED", "failed": "FAILED", "": "KILLED"}


def check(offline: bool) -> None:
    """Check that the store answers."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(int(PATIENCE_S)))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    import mlflow

    uri = mlflow.get_tracking_uri()
    way_out = "Check MLFLOW_TRACKING_URI; sqlite:///mlflow.db is a file that needs no server."
    if uri.startswith(("http:", "https:")):
        if offline:
            refuse_offline("mlflow", uri)
        refuse_unreachable(uri, way_out)
    try:
        mlflow.MlflowClient().search_experiments(max_results=1)
    except Exception as error:  # of the library, of a database or of the network
        raise InputError(
            f"mlflow: {uri}: cannot be used: {' '.join(str(error).split())[:300].rstrip('.')}. {way_out}"
        ) from error


class MlflowRun:
    def __init__(self, run: Run, reader: RunReader) -> None:
        import mlflow

        self._client = client = mlflow.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "tunesmith")
        experiment = client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
        found = client.search_runs([experiment_id], f"tags.`tunesmith.run` = '{reader.key}'", max_results=1)
        tags = {"tunesmith.run": reader.key}
        self._run: Any = found[0] if found else client.create_run(experiment_id, run_name=reader.name, tags=tags)
        self._id = self._run.info.run_id
        self.place = f"{mlflow.get_tracking_uri()}, experiment {name}, run {self._id}"
        # Every step is stored in one transaction, and each but 0 has a training loss.
        history = client.get_metric_history(self._id, "train/loss")
        self.last_step = max([0 if self._run.data.metrics else -1, *(metric.step for metric in history)])
        if found:
            client.update_run(self._id, status="RUNNING")

    def log(self, steps: Sequence[StepMetrics]) -> None:
        from mlflow.entities import Metric

        batch: list[Any] = []
        for step in steps:
            if len(batch) + len(step.values) > MOST_VALUES:
                self._client.log_batch(self._id, metrics=batch)
                batch = []
            batch += [Metric(key, value, int(step.time * 1000), step.step) for key, value in step.values.items()]
        self._client.log_batch(self._id, metrics=batch)

    def finish(self, reader: RunReader, artifacts: Mapping[str, Path]) -> None:
        from mlflow.entities import Param, RunTag

        known = self._run.data.params  # a parameter of a run cannot change
        params = [Param(key, value[:LONGEST_PARAM]) for key, value in _flat(reader.recipe).items() if key not in known]
        texts = {**_flat(reader.facts), "mlflow.note.content": "\n\n".join(reader.notes)}
        texts |= {f"tunesmith.{name}": repr(value) for name, value in reader.last_values.items()}
        tags = [RunTag(key, value[:LONGEST_TAG]) for key, value in texts.items()]
        for at in range(0, max(len(params), len(tags)), MOST_PARAMS):
            part = slice(at, at + MOST_PARAMS)
            self._client.log_batch(self._id, params=params[part], tags=tags[part])
        if reader.state == "end":
            for name, path in artifacts.items():
                log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
                log(self._id, str(path), name if path.is_dir() else None)
        self.close(_STATUS[reader.state])

    def close(self, status: str = "KILLED") -> None:
        self._client.set_terminated(self._id, status)


def _flat(tree: Mapping[str, Any]) -> dict[str, str]:
    """Dotted keys of the characters that MLflow allows, and values as text."""
    return {re.sub(r"[^\w\-. /]", "_", key)[:250]: str(value) for key, value in flat(tree).items()}


open_run = MlflowRun
