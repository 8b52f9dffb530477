"""tunesmith runs --where, --sort, rm and prune: what is chosen, what is removed, and what never is."""

import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evaluation.fake_runs import fake_run
from tunesmith.cli.app import app
from tunesmith.cli.runs import select
from tunesmith.errors import InputError, RunError
from tunesmith.runs import prune as removal
from tunesmith.runs.folder import Run
from tunesmith.types import Event

ROWS = [
    {"fields": {"name": "a", "task": "chat", "loss": 1.5, "steps": 10, "optim.lr": 1e-4, "before.loss": 2.0}},
    {"fields": {"name": "b", "task": "chat", "loss": 1.8, "steps": 30, "optim.lr": 1e-3}},
    {"fields": {"name": "c", "task": "classify", "loss": None, "steps": 20, "evaluation.general": True}},
]


def chosen(*where: str, sort: str = "name") -> str:
    return "".join(row["fields"]["name"] for row in select(ROWS, where, sort))


@pytest.mark.parametrize(
    ("where", "names"),
    [
        (["task=chat"], "ab"),
        (["task == chat"], "ab"),
        (["task!=chat"], "c"),
        (["task=c*"], "abc"),
        (["loss<1.7"], "a"),
        (["loss>=1.5", "steps>10"], "b"),
        (["loss!=1.5"], "b"),
        (["optim.lr=0.001"], "b"),
        (["evaluation.general=true"], "c"),
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
        ("foo=1", "`tunesmith show RUN --json` lists metrics"),
        ("task", "not of the form FIELD=VALUE"),
        ("task<chat", "it is text, such as 'chat'"),
        ("loss<low", "it is a number, such as 1.5"),
        ("__import__('os')=1", "not of the form"),
    ],
)
def test_wrong_conditions_are_refused_with_the_fields_there_are(where, message):
    with pytest.raises(InputError) as refused:
        select(ROWS, [where], "name")
    assert message in str(refused.value)
    assert str(refused.value).startswith(f"--where {where}: ")


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
    assert "one/merged stays: three starts from it" in out
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


@pytest.mark.parametrize(
    "words",
    [
        ("--where", "loss>2", "prune", "--yes"),  # the list's options, which these would not see
        ("--runs", "elsewhere", "rm", "one", "--yes"),
        ("prune", "one", "--where", "loss>2", "--yes"),
    ],
)
def test_a_condition_or_a_folder_that_would_not_be_heeded_is_refused(root, words):
    code, out = call(*words)
    assert code == 2
    assert "write it after" in out or "runs are named already" in out
    assert (root / "one" / "checkpoints" / "step-10").is_dir()


def test_rm_removes_the_named_runs_alone(root):
    code, out = call("rm", "one", "two", "--yes")
    assert (code, "freed" in out) == (0, True)
    assert sorted(path.name for path in root.iterdir()) == ["broken", "three"]


def test_rm_refuses_a_run_that_another_starts_from_unless_both_go(root):
    starts_from(Run(root / "three"), root / "one" / "merged")
    code, out = call("rm", "one", "--yes")
    assert code == 2
    assert "one stays: three starts from it" in out
    assert call("rm", "one", "three", "--yes")[0] == 0
    assert sorted(path.name for path in root.iterdir()) == ["broken", "two"]


def test_run_under_way_is_neither_removed_nor_pruned(root, monkeypatch):
    monkeypatch.setattr("tunesmith.runs.folder._LOCK_PATIENCE_S", 0.1)
    run = Run(root / "one")
    (part, *_), _ = removal.removable([run], whole=False)
    with run.lock():
        for verb in ("rm", "prune"):
            code, _ = call(verb, "one", "--yes")
            assert code == 2
        with pytest.raises(RunError):
            removal.remove_removable(part)
    assert (root / "one" / "checkpoints" / "step-10").is_dir()


def test_link_to_a_run_is_not_removed(root, tmp_path):
    (root / "one").rename(tmp_path / "kept")
    (root / "one").symlink_to(tmp_path / "kept")
    code, out = call("rm", "one", "--yes")
    assert code == 2
    assert "a link to" in out
    assert (tmp_path / "kept" / "recipe.yaml").is_file()


def test_an_interrupted_removal_leaves_no_half_run_and_the_next_ends_it(root, monkeypatch):
    real, parts = shutil.rmtree, removal.removable([Run(root / name) for name in ("one", "two")], whole=True)[0]

    def killed(path):
        os.unlink(next(Path(path).rglob("weights.bin")))
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        removal.remove_removable(parts[0])
    assert [row["name"] for row in json.loads(call("--json")[1])].count("one") == 0
    monkeypatch.setattr(shutil, "rmtree", real)
    removal.remove_removable(parts[1])
    assert sorted(path.name for path in root.iterdir()) == ["broken", "three"]


def test_file_with_another_name_frees_nothing(root):
    os.link(root / "one" / "checkpoints" / "step-10" / "weights.bin", root / "linked")
    assert removal.freed_bytes(root / "one" / "checkpoints") == 0


def measured(path: Path, right: set[int], num: int = 40) -> Path:
    """A run that measured these rows, some of them right."""
    (path / "evaluation").mkdir(parents=True)
    (path / "run.json").write_text('{"format": 1}')
    rows = [
        {"source": f"a.jsonl:{i}", "hash": f"{i:016x}", "text": f"row {i}", "loss": 0.5, "count": 1.0, "label": "fruit",
         "predicted": "fruit" if i in right else "none", "probability": 0.9}
        for i in range(num)
    ]  # fmt: skip
    (path / "evaluation" / "after.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def compared(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["compare", *map(str, words)])
    return result.exit_code, result.output


def test_few_rows_of_many_runs_are_said_to_be_few(tmp_path, monkeypatch):
    monkeypatch.setattr("tunesmith.evaluation.compare.FEW_ROWS", 41)
    assert "\n40 rows are few: " in compared(*(measured(tmp_path / name, {1}) for name in "abc"))[1]


def test_many_runs_are_one_table_against_the_first(tmp_path):
    paths = [measured(tmp_path / name, set(range(num))) for name, num in (("a", 20), ("b", 21), ("c", 40))]
    code, out = compared(*paths)
    lines = [line.split("\t") for line in out.splitlines()]
    assert (code, lines[0]) == (0, [f"40 rows in common; differences from {paths[0]} with 95 % intervals"])
    at = lines[1].index("accuracy")
    assert [line[0] for line in lines[2:]] == [str(path) for path in paths]
    assert lines[2][at] == "50.0 %"
    assert lines[3][at].startswith("52.5 % +2.5 (")
    assert lines[3][at].endswith(" points, may be chance")
    assert lines[4][at].startswith("100.0 % +50.0 (")
    assert lines[4][at].endswith(" points, better")


def test_many_runs_compare_on_the_rows_that_all_have(tmp_path):
    paths = [measured(tmp_path / name, set(range(30)), num) for name, num in (("a", 40), ("b", 38), ("c", 35))]
    found = json.loads(compared(*paths, "--json")[1])
    assert (found["rows"], [run["name"] for run in found["runs"]]) == (35, [str(path) for path in paths[1:]])
    assert found["runs"][0]["measures"]["accuracy"]["b_minus_a"]["value"] == 0


def test_differences_of_many_runs_are_those_of_each_pair(tmp_path):
    paths = [measured(tmp_path / name, right) for name, right in (("a", {1, 2}), ("b", {2, 3, 4}), ("c", {5}))]
    many = json.loads(compared(*paths, "--json")[1])
    for path, run in zip(paths[1:], many["runs"], strict=True):
        pair = json.loads(compared(paths[0], path, "--json")[1])
        assert run["measures"] == pair["measures"]


def test_page_of_a_comparison_has_the_table_and_a_picture_of_each_metric(root, tmp_path):
    page = tmp_path / "compared.html"
    code, out = compared(root / "two", root / "two", root / "two", "--out", page)
    assert code == 0, out
    text = page.read_text()
    assert text.count("<svg") >= 3
    assert "Differences from A" in text
    assert "src=" not in text


def test_compare_needs_two_runs_and_rows_in_common(tmp_path):
    a, b, c = (measured(tmp_path / name, set(), num) for name, num in (("a", 1), ("b", 2), ("c", 0)))
    assert compared(a)[0] == 2
    code, out = compared(a, b, c)
    assert code == 2
    assert "no row that is in all of them" in out.replace("\n", " ")
