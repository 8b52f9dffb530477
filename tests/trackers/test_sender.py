"""Sending: in batches, again after errors, nothing twice; with a tracker in memory, without any library."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from trackers.logs import ending, event, new_run, opening, trained, with_results, write
from tunesmith.runs import events
from tunesmith.runs.folder import Run
from tunesmith.trackers import sender
from tunesmith.trackers.libraries import Tracker
from tunesmith.trackers.run_reader import RunReader, StepMetrics
from tunesmith.trackers.sender import read_state


class MemoryTracker(Tracker):
    """Holds what was sent, across openings, and fails when it is told to."""

    place = "memory"

    def __init__(self) -> None:
        self.values: list[tuple[str, int, float]] = []
        self.files: list[str] = []
        self.openings = self.described = 0
        self.fail_after: list[int] = []
        """Numbers of steps after which a call of `log` fails."""
        self.loses = 0
        """Values that are lost whenever it fails: they were not stored yet."""
        self.has_failed = False

    @property
    def newest(self) -> int:
        return max((step for _, step, _ in self.values), default=-1)

    def open(self, run: Run, reader: RunReader) -> None:
        self.openings += 1
        self.last_step = self.newest

    def log(self, steps: Sequence[StepMetrics]) -> None:
        bound = self.fail_after.pop(0) if self.fail_after else len(steps)
        for step in steps[:bound]:
            self.values += [(name, step.step, value) for name, value in step.values.items()]
        if bound < len(steps):
            self.values = self.values[: len(self.values) - self.loses]
            self.has_failed = True
            raise ConnectionError("the server went away")

    def describe(self, reader: RunReader, results: Sequence[Path]) -> None:
        self.described += 1
        self.files += [path.name for path in results]

    def close(self, state: str = "") -> None:
        if self.has_failed:
            self.has_failed = False
            raise RuntimeError("closing fails too")


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> MemoryTracker:
    for name in ("PAUSE_S", "RETRY_S", "LONGEST_WAIT_S"):
        monkeypatch.setattr(sender, name, 0.01)
    return MemoryTracker()


def send(run: Run, tracker: Tracker) -> dict[str, Any]:
    over = threading.Event()
    over.set()
    sender.send(run, "memory", tracker, over)
    return read_state(run, "memory")


def following(run: Run, tracker: Tracker, over: threading.Event) -> threading.Thread:
    thread = threading.Thread(target=sender.send, args=(run, "memory", tracker, over))
    thread.start()
    return thread


def expected(run: Run) -> list[tuple[str, int, float]]:
    reader = RunReader(run)
    steps = [step for one in run.events() for step in reader.add(one)]
    return [(name, step.step, value) for step in steps for name, value in step.values.items()]


def whole(folder: Path, steps: int = 9) -> Run:
    run = with_results(new_run(folder))
    write(run, [*opening(steps), *trained(1, steps, steps), *ending(steps)])
    return run


def test_a_finished_run_is_sent_whole_with_report_and_adapter(tmp_path: Path, tracker: MemoryTracker) -> None:
    run = whole(tmp_path)
    state = send(run, tracker)
    assert tracker.values == expected(run)
    assert tracker.files == ["report.html", "report.md", "report.json", "adapter"]
    assert state == {"where": [], "place": "memory", "step": 9, "done": True, "error": ""}


@pytest.mark.parametrize("sent", [0, 3, 7])
def test_a_batch_that_breaks_off_is_continued_where_the_tracker_has_it(
    sent: int, tmp_path: Path, tracker: MemoryTracker
) -> None:
    run = whole(tmp_path)
    tracker.fail_after = [sent, 1]
    send(run, tracker)
    assert tracker.values == expected(run)
    assert tracker.openings == 3


def test_what_a_tracker_lost_when_it_failed_is_sent_again(tmp_path: Path, tracker: MemoryTracker) -> None:
    run, over = new_run(tmp_path), threading.Event()
    write(run, [*opening(9), *trained(1, 5, 9)])
    thread = following(run, tracker, over)
    while tracker.newest < 4:
        threading.Event().wait(0.01)
    tracker.fail_after, tracker.loses = [0], len([value for value in tracker.values if value[1] >= 3])
    write(run, trained(6, 9, 9))
    write(with_results(run), ending(9))
    over.set()
    thread.join(20)
    assert tracker.values == expected(run)


def test_a_kill_between_sending_and_noting_it_down_sends_nothing_twice(tmp_path: Path, tracker: MemoryTracker) -> None:
    run = new_run(tmp_path)
    write(run, [*opening(9), *trained(1, 5, 9)])
    send(run, tracker)
    (run.path / "tracking" / "memory.json").unlink()  # as if it had never been written
    write(run, [*trained(6, 9, 9), *ending(9)])
    send(with_results(run), tracker)
    assert tracker.values == expected(run)


def test_steps_that_a_resumed_run_repeats_are_sent_once(tmp_path: Path, tracker: MemoryTracker) -> None:
    run = new_run(tmp_path)
    write(run, [*opening(9), *trained(1, 5, 9)])
    send(run, tracker)
    assert tracker.newest == 4
    events.truncate_after(run.events_path, 2)
    write(run, [event("resume", 2, from_step=2), *trained(3, 9, 9), *ending(9)])
    send(with_results(run), tracker)
    assert tracker.values == expected(run)


def test_a_tracker_that_stays_down_reports_it_and_leaves_the_run_alone(tmp_path: Path, tracker: MemoryTracker) -> None:
    run = whole(tmp_path)
    before = run.events_path.read_bytes()
    tracker.fail_after = [0, 0, 0]
    with pytest.raises(ConnectionError):
        send(run, tracker)
    assert read_state(run, "memory")["error"] == "ConnectionError: the server went away"
    assert run.events_path.read_bytes() == before
    assert send(run, tracker)["done"]
    assert tracker.values == expected(run)


def test_a_run_under_way_is_followed_until_it_is_over(tmp_path: Path, tracker: MemoryTracker) -> None:
    run, over = new_run(tmp_path), threading.Event()
    thread = following(run, tracker, over)
    for part in (opening(9), trained(1, 4, 9), trained(5, 9, 9)):
        write(run, part)
        threading.Event().wait(0.1)
    assert tracker.newest == 8
    write(with_results(run), ending(9))
    over.set()
    thread.join(20)
    assert tracker.values == expected(run)
    assert tracker.described == 1


def test_a_planted_sender_that_trusts_its_own_notes_writes_twice(
    tmp_path: Path, tracker: MemoryTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryTracker, "newest", -1)
    run = whole(tmp_path)
    tracker.fail_after = [4]
    send(run, tracker)
    assert tracker.values != expected(run)
