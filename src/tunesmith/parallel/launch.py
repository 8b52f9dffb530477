"""One run on several devices of this machine: torch's elastic agent starts a rank for each, in this process.

Rank 0 has the terminal. The others write to `logs/rank-N.log` of the run. If a rank fails, the agent ends the
others, and what is printed is the reason of the one that failed.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.environment.children import for_child, python_words
from tunesmith.environment.process import num_cpus
from tunesmith.errors import GroupError, RecipeError, Stopped, TunesmithError
from tunesmith.parallel.world import AGREED, OWN_AGENT, place_of
from tunesmith.phrases import command, plural
from tunesmith.runs.folder import Run
from tunesmith.types import JsonObject

if TYPE_CHECKING:
    from tunesmith.recipe.schema import Recipe

SHUTDOWN_S = 600
"""Seconds that ranks get to save a checkpoint after a request to stop."""
INTERRUPTED_CODE = 130
RUN = "run"
"""File in the agent's folder that holds the path of the run."""


def devices_of(recipe: Recipe, environ: Mapping[str, str] = os.environ) -> int:
    """Devices on which this process has to start ranks; 1: it trains by itself, alone or as one of a group.

    Raises RecipeError for more devices than there are.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return 1
    if recipe.devices == "auto" and (recipe.reinforce.grader or recipe.distil.teacher):  # several by number alone
        return 1
    if recipe.devices == 1 or (recipe.devices == "auto" and recipe.device not in ("auto", "cuda")):
        return 1
    import torch

    cards = torch.cuda.device_count() if recipe.device.startswith(("auto", "cuda")) else 0
    if recipe.devices == "auto":
        return max(1, cards)
    if ":" in recipe.device or recipe.device == "mps":
        raise RecipeError(f"devices: {recipe.devices}: but device: {recipe.device} is one. Use device: cuda or cpu.")
    available = cards or num_cpus()
    if recipe.devices > available:
        what = (
            plural(available, "CUDA device")
            if cards
            else f"{available} core{'s' * (available > 1)} free to this process"
        )
        raise RecipeError(
            f"devices: {recipe.devices}: there {'are' if available > 1 else 'is'} {what}. Use at most {available}."
        )
    return recipe.devices


def launch(devices: int, words: Sequence[str], *, say: Callable[[str], None]) -> int:
    """Run `tunesmith WORDS` as a rank for each device and wait for them; returns the exit code of the run.

    `say` gets the lines of a failure that rank 0 has not printed itself.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what failed is said by `say`
    quiet = {"TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")}  # we name lost peers
    with tempfile.TemporaryDirectory(prefix="tunesmith-ranks-") as name, _environment({OWN_AGENT: name, **quiet}):
        has_timeout = "shutdown_timeout" in {field.name for field in fields(LaunchConfig)}  # newer torch
        patience: dict[str, Any] = {"shutdown_timeout": SHUTDOWN_S} if has_timeout else {}
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=devices,
            max_restarts=0,
            run_id=Path(name).name,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            logs_specs=DefaultLogsSpecs(name, redirects=dict.fromkeys(range(1, devices), Std.ALL)),
            **patience,
        )
        try:
            python, *module = python_words("tunesmith")
            elastic_launch(config, python)(*module, *words)
        except ChildFailedError as error:
            return report_failure(error.failures, Path(name), say)
        except SignalException:
            run = _run_of(Path(name))
            return Stopped.exit_code if run is not None and run.state() == "stopped" else INTERRUPTED_CODE
    return 0


@contextmanager
def _environment(more: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update({**for_child(), **more})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run_of(folder: Path) -> Run | None:
    path = folder / RUN
    return Run(Path(path.read_text("utf-8"))) if path.is_file() else None


def report_failure(failures: Mapping[int, Any], folder: Path, say: Callable[[str], None]) -> int:
    """Say why the first rank failed, unless it has; returns its exit code."""
    reasons = [(_reason(failure), rank, failure) for rank, failure in failures.items()]
    first = min(reasons, key=lambda one: (one[0].get("kind") == GroupError.__name__, one[2].timestamp))
    reason, rank, failure = first
    code: int = failure.exitcode
    if not reason.get("is_printed") and code != Stopped.exit_code:
        text = reason.get("text") or f"it was ended by {failure.message.split(' received')[0]}"
        names_rank = reason.get("kind") == GroupError.__name__
        say(f"error: {text}" if names_rank else f"error: rank {rank}: {text}")
        run = _run_of(folder)
        if run is not None and code not in (2, Stopped.exit_code) and any(run.checkpoints_path.glob("step-*")):
            say(f"Continue from the last checkpoint with: {command('resume', run.path)}")
    return code if code > 0 else 1


def _reason(failure: Any) -> JsonObject:
    data = failure.error_file_data
    message = data.get("message") if isinstance(data, Mapping) else None
    return dict(message.get("extraInfo", {})) if isinstance(message, Mapping) else {}


def record_failure(error: BaseException, code: int, text: str, *, is_printed: bool) -> None:
    """Write the reason of this rank's end where its agent looks for it; nothing where there is none."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    is_seen = is_printed and os.environ.get("RANK") == "0"  # what other ranks print goes to their logs
    extra = {"kind": type(error).__name__, "code": code, "text": text, "is_printed": is_seen}
    message = {"message": text, "extraInfo": {"timestamp": str(int(time.time())), **extra}}
    with suppress(OSError):
        Path(path).write_text(json.dumps({"message": message}), "utf-8")


def own_run(run: Run, rank: int) -> None:
    """Let our own agent know the run, and send the output of every rank but 0 to the run's logs."""
    folder = os.environ.get(OWN_AGENT)
    if folder is None:
        return
    if rank == 0:
        (Path(folder) / RUN).write_text(str(run.path.absolute()), "utf-8")
        return
    logs = run.path / "logs"
    logs.mkdir(exist_ok=True)
    target = os.open(logs / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)


def ending(error: BaseException, code: int) -> tuple[int, bool]:
    """(exit code, whether this process prints the error) of a rank that ends with it.

    What all ranks agreed on ends well on all but the first. A run that was stopped ends well under another
    agent, which starts again whatever fails. Of a rank that was lost our own agent says more.
    """
    try:
        place = place_of(os.environ)
    except TunesmithError:
        return code, True
    is_agreed = place.size > 1 and isinstance(error, AGREED)
    if is_agreed and place.rank > 0:
        return 0, False
    if isinstance(error, Stopped) and place.was_started:
        return 0, True
    return code, not (isinstance(error, GroupError) and OWN_AGENT in os.environ)
