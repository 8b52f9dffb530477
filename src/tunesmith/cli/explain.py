"""tunesmith explain"""

from __future__ import annotations

import difflib
import re
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.streams import console
from tunesmith.errors import InputError

EXPLAIN_PAGE = "troubleshooting.md"
"""The page of docs/guide, which a wheel holds too."""


def explain(
    word: Annotated[str, typer.Argument(help="The word that an error names; without it, all words are listed.")] = "",
) -> None:
    """Print what to do about a symptom or an error: cause, how to see it, the option.

    tunesmith explain out-of-memory
    """
    known = parts()
    screen = console()
    if not word:
        for name, text in known.items():
            line = re.sub(r"[*`]", "", " ".join(text.split())).removeprefix("- ")
            first_sentence = line.partition(". ")[0].partition(": ")[0].rstrip(".")
            screen.print(f"{name:<32} {first_sentence}", soft_wrap=True)
        return
    if word not in known:
        near = difflib.get_close_matches(word.lower().replace(" ", "-"), known, n=1, cutoff=0.5)
        way = f"Did you mean {near[0]}?" if near else "`tunesmith explain` lists all words."
        raise InputError(f"{word}: no such word. {way}")
    if screen.is_terminal:
        from rich.markdown import Markdown

        screen.print(Markdown(known[word]))
    else:
        screen.print(known[word], soft_wrap=True)


def parts() -> dict[str, str]:
    """The text of the page by its words."""
    packed = files("tunesmith").joinpath(EXPLAIN_PAGE)
    from_checkout = Path(__file__).resolve().parents[3] / "docs" / "guide" / EXPLAIN_PAGE
    text = packed.read_text("utf-8") if packed.is_file() else from_checkout.read_text("utf-8")
    pieces = re.split(r"^## (.+)\n", re.sub(r"^# .*\n", "", text, flags=re.MULTILINE), flags=re.MULTILINE)
    return {word: part.strip() for word, part in zip(pieces[1::2], pieces[2::2], strict=True)}
