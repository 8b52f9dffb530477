"""The loop of a sweep over fake trials: what runs, what is stopped, what is left after a kill."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import orjson
import pytest

from sweeps import fake_trials
from sweeps.fake_trials import FakeTrials, event, grid_file, measured
from tunesmith.cli.sweep import _show
from tunesmith.errors import InputError, RunError, Stopped
from tunesmith.runs import events
from tunesmith.runs.folder import Run
from tunesmith.sweeps.grid import read_grid
from tunesmith.sweeps.sweep import Sweep, Watch, best_of
from tunesmith.sweeps.trial import Follower, OneByOne

FOUR = "grid: {optim.lr: [1e-5, 1e-4, 1e-3, 1e-2]}\n"
LOSSES = {"lr-01": (3.0, 2.8, 2.7, 2.6), "lr-02": (2.5, 2.0, 1.8, 1.7), "lr-03": (2.6, 2.2), "lr-04": (9.0, 8.0)}


def sweep_of(folder: Path, rest: str = FOUR) -> Sweep:
    return Sweep(read_grid(grid_file(folder, rest)), folder / "runs")


def run(sweep: Sweep, trials: FakeTrials, **watch: Any) -> list[str]:
    said: list[str] = []
    with sweep.opened():
        sweep.run(OneByOne(trials), Watch(said.append, poll_s=0.005, **watch))
    return said


def test_all_trials_run_in_order_and_the_best_is_first(tmp_path: Path) -> None:
    sweep, trials = sweep_of(tmp_path), FakeTrials(LOSSES)
    run(sweep, trials)
    assert [name for name, _ in trials.began] == list(LOSSES)
    found = sweep.outcomes()
    assert [outcome.trial.name for outcome in found] == ["lr-02", "lr-03", "lr-01", "lr-04"]
    assert (best_of(found).measure, best_of(found).step, best_of(found).total) == (measured(1.7)["loss"], 40, 40)


def test_asha_stops_the_poor_by_their_own_stop_and_says_why(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, f"{FOUR}asha: {{factor: 2}}")
    said = run(sweep, FakeTrials(LOSSES, waits_for_stop={"lr-04"}))
    found = {outcome.trial.name: outcome for outcome in sweep.outcomes()}
    assert {name: one.state for name, one in found.items()} == {
        "lr-01": "done",
        "lr-02": "done",
        "lr-03": "stopped",
        "lr-04": "stopped",
    } or found["lr-03"].state == "done"
    assert found["lr-04"].state == "stopped"
    assert found["lr-04"].reason == "loss 9.0000 at step 10 was place 4 of 4"
    assert Run(sweep.root / "lr-04").state() == "stopped"
    assert any("lr-04: stops" in line for line in said)
    kept = orjson.loads((sweep.path / "sweep.json").read_bytes())
    assert kept["stopped"]["lr-04"]["rank"] == 4

    again = FakeTrials(LOSSES)
    other = sweep_of(tmp_path, f"{FOUR}asha: {{factor: 2}}")
    run(other, again)
    assert again.began == []
    assert [(one.trial.name, one.state, one.reason) for one in other.outcomes()] == [
        (one.trial.name, one.state, one.reason) for one in sweep.outcomes()
    ]


def test_a_stopped_sweep_goes_on_where_its_trials_are(tmp_path: Path) -> None:
    sweep, trials = sweep_of(tmp_path), FakeTrials(LOSSES)
    with pytest.raises(Stopped, match="1 of 4 trials done"):
        run(sweep, trials, should_stop=lambda: sweep.followers["lr-02"].step >= 20)
    assert Run(sweep.root / "lr-02").state() == "stopped"
    again = FakeTrials(LOSSES)
    run(sweep_of(tmp_path), again)
    assert again.began[0][0] == "lr-02"
    assert again.began[0][1] >= 20
    assert [name for name, _ in again.began] == ["lr-02", "lr-03", "lr-04"]


def test_a_killed_sweep_goes_on_where_its_trials_are(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        run(sweep_of(tmp_path), FakeTrials(LOSSES))
        os._exit(0)
    follower = Follower(Run(tmp_path / "runs" / "lr-02"))
    while follower.step < 20:
        time.sleep(0.01)
        follower.read()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    again = FakeTrials(LOSSES)
    sweep = sweep_of(tmp_path)
    run(sweep, again)
    assert [name for name, _ in again.began] == ["lr-02", "lr-03", "lr-04"]
    assert again.began[0][1] >= 20
    assert {outcome.state for outcome in sweep.outcomes()} == {"done"}


def test_a_trial_that_fails_is_a_line_of_the_table_and_the_others_go_on(tmp_path: Path) -> None:
    trials = FakeTrials(LOSSES, before=lambda job: "loss is not finite" if job.name == "lr-03" else "")
    sweep = sweep_of(tmp_path)
    run(sweep, trials)
    last = {outcome.trial.name: (outcome.state, outcome.reason) for outcome in sweep.outcomes()}
    assert last["lr-03"] == ("failed", "loss is not finite")
    assert [state for state, _ in last.values()].count("done") == 3
    run(sweep_of(tmp_path), again := FakeTrials(LOSSES))
    assert again.began == []


def test_a_trial_that_is_refused_before_any_run_is_made_ends_the_sweep(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path)
    with (
        pytest.raises(InputError, match=r"trial lr-01 \(optim.lr=1e-05\) cannot be run: no row can be read"),
        sweep.opened(),
    ):
        sweep.run(OneByOne(lambda job: "no row can be read"), Watch(poll_s=0.005))
    assert not any((sweep.root / trial.name).exists() for trial in sweep.grid.trials)


def test_where_every_trial_is_refused_no_further_ones_are_started(tmp_path: Path) -> None:
    """What is wrong with the first may be wrong with all: those that get ready meanwhile say whether it is."""
    started = []

    def refuse(job: Any) -> str:
        started.append(job.name)
        time.sleep(0.05 * len(started))
        return "no row can be read"

    engine, sweep = OneByOne(refuse), sweep_of(tmp_path)
    engine.slots = 2
    with pytest.raises(InputError, match=r"trial lr-02 .* cannot be run: no row can be read"), sweep.opened():
        sweep.run(engine, Watch(poll_s=0.005))
    assert started == ["lr-01", "lr-02"]


def test_a_trial_that_is_refused_while_others_get_ready_is_recorded(tmp_path: Path) -> None:
    def before(job: Any) -> str:
        if job.name != "lr-01":
            time.sleep(0.2)
        return "no room for it" if job.name == "lr-01" else ""

    engine, sweep = OneByOne(FakeTrials(LOSSES, before=before)), sweep_of(tmp_path)
    engine.slots = 2
    with sweep.opened():
        sweep.run(engine, Watch(poll_s=0.005))
    states = {one.trial.name: (one.state, one.reason) for one in sweep.outcomes()}
    assert states.pop("lr-01") == ("failed", "no room for it")
    assert {state for state, _ in states.values()} == {"done"}


def test_no_trial_that_ends_well_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path)
    run(sweep, FakeTrials(LOSSES, before=lambda job: "the disk is full"))
    with pytest.raises(InputError, match="the disk is full"):
        best_of(sweep.outcomes())


def test_another_grid_or_another_folder_is_never_overwritten(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path)
    with sweep.opened():
        pass
    other = sweep_of(tmp_path, "grid: {seed: [1, 2]}")
    with other.opened():  # none of the first one's trials began
        pass
    run(other, FakeTrials(LOSSES))
    with pytest.raises(RunError, match="another grid"), sweep_of(tmp_path).opened():
        pass
    named = Sweep(read_grid(grid_file(tmp_path, FOUR), "b"), tmp_path / "runs")
    (tmp_path / "runs" / "b-03").mkdir()
    with pytest.raises(RunError, match="b-03: is there already"), named.opened():
        pass


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with sweep_of(tmp_path).opened(), pytest.raises(RunError, match="another process"), sweep_of(tmp_path).opened():
        pass


def test_a_follower_reads_every_line_once_also_of_a_log_that_was_cut(tmp_path: Path) -> None:
    made = Run.create(tmp_path, "x", "", out=tmp_path / "x")
    follower = Follower(made)
    assert follower.read() == []
    for step in (10, 20):
        made.append(event("step", step))
        made.append(event("evaluation", step, name="step", measures=measured(step)))
    assert [step for step, _ in follower.read()] == [10, 20]
    assert follower.read() == []
    made.append(event("checkpoint", 20))
    events.truncate_after(made.events_path, 10)
    made.append(event("evaluation", 20, name="step", measures=measured(7.0)))
    follower.read()
    assert follower.last == measured(7.0)
    with open(made.events_path, "ab") as file:
        file.write(b'{"kind":"st')
    assert follower.read() == []


def test_stop_requests_wait_until_a_trial_has_its_folder(tmp_path: Path) -> None:
    ready = threading.Event()

    def wait(job: Any) -> str:
        ready.set()
        return ""

    sweep = sweep_of(tmp_path)
    with pytest.raises(Stopped, match="0 of 4"):
        run(sweep, FakeTrials(LOSSES, before=wait), should_stop=ready.is_set)


def test_a_sweep_of_graded_answers_ends_with_a_command_that_measures_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_trials, "measured", lambda value: {"reward": {"value": value, "low": 0.0, "high": 9.0}})
    rest = "  reinforce: {grader: right.py}\ngrid: {optim.lr: [1e-5, 1e-4]}\n"
    sweep = sweep_of(tmp_path, rest)
    run(sweep, FakeTrials({"lr-01": (0.1, 0.2), "lr-02": (0.4, 0.5)}))
    _show(sweep, as_json=False, quiet=False)
    printed = capsys.readouterr().out
    assert "reward" in printed.splitlines()[0]
    assert "loss" not in printed
    assert f"grade FILE --grader right.py --model {sweep.root / 'lr-02'}" in printed
    assert " eval " not in printed
