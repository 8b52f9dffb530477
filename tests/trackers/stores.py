"""What each tracker's own store holds of a run, read by its own library."""

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.runs.folder import Run
from tunesmith.trackers.run_reader import RunReader

Points = Counter[tuple[str, int, float]]


def missing(name: str) -> bool:
    return importlib.util.find_spec(name) is None


def in_tensorboard(run: Run) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return Counter((tag, one.step, one.value) for tag in found.Tags()["scalars"] for one in found.Scalars(tag))


def wandb_records(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    words = [sys.executable, "-m", "wandb", "leet", "inspect", "--json"]
    texts = [subprocess.run([*words, str(file)], capture_output=True, text=True, check=True).stdout for file in files]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def in_wandb(run: Run) -> Points:
    rows = [record["history"]["item"] for record in wandb_records(Path.cwd()) if record["type"] == "history"]
    return Counter(
        (name, row["_step"], float(value)) for row in rows for name, value in row.items() if not name.startswith("_")
    )


def in_mlflow(run: Run) -> Points:
    import mlflow

    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("tunesmith").experiment_id])
    names = found.data.metrics
    return Counter(
        (name, one.step, one.value) for name in names for one in client.get_metric_history(found.info.run_id, name)
    )


def in_trackio(run: Run) -> Points:
    script = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as S\n"
        "(run,) = S.get_runs('tunesmith')\nprint(json.dumps(S.get_logs('tunesmith', run)))"
    )  # a process of its own: the library reads its folder when it is imported
    text = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    rows = json.loads(text.splitlines()[-1])
    return Counter(
        (name, row["step"], float(value))
        for row in rows
        for name, value in row.items()
        if "/" in name and isinstance(value, (int, float))
    )


READ = {"tensorboard": in_tensorboard, "wandb": in_wandb, "mlflow": in_mlflow, "trackio": in_trackio}


def logged(run: Run, name: str) -> Points:
    """Values of the log as a tracker can hold them: TensorBoard's scalars are float32."""
    number: Any = np.float32 if name == "tensorboard" else float
    reader = RunReader(run)
    steps = [step for one in run.events() for step in reader.add(one)]
    return Counter((key, step.step, float(number(value))) for step in steps for key, value in step.values.items())
