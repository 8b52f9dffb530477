"""What there is to say about each knob, drawn from its declaration in knobs.py: for messages, docs and suggestions."""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Union

from pydantic.fields import FieldInfo

from tunesmith.recipe.knobs import DataFile, Recipe
from tunesmith.recipe.method_knobs import METHOD_KNOBS, AutoMethod
from tunesmith.recipe.sections import Section


@dataclass(frozen=True, slots=True)
class Knob:
    """One knob as a person sees it."""

    key: str
    """Dotted; `[]` stands for any entry of a list."""
    doc: str
    default: Any
    kinds: tuple[str, ...]
    """Its alternatives without bounds: ("a number", "auto")."""
    allowed: str
    """The same with bounds: "a number above 0, or auto"."""
    choices: tuple[str, ...]
    """The words among them."""
    required: bool = False
    methods: tuple[str, ...] = ()
    """The methods that have it; none: every run has it."""


@functools.cache
def knobs() -> Mapping[str, Knob]:
    """Every knob by its dotted key, in the order of declaration."""
    found: dict[str, Knob] = {}
    for knob in _knobs_of(Recipe, "", ()):
        before = found.get(knob.key)
        found[knob.key] = knob if before is None else replace(before, methods=(*before.methods, *knob.methods))
    words = tuple(METHOD_KNOBS)
    doc = " ".join(f"{name}: {document(section)}" for name, section in METHOD_KNOBS.items())
    name = Knob("method.name", doc, AutoMethod().name, words, _either(words), words)
    at = next(number for number, key in enumerate(found) if key.startswith("method."))
    items = list(found.items())
    return types.MappingProxyType(dict([*items[:at], (name.key, name), *items[at:]]))


@functools.cache
def sections() -> Mapping[str, str]:
    """Doc of every group of knobs by its dotted key, in the order of declaration."""
    return types.MappingProxyType(dict(_sections_of(Recipe, "")))


def document(section: type[Section]) -> str:
    """The doc of a section as one line."""
    return " ".join((section.__doc__ or "").split())


def _sections_of(section: type[Section], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in section.model_fields.items():
        inner = _section_in(field.annotation)
        if name == "method":
            yield name, " ".join((field.description or "").split())
        elif inner is not None:
            yield prefix + name, document(inner)
            yield from _sections_of(inner, f"{prefix}{name}.")


def _knobs_of(section: type[Section], prefix: str, methods: tuple[str, ...]) -> Iterator[Knob]:
    for name, field in section.model_fields.items():
        key = prefix + name
        inner = _section_in(field.annotation)
        if key == "method":
            for method_name, settings in METHOD_KNOBS.items():
                yield from _knobs_of(settings, "method.", (method_name,))
        elif inner is not None:
            yield from _knobs_of(inner, f"{key}.", methods)
        elif key != "method.name":
            yield _knob(key, field, methods)
            if key == "data.train":  # the entries of data.eval are the same
                yield from _knobs_of(DataFile, f"{key}[].", methods)


def _knob(key: str, field: FieldInfo, methods: tuple[str, ...]) -> Knob:
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    alternatives = list(_alternatives(field.annotation, field.metadata))
    choices = tuple(kind for kind, _, is_word in alternatives if is_word)
    return Knob(
        key=key,
        doc=" ".join((field.description or "").split()),
        default=default,
        kinds=tuple(kind for kind, _, _ in alternatives),
        allowed=_either([kind + bounds for kind, bounds, _ in alternatives]),
        choices=choices,
        required=field.is_required(),
        methods=methods,
    )


def _section_in(annotation: Any) -> type[Section] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _alternatives(annotation: Any, metadata: list[Any]) -> Iterator[tuple[str, str, bool]]:
    """(kind, its bounds, whether it is a word to be written as it is) of each member of a union."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        yield from _alternatives(arguments[0], [*metadata, *arguments[1:]])
    elif origin in (Union, types.UnionType):
        for member in arguments:
            yield from _alternatives(member, metadata)
    elif origin is Literal:
        for word in arguments:
            yield str(word), "", True
    elif origin is tuple and Ellipsis not in arguments:
        bounds = next(_alternatives(arguments[0], []))[1]
        yield f"a list of {len(arguments)} numbers", f", each{bounds}" if bounds else "", False
    else:
        names = {
            int: "a whole number",
            float: "a number",
            str: "text",
            type(None): "null",
            bool: "true or false",
            dict: "a mapping of names to " + _IN_MAPPINGS.get(arguments[1:], "numbers"),
            tuple: "a list of files" if DataFile in arguments else "a list of texts",
        }
        yield names[origin or annotation], _bounds(metadata), False


_IN_MAPPINGS: Mapping[tuple[Any, ...], str] = {(str,): "names", (Any,): "values"}


def _bounds(metadata: list[Any]) -> str:
    flat = [bound for item in metadata for bound in (item.metadata if isinstance(item, FieldInfo) else [item])]
    words = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
    found = [
        f"{word} {_short(getattr(item, name))}" for item in flat for name, word in words.items() if hasattr(item, name)
    ]
    return f" {' and '.join(found)}" if found else ""


def _short(number: float) -> str:
    return f"2^{int(number).bit_length() - 1}" if number >= 2**53 else str(number)


def _either(words: typing.Sequence[str]) -> str:
    if len(words) < 2:
        return "".join(words)
    comma = "," if any(" " in word for word in words) else ""
    return f"{', '.join(words[:-1])}{comma} or {words[-1]}"
