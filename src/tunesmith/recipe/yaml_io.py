"""YAML with the types of YAML 1.2: `no`, `1:30` and 2024-01-01 are text, 1e-4 a number, keys are there once."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import yaml

from tunesmith.errors import RecipeError
from tunesmith.types import JsonObject

MAX_RECIPE_BYTES = 256 * 1024
MAX_YAML_DEPTH = 32
MOST_RECIPE_PROBLEMS = 20
TYPES = {
    "null": re.compile(r"(?:~|null|Null|NULL|)\Z"),
    "bool": re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"),
    "int": re.compile(r"[-+]?[0-9][0-9_]{0,39}\Z"),
    "float": re.compile(r"[-+]?(?:\.[0-9]+|[0-9][0-9_]{0,39}(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]{1,4})?\Z"),
}


def parse(text: str, where: str) -> Any:
    """The value of a YAML or JSON text. Raises RecipeError with `where`, the line and the rule."""
    if len(text.encode("utf-8", "replace")) > MAX_RECIPE_BYTES:
        raise RecipeError(
            f"{where}: larger than {MAX_RECIPE_BYTES // 1024} KiB: this is not a recipe. Is it a data file?"
        )
    if where.lower().endswith(".json"):  # which YAML reads too, but for tabs between its tokens
        text = text.replace("\t", " ")
    try:
        loader = _Loader(text)
        try:
            value = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        character = f"the character U+{error.character:04X}"
        raise RecipeError(
            f"{where}:{line}: {character} is not allowed here: write it as an escape in quotes"
        ) from error
    except yaml.MarkedYAMLError as error:
        problem = error.problem or "not YAML"
        context = f"{error.context} " if error.context and problem.startswith("but ") else ""
        mark = error.problem_mark or error.context_mark
        raise RecipeError(f"{where}:{mark.line + 1 if mark else 1}: {context}{problem}") from error
    if loader.twice:
        raise RecipeError("\n".join(first_of([f"{where}:{line}: {problem}" for line, problem in loader.twice])))
    return value


def first_of(problems: Sequence[str]) -> list[str]:
    """The first twenty problems, and a line that counts the others."""
    more = len(problems) - MOST_RECIPE_PROBLEMS
    return [*problems[:MOST_RECIPE_PROBLEMS], f"and {more:,} more like these"] if more > 0 else list(problems)


def dump(value: object) -> str:
    """One line of YAML that `parse` reads back as the same value, bit for bit; tuples come back as lists."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=math.inf, sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...")


class _Loader(yaml.SafeLoader):
    """Without tags, anchors and aliases; keys are text. Keys that are there twice are collected in `twice`."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 (PyYAML's own form)

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0
        self.twice: list[tuple[int, str]] = []

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        problem = None
        if isinstance(event, yaml.AliasEvent) or event.anchor:
            problem = "& and * (anchors) are not for recipes"
        elif event.tag is not None:
            problem = f"{event.tag} (tags) are not for recipes"
        elif self.depth >= MAX_YAML_DEPTH:
            problem = f"nested deeper than {MAX_YAML_DEPTH}"
        if problem:
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_unique(self, node: yaml.Node) -> JsonObject:
        assert isinstance(node, yaml.MappingNode)
        result: JsonObject = {}
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.twice.append((line, "a list or mapping cannot be a key"))
            elif key in result:
                self.twice.append((line, f"{key}: is there twice, first in line {first[key]}: keep one"))
            else:
                result[key], first[key] = self.construct_object(value_node, deep=True), line
        return result


def _number(loader: _Loader, node: yaml.Node) -> int | float:
    digits = node.value.replace("_", "")
    number = float(digits)
    if re.fullmatch(TYPES["int"], node.value):
        return int(digits)
    # 1e4 is a whole number, 5.0 is not meant as one.
    return int(number) if "." not in digits and number.is_integer() and abs(number) < 2**63 else number


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 (PyYAML's own form)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    is_plain = all(character.isprintable() for character in text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_plain else '"')


for _side in (_Loader, _Dumper):
    for _name, _pattern in TYPES.items():
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, None)
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_unique)
_Loader.add_constructor("tag:yaml.org,2002:int", _number)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)
_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(float, lambda dumper, number: dumper.represent_scalar("tag:yaml.org,2002:float", repr(number)))
_Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)
