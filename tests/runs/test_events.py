"""The event log loses nothing, glues nothing together and takes back exactly what will be done again."""

import errno
import os
import threading
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from faults import Faults, in_child
from tunesmith.errors import RunError, StorageError
from tunesmith.runs import events
from tunesmith.types import Event


def event(step: int, kind: str = "step", **values) -> Event:
    return Event(kind, step, 1.5, values, {"seconds": 0.25})


def appended(path: Path, *wanted: Event) -> Path:
    for one in wanted:
        events.append(path, one)
    return path


@pytest.fixture
def log(tmp_path) -> Path:
    return tmp_path / "events.jsonl"


def test_a_line_is_a_json_object_with_the_kind_first(log):
    appended(log, event(3, loss=0.1))
    assert log.read_bytes() == (
        b'{"kind":"step","step":3,"time":1.5,"values":{"loss":0.1},"timing":{"seconds":0.25}}\n'
    )


@given(st.floats())
def test_floats_come_back_bit_for_bit(tmp_path_factory, number):
    log = tmp_path_factory.mktemp("log") / "events.jsonl"
    appended(log, event(1, loss=number))
    (back,) = events.read(log)
    assert repr(back.values["loss"]) == repr(number)


def test_half_last_line_is_no_event_and_spoils_none(log):
    appended(log, event(1), event(2))
    log.write_bytes(log.read_bytes() + b'{"kind":"step","step":3,"va')
    assert [one.step for one in events.read(log)] == [1, 2]
    appended(log, event(4))
    assert [one.step for one in events.read(log)] == [1, 2, 4]


def test_a_log_of_one_half_line_is_empty_and_heals(log):
    log.write_bytes(b'{"kind":"st')
    assert list(events.read(log)) == []
    appended(log, event(1))
    assert [one.step for one in events.read(log)] == [1]


@pytest.mark.parametrize(
    "line", [b"garbage", b'{"kind":"step"}', b'{"kind":"step","step":1,"time":0,"value":{}}', b"3"]
)
def test_a_whole_line_that_is_no_event_is_named(log, line):
    appended(log, event(1))
    log.write_bytes(log.read_bytes() + line + b"\n")
    with pytest.raises(RunError, match=r"events\.jsonl:2: not an event"):
        list(events.read(log))


@pytest.mark.parametrize("code", [errno.ENOSPC, None], ids=["disk full", "killed"])
def test_append_that_fails_at_any_call_leaves_the_events_before(log, code):
    appended(log, event(1), event(2))
    before = log.read_bytes()
    with Faults() as counted:
        appended(log, event(3, "checkpoint"))
    assert counted.num_calls == 3  # open, write, fsync
    for number in range(1, counted.num_calls + 1):
        log.write_bytes(before)

        def attempt(number=number) -> None:
            with Faults(number, code):
                events.append(log, event(3, "checkpoint"))

        if code is None:
            assert in_child(attempt) == -9
        else:
            with pytest.raises(StorageError, match="ENOSPC"):
                attempt()
        assert [one.step for one in events.read(log)] in ([1, 2], [1, 2, 3])
        appended(log, event(4))
        assert [one.step for one in events.read(log)] in ([1, 2, 4], [1, 2, 3, 4])


@pytest.mark.parametrize(("kind", "num_syncs"), [("step", 0), ("checkpoint", 1), ("end", 1), ("failed", 1)])
def test_ends_and_checkpoints_reach_the_disk(log, monkeypatch, kind, num_syncs):
    syncs = []
    monkeypatch.setattr(os, "fsync", syncs.append)
    appended(log, event(1, kind))
    assert len(syncs) == num_syncs


def story(log: Path) -> Path:
    """A run of five steps with checkpoints at 2 and 4 that was resumed once, at 2."""
    return appended(
        log,
        event(0, "start"),
        event(0, "plan"),
        event(0, "evaluation"),
        event(1),
        event(2),
        event(2, "evaluation"),
        event(2, "checkpoint"),
        event(2, "stopped"),
        event(2, "resume"),
        event(3),
        event(4),
        event(4, "note"),
        event(4, "checkpoint"),
        event(4, "evaluation"),
        event(4, "sample"),
        event(5),
        event(5, "failed"),
    )


def kept(log: Path) -> list[tuple[str, int]]:
    return [(one.kind, one.step) for one in events.read(log)]


def test_truncate_takes_back_what_will_be_done_again(log):
    assert events.truncate_after(story(log), 4) == 4  # the evaluation and sample after the checkpoint, step 5, failed
    assert kept(log)[-2:] == [("note", 4), ("checkpoint", 4)]
    assert events.truncate_after(log, 2) == 3
    assert kept(log)[-4:] == [("checkpoint", 2), ("stopped", 2), ("resume", 2), ("note", 4)]
    assert events.truncate_after(log, -1) == 8
    assert kept(log) == [("resume", 2), ("note", 4)]


def test_truncate_keeps_kept_lines_byte_for_byte(log):
    before = story(log).read_bytes().splitlines(keepends=True)
    events.truncate_after(log, 2)
    after = log.read_bytes().splitlines(keepends=True)
    assert after == [line for line in before if line in after]


def test_truncate_killed_anywhere_is_whole_or_not_at_all(log):
    before = story(log).read_bytes()
    with Faults() as counted:
        events.truncate_after(log, 2)
    after = log.read_bytes()
    for number in range(1, counted.num_calls + 1):
        log.write_bytes(before)

        def attempt(number=number) -> None:
            with Faults(number, None):
                events.truncate_after(log, 2)

        assert in_child(attempt) == -9
        assert log.read_bytes() in (before, after)


@pytest.mark.parametrize(
    ("kinds", "standing"),
    [
        ([], "new"),
        (["start", "step"], "interrupted"),
        (["plan"], "interrupted"),
        (["start", "stopped"], "stopped"),
        (["start", "stopped", "resume", "step"], "interrupted"),
        (["start", "failed", "resume", "end"], "done"),
        (["start", "failed", "note"], "failed"),
    ],
)
def test_standing_follows_the_last_word(log, kinds, standing):
    appended(log, *(event(number, kind) for number, kind in enumerate(kinds)))
    assert events.logged_state(log) == standing


class Follower(threading.Thread):
    """Follows a log until told to stop."""

    def __init__(self, log: Path) -> None:
        super().__init__(daemon=True)
        self.log, self.seen, self.done = log, [], threading.Event()
        self.start()

    def run(self) -> None:
        for one in events.follow(self.log, self.done.is_set, poll_s=0.005):
            self.seen.append((one.kind, one.step))

    def wait_for(self, number: int) -> None:
        deadline = time.monotonic() + 20
        while len(self.seen) < number and time.monotonic() < deadline:
            time.sleep(0.005)

    def finish(self) -> list[tuple[str, int]]:
        self.done.set()
        self.join(20)
        return self.seen


def test_follow_sees_each_event_once_as_it_comes(log):
    follower = Follower(log)
    for step in range(50):
        appended(log, event(step))
    assert follower.finish() == [("step", step) for step in range(50)]


def test_follow_waits_for_the_rest_of_a_line(log):
    appended(log, event(1))
    follower = Follower(log)
    follower.wait_for(1)
    line = log.read_bytes()
    with open(log, "ab") as file:
        file.write(line[:20])
        file.flush()
        time.sleep(0.05)
        file.write(line[20:])
    assert follower.finish() == [("step", 1), ("step", 1)]


def test_follow_goes_on_over_a_resume(log):
    follower = Follower(story(log))
    follower.wait_for(17)
    events.truncate_after(log, 2)
    appended(log, event(2, "resume"), event(3))
    seen = follower.finish()
    assert seen[17:] == [("resume", 2), ("step", 3)]


def test_a_follower_holds_no_file_between_two_looks(log):
    """Windows replaces no open file, and a resume replaces the log."""
    story(log)
    tail = events.Tail(log)
    assert len(list(tail.read())) == 17
    assert [file for file in psutil.Process().open_files() if file.path == str(log)] == []
    events.truncate_after(log, 2)
    events.truncate_after(log, 1)  # the file system may take the number of the first file again
    appended(log, event(1, "resume"), event(2))
    assert [(one.kind, one.step) for one in tail.read()] == [("resume", 1), ("step", 2)]


def test_follow_ends_with_all_there_is(log):
    story(log)
    assert len(list(events.follow(log, lambda: True))) == 17
    assert list(events.follow(log.with_name("absent"), lambda: True)) == []
