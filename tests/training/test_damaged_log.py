"""A log of events that a disk lost or changed since the newest checkpoint is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tiny_run import same_run, stop_at, tiny_recipe
from tunesmith.errors import RunError, Stopped
from tunesmith.runs import checkpoint
from tunesmith.runs.folder import Run, runs
from tunesmith.training.trainer import resume, train

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


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_log_is_refused_before_anything_is_loaded(
    run: Run, damage: Damage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.training.trainer.prepare", lambda *_, **__: pytest.fail("it loads"))
    run.events_path.write_bytes(damage(run.events_path.read_bytes().splitlines(keepends=True)))
    with pytest.raises(RunError, match=r"events\.jsonl: its first [\d,]+ bytes are not .* Put the file back"):
        resume(run)
    run.events_path.unlink()
    with pytest.raises(RunError, match="lines were lost"):
        resume(run)


def test_a_torn_line_after_the_checkpoint_is_no_damage(run: Run, straight: Run) -> None:
    with open(run.events_path, "ab") as log:
        log.write(b'{"kind":"step","st')
    same_run(resume(run), straight)


def test_a_line_after_the_checkpoint_that_is_no_event_is_named(run: Run) -> None:
    number = len(run.events_path.read_bytes().splitlines()) + 1
    with open(run.events_path, "ab") as log:
        log.write(b"{garbage}\n")
    with pytest.raises(RunError, match=rf"events\.jsonl:{number}: not an event"):
        resume(run)


def test_a_checkpoint_of_an_earlier_version_knows_nothing_of_the_log(run: Run, straight: Run) -> None:
    newest = checkpoint.load(run.checkpoints_path / "step-5")
    state = {key: value for key, value in newest.state.items() if key != "log"}
    checkpoint.save(run.checkpoints_path, 5, weights=newest.weights, optimizer=newest.optimizer, state=state)
    same_run(resume(run), straight)


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
    assert "train.tokens_per_pass is 64 in recipe.yaml; it was 256 until here" in texts


def test_other_settings_still_make_it_another_run(run: Run) -> None:
    run.recipe_path.write_text(run.recipe_path.read_text().replace("lr: 0.01", "lr: 0.02"))
    with pytest.raises(RunError, match=r"optim\.lr was 0\.01, is 0\.02"):
        resume(run)
