"""The code cells of a notebook, one after another as they are: python notebook.py NOTEBOOK CHANGES, in any environment.

CHANGES is JSON: `skip`, cells that contain one of these texts; `before` and `after`, code around the cell that contains
a text. Lines for the shell are left out. What the cells display is printed.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

Texts = Mapping[str, str]
NOTHING: Texts = MappingProxyType({})


def run(code: str, names: dict[str, Any]) -> None:
    """Like IPython: `await` is allowed, and the value of a last expression is shown."""
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    for part, kind in ((tree, "exec"), (last and ast.Expression(last.value), "eval")):
        if part is not None:
            value = eval(compile(part, "cell", kind, flags), names)
            value = asyncio.run(value) if inspect.iscoroutine(value) else value
            if value is not None:
                print(value)


def main(notebook: Path, skip: Sequence[str] = (), before: Texts = NOTHING, after: Texts = NOTHING) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    found = json.loads(notebook.read_text("utf-8"))["cells"]
    cells = ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]
    for text in (*skip, *before, *after):
        assert any(text in cell for cell in cells), f"no cell contains {text}"
    num = 0
    for cell in cells:
        if any(text in cell for text in skip):
            continue
        for text in (text for text in before if text in cell):
            run(before[text], names)
        run("".join(line for line in cell.splitlines(keepends=True) if not line.startswith("!")), names)
        for text in (text for text in after if text in cell):
            run(after[text], names)
        num += 1
    print(f"{num} of {len(cells)} cells")


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
