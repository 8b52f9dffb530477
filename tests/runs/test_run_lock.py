"""A run folder has one writer at a time, and a dead one holds nothing."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from faults import in_child
from tunesmith.errors import RunError, StorageError
from tunesmith.runs import folder
from tunesmith.runs.folder import Run

SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture
def run(tmp_path) -> Run:
    return Run.create(tmp_path, "support", "")


@contextmanager
def writer(run: Run):
    """Another process that holds the lock until it is killed."""
    code = (
        "import sys, time, pathlib\nfrom tunesmith.runs.folder import Run\n"
        "with Run(pathlib.Path(sys.argv[1])).lock():\n    print('locked', flush=True)\n    time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout.readline() == "locked\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def impatient(monkeypatch) -> None:
    """A writer waits for a tenth of a second instead of a whole one."""
    monkeypatch.setattr(folder, "_LOCK_PATIENCE_S", 0.1)


def test_second_writer_is_told_who_holds_the_lock(run, impatient):
    with writer(run) as process:
        assert run.state() == "running"
        with pytest.raises(RunError) as caught, run.lock():
            pass
        assert f"in use by process {process.pid} on {socket.gethostname()} since 20" in str(caught.value)
        assert run.state() == "running"
    assert run.state() == "new"


def test_second_writer_touches_nothing(run, impatient):
    with writer(run):
        (run.path / ".tmp-report.json-12345678").write_bytes(b"being written")
        before = sorted(os.listdir(run.path))
        with pytest.raises(RunError), run.lock():
            pass
        assert sorted(os.listdir(run.path)) == before


def test_dead_process_holds_nothing(run):
    def hold_and_die() -> None:
        with run.lock():
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(hold_and_die) == -9
    with run.lock():
        assert run.state() == "running"
    assert run.state() == "new"


def test_lock_is_free_after_an_error_inside(run):
    with pytest.raises(ValueError, match="inside"), run.lock():
        raise ValueError("inside")
    with run.lock():
        assert run.state() == "running"
    assert run.state() == "new"


def test_looking_at_the_state_turns_no_writer_away(run):
    with run.lock():
        pass

    def locks() -> None:
        with run.lock():
            pass

    # As `state` does it, but for longer than an instant.
    code = "import time, fcntl; fcntl.flock(0, fcntl.LOCK_SH); print('held', flush=True); time.sleep(0.3)"
    with open(run.path / "lock", "rb") as shared:
        reader = subprocess.Popen([sys.executable, "-c", code], stdin=shared, stdout=subprocess.PIPE, text=True)
        assert reader.stdout.readline() == "held\n"
    assert in_child(locks) == 0
    reader.wait()
    reader.stdout.close()


def test_lock_cleans_up_after_a_killed_writer(run):
    (run.path / ".tmp-report.json-12345678").write_bytes(b"half")
    run.checkpoints_path.mkdir()
    (run.checkpoints_path / ".tmp-step-3-12345678").mkdir()
    with run.lock():
        assert ".tmp-report.json-12345678" not in os.listdir(run.path)
        assert os.listdir(run.checkpoints_path) == []


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_can_be_read(run):
    os.chmod(run.path, 0o555)
    try:
        assert run.state() == "new"
        assert list(run.events()) == []
        with pytest.raises(StorageError, match="EACCES"), run.lock():
            pass
    finally:
        os.chmod(run.path, 0o755)


@pytest.mark.parametrize("name", ["events.jsonl", "grades.jsonl", "rollouts"])
def test_a_run_with_a_link_in_the_place_of_what_grows_is_not_written_to(run: Run, tmp_path: Path, name: str) -> None:
    precious = tmp_path / "precious"
    precious.write_text("half a line")
    (run.path / name).unlink(missing_ok=True)
    (run.path / name).symlink_to(precious)
    with pytest.raises(RunError, match=f"{name}: a link to"), run.lock():
        pass
    assert precious.read_text() == "half a line"
