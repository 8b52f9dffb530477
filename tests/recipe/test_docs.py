"""What is shown of a recipe is complete, current, and reads back as the same recipe."""

import re
import runpy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.recipe import docs, load
from tunesmith.recipe.docs import options, sections
from tunesmith.recipe.schema import Recipe
from tunesmith.recipe.yaml_io import parse

ROOT = Path(__file__).parents[2]
page = runpy.run_path(str(ROOT / "scripts" / "recipe_page.py"))["page"]

UNREAD: set[str] = set()
"""Options that nothing reads yet. It only ever shrinks."""

TEXT = st.text(max_size=20)
RECIPES = st.fixed_dictionaries(
    {
        "model": TEXT,
        "name": st.none() | TEXT,
        "method": st.sampled_from(["auto", "full", "lora", "dora"])
        | st.fixed_dictionaries(
            {
                "rank": st.integers(1, 4096),
                "alpha": st.floats(1e-6, 1e6),
                "targets": st.lists(TEXT, max_size=3),
                "rank_pattern": st.dictionaries(TEXT, st.integers(1, 64), max_size=3),
                "also_train": st.lists(TEXT, max_size=3),
            }
        ),
        "data": st.fixed_dictionaries(
            {
                "train": st.lists(
                    st.fixed_dictionaries({"path": TEXT, "weight": st.floats(1e-9, 100)}),
                    max_size=3,
                    unique_by=lambda file: file["path"],
                ),
                "columns": st.dictionaries(TEXT, TEXT, max_size=3),
                "max_tokens": st.just("auto") | st.integers(1, 10**6),
            }
        ),
        "optim": st.fixed_dictionaries(
            {"lr": st.floats(5e-324, 1e308) | st.just("auto"), "clip": st.none() | st.floats(1e-300, 1e300)}
        ),
        "seed": st.integers(0, 2**63 - 1),
    }
)


@settings(max_examples=60, deadline=None)  # writes a file: how long that takes is the machine's
@given(RECIPES, st.booleans())
def test_yaml_round_trip_is_exact(tmp_path_factory, data, comments):
    recipe = load.validate(data)
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(docs.as_yaml(recipe, comments), encoding="utf-8", newline="")
    back = load.load(str(path))
    assert back == recipe
    assert repr(back) == repr(recipe)


def check_round_trip(as_yaml, recipe: Recipe) -> None:
    assert load.validate(parse(as_yaml(recipe, False), "r.yaml")) == recipe


def as_short_yaml(recipe: Recipe, comments: bool) -> str:
    """Planted bug: numbers as a person would write them."""
    return re.sub(r"(lr: \d\.\d{3})\d*", r"\1", docs.as_yaml(recipe, comments))


def test_the_check_catches_a_rounded_rate():  # planted
    recipe = load.validate({"optim": {"lr": 1.00012345}})
    check_round_trip(docs.as_yaml, recipe)
    with pytest.raises(AssertionError):
        check_round_trip(as_short_yaml, recipe)


def test_shown_is_every_option_in_declared_order():
    peft = docs.as_yaml(load.validate({"method": {"name": "peft", "kind": "IA3"}}), False)
    assert "  kind: IA3\n  settings: {}\n" in peft
    shown = docs.as_yaml(load.validate({"method": "lora"}), False)
    keys, stack = [], []
    for line in shown.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        stack[depth:] = [line.strip().partition(":")[0]]
        keys.append(".".join(stack))
    expected = [
        key for key, option in options().items() if "[]" not in key and (not option.methods or "lora" in option.methods)
    ]
    assert sorted(key for key in keys if key not in sections()) == sorted(expected)
    assert keys[:5] == ["model", "revision", "name", "task", "method"]


def test_default_recipe_shows_docs_and_the_other_methods_options():
    shown = docs.as_yaml(Recipe(), True)
    assert parse(shown, "r.yaml")["method"] == {"name": "auto"}
    assert "  # Peak learning rate. " in shown
    assert "  schedule: linear  # linear, cosine or constant\n" in shown
    assert "  # Of method lora, dora, qlora:\n" in shown
    assert "  #   rank: 16  # a whole number above 0 and of at most 65536\n" in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_the_page_is_current():
    written = (ROOT / "docs" / "reference" / "recipe.md").read_text("utf-8")
    assert written == page(), "write it again: python scripts/recipe_page.py > docs/reference/recipe.md"


def test_every_option_and_section_is_documented():
    assert [key for key, option in options().items() if not option.doc.endswith((".", ")"))] == []
    assert [key for key, doc in sections().items() if not doc] == []


def test_every_option_is_read():
    code = "\n".join(
        path.read_text("utf-8")
        for path in sorted((ROOT / "src" / "tunesmith").rglob("*.py"))
        if path.parent.name != "recipe"
    )
    read = set(re.findall(r"(?<=\w)\.(\w+)", code))
    assert {key for key in options() if key.rpartition(".")[2] not in read} == UNREAD
