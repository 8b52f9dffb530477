"""A probe lives through the heaviest moments of a run in a process of its own, and tells whatever ends it."""

import io
import json
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest

import fresh
from tiny_run import tiny_recipe
from tunesmith.errors import OutOfMemoryError
from tunesmith.planning.forecast import WORK_KINDS, Duration
from tunesmith.training import probe as process
from tunesmith.training.probe import KILLED, MORE, STEP_SPREAD, USUAL_STEPS, Found, Timed, _why_it_ended, probe
from tunesmith.training.resolve import ResolvedRun, resolve_run
from tunesmith.training.setup import prepare


def foreseen(folder: Path, **sections: Any) -> ResolvedRun:
    return resolve_run(tiny_recipe(folder, **sections), root=folder / "runs")


def nothing_left(root: Path) -> bool:
    return [path.name for path in root.iterdir()] == [".rows"]


WEIGHT = 5 * 2**28


@pytest.fixture(scope="module")
def probed(tmp_path_factory) -> tuple[ResolvedRun, Found, list[str], Path]:
    folder = tmp_path_factory.mktemp("probed")
    seen, heard = foreseen(folder), []
    weight = bytearray(os.urandom(1)) * WEIGHT
    found = probe(
        seen.recipe, root=folder / "runs", offline=True, on_progress=lambda what, done, total: heard.append(what)
    )
    assert len(weight) == WEIGHT
    return seen, found, heard, folder / "runs"


def test_it_tells_of_every_heavy_moment_and_leaves_nothing(probed):
    seen, found, heard, root = probed
    assert found.ended == ""
    assert found.steps[0].step == seen.forecast.heavy.step
    assert len({one.step for one in found.steps}) == len(found.steps), "the heaviest step, then usual ones"
    assert 1 + USUAL_STEPS < len(found.steps) <= 1 + MORE, "more than four where they are short"
    assert all(one.seconds > 0 and one.count > 0 for one in found.steps)
    assert {*found.work, "training", "teaching", "grading"} == set(WORK_KINDS), "of rows with answers, no teacher"
    assert found.work["starting"].seconds > found.work["finishing"].seconds > 0
    assert heard[-1] == "probe"
    assert nothing_left(root), "no run, and no folder of the probe"


def test_its_memory_is_that_of_its_own_process(probed):
    """The tests held something larger meanwhile; what the kernel tells of a new process by getrusage begins with it."""
    _, found, _, _ = probed
    assert WEIGHT > found.peak > 2**27, "torch alone takes that much"


def test_a_probe_that_takes_too_long_is_ended_and_tells_what_it_found(tmp_path):
    seen = foreseen(tmp_path)
    root = tmp_path / "runs"
    found = probe(seen.recipe, root=root, offline=True, on_progress=lambda what, done, total: None, limit_s=0.1)
    assert found.ended == "it was not done within 0 s"
    assert found.steps == []
    assert nothing_left(root)


def child_that(code: str, monkeypatch, tmp_path: Path) -> None:
    """Let another module stand for the child's."""
    package = tmp_path / "stub"
    package.mkdir()
    (package / "stub_child.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(package))
    run = process.subprocess.run
    monkeypatch.setattr(process.subprocess, "run", lambda words, **how: run([*words[:2], "stub_child"], **how))


def test_a_childs_end_is_reported_where_signals_cannot_kill(tmp_path, monkeypatch):
    """As on Windows."""
    monkeypatch.delattr("signal.SIGKILL")
    (tmp_path / "printed").write_text("why\n")
    assert _why_it_ended(3, tmp_path / "printed") == "exit code 3: why"


def test_a_child_that_the_system_kills_is_told_as_memory(tmp_path, monkeypatch):
    seen = foreseen(tmp_path)
    child_that(
        "import json, os, signal, sys\n"
        "measured = open(json.load(sys.stdin)['folder'] + '/measured', 'w')\n"
        'measured.write(\'{"steps": [{"seconds": 2.0, "count": 5, "step": 1}], "peak": 7}\')\n'
        "measured.close()\n"
        "os.kill(os.getpid(), signal.SIGKILL)",
        monkeypatch,
        tmp_path,
    )
    found = probe(seen.recipe, root=tmp_path / "runs", offline=True, on_progress=lambda what, done, total: None)
    assert (found.ended, found.peak, found.steps) == (KILLED, 7, [Timed(2.0, 5, step=1)])
    assert nothing_left(tmp_path / "runs")


def test_what_a_child_said_last_is_told_where_it_fails(tmp_path, monkeypatch):
    seen = foreseen(tmp_path)
    child_that("raise ValueError('no such thing')", monkeypatch, tmp_path)
    found = probe(seen.recipe, root=tmp_path / "runs", offline=True, on_progress=lambda what, done, total: None)
    assert found.ended == "exit code 1: ValueError: no such thing"


def test_memory_that_ends_in_the_probe_is_told(tmp_path, monkeypatch):
    setup = prepare(tiny_recipe(tmp_path), root=tmp_path / "runs")
    monkeypatch.setattr("tunesmith.training.step._pass", lambda *args: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(OutOfMemoryError, match="out of memory in a micro-batch of one row"):
        list(process.measure(setup, tmp_path, Found()))


def test_ctrl_c_ends_the_child_too(tmp_path, monkeypatch):
    seen = foreseen(tmp_path)
    pid_file = tmp_path / "pid"
    child_that(
        f"import os, time\nopen({str(pid_file)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)", monkeypatch, tmp_path
    )

    def interrupt() -> None:
        while not (pid_file.exists() and pid_file.read_text()):
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever handler another test has left
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            probe(seen.recipe, root=tmp_path / "runs", offline=True, on_progress=lambda what, done, total: None)
    finally:
        signal.signal(signal.SIGINT, before)
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(pid_file.read_text())).wait(timeout=5)
    assert nothing_left(tmp_path / "runs")


def test_a_probe_whose_parent_is_killed_ends_and_leaves_nothing(tmp_path):
    folder = tmp_path / ".tmp-probe"
    folder.mkdir()
    code = "import time; from tunesmith.training import probe; probe.prepare = lambda *a, **how: time.sleep(60)"
    asked = {"recipe": {"model": "m"}, "root": "", "folder": str(folder), "offline": True, "parent": -1}
    code = f"{code}; import io, sys; sys.stdin = io.StringIO({json.dumps(asked)!r}); probe.main()"
    assert fresh.Process("-c", code).wait(60) == 1
    assert not folder.exists()


def test_each_piece_is_kept_as_soon_as_it_is_there(tmp_path):
    setup, found = prepare(tiny_recipe(tmp_path), root=tmp_path / "runs"), Found()
    numbers = [len(found.steps) + len(found.work) for _ in process.measure(setup, tmp_path, found)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert {"measuring", "answering", "saving", "finishing"} == set(found.work)


def test_the_peak_is_kept_with_each_piece(tmp_path, monkeypatch):
    """A child that is killed in its next piece has told the memory of those before."""
    kept: list[int] = []

    def measure(setup, folder, found):
        for _ in range(3):
            yield
            kept.append(json.loads((folder / process.MEASURED_FILE).read_bytes())["peak"])

    asked = {"recipe": {"model": "m"}, "root": "", "folder": str(tmp_path), "offline": True, "parent": 0, "born": 0.0}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(asked)))
    peaks = iter([5, 7, 9])
    for name, stub in {"prepare": mock.Mock(), "_end_with": mock.Mock(), "measure": measure}.items():
        monkeypatch.setattr(process, name, stub)
    monkeypatch.setattr(process, "peak", lambda device: next(peaks))
    process.main()
    assert kept == [5, 7, 9]


COUNTS = dict(zip(WORK_KINDS, (1, 0, 100, 1000, 40, 0, 5, 1), strict=True))
FORMULA = Duration(COUNTS, dict.fromkeys(COUNTS, 1.0))


def forecast_with(monkeypatch, tmp_path: Path):
    from dataclasses import replace

    forecast = foreseen(tmp_path).forecast
    return replace(forecast, duration=FORMULA)


def test_a_total_follows_from_what_was_measured(tmp_path, monkeypatch):
    """Every kind of work at the price that was found, as often as it was foreseen; one that was not tried keeps its."""
    found = Found(
        steps=[Timed(9.0, 300, step=4), Timed(1.0, 40, step=2), Timed(1.0, 60, step=3)],
        work={
            "starting": Timed(3.0),
            "measuring": Timed(1.0, 100),
            "answering": Timed(0.8, 8),
            "saving": Timed(0.5),
            "finishing": Timed(7.0),
        },
        peak=5000,
    )
    forecast = forecast_with(monkeypatch, tmp_path)
    assert found.values(forecast, 100.0)["memory"] == 5000
    duration = found.duration(forecast, 100.0)
    seconds = {kind: work["seconds"] for kind, work in duration.values()["work"].items()}
    assert seconds == pytest.approx(dict(zip(WORK_KINDS, (3.0, 0.0, 200.0, 10.0, 4.0, 0.0, 2.5, 7.0), strict=True)))
    assert duration.spread == STEP_SPREAD < FORMULA.spread
    assert duration.total == pytest.approx(226.5)


def test_of_many_short_steps_the_first_do_not_count(tmp_path, monkeypatch):
    first = [Timed(5.0, 50, step=number) for number in range(1, 6)]
    later = [Timed(1.0, 50, step=number) for number in range(6, 14)]
    duration = Found(steps=[*first, *later]).duration(forecast_with(monkeypatch, tmp_path), 100.0)
    assert duration.prices["training"] == 2.0


def test_steps_of_drawn_answers_take_what_they_took_of_whole_draws(tmp_path, monkeypatch):
    """However long answers may be: a draw is in the first step of those that learn from it."""
    first = [Timed(9.0, 50, step=1), Timed(2.0, 50, step=2)]
    later = [Timed(seconds, 40, step=3 + i) for i, seconds in enumerate([4.0, 1.0] * 5)]
    forecast = forecast_with(monkeypatch, tmp_path)
    assert Found(steps=[*first, *later], draws=2).duration(forecast, 900.0).prices["training"] == 2.5
    assert Found(steps=first, draws=2).duration(forecast, 900.0).prices["training"] == 5.5


def test_a_probe_that_ended_before_a_step_corrects_nothing(tmp_path, monkeypatch):
    values = Found(ended=KILLED, peak=9).values(forecast_with(monkeypatch, tmp_path), 100.0)
    assert (values["memory"], values["seconds"], values["ended"]) == (0, None, KILLED)
