"""tunesmith recipe"""

from __future__ import annotations

from typing import Annotated

import typer

from tunesmith.cli.options import Settings


def recipe(
    file: Annotated[str | None, typer.Argument(metavar="FILE", help="A recipe to complete.")] = None,
    settings: Settings = None,
    schema: Annotated[bool, typer.Option("--schema", help="The JSON schema of a recipe instead.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The table of all options, for the docs.")] = False,
) -> None:
    """Print a complete recipe with a comment on every option, ready to be edited.

    tunesmith recipe > recipe.yaml
    """
    from tunesmith.recipe import docs, load

    if schema:
        from tunesmith.cli.streams import json_page

        typer.echo(json_page(docs.schema()))
    elif markdown:
        typer.echo(docs.markdown())
    else:
        typer.echo(docs.as_yaml(load.load(file, settings or []), comments=True), nl=False)
