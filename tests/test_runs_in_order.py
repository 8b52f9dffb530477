"""tunesmith runs --where, --sort, rm and prune: what is chosen, what is removed, and what never is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evaluation.fake_runs import fake_run
from tunesmith.cli.app import app
from tunesmith.cli.run_filter import select
from tunesmith.errors import InputError, RunError
from tunesmith.runs import prune as removal
from tunesmith.runs.folder import Run
from tunesmith.types import Event

ROWS = [
    {"fields": {"name": "a", "task": "chat", "loss": 1.5, "steps": 10, "optim.lr": 1e-4, "before.loss": 2.0}},
    {"fields": {"name": "b", "task": "chat", "loss": 1.8, "steps": 30, "optim.lr": 1e-3}},
    {"fields": {"name": "c", "task": "classify", "loss": None, "steps": 20, "evaluation.bleu": True}},
]


def chosen(*where: str, sort: str | None = None) -> str:
    return "".join(ROWS[i]["fields"]["name"] for i in select(ROWS, where, sort))


@pytest.mark.parametrize(
    ("where", "names"),
    [
        (["task=chat"], "ab"),
        (["task == chat"], "ab"),
        (["task!=chat"], "c"),
        (["task=c*"], "abc"),
        (["loss<1.7"], "a"),
        (["eval_loss<1.7"], "a"),
        (["loss>=1.5", "steps>10"], "b"),
        (["loss!=1.5"], "b"),
        (["optim.lr=0.001"], "b"),
        (["evaluation.bleu=true"], "c"),
        (["name=[ab]"], "ab"),
    ],
)
def test_conditions_choose_runs(where, names):
    assert chosen(*where) == names


@pytest.mark.parametrize(("sort", "names"), [("loss", "abc"), ("-loss", "bac"), ("-steps", "bca"), ("name", "abc")])
def test_runs_are_sorted_and_those_without_a_value_come_last(sort, names):
    assert chosen(sort=sort) == names


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("tusk=chat", "no run has a field tusk. Did you mean task"),
        ("task", "not of the form FIELD=VALUE"),
        ("task<chat", "task is text, such as 'chat'"),
        ("loss<low", "loss is a number, such as 1.5"),
        ("__import__('os')=1", "not of the form"),
    ],
)
def test_wrong_conditions_are_refused_with_the_fields_there_are(where, message):
    with pytest.raises(InputError) as refused:
        select(ROWS, [where], None)
    assert message in str(refused.value)
    assert str(refused.value).startswith(f"--where {where}: ")


def test_unknown_field_to_sort_by_is_refused():
    with pytest.raises(InputError, match=r"--sort -size: no run has a field size"):
        select(ROWS, [], "-size")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three finished runs with checkpoints and exports, and one that was interrupted."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "some-model").mkdir(parents=True)
    for name, kind in (("one", "chat"), ("two", "classes"), ("three", "chat"), ("broken", "chat")):
        run, _, _ = fake_run(tmp_path / "runs" / name, kind)
        for part in ("checkpoints/step-10", "exports/gguf-q8_0", "merged", "adapter"):
            (run.path / part).mkdir(parents=True)
            (run.path / part / "weights.bin").write_bytes(b"x" * 1000)
        if name != "broken":
            run.append(Event("end", 120, 0.0, {"report": {}}))
    return tmp_path / "runs"


def starts_from(run: Run, place: Path) -> None:
    facts = run.read_json("run.json")
    facts["made"] = {"in": "", "root": str(run.path.parent), "places": {str(place): str(place)}}
    run.write_json("run.json", facts)
    run.recipe_path.write_text(f"model: {place}\ntask: chat\n")


def call(*words: str, answer: str = "") -> tuple[int, str]:
    result = CliRunner().invoke(app, ["runs", *words], input=answer)
    return result.exit_code, result.output


def test_list_is_filtered_and_sorted_on_the_command_line(root):
    code, out = call("--where", "task=chat", "--where", "state=done", "--sort", "-name", "--json")
    assert code == 0
    assert [row["name"] for row in json.loads(out)] == ["three", "one"]
    assert call("--where", "loss<0")[1].strip() == "runs: no runs of which loss<0 holds"


def test_prune_frees_checkpoints_and_exports_of_finished_runs_alone(root):
    code, out = call("prune", "--yes", "--json")
    report = json.loads(out.splitlines()[-1])
    assert (code, report["bytes"]) == (0, 9000)
    for name in ("one", "two", "three"):
        left = {path.name for path in (root / name).iterdir()}
        assert not {"checkpoints", "merged"} & left
        assert not list((root / name / "exports").iterdir())
        assert {"adapter", "recipe.yaml", "events.jsonl", "evaluation"} <= left
    assert (root / "broken" / "checkpoints" / "step-10" / "weights.bin").is_file()


def test_prune_keeps_what_another_run_starts_from(root):
    starts_from(Run(root / "three"), root / "one" / "merged")
    code, out = call("prune", "one", "--yes")
    assert code == 0
    assert "one: merged stays: three starts from it" in out
    assert (root / "one" / "merged" / "weights.bin").is_file()
    assert not (root / "one" / "checkpoints").exists()


def test_prune_keeps_exports_whose_base_is_gone(root):
    starts_from(Run(root / "one"), root.parent / "models" / "gone")
    _, out = call("prune", "one", "--yes")
    assert "one: its exports stay" in out
    assert (root / "one" / "exports" / "gguf-q8_0").is_dir()


def test_prune_follows_no_link_out_of_the_run(root, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    shutil.rmtree(root / "one" / "exports" / "gguf-q8_0")
    (root / "one" / "exports" / "gguf-q8_0").symlink_to(elsewhere)
    shutil.rmtree(root / "one" / "checkpoints" / "step-10")
    (root / "one" / "checkpoints" / "step-10").symlink_to(elsewhere)
    assert call("prune", "one", "--yes")[0] == 0
    assert (elsewhere / "precious").read_text() == "x"


def test_unfinished_run_is_not_pruned_by_name(root):
    code, out = call("prune", "broken", "--yes")
    assert code == 2
    assert "broken: it is interrupted, and only finished runs are pruned" in out


def test_nothing_is_removed_without_a_yes(root):
    code, out = call("prune")
    assert code == 2
    assert "Pass --yes" in out
    assert call("rm", "one")[0] == 2
    assert (root / "one" / "checkpoints").is_dir()


def test_rm_removes_the_named_runs_alone(root):
    code, out = call("rm", "one", "two", "--yes")
    assert (code, "freed" in out) == (0, True)
    assert sorted(path.name for path in root.iterdir()) == ["broken", "three"]


def test_rm_refuses_a_run_that_another_starts_from_unless_both_go(root):
    starts_from(Run(root / "three"), root / "one" / "merged")
    code, out = call("rm", "one", "--yes")
    assert code == 2
    assert "one: three starts from it" in out
    assert call("rm", "one", "three", "--yes")[0] == 0
    assert sorted(path.name for path in root.iterdir()) == ["broken", "two"]


def test_run_under_way_is_neither_removed_nor_pruned(root):
    run = Run(root / "one")
    with run.lock():
        for verb in ("rm", "prune"):
            code, _ = call(verb, "one", "--yes")
            assert code == 2
        with pytest.raises(RunError):
            removal.remove_parts(run, removal.prunable(Run(root / "two"))[0])
    assert (root / "one" / "checkpoints" / "step-10").is_dir()


def test_link_to_a_run_is_not_removed(root, tmp_path):
    (root / "one").rename(tmp_path / "kept")
    (root / "one").symlink_to(tmp_path / "kept")
    code, out = call("rm", "one", "--yes")
    assert code == 2
    assert "a link to" in out
    assert (tmp_path / "kept" / "recipe.yaml").is_file()


def test_interrupted_removal_leaves_no_half_run_and_the_next_one_finishes_it(root, monkeypatch):
    real = shutil.rmtree

    def killed(path):
        os.unlink(next(Path(path).rglob("weights.bin")))
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        removal.remove_run(Run(root / "one"))
    assert [row["name"] for row in json.loads(call("--json")[1])].count("one") == 0
    monkeypatch.setattr(shutil, "rmtree", real)
    removal.remove_run(Run(root / "two"))
    assert sorted(path.name for path in root.iterdir()) == ["broken", "three"]


def test_file_with_another_name_frees_nothing(root):
    os.link(root / "one" / "checkpoints" / "step-10" / "weights.bin", root / "linked")
    assert removal.freed_bytes(root / "one" / "checkpoints") == 0
