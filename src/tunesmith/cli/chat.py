"""tunesmith chat"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.options import BaseAt, Json, Offline, Root, remember_json
from tunesmith.errors import InputError


def chat(
    ctx: typer.Context,
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run, or a model folder, hub id or .gguf file.")],
    base: Annotated[bool, typer.Option("--base", help="Talk to the untouched model of the run.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Have both answer, before and after.")] = False,
    once: Annotated[str | None, typer.Option(metavar="TEXT", help="Ask this one thing and leave.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message to begin with.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token. Higher: more varied.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Choose among the likeliest tokens of this share.")] = 1.0,
    model: BaseAt = None,
    root: Root = Path("runs"),
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Talk to a tuned model. /help lists the commands, /exit or Ctrl-D leaves.

    tunesmith chat last --compare

    tunesmith chat last --once "My screen is flickering."
    """
    remember_json(ctx, as_json)
    from tunesmith.cli.talking import Manner, Talk, open_voices
    from tunesmith.serve.protocol import Refused

    voices = open_voices(target, root=root, base=base, compare=compare, model=model, offline=offline, note=_note)
    talk = Talk(voices, Manner(max_new_tokens, temperature, top_p), system=system, as_json=as_json)
    if once is None:
        talk.hold()
        return
    try:
        talk.ask(once)
    except Refused as refused:
        raise InputError(f"--once: {refused}.") from refused


def _note(text: str) -> None:
    from tunesmith.cli.render import visible
    from tunesmith.cli.streams import console

    console(stderr=True).print(visible(text), style="bright_black")
