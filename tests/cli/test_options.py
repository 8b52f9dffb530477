import json
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from tunesmith.cli.app import app
from tunesmith.cli.doctor import EXTRAS, findings
from tunesmith.cli.options import to_overrides
from tunesmith.errors import InputError
from tunesmith.graders import children
from tunesmith.graders.schema import UnitTests
from tunesmith.recipe import load
from tunesmith.recipe.schema import Recipe
from tunesmith.runs.folder import is_run


def test_words_of_the_command_line_become_recipe_keys() -> None:
    words = to_overrides(
        {
            "model": 'quo"te: [#👍]',
            "data.train": [{"path": "a b.jsonl", "weight": 2.0}],
            "data.eval": [],
            "task": None,
            "method.name": "lora",
        }
    )
    recipe = load.load(None, [*words, "method.rank=8", "optim.lr=1e-4"])
    assert recipe.model == 'quo"te: [#👍]'
    assert [(file.path, file.weight) for file in recipe.data.train] == [("a b.jsonl", 2.0)]
    assert recipe.data.eval == ()
    assert recipe.method.model_dump()["rank"] == 8
    assert recipe.optim.lr == 1e-4


def test_a_run_and_a_model_are_told_apart(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "support-3f2a"
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    model = tmp_path / "support"
    model.mkdir()
    root = tmp_path / "runs"
    assert is_run("support-3f2a", root)
    assert is_run("supp", root)
    assert is_run("last", root)
    assert is_run(str(run), root)
    assert not is_run(str(model), root)
    assert not is_run("HuggingFaceTB/SmolLM2-135M-Instruct", root)
    assert not is_run("gpt2", root)


VERBS = [verb for verb in get_command(app).commands if verb not in ("keys", "jobs")]  # type: ignore[attr-defined]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    result = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    assert f"tunesmith {verb}" in result.output.split("Usage:")[1].split("\n", 2)[2]


def test_help_names_every_verb_and_the_exit_codes() -> None:
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120"})
    assert all(verb in result.output for verb in VERBS)
    assert "0 done, 1 failed, 2 bad input, 3 stopped and resumable" in result.output


def test_recipe_is_printed_ready_to_edit(tmp_path: Path) -> None:
    printed = CliRunner().invoke(app, ["recipe", "--set", "method.rank=8"]).output
    (tmp_path / "recipe.yaml").write_text(printed)
    assert load.load(str(tmp_path / "recipe.yaml")) == load.load(None, ["method.rank=8"])
    assert "# " in printed


@pytest.mark.parametrize("words", [[], ["some/model"]])
def test_nothing_to_train_on_is_bad_input(words: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", *words, "--runs", str(tmp_path / "runs")])
    assert result.exit_code == 2
    assert "nothing was given" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_all_wrong_settings_at_once(tmp_path: Path) -> None:
    words = ["train", "m", "d.jsonl", "--task", "talk", "--set", "method.rnk=8", "--set", "optim.lr=-1"]
    result = CliRunner().invoke(app, [*words, "--runs", str(tmp_path)])
    assert result.exit_code == 2
    for key in ("task", "method.rnk", "optim.lr"):
        assert key in result.stderr
    assert "method.rank" in result.stderr


def refused(*words: str) -> str:
    result = CliRunner().invoke(app, [*words], env={"COLUMNS": "200"})
    assert result.exit_code == 2, result.output
    return result.output


def recipe_of(*words: str) -> Recipe:
    """What `tunesmith train` makes of a command line."""
    seen: list[Recipe] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tunesmith.cli.options.refuse_unreadable", lambda files, how: None)
        patch.setattr("tunesmith.training.job.train_run", lambda recipe, **how: seen.append(recipe))
        result = CliRunner().invoke(app, ["train", "m", "rows.jsonl", *words])
    assert result.exit_code == 0, result.output
    return seen[0]


def test_the_options_that_other_tools_have_set_keys_of_the_recipe() -> None:
    recipe = recipe_of("--lr", "1e-4", "--epochs", "0.5", "--batch-size", "8", "--rank", "4")
    assert (recipe.optim.lr, recipe.train.epochs, recipe.train.rows_per_step) == (1e-4, 0.5, 8)
    assert recipe.method.model_dump()["rank"] == 4
    assert recipe.method.name == "lora"


def test_fast_measures_the_loss_alone_and_a_setting_counts_more() -> None:
    evaluation = recipe_of("--fast").evaluation
    assert (evaluation.samples, evaluation.general, evaluation.surprising) == (0, False, 0)
    assert recipe_of("--fast", "--set", "evaluation.samples=4").evaluation.samples == 4


@pytest.mark.parametrize(
    ("option", "setting"),
    [
        ("--lr", "optim.lr=2"),
        ("--rank", "method.rank=3"),
        ("--rank", "method={name: lora}"),
        ("--epochs", "train.epochs=1"),
    ],
)
def test_an_option_and_a_setting_of_the_same_key_are_an_error(option: str, setting: str) -> None:
    text = refused("train", "m", "rows.jsonl", option, "1", "--set", setting)
    assert f"{option} and --set {setting.partition('=')[0]} both set " in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train", "--lr", "abc"), "'--lr': it is abc, and must be a number."),
        (("train", "--batch-size", "1.5"), "'--batch-size': it is 1.5, and must be a whole number."),
        (("eval", "--samples", "-1"), "'--samples': it is -1, and must be greater than or equal to 0."),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_the_rule(words: tuple[str, ...], said: str) -> None:
    result = CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert said in result.stderr


@pytest.mark.parametrize(
    ("unknown", "meant"),
    [
        ("--learning-rate", "--lr (optim.lr)"),
        ("--learning_rate", "--lr (optim.lr)"),
        ("--num-epochs", "--epochs (train.epochs)"),
        ("--num-train-epochs", "--epochs (train.epochs)"),
        ("--per-device-train-batch-size", "--batch-size (train.rows_per_step)"),
        ("--batch-sze", "--batch-size (train.rows_per_step)"),
        ("--lora-r", "--rank (method.rank)"),
        ("--lora-alpha", "--set method.alpha=..."),
        ("--max-steps", "--set train.max_steps=..."),
        ("--seed", "--set seed=..."),
        ("--exprt", "--export"),
    ],
)
def test_an_unknown_option_says_which_one_is_meant(unknown: str, meant: str) -> None:
    assert f"No such option: {unknown}, did you mean {meant}?" in refused("train", "m", "rows.jsonl", unknown, "1")


def test_doctor_says_which_extras_are_here_and_how_to_get_the_others(monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setitem(EXTRAS, "peft", ("no_such_module", "the methods of PEFT"))
    told = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)
    assert set(told["extras"]) == set(EXTRAS)
    assert told["extras"]["peft"] is False
    assert isinstance(told["threads"], int)
    assert told["devices"].startswith("gloo (between processors) is here, NCCL (between CUDA cards) is ")
    lines = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "300"}).output.splitlines()
    assert [line for line in lines if line.startswith("extra peft")] == [
        "extra peft           the methods of PEFT (not installed)"
    ]
    assert sum("pip install" in line for line in lines) == 1  # for one of them


@pytest.mark.parametrize(
    ("offline", "words"),
    [
        (True, "runs without network (graders python and unit_tests)"),
        (False, "runs with network: this system lets no ordinary program close it (graders python and unit_tests)"),
        (None, "does not run: no process"),
    ],
)
def test_doctor_says_whether_code_of_graders_has_a_network(
    monkeypatch: pytest.MonkeyPatch, offline: bool | None, words: str
) -> None:
    class FakeChild:
        def __init__(self, grader: UnitTests) -> None:
            if offline is None:
                raise InputError("no process")
            self.files, self.offline = dict[str, str](), offline

        def end(self) -> None:
            pass

    monkeypatch.setattr(children, "_Child", FakeChild)
    assert findings()["grader code"] == words


def test_doctor_says_why_it_does_not_know_the_free_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(path: str) -> None:
        raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr("shutil.disk_usage", gone)
    told = CliRunner().invoke(app, ["doctor", "--json"]).output
    assert json.loads(told)["disk free"] == "not known: No such file or directory"
    assert told.count("\n") == 1, "every --json is a line"
