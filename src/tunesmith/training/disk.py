"""Whether a run fits on its disk, asked before the first step."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from tunesmith.errors import DoesNotFitError
from tunesmith.formatting import size
from tunesmith.methods import METHODS
from tunesmith.planning.duration import kept_checkpoints
from tunesmith.training.setup import Setup


def refuse_small_disk(setup: Setup, folder: Path) -> None:
    """Raise DoesNotFitError where the disk of `folder` has less room than checkpoints and result take.

    `folder`: of runs, of one that is to be made, or of one that goes on: the checkpoints in it are replaced by others.
    """
    trained = 4 * sum(tensor.numel() for tensor in setup.attachment.trained.values())
    is_adapter = METHODS[setup.recipe.method.name].is_adapter
    checkpoints = kept_checkpoints(setup.recipe, setup.total_steps) * (trained + setup.optimizer.state_bytes())
    result = trained if is_adapter else sum(tensor.nbytes for tensor in setup.model.parameters())
    held = _num_bytes(folder / "checkpoints")
    needed = checkpoints + result - min(checkpoints, held)
    free = free_bytes(folder)
    if free is None or needed <= free:
        return
    raise DoesNotFitError(
        f"{folder}: the disk has {size(free)} free, but this run needs {size(needed)} more: {size(checkpoints)} for "
        f"checkpoints and {size(result)} for the result{f', less {size(held)} that it has' if held else ''}. "
        + _way_out(setup, is_new=not held),
        needed=needed,
        room=free,
    )


def free_bytes(folder: Path) -> int | None:
    """Free bytes on the disk of a folder that exists or will; None if the system does not say."""
    place = next((one for one in (folder.absolute(), *folder.absolute().parents) if one.exists()), None)
    try:
        return None if place is None else shutil.disk_usage(place).free
    except OSError:
        return None


def _way_out(setup: Setup, *, is_new: bool) -> str:
    if not is_new:
        return "Free some space, or move the run's folder to a larger disk."
    fewer = ", keep fewer checkpoints with --set checkpoint.keep=1" if setup.recipe.checkpoint.keep > 1 else ""
    return f"Free some space, choose a folder on a larger disk with --runs{fewer}."


def _num_bytes(folder: Path) -> int:
    found = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            found += path.stat().st_size if path.is_file() else 0
    return found
