"""A run folder is complete or absent, has one writer, and is found by what a person remembers of it."""

import errno
import os
import time
from contextlib import suppress
from pathlib import Path

import pytest

from faults import Faults, in_child
from tunesmith.errors import RunError, StorageError
from tunesmith.recipe.docs import as_yaml
from tunesmith.recipe.schema import Recipe
from tunesmith.runs import events
from tunesmith.runs.folder import Run, refuse_taken, runs
from tunesmith.training.trainer import train
from tunesmith.types import Event


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def run(root) -> Run:
    return Run.create(root, "support", as_yaml(Recipe(seed=7), False))


def test_create_makes_a_complete_folder(root, run):
    assert run.path.parent == root
    assert run.path.name.startswith("support-")
    assert len(run.path.name) == len("support-") + 4
    assert set(run.path.name[-4:]) <= set("0123456789abcdef")
    assert sorted(os.listdir(run.path)) == ["recipe.yaml", "run.json"]
    assert run.read_json("run.json")["format"] == 1
    assert run.recipe().model_dump() == Recipe(seed=7).model_dump()
    assert run.state() == "new"


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("My Data (v2).jsonl", "my-data-v2-jsonl"),
        ("../../etc/passwd", "etc-passwd"),
        ("客服", "客服"),
        ("  ", "run"),
        ("x" * 300, "x" * 40),
        ("a\0b\nc", "a-b-c"),
    ],
)
def test_any_name_makes_a_safe_folder(root, name, slug):
    run = Run.create(root, name, "")
    assert run.path.parent == root
    assert run.path.name.rpartition("-")[0] == slug


def test_create_never_overwrites(root, monkeypatch):
    monkeypatch.setattr("secrets.token_hex", lambda size: "aaaa" if size == 2 else os.urandom(size).hex())
    first = Run.create(root, "x", "seed: 1")
    with pytest.raises(RunError, match="never overwrites"):
        Run.create(root, "x", "seed: 2")
    assert first.recipe().seed == 1
    assert os.listdir(root) == ["x-aaaa"]


def test_a_folder_that_is_taken_is_refused_before_data_and_model_are_read(tmp_path):
    (tmp_path / "mine").write_text("mine")
    recipe = Recipe(model=str(tmp_path / "no-model"), data={"train": [str(tmp_path / "none.jsonl")]})
    with pytest.raises(RunError, match="already exists"):
        train(recipe, out=tmp_path, offline=True)


def test_create_in_a_folder_of_choice(tmp_path):
    (tmp_path / "empty").mkdir()
    assert Run.create(tmp_path, "x", "", out=tmp_path / "empty").path == tmp_path / "empty"
    assert Run.create(tmp_path, "x", "", out=tmp_path / "a" / "b").path == tmp_path / "a" / "b"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(RunError, match="full: already exists"):
        Run.create(tmp_path, "x", "", out=tmp_path / "full")
    with pytest.raises(RunError, match="full: already exists"):
        refuse_taken(tmp_path / "full")
    refuse_taken(tmp_path / "none")
    assert sorted(os.listdir(tmp_path)) == ["a", "empty", "full"]
    assert os.listdir(tmp_path / "full") == ["mine"]


@pytest.mark.parametrize("code", [errno.ENOSPC, None], ids=["disk full", "killed"])
def test_create_that_fails_at_any_call_leaves_a_complete_folder_or_none(tmp_path, code):
    with Faults() as counted:
        Run.create(tmp_path / "probe", "x", "seed: 3")
    for number in range(1, counted.num_calls + 1):
        root = tmp_path / f"runs-{number}"

        def attempt(root=root, number=number) -> None:
            with Faults(number, code):
                Run.create(root, "x", "seed: 3")

        if code is None:
            assert in_child(attempt) in (-9, 0)  # rmdir of an absent folder may fail: it is meant to
        else:
            with suppress(StorageError):
                attempt()
            assert not root.exists() or not [name for name in os.listdir(root) if name.startswith(".")]
        for run in runs(root):
            assert run.recipe().seed == 3
            assert run.state() == "new"


def test_open_by_path_name_beginning_and_last(root, run):
    time.sleep(0.01)
    other = Run.create(root, "chat", "")
    for text in (run.path, str(run.path), f"{run.path}/", run.path.name, run.path.name[:9], "sup"):
        assert Run.open(text, root).path == run.path
    assert Run.open("last", root).path == other.path
    assert {found.path for found in runs(root)} == {run.path, other.path}


def test_open_names_near_matches(root, run):
    with pytest.raises(RunError, match=f"did you mean {run.path.name}"):
        Run.open(run.path.name.replace("support", "suport"), root)
    with pytest.raises(RunError, match=f"did you mean {run.path.name}"):
        Run.open(f"runs/{run.path.name.replace('support', 'suport')}", root)


def test_open_says_what_is_wrong(root, tmp_path):
    with pytest.raises(RunError, match=r"runs holds none\. Start one"):
        Run.open("x", root)
    with pytest.raises(RunError, match="holds none"):
        Run.open("last", root)
    with pytest.raises(RunError, match="not a run folder"):
        Run.open(tmp_path, root)
    for _ in range(7):
        Run.create(root, "x", "")
    with pytest.raises(RunError, match=r"the names of 7 runs in .* begin with it: .* and 1 more"):
        Run.open("x", root)
    with pytest.raises(RunError, match="no such run"):
        Run.open("", root)


def test_run_of_a_newer_format_is_refused(root, run):
    run.write_json("run.json", {"format": 2, "created": 0.0})
    with pytest.raises(RunError, match="format 2, this version of tunesmith knows 1"):
        Run.open(run.path, root)


def test_passed_over_is_what_is_no_run(root, run):
    (root / "notes.txt").write_text("x")
    (root / "empty").mkdir()
    (root / ".tmp-new-run-12345678").mkdir()
    (root / ".tmp-new-run-12345678" / "run.json").write_text("{}")
    assert [found.path for found in runs(root)] == [run.path]


def test_state_follows_lock_and_events(run):
    with run.lock():
        run.append(Event("start", 0, 0.0, {}))
        assert run.state() == "running"
    assert run.state() == "interrupted"
    run.append(Event("stopped", 3, 0.0, {}))
    assert run.state() == "stopped"
    assert [event.kind for event in events.follow(run.events_path, lambda: True)] == ["start", "stopped"]
    assert events.truncate_after(run.events_path, 2) == 1
    assert run.state() == "interrupted"


def test_json_files_round_trip_and_say_what_is_wrong(run):
    run.write_json("report.json", {"loss": 0.1, "worst": float("inf")})
    assert run.read_json("report.json") == {"loss": 0.1, "worst": float("inf")}
    (run.path / "report.json").write_bytes(b'{"loss": ')
    with pytest.raises(RunError, match=r"report\.json: is not JSON"):
        run.read_json("report.json")
    with pytest.raises(RunError, match=r"absent\.json: cannot be read: No such file"):
        run.read_json("absent.json")
