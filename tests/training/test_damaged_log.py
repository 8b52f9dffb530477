"""A log of events that a disk lost or changed is put right from the newest checkpoint, and that is said."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tiny_run import same_run, stop_at, tiny_recipe
from tunesmith.cli.app import app
from tunesmith.errors import RunError, Stopped
from tunesmith.runs.folder import Run, runs
from tunesmith.training.trainer import Listener, resume, train

Damage = Callable[[list[bytes]], bytes]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("straight")
    return train(tiny_recipe(folder), root=folder / "runs")


@pytest.fixture(scope="module")
def stopped(straight: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Stopped after step 5; its checkpoint is that of step 5."""
    root = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Stopped):
        train(straight.recipe(), root=root, listener=stop_at(5))
    return runs(root)[0]


@pytest.fixture
def run(stopped: Run, tmp_path: Path) -> Run:
    shutil.copytree(stopped.path, tmp_path / "runs" / "copy")
    return Run(tmp_path / "runs" / "copy")


def without_step(lines: list[bytes]) -> bytes:
    return b"".join(line for line in lines if not (b'"kind":"step"' in line and b'"step":3' in line))


def flipped_value(lines: list[bytes]) -> bytes:
    """A digit of a loss in the middle of the log: still JSON, still an event."""
    at = next(i for i, line in enumerate(lines) if b'"kind":"step"' in line)
    event = json.loads(lines[at])
    event["values"]["loss"] += 1e-6
    return b"".join([*lines[:at], json.dumps(event, separators=(",", ":")).encode() + b"\n", *lines[at + 1 :]])


def flipped_bit(lines: list[bytes]) -> bytes:
    whole = bytearray(b"".join(lines))
    whole[len(whole) // 3] ^= 0x10
    return bytes(whole)


DAMAGES: dict[str, Damage] = {
    "first four lines": lambda lines: b"".join(lines[:4]),
    "empty": lambda lines: b"",
    "zeros": lambda lines: bytes(len(b"".join(lines))),
    "half": lambda lines: b"".join(lines)[: len(b"".join(lines)) // 2],
    "tail of zeros": lambda lines: b"".join(lines)[: len(b"".join(lines)) // 2] + bytes(3000),
    "one step lost": without_step,
    "a value changed": flipped_value,
    "a bit flipped": flipped_bit,
    "two lines swapped": lambda lines: b"".join([*lines[:3], lines[4], lines[3], *lines[5:]]),
    "garbage between": lambda lines: b"".join([*lines[:3], b"{garbage}\n", *lines[3:]]),
}


OFTEN = ("first four lines", "tail of zeros", "one step lost", "a value changed", "garbage between")
"""The others are in the slow set: each is a run."""


@pytest.mark.parametrize(
    "damage",
    [pytest.param(DAMAGES[name], id=name, marks=[] if name in OFTEN else pytest.mark.slow) for name in DAMAGES],
)
def test_a_damaged_log_is_put_right_and_said_before_training_goes_on(run: Run, straight: Run, damage: Damage) -> None:
    run.events_path.write_bytes(damage(run.events_path.read_bytes().splitlines(keepends=True)))
    heard: list[tuple[str, str]] = []
    resume(run, listener=Listener(on_event=lambda event: heard.append((event.kind, event.values.get("text", "")))))
    kinds = [kind for kind, _ in heard]
    note = next(i for i, (kind, text) in enumerate(heard) if kind == "note" and "was lost or changed" in text)
    assert note < kinds.index("step")
    assert run.state() == "done"
    same_run(run, straight)


def test_a_log_that_is_gone_is_put_right(run: Run, straight: Run) -> None:
    run.events_path.unlink()
    same_run(resume(run), straight)


def test_a_torn_line_after_the_checkpoint_is_no_damage(run: Run, straight: Run) -> None:
    with open(run.events_path, "ab") as log:
        log.write(b'{"kind":"step","st')
    same_run(resume(run), straight)
    assert not any("was lost or changed" in event.values.get("text", "") for event in run.events())


def test_garbage_after_the_checkpoint_is_cut(run: Run, straight: Run) -> None:
    with open(run.events_path, "ab") as log:
        log.write(b"\x00\x00\n{}\n")
    same_run(resume(run), straight)


def test_the_command_resumes_a_run_whose_log_cannot_be_read(run: Run) -> None:
    from typer.testing import CliRunner

    lines = run.events_path.read_bytes().splitlines(keepends=True)
    run.events_path.write_bytes(b"{garbage}\n" + b"".join(lines))
    result = CliRunner().invoke(app, ["resume", str(run.path), "--offline"])
    assert result.exit_code == 0, result.output
    assert "line 1 was lost or changed after it was written; the log is as the checkpoint of step 5 has it" in (
        " ".join(result.output.split())
    )


def test_without_a_checkpoint_a_damaged_log_is_kept_aside_and_the_run_starts_over(run: Run, straight: Run) -> None:
    shutil.rmtree(run.checkpoints_path)
    run.events_path.write_bytes(b"{garbage}\n")
    same_run(resume(run), straight)
    assert (run.path / "damaged-events.jsonl").read_bytes() == b"{garbage}\n"
    assert any("the run starts over" in event.values.get("text", "") for event in run.events())


def test_killed_between_new_settings_and_their_checkpoint_it_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException): ...

    def killed(session: object) -> None:
        raise Killed

    monkeypatch.setattr("tunesmith.training.artifacts._write", killed)
    with pytest.raises(Killed):
        resume(run, settings=["train.tokens_per_pass=64"])
    monkeypatch.undo()
    resume(run)
    assert run.state() == "done"
    assert run.recipe().train.tokens_per_pass == 64
    texts = [event.values.get("text", "") for event in run.events()]
    assert "train.tokens_per_pass is 64 in recipe.yaml; it was 96 until here" in texts


def test_other_settings_still_make_it_another_run(run: Run) -> None:
    run.recipe_path.write_text(run.recipe_path.read_text().replace("lr: 0.01", "lr: 0.02"))
    with pytest.raises(RunError, match=r"optim\.lr was 0\.01, is 0\.02"):
        resume(run)


def test_a_damaged_copy_of_the_log_is_a_damaged_checkpoint(run: Run, straight: Run) -> None:
    copy = run.checkpoints_path / "step-5" / "events.jsonl"
    content = bytearray(copy.read_bytes())
    content[len(content) // 2] ^= 1
    copy.write_bytes(content)
    resume(run)
    same_run(run, straight)
    texts = [event.values.get("text", "") for event in run.events()]
    assert any("events.jsonl is not what was written" in text for text in texts)
    assert not any("was lost or changed" in text for text in texts)  # the log itself is whole
