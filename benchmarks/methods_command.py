"""`python -m benchmarks methods`: its words, and what it writes."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import methods, methods_page
from benchmarks.classify import UnusableError
from benchmarks.table import place


def add_methods(verbs: Any) -> None:
    """Make the command known."""
    parser = verbs.add_parser(
        "methods",
        help="each method on the same rows: what it learns, forgets and costs",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="a folder, a hub id or a .gguf file")
    add("--chat", nargs=2, metavar=("TRAIN", "TEST"), help="files of conversations")
    add("--medical", nargs=2, metavar=("TRAIN", "TEST"), help="files of texts and their classes")
    add("--chat-steps", type=int, default=48, help="updates on conversations")
    add("--medical-steps", type=int, default=64, help="updates on texts")
    add("--rows-per-step", type=int, default=16, help="rows of one update")
    add("--only", nargs="*", default=[], metavar="CASE", help=f"of {'; '.join(methods.CASES)}")
    add("--set", action="append", default=[], metavar="OPTION=VALUE", help="any other option of a recipe")
    add("--minutes", type=float, help="begin no case that would end later; run it again to go on")
    add("--folder", type=Path, required=True, help="of the results, one file a case: what is there is not run again")
    add(
        "--speed-folder",
        type=Path,
        help="of results of the same cases, few steps each, on a machine without other work: has the tokens/s",
    )
    add("--page", type=Path, help="a page with the two markers between which the table goes; the plot lies beside it")
    parser.set_defaults(run=_run)


def _without_parts(words: Sequence[str]) -> list[str]:
    """The words that make all results, of a command that may have made a part of them."""
    kept, skips = [], False
    for word in words:
        skips = word in ("--only", "--minutes") or (skips and not word.startswith("--"))
        kept += [] if skips else [word]
    return kept


def _run(options: argparse.Namespace, words: Sequence[str]) -> int:
    data = {name: tuple(getattr(options, name)) for name in ("chat", "medical") if getattr(options, name)}
    if not data:
        raise UnusableError("Nothing to train on: give --chat TRAIN TEST or --medical TRAIN TEST.")
    if unknown := [case for case in options.only if case not in methods.CASES]:
        raise UnusableError(f"--only: {unknown[0]}: there is no such case. One of {', '.join(methods.CASES)}.")
    settings = methods.Settings(
        model=options.model,
        steps={name: getattr(options, f"{name}_steps") for name in data},
        rows_per_step=options.rows_per_step,
        data=data,
        extra=options.set,
    )
    results = methods.run_all(settings, options.folder, only=options.only, minutes=options.minutes)
    if options.speed_folder:
        results = methods.with_speed_of(results, options.speed_folder)
    command = shlex.join(["python", "-m", "benchmarks", *map(place, _without_parts(words))])
    text = methods_page.table(settings, results, command)
    if options.page:
        plot = options.page.with_name(f"{options.page.stem}-compared.svg")
        methods_page.plot(results, plot)
        shown = f"![What each method learnt and forgot, and its speed and memory]({plot.name})\n"
        methods_page.put_into(options.page, f"{text}\n{shown}" if plot.exists() else text)
    print(text)
    return int(any(result.error for result in results))
