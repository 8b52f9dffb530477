"""Ray, and what a run takes of it."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunesmith.environment.children import SAFE_PATH, for_child
from tunesmith.environment.packages import install_command
from tunesmith.errors import InputError
from tunesmith.recipe.schema import Recipe

NO_REPORTS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_V2_ENABLED": "1"}
LOCAL = "local"
"""Address of a Ray that is started on this machine and ends with this process."""


def import_ray() -> Any:
    """Ray, with its report of usage switched off. Raises InputError with the command that installs it."""
    os.environ.update(NO_REPORTS)
    try:
        import ray
    except ModuleNotFoundError as error:
        raise InputError(
            f"--ray: Ray is not installed. Install it with: {install_command('ray')}, or leave --ray out: runs "
            "then follow one after the other."
        ) from error
    return ray


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray at `address`: "local", "auto" (the cluster of this machine), HOST:PORT or ray://HOST:PORT.

    Raises InputError if it is not reached.
    """
    ray = import_ray()
    child = for_child()
    environment = {"env_vars": {**NO_REPORTS, **{name: child[name] for name in ("PYTHONPATH", *SAFE_PATH)}}}
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if "://" in address and not port.isdigit():
        raise InputError(f"--ray {address}: has no port. Write HOST:PORT or ray://HOST:PORT, such as ray://head:10001.")
    try:
        if colon:  # Ray itself tries a place where nobody answers for many minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        with _elsewhere():
            ray.init(
                address=address,
                include_dashboard=False if address == LOCAL else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env=environment,
            )
    except (OSError, ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"--ray {address}: no Ray is reached there: {text:.200} Use local, or start one.") from error
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _elsewhere() -> Iterator[None]:
    """A block whose working folder is this package's: Ray puts it on the path of its workers' imports."""
    before = Path.cwd()
    os.chdir(Path(__file__).parents[2])
    try:
        yield
    finally:
        os.chdir(before)


def needs_of(recipe: Recipe, ray: Any) -> dict[str, float]:
    """Processors and cards that Ray keeps for one run of a recipe.

    As many processors as `threads` says, else one; a card each of `devices` if the cluster has cards and the
    recipe does not name another device.
    """
    devices = recipe.devices if isinstance(recipe.devices, int) else 1
    has_cards = ray.cluster_resources().get("GPU", 0) > 0 and recipe.device in ("auto", "cuda")
    threads = recipe.threads if isinstance(recipe.threads, int) else 1
    return {"num_cpus": threads * (1 if has_cards else devices), "num_gpus": devices if has_cards else 0}
