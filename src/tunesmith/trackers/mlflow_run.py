"""MLflow: a run found by its tag, on a server, in a database or in files, as MLFLOW_TRACKING_URI says."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.recipe.docs import flat
from tunesmith.runs.folder import Run
from tunesmith.trackers.tracker import RunReader, StepMetrics

WAY_OUT = "Check MLFLOW_TRACKING_URI; sqlite:///mlflow.db is a file that needs no server."
_STATUS = {"end": "FINISHED", "failed": "FAILED"}


def server() -> str:
    import mlflow

    uri = str(mlflow.get_tracking_uri())
    return uri if uri.startswith(("http:", "https:")) else ""


def check() -> None:
    import mlflow

    mlflow.MlflowClient().search_experiments(max_results=1)


class MlflowRun:
    def __init__(self, run: Run, reader: RunReader) -> None:
        import mlflow

        self._client = client = mlflow.MlflowClient()
        experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "tunesmith"))
        of_it, tags = [experiment.experiment_id], {"tunesmith.run": reader.key}
        found = client.search_runs(of_it, f"tags.`tunesmith.run` = '{reader.key}'", max_results=1)
        self._run: Any = found[0] if found else client.create_run(*of_it, run_name=reader.name, tags=tags)
        self._id = self._run.info.run_id
        client.update_run(self._id, status="RUNNING")
        self.place = f"{mlflow.get_tracking_uri()}, experiment {experiment.name}, run {self._id}"
        # Every step is stored in one transaction, and each but 0 has a training loss.
        history = client.get_metric_history(self._id, "train/loss")
        self.last_step = max([0 if self._run.data.metrics else -1, *(metric.step for metric in history)])

    def log(self, steps: Sequence[StepMetrics]) -> None:
        from mlflow.entities import Metric

        values = [
            Metric(key, value, int(one.time * 1000), one.step) for one in steps for key, value in one.values.items()
        ]
        self._client.log_batch(self._id, metrics=values)

    def finish(self, reader: RunReader, artifacts: Mapping[str, Path]) -> None:
        from mlflow.entities import Param, RunTag

        known = self._run.data.params  # a parameter of a run cannot change
        params = [Param(key, value) for key, value in _flat(reader.recipe).items() if key not in known]
        tags = {**_flat(reader.facts), "mlflow.note.content": "\n\n".join(reader.notes)}
        self._client.log_batch(self._id, params=params, tags=[RunTag(key, value) for key, value in tags.items()])
        for name, path in artifacts.items():
            log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
            log(self._id, str(path), name if path.is_dir() else None)
        self.close(_STATUS.get(reader.state, "KILLED"))

    def close(self, status: str = "KILLED") -> None:
        self._client.set_terminated(self._id, status)


def _flat(tree: Mapping[str, Any]) -> dict[str, str]:
    """Dotted keys of the characters that MLflow allows, and values as text."""
    return {re.sub(r"[^\w\-. /]", "_", key)[:250]: str(value)[:5000] for key, value in flat(tree).items()}


open_run = MlflowRun
