"""Documentation of every option, from its declaration in schema.py, and a recipe as YAML with comments."""

from __future__ import annotations

import functools
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Union

from pydantic.fields import FieldInfo

from tunesmith.recipe.methods import METHOD_OPTIONS, AutoMethod, OptionGroup, Positive
from tunesmith.recipe.schema import DataFile, OneOf, Recipe
from tunesmith.recipe.yaml_io import dump
from tunesmith.types import TASK_NAMES, JsonObject, Record

_WIDTH = 110


@dataclass(frozen=True, slots=True)
class Option:
    """One option as a person sees it."""

    key: str
    """Dotted; `[]` is any entry of a list."""
    doc: str
    default: Any
    allowed: str
    """Its alternatives: "a number above 0, or auto"."""
    choices: tuple[str, ...]
    """The words among them."""
    required: bool = False
    methods: tuple[str, ...] = ()
    """The methods that have it; none: every run has it."""


def options() -> Mapping[str, Option]:
    """Every option by its dotted key, in the order of declaration."""
    return _options(tuple(METHOD_OPTIONS), tuple(TASK_NAMES))


@functools.cache
def _options(words: tuple[str, ...], tasks: tuple[str, ...]) -> Mapping[str, Option]:
    by_key: dict[str, Option] = {}
    for option in _options_of(Recipe, "", ()):
        before = by_key.get(option.key)
        by_key[option.key] = option if before is None else replace(before, methods=(*before.methods, *option.methods))
    return types.MappingProxyType(by_key)


@functools.cache
def sections() -> Mapping[str, str]:
    """Doc of every group of options by its dotted key, in the order of declaration."""
    return types.MappingProxyType(dict(_sections_of(Recipe, "")))


def document(section: type[OptionGroup]) -> str:
    """The doc of a section as one line."""
    return " ".join((section.__doc__ or "").split())


def _sections_of(section: type[OptionGroup], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in section.model_fields.items():
        inner = _section_in(field.annotation)
        if name == "method":
            yield name, " ".join((field.description or "").split())
        elif inner is not None:
            yield prefix + name, document(inner)
            yield from _sections_of(inner, f"{prefix}{name}.")


def _options_of(section: type[OptionGroup], prefix: str, methods: tuple[str, ...]) -> Iterator[Option]:
    for name, field in section.model_fields.items():
        key = prefix + name
        inner = _section_in(field.annotation)
        if key == "method":
            names = tuple(METHOD_OPTIONS)
            doc = " ".join(f"{name}: {document(settings)}" for name, settings in METHOD_OPTIONS.items())
            yield Option("method.name", doc, AutoMethod().name, _either(names), names)
            for method_name, settings in METHOD_OPTIONS.items():
                yield from _options_of(settings, "method.", (method_name,))
        elif inner is not None:
            yield from _options_of(inner, f"{key}.", methods)
        elif key != "method.name":
            yield _option(key, field, methods)
            if key == "data.train":  # the entries of data.eval are the same
                yield from _options_of(DataFile, f"{key}[].", methods)


def _option(key: str, field: FieldInfo, methods: tuple[str, ...]) -> Option:
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    alternatives = list(_alternatives(field.annotation, field.metadata))
    choices = tuple(words for words, is_word in alternatives if is_word)
    return Option(
        key=key,
        doc=" ".join((field.description or "").split()),
        default=default,
        allowed=_either([words for words, _ in alternatives]),
        choices=choices,
        required=field.is_required(),
        methods=methods,
    )


def _section_in(annotation: object) -> type[OptionGroup] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, OptionGroup) else None


def _alternatives(annotation: Any, metadata: list[Any]) -> Iterator[tuple[str, bool]]:
    """(its kind and bounds in words, whether it is a word to be written as it is) of each member of a union."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        yield from _alternatives(arguments[0], [*metadata, *arguments[1:]])
    elif origin in (Union, types.UnionType):
        for member in arguments:
            yield from _alternatives(member, metadata)
    elif origin is Literal:
        yield from ((str(word), True) for word in arguments)
    elif words := next((allowed.words for allowed in metadata if isinstance(allowed, OneOf)), None):
        yield from ((word, True) for word in words)
    elif origin is tuple and Ellipsis not in arguments:
        number, _ = next(_alternatives(arguments[0], []))
        yield f"a list of {len(arguments)} numbers, each {number}", False
    else:
        names = {
            int: "a whole number",
            float: "a number",
            str: "text",
            type(None): "null",
            bool: "true or false",
            dict: "a mapping of names to " + _IN_MAPPINGS.get(arguments[1:], "numbers"),
            tuple: _LISTS.get(arguments[:1], "a list of texts"),
        }
        yield names[origin or annotation] + _bounds(metadata), False


_LISTS: Mapping[tuple[Any, ...], str] = {(DataFile,): "a list of files", (Positive,): "a list of whole numbers"}
_IN_MAPPINGS: Mapping[tuple[Any, ...], str] = {(str,): "names", (Any,): "values"}


def _bounds(metadata: list[Any]) -> str:
    flat = [bound for item in metadata for bound in (item.metadata if isinstance(item, FieldInfo) else [item])]
    words = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
    bounds = [
        f"{word} {_short(getattr(item, name))}" for item in flat for name, word in words.items() if hasattr(item, name)
    ]
    return f" {' and '.join(bounds)}" if bounds else ""


def _short(number: float) -> str:
    return f"2^{int(number).bit_length() - 1}" if number >= 2**53 else str(number)


def _either(words: typing.Sequence[str]) -> str:
    if len(words) < 2:
        return "".join(words)
    comma = "," if any(" " in word for word in words) else ""
    return f"{', '.join(words[:-1])}{comma} or {words[-1]}"


def as_yaml(recipe: Recipe, comments: bool) -> str:
    """Every option of `recipe`; `load.load` makes the same recipe of it. With `comments`, each with its doc."""
    lines = list(_section_lines(recipe, "", comments))
    if comments:
        lines.insert(
            0, "# Every option of a run. Keep the lines you change; `tunesmith train --recipe FILE` reads this.\n"
        )
    return "\n".join(lines).strip("\n") + "\n"


_IN_SIGHT = ("model", "name", "data.train", "data.eval", "track")


def changed(recipe: Recipe) -> JsonObject:
    """Options by dotted keys that differ from the defaults, without model, name, files and trackers."""
    start: JsonObject = Recipe().model_dump()
    fields = type(recipe.method).model_fields.items()
    start["method"] = {key: field.get_default(call_default_factory=True) for key, field in fields}
    start["method"]["name"] = Recipe().method.name

    def leaves(now: Record, then: Record, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in now.items():
            if prefix + name in sections():
                yield from leaves(value, then[name], f"{prefix}{name}.")
            elif value != then[name] and prefix + name not in _IN_SIGHT:
                yield prefix + name, value

    return dict(leaves(recipe.model_dump(), start, ""))


def flat(tree: Record, prefix: str = "") -> JsonObject:
    """A nested mapping as dotted keys."""
    leaves: JsonObject = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves


def _section_lines(section: OptionGroup, prefix: str, comments: bool) -> Iterator[str]:
    indent = "  " * prefix.count(".")
    after_section = False
    for name in type(section).model_fields:
        key, value = prefix + name, getattr(section, name)
        if comments and after_section and not isinstance(value, OptionGroup):
            yield ""
        after_section = isinstance(value, OptionGroup)
        if isinstance(value, OptionGroup):
            if comments:
                yield ""
                yield from _comment(sections()[key], indent)
            yield f"{indent}{name}:"
            yield from _section_lines(value, f"{key}.", comments)
            if key == "method" and comments:
                yield from _other_methods(value)
        else:
            yield from _option_lines(options()[key], name, value, indent, comments)


def _option_lines(option: Option, name: str, value: object, indent: str, comments: bool) -> Iterator[str]:
    allowed = f"  # {option.allowed}" if comments else ""
    if comments:
        yield from _comment(option.doc, indent)
    if isinstance(value, tuple) and value and isinstance(value[0], OptionGroup):
        yield f"{indent}{name}:{allowed}"
        yield from (f"{indent}  - {dump(entry.model_dump())}" for entry in value)
    else:
        yield f"{indent}{name}: {dump(value)}{allowed}"


def _other_methods(method: Any) -> Iterator[str]:
    """The options that another method would have, as comments: switching is uncommenting."""
    others = [option for option in options().values() if option.methods and method.name not in option.methods]
    for number, option in enumerate(others):
        if number == 0 or others[number - 1].methods != option.methods:
            yield f"  # Of method {', '.join(option.methods)}:"
        yield from _comment(option.doc, "  #   ")
        yield f"  #   {option.key.removeprefix('method.')}: {dump(option.default)}  # {option.allowed}"


def _comment(doc: str, indent: str) -> Iterator[str]:
    yield from (f"{indent}# {line}" for line in textwrap.wrap(doc, _WIDTH, break_on_hyphens=False))
