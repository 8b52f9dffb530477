"""A run names the libraries that its numbers depend on, and of those that not every run needs the ones it uses."""

from importlib.metadata import version

import pytest

from tunesmith.recipe.load import validate
from tunesmith.training.summary import versions


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        ({}, set()),
        ({"method": "qlora"}, {"bitsandbytes"}),
        ({"optim": {"name": "adamw_8bit"}}, {"bitsandbytes"}),
    ],
)
def test_extras_are_named_where_they_are_used(recipe: dict[str, object], named: set[str]) -> None:
    found = versions(validate(recipe))
    assert found.keys() - versions().keys() == named
    assert all(found[name] == version(name) for name in named)
