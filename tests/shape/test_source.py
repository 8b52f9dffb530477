"""What must not stand in the source, or in any tracked file."""

import ast
import re
from collections.abc import Iterator
from itertools import pairwise

import pytest

from shape.tree import ROOT, name_of, parsed, source_files, tracked_files, walked

# Code that can run code: (what is called or imported, why not)
FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "multiprocessing.reduction",
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "yaml.load", "yaml.unsafe_load", "os.system"}
PRINTERS = {"print", "input", "breakpoint"}
PRINTING_IS_ITS_WORK = ("src/tunesmith/cli/",)

TEXT_SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".txt", ".cfg", ".sh", ""}
# Spelled in pieces, so that this file passes its own test.
NOT_IN_FILES = {
    "a folder of somebody's machine": re.compile(r"(?<![\w.])/" + r"(work|root|home/[a-z]\w*|Users/\w+|opt/wheels)/"),
    "the host of a package registry": re.compile(
        r"(files\.python" + r"hosted|registry\.np" + r"mjs|download\.py" + r"torch)\.org"
    ),
    "a package index option": re.compile(r"--(extra-)?index" + r"-url"),
    "a local build of torch": re.compile(r"torch[=><~ \d.]*\+" + r"(cpu|cu\d+)"),
}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def forbidden(tree: ast.Module, *, may_print: bool) -> Iterator[str]:
    """Every place of a module where something forbidden is imported or called."""
    for node in walked(tree):
        if isinstance(node, ast.Import):
            yield from (
                f"{node.lineno}: import {a.name}" for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES
            )
        elif isinstance(node, ast.ImportFrom) and FORBIDDEN_MODULES & {node.module, (node.module or "").split(".")[0]}:
            yield f"{node.lineno}: from {node.module}"
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in FORBIDDEN_CALLS or (name in PRINTERS and not may_print):
                yield f"{node.lineno}: {name}("
            for keyword in node.keywords:
                if keyword.arg == "trust_remote_code" and not _is(keyword.value, False):
                    yield f"{node.lineno}: trust_remote_code"
                if keyword.arg == "shell" and not _is(keyword.value, False):
                    yield f"{node.lineno}: shell"
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"{node.lineno}: bare except"
        for block in ("body", "orelse", "finalbody"):
            for last, behind in pairwise(found if isinstance(found := getattr(node, block, []), list) else []):
                if isinstance(last, (ast.Raise, ast.Return)):
                    yield f"{behind.lineno}: behind a raise or return, where nothing gets"


def _is(node: ast.expr, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_source_runs_no_foreign_code_and_prints_nothing() -> None:
    files = {name_of(path): parsed(path) for path in source_files()}
    found = {name: [*forbidden(tree, may_print=name.startswith(PRINTING_IS_ITS_WORK))] for name, tree in files.items()}
    assert {name: places for name, places in found.items() if places} == {}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from multiprocessing.reduction import ForkingPickler",
        "from joblib import load",
        "torch.load('x')",
        "yaml.load(text)",
        "eval('1')",
        "f(trust_remote_code=True)",
        "run('ls', shell=True)",
        "try:\n    f()\nexcept:\n    pass",
        "print(1)",
        "if 1:\n    raise ValueError\n    import x",
    ],
)
def test_the_rule_catches(text: str) -> None:
    assert list(forbidden(ast.parse(text), may_print=False))


def test_annotations_are_not_evaluated() -> None:
    """`from __future__ import annotations` in every file that has code: Python 3.10 reads newer annotations then.

    Not in the package's first file: it drops the working folder, where a file __future__.py may lie, before imports.
    """
    for path in source_files():
        if name_of(path) == "src/tunesmith/__init__.py":
            continue
        code = [node for node in parsed(path).body if not isinstance(node, ast.Expr)]
        has = any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in code)
        assert has or len(code) <= 1, name_of(path)


def test_no_file_names_a_machine_or_a_registry() -> None:
    found = [
        f"{name_of(path)}: {what}: {match.group()}"
        for path in tracked_files()
        if path.suffix in TEXT_SUFFIXES and path.name != "LICENSE"
        for what, pattern in NOT_IN_FILES.items()
        for match in pattern.finditer(path.read_text("utf-8", errors="replace"))
    ]
    assert found == []


def test_no_large_file_is_tracked() -> None:
    assert [name_of(path) for path in tracked_files() if path.stat().st_size > 600_000] == []


def test_nothing_is_left_to_do() -> None:
    """Plans live in issues, not in the source."""
    mark = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    assert [name_of(p) for p in source_files() if mark.search(p.read_text("utf-8"))] == []
    assert not mark.search((ROOT / "README.md").read_text("utf-8"))
