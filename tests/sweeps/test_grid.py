"""The file of a sweep becomes recipes, or a list of what is wrong with it."""

from pathlib import Path

import pytest

from sweeps.fake_trials import grid_file
from tunesmith.errors import RecipeError
from tunesmith.recipe.load import load
from tunesmith.sweeps.grid import read_grid


def test_every_combination_is_a_trial_with_the_recipe_of_its_settings(tmp_path: Path) -> None:
    grid = read_grid(grid_file(tmp_path, "grid: {optim.lr: [1e-4, 3e-4], method.rank: [8, 16, 32]}"))
    assert [trial.name for trial in grid.trials] == [f"lr-0{i}" for i in range(1, 7)]
    assert grid.trials[4].options == {"optim.lr": 3e-4, "method.rank": 16}
    base = {"model": "model", "data": {"train": ["chats.jsonl"]}}
    settings = ["optim.lr=3e-4", "method.rank=16", "evaluation.every=10", "evaluation.metric=loss"]
    assert grid.trials[4].recipe == load(None, settings, base)


def test_values_of_any_form(tmp_path: Path) -> None:
    grid = read_grid(grid_file(tmp_path, "grid: {method: [{name: lora, rank: 8}, full]}"))
    assert [trial.recipe.method.name for trial in grid.trials] == ["lora", "full"]


def test_draws_repeat_by_their_seed_and_never_twice(tmp_path: Path) -> None:
    rest = "grid: {{optim.lr: {{low: 1e-5, high: 1e-3, log: true}}, method.rank: {{low: 4, high: 64}}}}\nrandom: {}"
    first, again, other = (
        [trial.options for trial in read_grid(grid_file(tmp_path, rest.format(how))).trials]
        for how in ("{trials: 20, seed: 1}", "{trials: 20, seed: 1}", "{trials: 20, seed: 2}")
    )
    assert first == again != other
    assert all(1e-5 <= one["optim.lr"] <= 1e-3 and one["method.rank"] in range(4, 65) for one in first)
    below = sum(one["optim.lr"] < 1e-4 for one in first)
    assert 4 <= below <= 16  # half of a range on a logarithmic scale
    few = read_grid(grid_file(tmp_path, "grid: {method.rank: [8, 16]}\nrandom: {trials: 9}"))
    assert sorted(trial.options["method.rank"] for trial in few.trials) == [8, 16]


@pytest.mark.parametrize(
    ("rest", "says"),
    [
        ("grid: {optim.lr: [1e-4, -1]}", "lr.yaml:6: grid: optim.lr: -1 is not a number above 0"),
        ("grid:\n  optim.lr: [1e-4]\n  method.rnk: [8]", "lr.yaml:8: grid: method.rnk: unknown key"),
        ("grid: {method.rank: [eight]}", "method.rank: 'eight' is not"),
        ("grid: {optim.lr: 1e-4}", "grid.optim.lr: 0.0001 is not a list of values"),
        ("grid: {optim.lr: []}", "grid.optim.lr: [] is not a list of values"),
        ("grid: {optim.lr: [1e-4, 0.0001]}", "a value is there twice"),
        ("grid: {}", "grid: empty"),
        ("", "grid: missing"),
        ("grid: {data.held_out: [0.1, 0.2]}", "has to be the same for all trials"),
        ("grid: {evaluation: [{every: 5}]}", "has to be the same for all trials"),
        ("grid: {optim.lr: {low: 1e-5, high: 1e-3}}", "add random"),
        ("grid: {optim.lr: {low: 1, high: 0.1}}\nrandom: {trials: 2}", "low must be below high"),
        ("grid: {optim.lr: {low: 0, high: 0.1, log: true}}\nrandom: {trials: 2}", "and above 0"),
        ("grid: {optim.lr: {low: 0.1}}\nrandom: {trials: 2}", "is not {low: NUMBER, high: NUMBER}"),
        ("grid: {optim.lr: [1e-4]}\nrandom: {seed: 2}", "random.trials: missing"),
        ("grid: {optim.lr: [1e-4]}\nasha: {factor: 1}", "asha.factor: 1 is not a whole number from 2 up"),
        ("grid: {optim.lr: [1e-4]}\nasha: {rungs: 1}", "asha.rungs: unknown: it has factor, first"),
        ("grid: {optim.lr: [1e-4]}\nstop: 1", "stop: unknown: a sweep has base, grid, random, asha"),
        (f"grid: {{seed: {list(range(40))}, method.rank: {list(range(1, 41))}}}", "1,600 trials: more than 1,000"),
    ],
)
def test_what_is_wrong_is_named_with_its_place_and_rule(tmp_path: Path, rest: str, says: str) -> None:
    with pytest.raises(RecipeError) as raised:
        read_grid(grid_file(tmp_path, rest))
    assert says in str(raised.value)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("base", "rest", "says"),
    [
        ("base: {data: {train: [a.jsonl]}}\n", "", "base: model: missing"),
        ("base: {model: m}\n", "", "base: data.train: missing"),
        ("base: {model: last, data: {train: [a]}}\n", "", "model: last: is the trial before for every trial but"),
        ("base: {model: m, data: {train: [a]}, optim: {lr: fast}}\n", "", "base: optim.lr: 'fast' is"),
        ("base: {model: m, data: {train: [a]}}\n", "asha: {}\n", "evaluation.every: missing"),
        ("base: {model: m, data: {train: [a]}, evaluation: {metric: beauty}}\n", "", "beauty is not a measure"),
    ],
)
def test_a_base_that_cannot_be_trained_is_refused(tmp_path: Path, base: str, rest: str, says: str) -> None:
    with pytest.raises(RecipeError) as raised:
        read_grid(grid_file(tmp_path, f"{rest}grid: {{seed: [1, 2]}}", base))
    assert says in str(raised.value)


def test_all_trials_are_judged_and_kept_by_one_measure(tmp_path: Path) -> None:
    base = "base: {model: m, data: {train: [a]}%s}\n"
    for given, key in (("", "loss"), (", evaluation: {metric: accuracy}", "accuracy")):
        grid = read_grid(grid_file(tmp_path, "grid: {seed: [1, 2]}", base % given))
        assert (grid.metric, {trial.recipe.evaluation.metric for trial in grid.trials}) == (key, {key})


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        read_grid(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not UTF-8"):
        read_grid(tmp_path / "b.yaml")


def test_graded_answers_are_judged_by_their_reward_and_not_by_its_negative(tmp_path: Path) -> None:
    base = "base: {model: m, data: {train: [a]}%s}\n"
    graded = (", task: reinforce", ", reinforce: {grader: g.py}")
    others = (", task: reward", ", task: rank", ", task: embed", ", task: distil")
    for given, key in [(given, "reward") for given in graded] + [(given, "loss") for given in others]:
        assert read_grid(grid_file(tmp_path, "grid: {seed: [1, 2]}", base % given)).metric == key
    varied = "grid: {reinforce.grader: [g.py, h.py]}"
    assert read_grid(grid_file(tmp_path, varied, base % "")).metric == "reward"
