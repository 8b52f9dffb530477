"""A recipe that cannot be used is refused with every problem at once, each with its place and the way out."""

import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from tunesmith.errors import RecipeError
from tunesmith.recipe import load
from tunesmith.recipe.docs import options
from tunesmith.recipe.methods import AutoMethod, FullMethod, LoraMethod
from tunesmith.recipe.reinforcement import NAMES_OF_LOSSES
from tunesmith.recipe.schema import Data, Limits, Recipe

PROBLEMS = [
    ({"method": {"name": "lora", "rank": "x"}}, "method.rank: 'x' is not a whole number"),
    ({"method": {"rank": 0}}, "method.rank: 0 is not a whole number above 0"),
    ({"method": {"rank": True}}, "method.rank: true is not a whole number"),
    ({"method": {"name": "lora", "rnk": 3}}, "method.rnk: unknown key, did you mean method.rank?"),
    (
        {"method": {"name": "full", "rank": 3}},
        "method.rank: has no meaning for method full: drop it or set method.name: lora or dora",
    ),
    ({"method": "lorra"}, "method.name: 'lorra' is not auto, lora, dora, qlora, full or peft, did you mean lora?"),
    ({"method": "registered"}, "method.name: 'registered' is not auto, lora, dora, qlora, full or peft"),
    ({"method": 5}, "method: 5 is not a section: write its options below it, or as method.<option>"),
    (
        {"method": {"rank_pattern": {"mlp": 0}}},
        "method.rank_pattern.mlp: 0 does not belong in a mapping of names to numbers",
    ),
    ({"optim": {"lr": "atuo"}}, "optim.lr: 'atuo' is not a number above 0, or auto, did you mean auto?"),
    ({"optim": {"lr": -1}}, "optim.lr: -1 is not a number above 0, or auto"),
    ({"optim": {"lr": float("nan")}}, "optim.lr: NaN is not a number above 0, or auto"),
    (
        {"optim": {"betas": [0.9]}},
        "optim.betas: [0.9] is not a list of 2 numbers, each a number of at least 0 and below 1, or null",
    ),
    (
        {"optim": {"betas": [0.9, 2]}},
        "optim.betas: 2 is not a list of 2 numbers, each a number of at least 0 and below 1, or null",
    ),
    (
        {"optim": {"schedule": "lin"}},
        "optim.schedule: 'lin' is not linear, cosine or constant, did you mean linear?",
    ),
    ({"precision": "fp8"}, "precision: 'fp8' is not auto, float32, bfloat16 or float16"),
    ({"name": 5}, "name: 5 is not text or null: put it in quotes"),
    ({"seed": -1}, "seed: -1 is not a whole number of at least 0 and below 2^63"),
    ({"seed": 2**63}, f"seed: {2**63} is not a whole number of at least 0 and below 2^63"),
    ({"data": 3}, "data: 3 is not a section: write its options below it, or as data.<option>"),
    ({"data": {"train": [{"weight": 1}]}}, "data.train[0].path: missing: "),
    ({"data": {"train": ["a", {"path": "b", "weigth": 1}]}}, "data.train[1].weigth: unknown key, did you mean "),
    ({"data": {"train": ["a", "a"]}}, "data.train: a is there twice: give it once with a weight"),
    (
        {"data": {"columns": {"a:b": None}}},
        "data.columns.a:b: null does not belong in a mapping of names to names: write {name: value}",
    ),
    ({"data": {"limits": {"depht": 3}}}, "data.limits.depht: unknown key, did you mean data.limits.depth?"),
    (
        {"data": {"held_out": 8}},
        "data.held_out: 8 is not a number of at least 0 and below 1, or auto: it is a share, 0.2 for a fifth",
    ),
    ({"rank": 8}, "rank: unknown key, did you mean method.rank?"),
    ({"every": 8}, "every: unknown key, did you mean evaluation.every or checkpoint.every?"),
    ({"learning_rate": 8}, "learning_rate: unknown key, did you mean optim.lr?"),
    ({"sed": 8}, "sed: unknown key, did you mean seed?"),
    (
        {"reinforce": {"max_tokens": 8}},
        "reinforce.max_tokens: unknown key, did you mean reinforce.max_new_tokens?",
    ),
    ({"train": {"max_tokens": 8}}, "train.max_tokens: unknown key, did you mean data.max_tokens?"),
    (
        {"reinforce": {"loss": "Dr. GRPO"}},
        "reinforce.loss: 'Dr. GRPO' is not clip, cispo or sequence: Dr. GRPO is written reinforce: {loss: clip, "
        "normalize: constant, scale: none} here",
    ),
    (
        {"reinforce": {"loss": "gspo"}},
        "reinforce.loss: 'gspo' is not clip, cispo or sequence: gspo is written reinforce: {loss: sequence, "
        "normalize: answers, scale: group} here",
    ),
    ({"xyzzy": 8}, "xyzzy: unknown key: see `tunesmith recipe` for all"),
    ({"model": "x" * 500, "task": "y" * 500}, "task: 'yyyyyy"),
]


@pytest.mark.parametrize(("data", "message"), PROBLEMS, ids=[message.partition(":")[0] for _, message in PROBLEMS])
def test_problem_names_place_value_and_rule(data, message):
    with pytest.raises(RecipeError) as caught:
        load.validate(data, "recipe.yaml")
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"recipe.yaml: {message}")
    assert len(line) < 200


def test_all_problems_come_at_once():
    data = {"seed": -1, "foo": 1, "method": {"name": "lora", "rank": "x", "alpha": 0}, "optim": {"lr": "x"}}
    with pytest.raises(RecipeError) as caught:
        load.validate(data)
    keys = [line.split(": ")[1] for line in str(caught.value).splitlines()]
    assert sorted(keys) == ["foo", "method.alpha", "method.rank", "optim.lr", "seed"]


def test_every_option_refuses_nonsense_with_its_own_name():
    for key in options():
        if "[]" in key or key in ("data.columns",):
            continue
        with pytest.raises(RecipeError) as caught:
            load.load(None, [f"{key}={{x: {{y: z}}}}"])
        assert str(caught.value).startswith(f"--set: {key}"), key


def test_names_of_losses_are_recipes_and_in_the_guide():
    guide = (Path(__file__).parents[2] / "docs/guide/reinforce.md").read_text("utf-8")
    for name, words in NAMES_OF_LOSSES.items():
        written = words[: words.index("}") + 1]
        assert f"`{written}`" in guide, name
        load.validate(yaml.safe_load(written))


def test_other_tools_names_lead_to_options_that_exist():
    assert set(load.OTHER_NAMES.values()) <= set(options())
    assert not set(load.OTHER_NAMES) & {key.rpartition(".")[2] for key in options()}


def recipe_file(folder: Path, content: str | bytes, name: str = "recipe.yaml") -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_file_over_base_and_settings_over_both(tmp_path):
    path = recipe_file(tmp_path, "seed: 2\noptim: {lr: 1e-4}\nmethod: {rank: 4}\n")
    base = {"model": "m", "seed": 1, "optim": {"lr": 1.0, "clip": 2}}
    recipe = load.load(path, ["method.alpha=8", "optim.lr=1e-3", "optim.lr=2e-3", "data.train=a.jsonl"], base)
    assert (recipe.model, recipe.seed, recipe.optim.lr, recipe.optim.clip) == ("m", 2, 2e-3, 2.0)
    assert recipe.method == LoraMethod(rank=4, alpha=8)
    assert recipe.data.train[0].path == "a.jsonl"
    assert base == {"model": "m", "seed": 1, "optim": {"lr": 1.0, "clip": 2}}


@pytest.mark.parametrize("content", ["", "# nothing\n", "optim:\n  # lr: 1\ndata:\n  limits:\n", "---\n"])
def test_a_file_with_everything_commented_out_is_the_default(tmp_path, content):
    assert load.load(recipe_file(tmp_path, content)) == Recipe()


@pytest.mark.parametrize(
    ("base", "settings", "method"),
    [
        ({}, ["method=full"], FullMethod()),
        ({}, ["method.name=lora"], LoraMethod()),
        ({}, ["method.rank=4"], LoraMethod(rank=4)),
        ({"method": "lora"}, ["method.rank=4"], LoraMethod(rank=4)),
        ({"method": {"name": "lora", "rank": 4}}, ["method=full"], FullMethod()),
        ({"method": "full"}, ["method=auto"], AutoMethod()),
        ({"method": "lora"}, ["method.targets=q_proj"], LoraMethod(targets=("q_proj",))),
        ({"method": "lora"}, ["method.targets=[q_proj, v_proj]"], LoraMethod(targets=("q_proj", "v_proj"))),
        ({}, ["method.rank_pattern={mlp: 4}"], LoraMethod(rank_pattern={"mlp": 4})),
        ({}, ["method.also_train=norm"], LoraMethod(also_train=("norm",))),
    ],
)
def test_method_by_name_or_by_option(base, settings, method):
    assert load.load(None, settings, base).method == method


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("method.rank", "--set method.rank: not of the form key=value, such as method.rank=8."),
        ("=8", "--set =8: not of the form key=value"),
        ("a..b=8", "--set a..b=8: not of the form key=value"),
        ("name=*.x", "--set name=*.x: "),
        ("name=[a", "--set name=[a: "),
        ("method.rnk=8", "--set: method.rnk: unknown key, did you mean method.rank?"),
        ("data.train=[{path: a, weigth: 1}]", "--set: data.train[0].weigth: unknown key"),
        ("seed.x=3", "--set seed.x: seed has no options below it: set seed as a whole."),
    ],
)
def test_setting_that_cannot_be_used_is_named(setting, message):
    with pytest.raises(RecipeError) as caught:
        load.load(None, [setting], {"seed": 1})
    assert str(caught.value).startswith(message)


def test_problems_say_where_each_came_from(tmp_path):
    path = recipe_file(tmp_path, "seed: -1\nmethod: {name: lora, rank: 0}\n")
    with pytest.raises(RecipeError) as caught:
        load.load(path, ["method.alpha=0", "nonsense"])
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("--set nonsense: ")
    assert {line.split(": ")[0] + ": " + line.split(": ")[1] for line in lines[1:]} == {
        f"{path}: seed",
        f"{path}: method.rank",
        "--set: method.alpha",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: 1\nname: caf\xe9\n", ":2: not UTF-8 text: save the recipe as UTF-8."),
        ("[1, 2]", ": [1, 2] is not a recipe: write one `key: value` a line."),
        ("just words", ": 'just words' is not a recipe"),
        ("seed: 1\nseed: 2", ":2: seed: is there twice, first in line 1: keep one"),
    ],
)
def test_file_that_is_no_recipe_is_named(tmp_path, content, message):
    path = recipe_file(tmp_path, content)
    with pytest.raises(RecipeError) as caught:
        load.load(path)
    assert str(caught.value).startswith(path + message)


def test_python_values_are_taken():
    data = {"model": Path("m"), "seed": np.int64(3), "optim": {"lr": np.float32(0.5)}, "data": {"train": (Path("a"),)}}
    recipe = load.validate(data)
    assert (recipe.model, recipe.seed, recipe.optim.lr) == ("m", 3, 0.5)
    with pytest.raises(RecipeError, match="of type object: give text, a number or a list"):
        load.validate({"model": object()})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.json", '{"seed": ' + "9" * 5000 + "}", "is not a whole number"),
        ("r.json", '{"a": ' * 900 + "1" + "}" * 900, "nested deeper than 32"),
    ],
)
def test_a_recipe_that_no_hand_wrote_is_refused_with_words(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError, match=message):
        load.load(str(tmp_path / name))


@pytest.mark.parametrize("template", ["k%d: 1", '"k%d": 1'])
def test_a_flood_of_unknown_keys_is_counted_in_seconds(tmp_path, template):
    keys = [template % number for number in range(20_000)]
    (tmp_path / "r.yaml").write_text("{" + ", ".join(keys) + "}")
    begun = time.monotonic()
    with pytest.raises(RecipeError) as refusal:
        load.load(str(tmp_path / "r.yaml"))
    assert time.monotonic() - begun < 15  # 39 s before; a slow machine reads YAML in some 6
    lines = str(refusal.value).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "and 19,980 more like these"


@pytest.mark.parametrize(
    "data",
    [
        {"method": {"name": "lora", "rank": 10**18}},
        {"method": {"name": "lora", "rank_pattern": {"mlp": 10**18}}},
        {"threads": 10**9},
    ],
)
def test_numbers_that_no_machine_has_room_for_are_refused(data):
    """torch and libgomp end the process for them, without a word about the recipe."""
    with pytest.raises(RecipeError, match=str(10**9)):
        load.validate({"model": "m", **data})


def test_options_that_win_leave_the_other_limits_of_a_run():
    run = Data(limits=Limits(line_bytes=9, depth=8), encoding="cp1252")
    wins = load.load(None, ["data.limits.depth=7"]).data
    read = run.with_options({"limits": wins.limits})
    assert read == Data(limits=Limits(line_bytes=9, depth=7), encoding="cp1252")
