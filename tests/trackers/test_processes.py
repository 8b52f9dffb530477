"""One process for each tracker, from the check to the end, with a stand-in for a tracker's package: it starts once,
ends with its parent, and neither stops a run nor slows its end."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from trackers.logs import ending, new_run, opening, trained, with_results, write
from trackers.processes import answering, begun, finish, process_of, processes
from tunesmith.environment.children import for_child
from tunesmith.errors import InputError
from tunesmith.runs.folder import Run
from tunesmith.trackers.sender import _result, tracked

STAND_IN = """
import os, time
from types import SimpleNamespace
with open("imports.txt", "a") as file:
    file.write("once\\n")
if os.environ.get("STAND_IN") == "breaks":
    raise ImportError("a part of it is missing.")
if os.environ.get("STAND_IN") == "dies":
    os._exit(3)
if os.environ.get("STAND_IN") == "hangs":
    time.sleep(60)
print("a library talks")
utils, Markdown = SimpleNamespace(TRACKIO_DIR="here"), str

class Opened:
    _next_step = 0
    def log(self, values, step):
        if os.environ.get("STAND_IN") == "is slow":
            time.sleep(60)
        print("a library talks" * 10000)
    def log_artifact(self, path, name, type):
        pass
    def finish(self):
        pass

def init(**options):
    with open("init.txt", "a") as file:
        file.write(options["project"] + "\\n")
    return Opened()
"""


@pytest.fixture(autouse=True)
def _stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "trackio.py").write_text(STAND_IN, "utf-8")
    (tmp_path / "packages" / "tensorboard.py").write_text("", "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "packages"), os.environ.get("PYTHONPATH", "")]))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    found = with_results(new_run(tmp_path / "runs"))
    write(found, [*opening(3), *trained(1, 3, 3), *ending(3)])
    return found


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie"


def test_a_tracker_is_checked_and_sent_to_by_one_process(tmp_path: Path, run: Run) -> None:
    place = f"{tmp_path / 'here'}, project tunesmith"
    assert finish("trackio", run).startswith(f"trackio: sent up to step 3, with the results: {place}")
    assert (tmp_path / "imports.txt").read_text() == "once\n"
    assert processes() == []


def test_a_finished_run_is_sent_to_another_place_without_secrets(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish("trackio", run)
    monkeypatch.setenv("TRACKIO_PROJECT", "other")
    assert "sent up to step 3, with the results: " in (line := finish("trackio", run))
    assert f"{tmp_path / 'here'}, project other" in line
    assert (tmp_path / "init.txt").read_text() == "tunesmith\nother\n"
    finish("trackio", run)
    assert (tmp_path / "init.txt").read_text() == "tunesmith\nother\n"
    with answering() as address:
        monkeypatch.setenv("TRACKIO_SERVER_URL", f"http://u:secret@{address}/?write_token=secret")
        assert f"http://{address}/, project other" in finish("trackio", run)
    with pytest.raises(InputError, match=f"http://{address}/: no server answers") as caught, begun("trackio"):
        pytest.fail("it can be used")
    assert "secret" not in str(caught.value) + (run.path / "tracking" / "trackio.json").read_text()


def test_trackio_needs_a_write_token_for_a_server_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering() as address:
        monkeypatch.setenv("TRACKIO_SERVER_URL", f"http://{address}/")
        with pytest.raises(InputError, match=f"http://{address}/: there is no write token"), begun("trackio"):
            pytest.fail("it can be used")
        monkeypatch.setenv("TRACKIO_WRITE_TOKEN", "secret")
        with begun("trackio") as said:
            pass
    assert said == [(True, "opening trackio")]


def test_without_a_run_the_process_ends_and_nothing_is_said(tmp_path: Path) -> None:
    with begun("trackio") as said:
        assert len(processes()) == 1
    assert said == [(True, "opening trackio")]
    assert processes() == []


@pytest.mark.skipif(sys.platform == "win32", reason="sessions are of POSIX")
def test_an_interrupt_is_for_the_run_and_the_rest_is_sent(run: Run) -> None:
    with suppress(KeyboardInterrupt), begun("trackio", run) as said:
        assert os.getsid(process_of("trackio").pid) != os.getsid(0)
        raise KeyboardInterrupt
    assert said[-2] == (True, "sending the rest to trackio, for at most 30 s")
    assert said[-1][0]


@pytest.mark.parametrize(
    ("what", "message"),
    [("breaks", "trackio: a part of it is missing. Without TRACKIO_"), ("dies", "trackio: its process ended.")],
)
def test_a_tracker_that_cannot_be_used_is_refused(what: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN", what)
    with pytest.raises(InputError, match=message), begun("trackio"):
        pytest.fail("it can be used")
    assert processes() == []


@pytest.mark.parametrize("what", ["breaks", "dies", "is missing"])
def test_a_resumed_run_goes_on_without_a_tracker_of_its_recipe(
    what: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", what)
    if what == "is missing":
        monkeypatch.setattr("tunesmith.trackers.libraries.importlib.util.find_spec", lambda name: None)
    said: list[tuple[bool, str]] = []
    with tracked((), offline=False, say=lambda *line: said.append(line), optional=["trackio"]) as begin:
        begin(run)
    assert said[-1][0] is False
    assert said[-1][1].endswith("continues without it; send it later: tunesmith track RUN --to trackio")
    assert processes() == []
    with tracked(["none"], offline=False, say=lambda *line: pytest.fail(line[1]), optional=["trackio"]):
        pass


def test_a_folder_of_wandb_is_written_and_its_way_is_named(run: Run, tmp_path: Path) -> None:
    (run.path / "tracking").mkdir()
    run.write_json("tracking/wandb.json", {"place": str(tmp_path), "step": 8, "done": True})
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        line = _result(run, "wandb", process, None)[1]
    assert line.startswith("wandb: written up to step 8, with the results: ")
    assert line.endswith(f"Send it with: wandb sync {tmp_path}")


def test_a_refusal_ends_the_processes_of_the_other_trackers() -> None:
    with (
        pytest.raises(InputError, match="Install the package tensorboard again"),
        tracked(["trackio", "tensorboard"], offline=False, say=lambda is_sent, line: None),
    ):
        pytest.fail("it can be used")
    assert processes() == []


def test_debugging_shows_what_the_library_raised_and_printed(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TUNESMITH_DEBUG", "1")
    finish("trackio", run)
    monkeypatch.setenv("STAND_IN", "breaks")
    with pytest.raises(InputError), begun("trackio"):
        pytest.fail("it can be used")
    out, err = capfd.readouterr()
    assert out == ""
    assert "a library talks" in err
    assert "ImportError: a part of it is missing." in err


def test_a_check_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN", "hangs")
    script = "from tunesmith.trackers import sender; sender.READY_S = 0.2; sender.main()"
    words = [sys.executable, "-c", script, "trackio"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=for_child(), text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        process.kill()
    assert said.startswith("track: trackio: no answer for 0 s. Leave it out, and send the run later: tunesmith track")


def test_a_process_that_dies_before_the_run_exists_stops_nothing(run: Run) -> None:
    said: list[tuple[bool, str]] = []
    with tracked(["trackio"], offline=False, say=lambda *line: said.append(line)) as begin:
        process_of("trackio").kill()
        while processes():
            time.sleep(0.01)
        begin(run)
    assert said[-1][0] is False
    assert "sent nothing yet; not all of it: its process ended. Send the rest with: tunesmith track" in said[-1][1]


def test_a_slow_tracker_does_not_keep_a_run_from_ending(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN", "is slow")
    with begun("trackio", run, wait_s=1) as said:
        start = time.monotonic()
    assert time.monotonic() - start < 10
    assert "not all of it: no answer in time" in said[-1][1]
    assert processes() == []


@pytest.mark.parametrize("has_run", [False, True])
def test_a_process_ends_when_its_parent_is_killed(has_run: bool, run: Run) -> None:
    script = (
        "import sys, time, psutil\nfrom pathlib import Path\nfrom tunesmith.runs.folder import Run\n"
        "from tunesmith.trackers.sender import tracked\n"
        "with tracked(['trackio'], offline=False, say=lambda *line: None) as begin:\n"
        f"    if {has_run}: begin(Run(Path({str(run.path)!r})))\n"
        "    print(*(one.pid for one in psutil.Process().children()), flush=True)\n    time.sleep(60)\n"
    )
    words = [sys.executable, "-c", script]
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=for_child(), text=True) as parent:
        assert parent.stdout is not None
        (pid,) = map(int, parent.stdout.readline().split())
        assert not gone(pid)
        parent.kill()
    until = time.monotonic() + 60
    while not gone(pid):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert (run.path / "tracking" / "trackio.json").exists() is has_run
