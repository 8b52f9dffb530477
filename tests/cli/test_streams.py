"""What is printed never decides how a run ends: other encodings, full disks, closed and broken pipes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import fresh
import tunesmith
from tiny_run import chats, model_folder
from tunesmith.runs.folder import Run

SOURCE = Path(tunesmith.__file__).resolve().parents[1]
QUICK = ("method.rank=4", "train.max_steps=2", "train.rows_per_step=3", "evaluation.samples=1", "threads=1")
QUICK += ("evaluation.sample_tokens=4", "evaluation.general=false", "evaluation.surprising=0", "precision=float32")
SETTINGS = [word for setting in QUICK for word in ("--set", setting)]
START = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background is started without it
from tunesmith import cli
print("ready", flush=True)
cli.main()
"""
Ended = subprocess.CompletedProcess[bytes]

needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    model_folder(folder / "model")
    chats(folder / "chats.jsonl", 9)
    chats(folder / "held.jsonl", 3, seed=1)
    (folder / "日本 ✓.jsonl").write_text('{"text": "日本 ✓"}\n{"txt": "é ✓ 日本"}\n', encoding="utf-8")
    return folder


def words(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tunesmith", *arguments]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SOURCE), **more}


def ran(folder: Path, *arguments: str, env: dict[str, str] | None = None, **streams: Any) -> Ended:
    streams = streams or {"stdout": subprocess.PIPE}
    pipes = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, **streams}
    return subprocess.run(
        words(*arguments), cwd=folder, env=environment(**env or {}), check=False, timeout=300, **pipes
    )


def trained(folder: Path, name: str, stdout: int) -> fresh.Process:
    given = ["train", "model", "chats.jsonl", "--eval", "held.jsonl", "--offline", "--out", f"runs/{name}"]
    return fresh.Process("-m", "tunesmith", *given, *SETTINGS, cwd=folder, stdout=stdout)


@pytest.mark.slow
def test_closed_streams_and_another_encoding_leave_the_run_done(folder: Path) -> None:
    """stdin and stderr are closed, stdout takes ASCII alone: a process of its own, since Python starts otherwise."""
    given = ["train", "model", "chats.jsonl", "--eval", "held.jsonl", "--offline", "--out", "runs/closed", *SETTINGS]
    closed = ["sh", "-c", '"$0" "$@" <&- 2>&-', *words(*given)]
    env = environment(PYTHONIOENCODING="ascii")
    ended = subprocess.run(closed, cwd=folder, env=env, check=False, timeout=300, stdout=subprocess.PIPE)
    assert (ended.returncode, Run(folder / "runs" / "closed").state()) == (0, "done")
    assert b"result: runs/closed" in ended.stdout
    assert ended.stdout.isascii()


def test_a_reader_of_stdout_that_leaves_leaves_the_run_done(folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = trained(folder, "pipe", writer)
    os.close(writer)
    _, errors = process.communicate()
    assert (process.returncode, Run(folder / "runs" / "pipe").state()) == (0, "done"), errors


def test_a_command_whose_stdout_is_closed_ends_as_ever(folder: Path) -> None:
    closed = ["sh", "-c", '"$0" "$@" >&-', *words("check", "日本 ✓.jsonl")]
    ended = subprocess.run(closed, cwd=folder, env=environment(), check=False, timeout=300, stderr=subprocess.PIPE)
    assert (ended.returncode, b"Traceback" in ended.stderr) == (2, False), ended.stderr.decode()


def test_commands_print_in_any_encoding(folder: Path) -> None:
    env = {"PYTHONIOENCODING": "ascii"}
    check = ran(folder, "check", "日本 ✓.jsonl", env=env)
    assert check.returncode == 2
    listed = ran(folder, "runs", "--runs", "日本", env=env)
    for ended in (check, listed):
        assert b"fault in tunesmith" not in ended.stderr
        assert ended.stdout.isascii()


def test_json_in_another_encoding_says_the_same(folder: Path) -> None:
    def problems(**env: str) -> list[Any]:
        ended = ran(folder, "check", "日本 ✓.jsonl", "--json", env=env)
        return [json.loads(line) for line in ended.stdout.decode(env["PYTHONIOENCODING"]).splitlines()]

    assert problems(PYTHONIOENCODING="cp1252") == problems(PYTHONIOENCODING="utf-8") != []


@needs_full
def test_a_full_disk_behind_stdout_leaves_the_run_done_and_is_said(folder: Path) -> None:
    with open("/dev/full", "wb") as full:
        process = trained(folder, "full", full.fileno())
    _, errors = process.communicate()
    assert Run(folder / "runs" / "full").state() == "done"
    assert process.returncode == 1
    assert "stdout: No space left on device: not all of the output could be written" in errors
    assert "fault in tunesmith" not in errors


@needs_full
def test_answers_that_nobody_gets_are_not_computed_on(folder: Path) -> None:
    with open("/dev/full", "wb") as full:
        words = ("-m", "tunesmith", "predict", "model", "held.jsonl", "--offline")
        process = fresh.Process(*words, cwd=folder, stdout=full.fileno())
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "error: stdout: No space left on device" in errors


@pytest.mark.parametrize("delay", [0.05, 0.3])
def test_an_interrupt_while_it_starts_shows_no_traceback(folder: Path, delay: float) -> None:
    """Python's own start-up, some 0.05 s before the first line of ours, cannot be helped."""
    started = [sys.executable, "-c", START]
    process = subprocess.Popen(
        [*started, "doctor"], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder
    )
    process.stdout.readline()
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1].decode()
    assert "Traceback" not in errors
    assert process.returncode in (130, 0), errors
