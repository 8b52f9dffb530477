"""A recipe as text: YAML that reads back as the same recipe, its JSON schema, and a page on every knob."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from tunesmith.recipe.fields import Knob, knobs, sections
from tunesmith.recipe.knobs import Recipe
from tunesmith.recipe.sections import Section
from tunesmith.recipe.text import dump

_WIDTH = 110

_INTRODUCTION = """\
# Recipe

<!-- Written by tunesmith.recipe.show.markdown from src/tunesmith/recipe/knobs.py; a test compares. -->

A recipe says everything about a run. `tunesmith recipe` prints this list as a commented YAML file, and
`tunesmith recipe --schema` as a JSON schema. A knob that is left out has its default.

```
tunesmith train --recipe recipe.yaml
tunesmith train MODEL DATA --set method.rank=8 --set optim.lr=1e-4
```

`--set` takes a dotted key and a YAML value, and wins over the file. What is `auto` is decided before the run starts,
printed with its reason, and written decided into the run's own `recipe.yaml`: that file repeats the run.
An unknown key, a key twice, or a value of the wrong type or out of range ends in an error that names all of them.
Files are YAML, with the types of YAML 1.2 (`no` and `2024-01-01` are text, `1e-4` is a number), or JSON.
"""


def as_yaml(recipe: Recipe, comments: bool) -> str:
    """Every knob of `recipe`; `read.load` makes the same recipe of it. With `comments`, each with its doc."""
    lines = list(_section_lines(recipe, "", comments))
    if comments:
        lines.insert(
            0, "# Every knob of a run. Keep the lines you change; `tunesmith train --recipe FILE` reads this.\n"
        )
    return "\n".join(lines).strip("\n") + "\n"


def schema() -> dict[str, Any]:
    """JSON schema (2020-12) of a recipe file."""
    found = Recipe.model_json_schema()
    text = {"type": "string"}
    files = found["$defs"]["Data"]["properties"]
    for name in ("train", "eval"):  # as knobs.py reads them: one file or several, each a path or a mapping
        entry = {"anyOf": [text, files[name]["items"]]}
        files[name] = {**files[name], "items": entry, "type": ["array", "string", "object"]}
    several = dict.fromkeys(("LoraMethod", "DoraMethod", "QloraMethod"), ("targets", "layers", "also_train"))
    for method, names in {**several, "FullMethod": ("train", "freeze")}.items():
        for name in names:
            found["$defs"][method]["properties"][name]["type"] = ["array", "string"]
    method = found["properties"]["method"]
    method["anyOf"] = [text, *method.pop("oneOf")]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def markdown() -> str:
    """The page docs/recipe.md."""
    tables: dict[str, list[str]] = {"": []}
    tables.update({key: [] for key in sections()})
    for knob in knobs().values():
        section = max((key for key in tables if knob.key.startswith(f"{key}.") or not key), key=len)
        of_method = f"Method {', '.join(knob.methods)}. " if knob.methods else ""
        default = "required" if knob.required else f"`{dump(knob.default)}`"
        cells = (f"`{knob.key}`", default, knob.allowed, _prose(of_method + knob.doc))
        tables[section].append(f"| {' | '.join(cells)} |")
    pages = [_INTRODUCTION]
    for key, rows in tables.items():
        title = f"## {key}\n\n{_prose(sections()[key])}" if key else "## The run"
        pages.append("\n".join([f"{title}\n", "| Key | Default | Allowed | |", "|---|---|---|---|", *rows, ""]))
    return "\n".join(pages)


_IN_SIGHT = ("model", "name", "data.train", "data.eval")


def changed(recipe: Recipe) -> dict[str, Any]:
    """Knobs by their dotted keys that are not as they are by default, without model, name and files."""
    start: dict[str, Any] = Recipe().model_dump()
    fields = type(recipe.method).model_fields.items()
    start["method"] = {key: field.get_default(call_default_factory=True) for key, field in fields}
    start["method"]["name"] = Recipe().method.name

    def leaves(now: Mapping[str, Any], then: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in now.items():
            if prefix + name in sections():
                yield from leaves(value, then[name], f"{prefix}{name}.")
            elif value != then[name] and prefix + name not in _IN_SIGHT:
                yield prefix + name, value

    return dict(leaves(recipe.model_dump(), start, ""))


def _section_lines(section: Section, prefix: str, comments: bool) -> Iterator[str]:
    indent = "  " * prefix.count(".")
    after_section = False
    for name in type(section).model_fields:
        key, value = prefix + name, getattr(section, name)
        if comments and after_section and not isinstance(value, Section):
            yield ""
        after_section = isinstance(value, Section)
        if isinstance(value, Section):
            if comments:
                yield ""
                yield from _comment(sections()[key], indent)
            yield f"{indent}{name}:"
            yield from _section_lines(value, f"{key}.", comments)
            if key == "method" and comments:
                yield from _other_methods(value)
        else:
            yield from _knob_lines(knobs()[key], name, value, indent, comments)


def _knob_lines(knob: Knob, name: str, value: Any, indent: str, comments: bool) -> Iterator[str]:
    allowed = f"  # {knob.allowed}" if comments else ""
    if comments:
        yield from _comment(knob.doc, indent)
    if isinstance(value, tuple) and value and isinstance(value[0], Section):
        yield f"{indent}{name}:{allowed}"
        yield from (f"{indent}  - {dump(entry.model_dump())}" for entry in value)
    else:
        yield f"{indent}{name}: {dump(value)}{allowed}"


def _other_methods(method: Any) -> Iterator[str]:
    """The knobs that another method would have, as comments: switching is uncommenting."""
    others = [knob for knob in knobs().values() if knob.methods and method.name not in knob.methods]
    for number, knob in enumerate(others):
        if number == 0 or others[number - 1].methods != knob.methods:
            yield f"  # Of method {', '.join(knob.methods)}:"
        yield from _comment(knob.doc, "  #   ")
        yield f"  #   {knob.key.removeprefix('method.')}: {dump(knob.default)}  # {knob.allowed}"


def _comment(doc: str, indent: str) -> Iterator[str]:
    yield from (f"{indent}# {line}" for line in textwrap.wrap(doc, _WIDTH, break_on_hyphens=False))


def _prose(doc: str) -> str:
    """A doc inside a Markdown table: what looks like HTML or a column is text."""
    return html.escape(doc, quote=False).replace("|", "\\|").replace("*", "\\*")
