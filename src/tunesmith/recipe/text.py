"""Recipe text to plain values and back: the YAML that people expect, and JSON.

The types are those of YAML 1.2's core schema: `no`, `1:30` and 2024-01-01 are text, 1e-4 is a number. Keys are text.
Nothing else is understood: no tags, no anchors, no aliases.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, ClassVar

import yaml

from tunesmith.errors import RecipeError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_DIGITS = 40
MOST_PROBLEMS = 20

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9][0-9_]{0,39}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]{0,39}(\.[0-9]*)?)([eE][-+]?[0-9]{1,4})?")


def parse(text: str, where: str) -> Any:
    """The value of a YAML or JSON text. Raises RecipeError naming `where`, the line and the rule."""
    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise RecipeError(f"{where}: larger than {MAX_BYTES // 1024} KiB: this is no recipe. Is it a data file?")
    if where.lower().endswith(".json"):
        return _json(text, where)
    if text.lstrip().startswith("{"):
        with suppress(json.JSONDecodeError):  # not JSON: then it may be YAML's flow style
            return _json(text, where)
    return _yaml(text, where)


def first_of(problems: Sequence[str]) -> list[str]:
    """The first twenty problems, and a line that counts the others."""
    more = len(problems) - MOST_PROBLEMS
    return [*problems[:MOST_PROBLEMS], f"and {more:,} more like these"] if more > 0 else list(problems)


def dump(value: Any) -> str:
    """One line of YAML that `parse` reads back as the same value, bit for bit; tuples come back as lists."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=math.inf, sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _yaml(text: str, where: str) -> Any:
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        character = f"the character U+{error.character:04X}"
        raise RecipeError(f"{where}:{line}: {character} cannot stand here: write it as an escape in quotes") from error
    value = None
    try:
        value = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        problem = error.problem or "not YAML"
        context = f"{error.context} " if error.context and problem.startswith("but ") else ""
        loader.problems.append((_line(error), context + problem))
    finally:
        loader.dispose()
    if loader.problems:
        raise RecipeError("\n".join(first_of([f"{where}:{line}: {problem}" for line, problem in loader.problems])))
    return value


def _json(text: str, where: str) -> Any:
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice.extend(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        return dict(pairs)

    def whole_number(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise RecipeError(f"{where}: a number of {len(digits):,} digits: the most is {MAX_DIGITS}")
        return int(digits)

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_int=whole_number)
    except json.JSONDecodeError as error:
        if not where.lower().endswith(".json"):
            raise
        raise RecipeError(f"{where}:{error.lineno}: {error.msg}") from error
    except RecursionError as error:
        raise RecipeError(f"{where}: nested deeper than {MAX_DEPTH}") from error
    if _is_deeper(value, MAX_DEPTH):
        raise RecipeError(f"{where}: nested deeper than {MAX_DEPTH}")
    if twice:
        raise RecipeError("\n".join(first_of([f"{where}: {key}: stands twice: keep one" for key in twice])))
    return value


def _is_deeper(value: Any, depth: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth < 0 or any(_is_deeper(one, depth - 1) for one in inner)


def _line(error: yaml.MarkedYAMLError) -> int:
    mark = error.problem_mark or error.context_mark
    return mark.line + 1 if mark else 1


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[Any] = {}  # type: ignore[misc]
    yaml_constructors: ClassVar[Any] = {}

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0
        self.problems: list[tuple[int, str]] = []

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or event.anchor:
            raise yaml.composer.ComposerError(None, None, "& and * (anchors) are not for recipes", event.start_mark)
        if event.tag is not None:
            raise yaml.composer.ComposerError(None, None, f"{event.tag} (tags) are not for recipes", event.start_mark)
        if self.depth >= MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {MAX_DEPTH}", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_any_mapping(self, node: yaml.Node) -> dict[str, Any]:
        assert isinstance(node, yaml.MappingNode)
        result: dict[str, Any] = {}
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append((line, "a list or mapping cannot be a key"))
            elif key in result:
                self.problems.append((line, f"{key}: stands twice, first in line {first[key]}: keep one"))
            else:
                result[key], first[key] = self.construct_object(value_node, deep=True), line
        return result

    def construct_any_list(self, node: yaml.Node) -> list[Any]:
        assert isinstance(node, yaml.SequenceNode)
        return [self.construct_object(item, deep=True) for item in node.value]


def _number(loader: _Loader, node: yaml.Node) -> int | float:
    digits = node.value.replace("_", "")
    try:
        return int(digits)
    except ValueError:
        number = float(digits)
    # 1e4 is a whole number, 5.0 is not meant as one.
    return int(number) if "." not in digits and number.is_integer() and abs(number) < 2**63 else number


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: ClassVar[Any] = {}  # type: ignore[misc]

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    plain = all(character.isprintable() for character in text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


def _represent_float(dumper: yaml.SafeDumper, number: float) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:float", repr(number))


for _side in (_Loader, _Dumper):
    for _tag, _pattern in (("null", _NULL), ("bool", _BOOL), ("int", _INT), ("float", _FLOAT)):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern.pattern})\Z"), None)
for _tag, _construct in (
    ("null", lambda loader, node: None),
    ("bool", lambda loader, node: node.value.lower() == "true"),
    ("int", _number),
    ("float", _number),
    ("str", lambda loader, node: node.value),
    ("map", _Loader.construct_any_mapping),
    ("seq", _Loader.construct_any_list),
):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _construct)
_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(float, _represent_float)
_Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)
