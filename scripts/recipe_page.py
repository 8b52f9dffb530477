"""Prints the table of all options: `python scripts/recipe_page.py > docs/reference/recipe.md`."""

from __future__ import annotations

import html

from tunesmith.recipe.docs import options, sections
from tunesmith.recipe.yaml_io import dump

_INTRODUCTION = """\
# Recipe

<!-- Written by scripts/recipe_page.py from src/tunesmith/recipe/schema.py; a test compares. -->

A recipe says everything about a run. `tunesmith recipe` prints this list as a commented YAML file. An option that is
left out has its default.

```
tunesmith train --recipe recipe.yaml
tunesmith train MODEL DATA --set method.rank=8 --set optim.lr=1e-4
```

`--set` takes a dotted key and a YAML value, and wins over the file. What is `auto` is decided before the run starts,
printed with its reason, and written decided into the run's own `recipe.yaml`: that file repeats the run.
An unknown key, a key twice, or a value of the wrong type or out of range ends in an error that names all of them.
Files are YAML, with the types of YAML 1.2 (`no` and `2024-01-01` are text, `1e-4` is a number), or JSON.
"""


def page() -> str:
    """The page docs/reference/recipe.md."""
    tables: dict[str, list[str]] = {"": []}
    tables.update({key: [] for key in sections()})
    for option in options().values():
        section = max((key for key in tables if option.key.startswith(f"{key}.") or not key), key=len)
        of_method = f"Method {', '.join(option.methods)}. " if option.methods else ""
        default = "required" if option.required else f"`{dump(option.default)}`"
        cells = (f"`{option.key}`", default, option.allowed, _prose(of_method + option.doc))
        tables[section].append(f"| {' | '.join(cells)} |")
    pages = [_INTRODUCTION]
    for key, rows in tables.items():
        title = f"## {key}\n\n{_prose(sections()[key])}" if key else "## The run"
        pages.append("\n".join([f"{title}\n", "| Key | Default | Allowed | |", "|---|---|---|---|", *rows, ""]))
    return "\n".join(pages)


def _prose(doc: str) -> str:
    """A doc inside a Markdown table: what looks like HTML or a column is text."""
    return html.escape(doc, quote=False).replace("|", "\\|").replace("*", "\\*")


if __name__ == "__main__":
    print(page(), end="")
