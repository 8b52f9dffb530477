"""What docs name exists: the real parser reads commands and options, Python names resolve, paths are there."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import re
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from shape.tree import ROOT, name_of, tracked_files

PAGES = [path for path in tracked_files() if path.suffix == ".md"]
USER_PAGES = [
    path
    for path in PAGES
    if path.name not in {"CHANGELOG.md", "EXPERIMENTS.md"}
    and not {"decisions", "tests", "benchmarks"} & set(path.parts)
]
INSIDE = [
    path
    for path in PAGES
    if path.name in {"architecture.md", "CONTRIBUTING.md"}
    or ("decisions" in path.parts and path.name != "006-names.md")  # it maps old names to new ones
]
FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
PLACEHOLDERS = re.compile(r"[\[\]…]|\.\.\.")
SECTIONS = ["optim", "data", "train", "evaluation", "checkpoint", "loss", "method", "prefer", "embed", "rank", "reward"]
NO_OPTIONS = {"data.formats", "train.micro_batch_size"}
"""Names that read like options of ours: a module, and an option of another tool."""


def blocks(page: Path, *languages: str) -> Iterator[str]:
    for language, text in FENCE.findall(page.read_text("utf-8")):
        if language in languages:
            yield text


def command_lines(page: Path) -> Iterator[str]:
    """Lines that begin with the command, in fences and in code spans, without comments."""
    fenced = [line for block in blocks(page, "", "bash", "sh", "console") for line in block.splitlines()]
    spans = [span.replace("\\|", "|") for span in CODE_SPAN.findall(FENCE.sub("", page.read_text("utf-8")))]
    for line in (line.strip().removeprefix("$ ") for line in [*fenced, *spans]):
        if re.match(r"tunesmith [a-z]", line) and not line.endswith(" --set"):
            yield re.sub(r"\s#.*", "", line).rstrip("\\").strip()


@pytest.fixture(scope="module")
def program() -> Any:
    from tunesmith.cli.app import app

    return typer.main.get_command(app)


def problem_of(program: Any, line: str) -> str:
    """What the real parser or the real reader of options says against a command line; "" where nothing."""
    words = shlex.split(PLACEHOLDERS.sub("", line).split(" | ")[0].split(" > ")[0].rstrip("&"))[1:]
    command, context = program, program.context_class(program, info_name="tunesmith")
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        names = words.pop(0).split("|")
        unknown = [name for name in names if name not in command.commands]
        if unknown:
            return f"no command {unknown[0]}"
        command = command.commands[names[0]]
        context = command.context_class(command, info_name=names[0], parent=context)
    try:
        values, rest, _ = command.make_parser(context).parse_args(list(words))
    except Exception as error:  # typer has its own copy of click's classes
        return f"{type(error).__name__}: {getattr(error, 'message', error)}"
    takes_many = any(param.nargs == -1 for param in command.params if "Argument" in type(param).__name__)
    if rest and not takes_many and not hasattr(command, "commands"):
        return f"too many words: {rest}"
    return "\n".join(filter(None, (setting_problem(setting) for setting in values.get("settings") or [])))


def setting_problem(setting: str) -> str:
    from tunesmith.errors import RecipeError
    from tunesmith.recipe.docs import options
    from tunesmith.recipe.load import load

    key, _, value = setting.partition("=")
    if value in {"", "false"} or re.fullmatch(r"[A-Z_]+|N|\{.*", value):  # a placeholder: only the name counts
        known = options()
        return "" if any(name == key or name.startswith(f"{key}.") for name in known) else f"no option {key}"
    try:
        load(None, [setting])
    except RecipeError as error:  # what depends on other options is not looked at
        return "" if re.search(r"needs|only|has no meaning for method auto", str(error)) else str(error)
    return ""


@pytest.mark.parametrize("page", USER_PAGES, ids=name_of)
def test_commands_in_docs_are_parsed_by_the_real_parser(page: Path, program: Any) -> None:
    lines = list(command_lines(page))
    assert [f"{line}: {problem}" for line in lines if (problem := problem_of(program, line))] == []


@pytest.mark.parametrize("page", USER_PAGES, ids=name_of)
def test_settings_in_docs_are_options(page: Path) -> None:
    pattern = r"--set ['\"]?([a-z_]+(?:\.[a-z_0-9]+)*(?:=(?:\[[^\]]*\]|[^\s`'\"|,;:)]*))?)"
    settings = [one.rstrip(".") for one in re.findall(pattern, page.read_text("utf-8"))]
    assert [f"{one}: {problem}" for one in settings if (problem := setting_problem(one))] == []


@pytest.mark.parametrize("page", USER_PAGES, ids=name_of)
def test_options_named_in_docs_exist(page: Path) -> None:
    from tunesmith.recipe.docs import options

    spans = "\n".join(CODE_SPAN.findall(page.read_text("utf-8")))
    named = re.findall(rf"(?<![\w./])((?:{'|'.join(SECTIONS)})\.[a-z_]+(?:\.[a-z_]+)*)(?![\w(/.]*[/(])", spans)
    files = (".py", ".json", ".jsonl", ".csv", ".yaml", ".parquet", ".txt", ".md")
    missing = [one for one in named if not one.endswith(files) and one not in {*options(), *NO_OPTIONS}]
    assert [one for one in missing if not any(name.startswith(f"{one}.") for name in options())] == []


@pytest.mark.parametrize("page", INSIDE, ids=name_of)
def test_files_named_in_docs_exist(page: Path) -> None:
    names = re.findall(r"(?<![\w./:{])([a-z_]+/[\w/]+\.py)\b", page.read_text("utf-8"))
    homes = (ROOT, ROOT / "src" / "tunesmith", ROOT / "docs")
    made_up = {"tasks/x.py", "methods/x.py", "cli/x.py", "export/x.py"}
    assert [name for name in names if name not in made_up and not any((home / name).exists() for home in homes)] == []


class Instance:
    """A value of a class."""

    def __init__(self, of: Any) -> None:
        self.of = of


class Names(ast.NodeVisitor):
    """Follows the names of a program as far as annotations of our code say their types."""

    def __init__(self) -> None:
        self.types: dict[str, Any] = {"tunesmith": importlib.import_module("tunesmith")}
        self.problems: list[str] = []

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if (node.module or "").split(".")[0] not in {"tunesmith", "pathlib"}:
            return
        module = importlib.import_module(node.module or "")
        for alias in node.names:
            value = getattr(module, alias.name, None)
            if value is None:
                try:
                    value = importlib.import_module(f"{node.module}.{alias.name}")
                except ImportError:
                    self.problems.append(f"{node.module} has no {alias.name}")
            self.types[alias.asname or alias.name] = value

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.types[target.id] = self.kind(node.value, report=False)

    def visit_For(self, node: ast.For) -> None:
        items = typing.get_args(self.kind(node.iter, report=False))
        if items and isinstance(node.target, ast.Name):
            self.types[node.target.id] = Instance(items[0])
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.kind(node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        function = self.kind(node.func, report=False)
        if callable(function) and str(getattr(function, "__module__", "")).startswith("tunesmith"):
            names = inspect.signature(function).parameters
            takes_any = any(name.kind is inspect.Parameter.VAR_KEYWORD for name in names.values())
            unknown = [word.arg for word in node.keywords if word.arg and word.arg not in names and not takes_any]
            self.problems += [f"{ast.unparse(node.func)} takes no {name}" for name in unknown]
        self.generic_visit(node)

    def kind(self, node: ast.expr, *, report: bool = True) -> Any:
        """A module, class, function, `Instance` or type hint; None where unknown."""
        if isinstance(node, ast.Name):
            return self.types.get(node.id, getattr(builtins, node.id, None))
        if isinstance(node, ast.Call):
            function = self.kind(node.func, report=False)
            return Instance(function) if inspect.isclass(function) else returned(function)
        if isinstance(node, ast.Attribute):
            return self.member(node, self.kind(node.value, report=False), report=report)
        return None

    def member(self, node: ast.Attribute, owner: Any, *, report: bool) -> Any:
        holder = owner.of if isinstance(owner, Instance) else owner
        if not inspect.isclass(holder) and not inspect.ismodule(holder):
            return None
        members = {**getattr(holder, "model_fields", {}), **getattr(holder, "__annotations__", {})}
        is_ours = str(getattr(holder, "__module__", "tunesmith")).startswith("tunesmith")
        if report and is_ours and not hasattr(holder, node.attr) and node.attr not in members:
            self.problems.append(f"{ast.unparse(node)}: {holder.__name__} has no {node.attr}")
        value = inspect.getattr_static(holder, node.attr, None)
        return returned(value.fget) if isinstance(value, property) else getattr(holder, node.attr, None)


def returned(function: Any) -> Any:
    """What a function returns by its annotation: an `Instance` of a class, another hint, or None."""
    try:
        hint = typing.get_type_hints(function).get("return")
    except (TypeError, NameError):  # none, or one that only mypy can read
        return None
    return Instance(hint) if inspect.isclass(hint) else hint


PYTHON = [(page, text) for page in USER_PAGES for text in blocks(page, "python", "py")]
IDS = [f"{name_of(page)}-{num}" for num, (page, _) in enumerate(PYTHON)]


@pytest.mark.parametrize("text", [text for _, text in PYTHON], ids=IDS)
def test_python_in_docs_compiles_and_its_names_resolve(text: str) -> None:
    names = Names()
    names.visit(ast.parse(text.replace("…", "...")))
    assert names.problems == []


def test_names_that_do_not_exist_are_noticed() -> None:
    program = "from tunesmith import Run\nrun = Run.open('last', 'runs')\nrun.folow()\nrun.follow(until=1)\n"
    names = Names()
    names.visit(ast.parse(program))
    assert names.problems == ["run.folow: Run has no folow", "run.follow takes no until"]


def test_every_public_name_that_is_called_has_an_example() -> None:
    """The page of the API and `help()` show it."""
    import tunesmith

    called = {
        "evaluate",
        "load",
        "predict",
        "prepare",
        "resume",
        "train",
        "training_steps",
        "Listener",
        "Recipe",
        "Run",
    }
    assert {name for name in called if "Examples:" not in (getattr(tunesmith, name).__doc__ or "")} == set()
