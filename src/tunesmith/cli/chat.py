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
    compare: Annotated[bool, typer.Option("--compare", help="Let both answer, before and after.")] = False,
    once: Annotated[str | None, typer.Option(metavar="TEXT", help="Send this one message and leave.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message to start with.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy. Higher: more varied.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from the most likely tokens of this share.")] = 1.0,
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
    from tunesmith.cli.conversation import ChatSettings, Conversation, open_speakers
    from tunesmith.cli.render import visible
    from tunesmith.cli.streams import console
    from tunesmith.serve.protocol import RequestError

    def note(text: str) -> None:
        console(stderr=True).print(visible(text), style="bright_black")

    speakers = open_speakers(target, root=root, base=base, compare=compare, model=model, offline=offline, note=note)
    settings = ChatSettings(max_new_tokens, temperature, top_p)
    conversation = Conversation(speakers, settings, system=system, as_json=as_json)
    if once is None:
        conversation.run()
        return
    try:
        conversation.send(once)
    except RequestError as error:
        raise InputError(f"--once: {error}.") from error
