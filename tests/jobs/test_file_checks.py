"""Files are checked in processes that have an end, and no server ends by what is in a file."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jobs.places import BASES, FakeLauncher, FakeModels, put_file, put_job, rows
from jobs.test_rules import as_project
from often import often
from serve.running import wait_for
from tunesmith.environment.children import for_child
from tunesmith.jobs import file_checks
from tunesmith.jobs.dispatcher import Dispatcher
from tunesmith.jobs.file_checks import FileChecks
from tunesmith.jobs.launcher import ChildProcess
from tunesmith.jobs.store import Store
from tunesmith.jobs.tables import events
from tunesmith.jobs.training_files import FileFault, check_file


@pytest.fixture
def store(tmp_path: Path) -> Any:
    made = Store(tmp_path / "store")
    yield made
    made.close()


def working(store: Store) -> Dispatcher:
    return Dispatcher(store, BASES, FakeLauncher(), FakeModels())


def ended(store: Store, server: Dispatcher, name: str, *, within_s: float) -> Any:
    """The job, once it has come to an end by rounds of its server."""
    until = time.monotonic() + within_s
    while (job := store.job(name))["finished_at"] is None:
        since = time.monotonic()
        server.round()
        assert since < until
        assert time.monotonic() - since < 2, "no other job moves in a round"
        time.sleep(0.02)
    return job


def put_waiting(store: Store, project: str, file: str, content: bytes) -> str:
    with as_project(project):
        return put_job(store, put_file(store, content, file))


def process_of(server: Dispatcher, name: str) -> int:
    process = server.checks.active[name][1]
    assert isinstance(process, ChildProcess)
    assert process.popen is not None
    return process.popen.pid


def peak_bytes(*, anew: bool = False) -> int:
    """The most resident memory of this process; from now on, if `anew`."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) << 10


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_a_million_bad_lines_end_their_job_without_the_servers_memory(store: Store) -> None:
    name = put_job(store, put_file(store, rows(1) + b"1\n" * 1_500_000))
    server, before = working(store), peak_bytes(anew=True)
    job = ended(store, server, name, within_s=60)
    assert peak_bytes() - before < 50 << 20, "a problem of each line took 560 MiB"
    assert job["error"]["code"] == "invalid_training_file"
    assert job["error"]["message"].endswith(" And 990 more, behind which the file was not read.")
    assert len(store.page(events, events.c.job == name, limit=1000)[0]) == 103, "100 lines, and three of the job"


def test_faults_are_counted_to_a_bound_and_named_within_one(tmp_path: Path) -> None:
    path, long = tmp_path / "rows.jsonl", "x" * 10_000
    for num, words in ((30, "And 20 more."), (999, "And 989 more."), (1000, "And 990 more, behind which")):
        path.write_bytes(rows(1) + (json.dumps({long: 1}).encode() + b"\n") * num)
        with pytest.raises(FileFault) as fault:
            check_file(path, "training", method="supervised", min_examples=1)
        assert words in fault.value.message
        assert len(fault.value.lines) == min(num, 100)
        assert max(map(len, fault.value.lines)) <= 1000


def its_check_ends(server: Dispatcher, name: str, process: int) -> None:
    since = time.monotonic()
    while Path(f"/proc/{process}").exists() or name in server.checks.active:
        server.round()
        assert time.monotonic() - since < 2


# trap: S21
@pytest.mark.slow
def test_a_cancelled_job_ends_its_check_while_other_projects_continue(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = b"".join(json.dumps({f"field {i} {row}": 1 for i in range(9_000)}).encode() + b"\n" for row in range(12))
    slow = put_waiting(store, "red", "file-slow", wide)
    server = working(store)
    server.round()
    process = process_of(server, slow)
    os.kill(process, signal.SIGSTOP)  # however fast the rows are read
    second = put_waiting(store, "red", "file-a", rows(12))
    other = put_waiting(store, "blue", "file-b", rows(12))
    assert ended(store, server, other, within_s=30)["status"] == "succeeded"
    assert [store.job(name)["status"] for name in (slow, second)] == ["validating_files"] * 2, "one of a project"
    store.act(slow, "cancel", "cancelled")
    with monkeypatch.context() as patch:
        patch.setattr(ChildProcess, "stop", lambda it: None)
        with pytest.raises(AssertionError):
            its_check_ends(server, slow, process)
    its_check_ends(server, slow, process)
    assert not list(store.runs_path.glob(f".{slow}.check.*"))
    assert ended(store, server, second, within_s=30)["status"] == "succeeded"


def test_a_paused_job_is_checked_again_when_it_goes_on(store: Store) -> None:
    name, server = put_job(store, put_file(store, rows(12))), working(store)
    server.round()
    os.kill(process_of(server, name), signal.SIGSTOP)
    store.act(name, "pause", "paused")
    wait_for(lambda: server.round() or name not in server.checks.active)
    store.act(name, "resume", "resumed")
    assert ended(store, server, name, within_s=30)["status"] == "succeeded"


@pytest.mark.parametrize("what", often(["memory", "memory, and a library crashes", "time"], "memory"))
def test_a_check_that_takes_too_much_is_an_error_of_its_job(
    store: Store, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if "memory" in what:
        monkeypatch.setattr(file_checks, "MEMORY_BYTES", 32 << 20)
        piece = b"{}," * 600_000 if what == "memory" else b"[[[]]]," * 200_000
        content = rows(1) + b'{"messages": [' + piece + b"1]}\n"
    else:
        monkeypatch.setattr(file_checks, "SECONDS", 1)
        monkeypatch.setattr(file_checks, "BYTES_A_SECOND", 1 << 40)
        content = rows(1000) * 300
    name = put_job(store, put_file(store, content))
    job = ended(store, working(store), name, within_s=60)
    if "crashes" in what:
        assert job["error"]["code"] in ("check_crashed", "invalid_training_file")
    else:
        assert job["error"]["code"] == "invalid_training_file"
        assert "Reading it takes more than " + {"memory": "32 MiB", "time": "1 s"}[what] in job["error"]["message"]


def test_a_check_outlives_its_server(store: Store) -> None:
    name = put_job(store, put_file(store, rows(12)))
    first = working(store)
    first.round()
    server = working(store)  # the first is gone
    server.recover()
    assert list(server.checks.active) == [name]
    server.checks.start = lambda place, request: pytest.fail("it is not begun anew")
    assert ended(store, server, name, within_s=30)["status"] == "succeeded"


def test_a_file_that_kills_its_check_repeatedly_fails_its_job(store: Store) -> None:
    """As where everything of the server is ended for want of memory."""
    name = put_job(store, put_file(store, rows(12)))
    for _ in range(3):
        server = working(store)
        server.recover()
        server.round()
        wait_for(lambda server=server: server.round() or name in server.checks.active or store.job(name)["finished_at"])
        for _, process in server.checks.active.values():
            process.stop()
    server = working(store)
    server.recover()
    assert ended(store, server, name, within_s=10)["error"]["code"] == "check_crashed"


def test_a_server_that_stops_ends_its_checks_and_counts_nothing(store: Store) -> None:
    name = put_job(store, put_file(store, rows(12)))
    for _ in range(4):
        server = working(store)
        server.recover()
        server.round()
        process = process_of(server, name)
        os.kill(process, signal.SIGSTOP)
        server.checks.close()
        assert not Path(f"/proc/{process}").exists()
    assert ended(store, working(store), name, within_s=30)["status"] == "succeeded"


def test_projects_take_turns_in_being_checked(store: Store) -> None:
    began: list[str] = []

    class Never:
        def is_alive(self) -> bool:
            return False

        def printed(self) -> dict[str, Any]:
            return {"fault": {"code": "x", "message": "x", "param": "x", "lines": []}}

        def forget(self) -> None:
            pass

        stop = forget

    checks = FileChecks(store, BASES, lambda place, request: began.append(place.name) or Never())
    names = [put_waiting(store, "red", f"file-{i}", rows(12)) for i in range(4)]
    names.append(put_waiting(store, "blue", "file-b", rows(12)))
    while waiting := store.with_status("validating_files"):
        checks.begin(waiting)
        checks.follow()
    assert [names.index(one.removesuffix(".check")) for one in began] == [0, 4, 1, 2, 3]


def test_content_that_is_gone_or_a_link_is_an_error_of_its_job(store: Store, tmp_path: Path) -> None:
    for is_link in (False, True):
        file = put_file(store, rows(12), f"file-{is_link}")
        store.content_path(file).unlink()
        if is_link:
            (tmp_path / "other").write_bytes(rows(12))
            store.content_path(file).symlink_to(tmp_path / "other")
        job = ended(store, working(store), put_job(store, file), within_s=30)
        assert job["error"]["message"] == f"The training file {file} was deleted."


def test_a_check_works_within_a_lower_limit_of_the_machine(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(rows(12))
    facts = {"memory_bytes": 1 << 30, "seconds": 60, "method": "supervised", "min_examples": 10}
    limited = (
        "import resource, runpy\nresource.setrlimit(resource.RLIMIT_CPU, (40, 40))\n"
        "runpy.run_module('tunesmith.jobs.check_process', run_name='__main__', alter_sys=True)"
    )
    words = [sys.executable, "-c", limited, json.dumps({"files": {"training": str(file)}, **facts})]
    done = subprocess.run(words, env=for_child(), capture_output=True, check=True)
    assert json.loads(done.stdout)["num_rows"] == 12
