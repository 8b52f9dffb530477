"""Saving and rotating under every fault: afterwards there is the old checkpoint or the new, never half of one."""

import errno
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import fresh
from faults import Faults, in_child
from tunesmith.errors import StorageError
from tunesmith.runs import atomic as files
from tunesmith.runs import checkpoint

NUM_KILLS = int(os.environ.get("TUNESMITH_KILLS", "20"))
SEED = int(os.environ.get("TUNESMITH_KILL_SEED", "0"))


def content(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((300,), float(step)), "b": torch.full((7,), step).bfloat16()}


def save(folder: Path, step: int, *, value: int | None = None) -> None:
    held = content(step if value is None else value)
    checkpoint.save(folder, step, weights=held, optimizer={"m": held["w"] * 2}, state={"value": value or step})


def save_and_rotate(folder: Path, step: int, *, value: int | None = None) -> None:
    save(folder, step, value=value)
    checkpoint.rotate(folder, keep=1, best=None)


def save_in_place(folder: Path, step: int, *, value: int | None = None) -> None:
    """Planted bug: the folder has its name before it is complete."""
    with pytest.MonkeyPatch.context() as patch, files.storing(folder):
        patch.setattr(checkpoint, "temporary_folder", lambda folder, name: made(folder / name))
        patch.setattr(checkpoint, "replace_folder", lambda tmp, final, swap: None)
        save(folder, step, value=value)


def made(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def rotate_then_save(folder: Path, step: int, *, value: int | None = None) -> None:
    """Planted bug: room is made before the new one is complete."""
    for old in checkpoint.steps(folder):
        with files.storing(folder):
            shutil.rmtree(folder / f"step-{old}")
    save(folder, step, value=value)


def never(path: Path, reason: str) -> None:
    raise AssertionError(f"{path} is half a checkpoint: {reason}")


def check_newest(folder: Path, allowed: set[tuple[int, int]]) -> None:
    """The newest checkpoint is whole, one of the allowed (step, value), and nothing lies about beside it."""
    newest = checkpoint.newest(folder, never)
    assert newest is not None
    value = newest.state["value"]
    assert (newest.step, value) in allowed
    assert all(torch.equal(newest.weights[name], tensor) for name, tensor in content(value).items())
    assert torch.equal(newest.optimizer["m"], content(value)["w"] * 2)
    assert all(name.startswith("step-") for name in os.listdir(folder))


def check_sweep(action, base: Path, *, code: int | None, step: int, value: int, from_there_on: bool = False) -> None:
    """Fail at call 1, 2, ... N of `action`, which saves `step` beside a checkpoint of step 10."""
    save(made(base / "count"), 10)
    with Faults() as counted:
        action(base / "count", step, value=value)
    assert counted.num_calls > 10
    for number in range(1, counted.num_calls + 1):
        folder = base / f"at-{number}"
        save(folder, 10)

        def attempt(folder=folder, number=number) -> None:
            with Faults(number, code, from_there_on=from_there_on):
                action(folder, step, value=value)

        allowed = {(10, 10), (step, value)}
        if code is None:
            assert in_child(attempt) == -signal.SIGKILL
        elif raised := raised_by(attempt):
            assert f": {errno.errorcode[code]}: " in str(raised)
            left = [name for name in os.listdir(folder) if name.startswith(f".tmp-step-{step}-")]
            assert not left or from_there_on or step == 10
        else:
            allowed = {(step, value)}  # a call whose failure does no harm, such as making a folder that is there
        check_newest(folder, allowed)
        shutil.rmtree(folder)


@pytest.mark.parametrize("code", [None, errno.ENOSPC, errno.EIO], ids=["killed", "disk full", "disk broken"])
@pytest.mark.parametrize(("step", "value"), [(20, 20), (10, 11)], ids=["next step", "same step"])
def test_save_failing_at_any_call_leaves_old_or_new(tmp_path, code, step, value):  # trap: R5
    if code is None:
        in_a_small_process(
            f"check_sweep(save_and_rotate, Path({str(tmp_path)!r}), code=None, step={step}, value={value})"
        )
    else:
        check_sweep(save_and_rotate, tmp_path, code=code, step=step, value=value)


def in_a_small_process(call: str) -> None:
    """Where a fork takes a hundredth of a second: the process of all tests is large."""
    fresh.done("-c", f"from runs.test_checkpoint_faults import *\n{call}")


def test_save_on_a_disk_that_stays_full_leaves_the_old(tmp_path):  # trap: R5
    check_sweep(save_and_rotate, tmp_path, code=errno.ENOSPC, step=20, value=20, from_there_on=True)


@pytest.mark.slow
@pytest.mark.parametrize("planted", [save_in_place, rotate_then_save])
@pytest.mark.parametrize(("code", "step"), [(None, 20), (errno.ENOSPC, 10)], ids=["killed", "disk full"])
def test_the_sweep_catches_an_unsafe_save(tmp_path, planted, code, step):  # trap: R5 planted
    with pytest.raises(AssertionError):
        check_sweep(planted, tmp_path, code=code, step=step, value=step + 1)


def raised_by(action) -> StorageError | None:
    try:
        action()
    except StorageError as error:
        return error
    return None


def test_disk_full_names_the_checkpoint_and_all_its_bytes(tmp_path):
    with Faults(5, errno.ENOSPC):
        raised = raised_by(lambda: save(tmp_path, 20))
    num_bytes = 300 * 4 + 7 * 2 + 300 * 4  # w, b and m
    cause = "ENOSPC: No space left on device. Free some space and try again."
    assert str(raised) == f"{tmp_path / 'step-20'}: cannot be written ({num_bytes:,} bytes needed): {cause}"


def saving_forever(folder: Path, acknowledge: int) -> None:
    step = 0
    while True:
        step += 1
        held = {"w": torch.full((30_000,), float(step))}
        checkpoint.save(folder, step, weights=held, optimizer={"m": held["w"] * 2}, state={"value": step})
        os.write(acknowledge, step.to_bytes(4, "little"))
        checkpoint.rotate(folder, keep=2, best=None)


def test_killed_at_random_moments_nothing_acknowledged_is_lost(tmp_path):  # trap: R5
    """TUNESMITH_KILLS and TUNESMITH_KILL_SEED run more, or others."""
    in_a_small_process(f"kill_at_random_moments(Path({str(tmp_path)!r}))")


def kill_at_random_moments(base: Path) -> None:
    draw = random.Random(SEED)
    for number in range(NUM_KILLS):
        folder = made(base / str(number))
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                saving_forever(folder, writing)
            finally:
                os._exit(1)
        os.close(writing)
        time.sleep(0.02 + draw.random() * 0.08)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reading, "rb") as acknowledged:
            done = acknowledged.read()
        last = int.from_bytes(done[-4:], "little")
        newest = checkpoint.newest(folder, never)
        if last:
            assert newest.step in (last, last + 1)
        if newest is not None:
            assert newest.weights["w"].eq(newest.state["value"]).all()
        assert not files.clean(folder)
        shutil.rmtree(folder)
