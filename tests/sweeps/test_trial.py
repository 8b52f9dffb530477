"""A trial is begun, goes on, or is left: by the command line of a run."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sweeps.fake_trials import event
from tunesmith.errors import DataError, Stopped
from tunesmith.runs.folder import Run
from tunesmith.sweeps.trial import Job, run_trial


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The command lines that trials are run by."""
    seen: list[Any] = []
    monkeypatch.setattr("tunesmith.sweeps.trial.run_words", lambda words, **how: seen.append(words))
    return seen


def job(folder: Path) -> Job:
    return Job("lr-01", folder / "lr-01", folder / "lr-01.yaml", Path.cwd())


def made(folder: Path, *kinds: str) -> Run:
    run = Run.create(folder, "lr-01", "", out=folder / "lr-01")
    for kind in kinds:
        run.append(event(kind))
    return run


def test_a_new_trial_trains_a_killed_one_resumes_a_finished_one_stays(tmp_path: Path, words: list[Any]) -> None:
    assert run_trial(job(tmp_path)) == ""
    recipe, out = str(tmp_path / "lr-01.yaml"), str(tmp_path / "lr-01")
    assert words.pop() == ["train", "--recipe", recipe, "--out", out, "--runs", str(tmp_path)]
    run = made(tmp_path, "start")
    run_trial(job(tmp_path))
    assert words.pop() == ["resume", out]
    run.append(event("end"))
    assert run_trial(job(tmp_path)) == ""
    assert words == []


def test_a_process_that_a_killed_sweep_left_is_stopped_first(tmp_path: Path, words: list[Any]) -> None:
    run, events = made(tmp_path, "start"), list[str]()

    def left_behind() -> None:
        with run.lock():
            began.set()
            while not run.stop_asked():
                time.sleep(0.01)
            events.append("stopped")
            run.append(event("stopped"))

    began = threading.Event()
    writer = threading.Thread(target=left_behind)
    writer.start()
    began.wait(10)
    assert run_trial(job(tmp_path)) == ""
    writer.join()
    assert (events, words) == (["stopped"], [["resume", str(run.path)]])


@pytest.mark.parametrize(
    ("error", "says"), [(Stopped("stopped"), ""), (DataError("line 3: no label"), "line 3: no label")]
)
def test_why_a_trial_failed_is_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    def fail(words: Any, **how: Any) -> None:
        raise error

    monkeypatch.setattr("tunesmith.sweeps.trial.run_words", fail)
    assert run_trial(job(tmp_path)) == says
