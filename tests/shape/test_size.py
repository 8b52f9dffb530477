"""Files and functions stay small enough to be read at one sitting."""

import ast
from pathlib import Path

import pytest

from shape.tree import name_of, parsed, source_files

MAX_LINES = 500
"""A concept is a file."""
MAX_FUNCTION = 60
LONGER_FUNCTIONS = {"training_steps": 90}
"""The loop may be longer: it is the method, whole, in one place."""
MAX_PACKAGE = 46_150
"""Why not less: docs/decisions/004-size-of-the-package.md"""


@pytest.mark.parametrize("path", source_files(), ids=name_of)
def test_file_and_its_functions_are_short(path: Path) -> None:
    lines = path.read_text("utf-8").count("\n")
    assert lines <= MAX_LINES, f"{name_of(path)} has {lines} lines: split it where its subject splits"
    for node in ast.walk(parsed(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            limit = LONGER_FUNCTIONS.get(node.name, MAX_FUNCTION)
            assert length <= limit, f"{name_of(path)}:{node.lineno} {node.name} has {length} lines, at most {limit}"


def test_package_stays_small() -> None:
    total = sum(path.read_text("utf-8").count("\n") for path in source_files())
    assert total <= MAX_PACKAGE
