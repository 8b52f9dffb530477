"""Files and functions stay small enough to be read at one sitting."""

import ast

from shape.tree import name_of, parsed, source_files

MAX_LINES = 500
"""A concept is a file."""
MAX_FUNCTION = 60
LONGER_FUNCTIONS = {"training_steps": 90}
"""The loop may be longer: it is the method, whole, in one place."""
MAX_PACKAGE = 45_820
"""Why not less: docs/decisions/004-size-of-the-package.md"""


def test_files_and_functions_are_short_and_the_package_stays_small() -> None:
    lines = {name_of(path): path.read_text("utf-8").count("\n") for path in source_files()}
    assert [f"{name}: {num}: split it where its subject splits" for name, num in lines.items() if num > MAX_LINES] == []
    assert sum(lines.values()) <= MAX_PACKAGE
    long = [
        f"{name_of(path)}:{node.lineno} {node.name}: {length}, at most {limit}"
        for path in source_files()
        for node in ast.walk(parsed(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1)
        > (limit := LONGER_FUNCTIONS.get(node.name, MAX_FUNCTION))
    ]
    assert long == []
