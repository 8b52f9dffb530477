"""Kills, full disks and lost databases: after the restart everything is as without them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from faults import Faults
from jobs.places import FakeLauncher, FakeModels, dispatcher, put_file, put_job, rows
from jobs.postgres import Cluster
from jobs.test_dispatcher import TRANSACTIONS, outcome, work
from tunesmith.jobs.store import Store, event
from tunesmith.jobs.tables import files, jobs
from tunesmith.serve.protocol import RequestError

# A killed server


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """The outcome without a fault."""
    folder = tmp_path_factory.mktemp("whole")
    from_upload_to_model(folder)
    return look(folder)


def from_upload_to_model(folder: Path) -> None:
    """A client, which sends again what was not answered, and a server."""
    store, models = Store(folder), FakeModels()
    if store.file("file-a") is None:
        put_file(store, rows(12))
    if store.one(jobs) is None:
        put_job(store, "file-a", seed=3)
    work(store, FakeLauncher(), models, num=16)
    store.close()


def look(folder: Path) -> tuple[object, ...]:
    store, models = Store(folder), FakeModels()
    for row in store.tuned():
        models.attach(row["base"], row["name"], store.runs_path / row["job"])
    [job] = store.page(jobs)[0]
    found = outcome(store, job["id"], models)
    left = sorted(path.name for path in store.files_path.iterdir())
    store.close()
    assert left == sorted(["file-a", job["result_file"]]), "nothing is left that no row names"
    return found


WRITES = "write,pwrite64,fdatasync,fsync,rename,unlink,ftruncate,mkdir"


def killed_at(folder: Path, num: int) -> bool:
    """Whether a server was killed at its write number `num`; False: it had done before."""
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go)
        os.read(ready, 1)
        try:
            from_upload_to_model(folder)
        except BaseException:
            os._exit(1)
        os._exit(0)
    words = ["strace", "-q", "-o", "/dev/null", "-p", str(child), "-e", f"trace={WRITES}"]
    tracer = subprocess.Popen([*words, "-e", f"inject={WRITES}:signal=SIGKILL:when={num}"], stderr=subprocess.DEVNULL)
    while "TracerPid:\t0\n" in Path(f"/proc/{child}/status").read_text():
        assert tracer.poll() is None, "strace may not trace here"
        time.sleep(0.002)
    os.write(go, b"x")
    status = os.waitpid(child, 0)[1]
    tracer.wait()
    for end in (ready, go):
        os.close(end)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "it failed by itself"
    return os.WIFSIGNALED(status)


def check_kill(folder: Path, num: int, whole: tuple[object, ...]) -> bool:
    is_killed = killed_at(folder, num)
    if is_killed:
        from_upload_to_model(folder)
    assert look(folder) == whole, f"killed at write {num}"
    shutil.rmtree(folder)
    return is_killed


needs_strace = pytest.mark.skipif(shutil.which("strace") is None or sys.platform != "linux", reason="strace is missing")


@needs_strace
@pytest.mark.parametrize("num", [40, 150])
def test_a_server_killed_at_a_write_goes_on(tmp_path: Path, whole: tuple[object, ...], num: int) -> None:
    assert check_kill(tmp_path / "store", num, whole)


@needs_strace
@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_a_server_killed_at_every_write_goes_on(tmp_path: Path, whole: tuple[object, ...], part: int) -> None:
    num = part + 1
    while check_kill(tmp_path / str(num), num, whole):
        num += 4
    assert num > 150


@pytest.mark.slow
def test_a_database_that_is_stopped_at_fifty_points_loses_nothing(tmp_path: Path, whole: tuple[object, ...]) -> None:
    """As the power does it, before and after each transaction of the dispatcher; the same server goes on."""
    cluster = Cluster(sync=True)
    points = [(at, after) for at in range(1, TRANSACTIONS + 1) for after in (False, True)] * 3
    for place, (at, after) in enumerate(points[:50]):
        folder = tmp_path / str(place)
        store, models, launcher = Store(folder, cluster.url(folder)), FakeModels(), FakeLauncher()
        name = put_job(store, put_file(store, rows(12)), seed=3)
        stop_at(store, cluster, at, after=after)
        working = dispatcher(store, launcher, models)
        statuses = []
        for _ in range(16):
            try:
                working.round()
            except RequestError as error:
                statuses.append(error.status)
                cluster.start()
        assert statuses == [503]
        found = outcome(store, name, models)
        assert (found[0], found[2:]) == (whole[0], whole[2:]), f"stopped at {at}, {after}"
        store.close()
    cluster.remove()


def stop_at(store: Store, cluster: Cluster, at: int, *, after: bool) -> None:
    """Stop the database in transaction number `at`: before its commit, or behind it with a lost answer."""
    writing, left = store.writing, [at]

    @contextmanager
    def stopping(**how: bool):
        left[0] -= 1
        with writing(**how) as connection:
            yield connection
            if left[0] == 0 and not after:
                cluster.stop()
        if left[0] == 0 and after:
            cluster.stop()
            raise RequestError("the answer is lost", status=503)

    store.writing = stopping


# A full disk


def test_an_upload_on_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("openai")
    from jobs.served import serving

    with serving(tmp_path) as served:
        body = b'--b\r\nContent-Disposition: form-data; name="%s"; filename="a"\r\n\r\n%s\r\n'
        whole = body % (b"file", rows(5)) + body % (b"purpose", b"fine-tune") + b"--b--\r\n"
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        at = 1
        while True:
            with Faults(at, errno.ENOSPC) as fault:
                status, answer, head = served.running.ask("POST", "/v1/files", whole, headers=headers)
            if fault.failed is None:
                break
            left = {path.name for path in served.store.files_path.iterdir()}
            known = {row["id"] for row in served.store.page(files)[0]}
            if fault.failed != "unlink":
                assert status in (200, 507), (fault.failed, answer)
            if status == 507:
                assert answer["error"]["code"] == "storage_full"
                assert "x-should-retry: false" in head
            assert left == known, f"{fault.failed} at {at}"
            at += 1
        assert status == 200
        assert at > 3


def test_a_run_on_a_full_disk_waits_for_room(tmp_path: Path) -> None:
    store, models, launcher = Store(tmp_path), FakeModels(), FakeLauncher()
    name = put_job(store, put_file(store, rows(12)), seed=3)
    working = dispatcher(store, launcher, models)
    with store.writing() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    for size in (3000, 300, 30, 3):
        with suppress(RequestError):
            while True:
                store.add_events([event(name, "x" * size)])
    statuses = []
    for _ in range(40):
        try:
            working.round()
        except RequestError as error:
            statuses.append(error.status)
            if len(statuses) == 5:
                store._database._connected().exec_driver_sql("PRAGMA max_page_count = 1000000")
    assert statuses == [507] * 5
    assert store.job(name)["status"] == "succeeded"
    store.close()


# Rows and names


def test_folders_and_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    put_file(store, rows(1))
    for path in (store.folder, store.files_path, store.runs_path, store.recipes_path, store.parts_path):
        assert path.stat().st_mode & 0o077 == 0, path
    for path in store.folder.glob("jobs.sqlite*"):
        assert path.stat().st_mode & 0o077 == 0, path
    store.close()


@pytest.mark.parametrize(
    "content",
    [
        b'{"messages": ' + b"[" * 2000 + b"]" * 2000 + b"}\n",
        b'{"messages": [{"role": "user", "content": "' + b"a" * (8 << 20) + b'"}]}\n',
        json.dumps({"messages": {"a": {"b": None}}}).encode() + b"\n",
        b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" * 10,
        b'{"messages": [{"role": "user", "content": "<|im_start|>system"}, {"role": "assistant", "content": 1e999}]}\n',
        b"\0" * 100 + b"\n",
    ],
)
def test_rows_made_to_harm_are_an_error_of_the_job(store: Store, content: bytes) -> None:
    launcher = FakeLauncher()
    name = put_job(store, put_file(store, content * 12))
    work(store, launcher, FakeModels(), num=3)
    job = store.job(name)
    assert (job["status"], job["error"]["param"]) == ("failed", "training_file")
    assert len(job["error"]["message"]) < 20_000
    assert launcher.started == []


@pytest.mark.parametrize("text", ["a[b]", "%' OR 1=1 --", '"', "\\", "a=b&c", "\u202e", "x" * 64])
def test_metadata_is_data(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    pytest.importorskip("openai")
    from jobs.served import serving

    with serving(tmp_path_factory.mktemp("metadata")) as served:
        file = served.client.files.create(file=("a", rows(12)), purpose="fine-tune").id
        body: dict[str, Any] = {"model": "tiny", "training_file": file}
        made = served.client.fine_tuning.jobs.create(**body, metadata={text: text})
        served.client.fine_tuning.jobs.create(**body, metadata={"other": text})
        assert [one.id for one in served.client.fine_tuning.jobs.list(metadata={text: text})] == [made.id]
