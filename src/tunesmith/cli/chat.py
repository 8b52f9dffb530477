"""tunesmith chat: a conversation with one model, or with the tuned and the untouched one side by side"""

from __future__ import annotations

import contextlib
import math
import re
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.options import BaseAt, Json, Offline, Root, Target, named, refuse_missing
from tunesmith.cli.streams import console, json_line, refuse_lost
from tunesmith.errors import InputError
from tunesmith.phrases import command, plural, visible
from tunesmith.runs.folder import Run, is_run
from tunesmith.serve.protocol import Delta, EngineOptions, Finished, GenerationRequest, RequestError

if TYPE_CHECKING:
    from tunesmith.serve.registry import LocalEngine


def chat(
    target: Target,
    base: Annotated[bool, typer.Option("--base", help="Talk to the untouched model of the run.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Show the untouched model's answers too.")] = False,
    once: Annotated[str | None, typer.Option(metavar="TEXT", help="Send this one message and leave.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Show this image with the first message; repeatable.")
    ] = None,
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

    tunesmith chat last --image receipt.jpg --once "What is the total?"
    """

    def note(text: str) -> None:
        console(stderr=True).print(visible(text), style="bright_black")

    speakers = open_speakers(target, root=root, base=base, compare=compare, model=model, offline=offline, note=note)
    if not (math.isfinite(temperature) and math.isfinite(top_p)):
        raise InputError(f"--temperature {temperature}, --top-p {top_p}: both are finite numbers.")
    sampled = GenerationRequest("", temperature=temperature, top_p=top_p)
    conversation = Conversation(speakers, sampled, max_new_tokens, system=system, as_json=as_json)
    for file in image or ():
        conversation.show(file)
    if once is None:
        conversation.run()
        return
    try:
        conversation.send(once)
    except RequestError as error:
        raise InputError(f"--once: {error}.") from error


CHAT_HELP = """/image FILE  show an image with the next message
/reset       forget the conversation
/help        these lines
/exit        leave; so do /quit and Ctrl-D"""
_COMMAND = re.compile(r"/\w+")
"""Text that looks like a command; a message may begin so, and goes on."""
STYLES = {"before": "default", "after": "green", "": "default"}


@dataclass(frozen=True)
class ChatSpeaker:
    """A model that answers, and the name shown before its answers ("" if it is the only one)."""

    name: str
    engine: LocalEngine
    mode: Callable[[], AbstractContextManager[None]] = nullcontext


def open_speakers(
    target: str,
    *,
    root: Path,
    base: bool,
    compare: bool,
    model: str | None = None,
    offline: bool,
    note: Callable[[str], None],
) -> list[ChatSpeaker]:
    """The models that answer, in order; the last one's answers continue the conversation."""
    target = named(target, root)
    refuse_missing(target, root, offline=offline)
    from tunesmith.inference.load import load_any
    from tunesmith.serve.registry import LocalEngine

    run = Run.open(target, root) if is_run(target, root) else None
    if run is None and compare:
        raise InputError(f"{target}: --compare needs a run: a model has no other, untouched version.")
    note(f"loading {target if run is None else run.path}")
    is_whole = compare and run is not None and run.model_path.exists()  # its base is for the other answers only
    load = partial(load_any, target, root=root, offline=offline)
    last = load(base=base, model=None if is_whole else model)
    if last.note:
        note(last.note)
    if last.head != "next_token":
        way = command("eval" if last.head == "masked_token" else "predict", target, "FILE")
        raise InputError(f"{target}: a model for the task {last.renderer.task_name} does not write text. Use: {way}")
    engine = LocalEngine(last, note)
    if base or not compare:
        return [ChatSpeaker("", engine)]
    if last.has_base:  # one model, with its adapter and without
        return [ChatSpeaker("before", engine, last.adapter_disabled), ChatSpeaker("after", engine)]
    before = LocalEngine(load(base=True, model=model), note)
    return [ChatSpeaker("before", before), ChatSpeaker("after", engine)]


@dataclass
class Conversation:
    """Turns of one conversation, or single prompts if the task is not a conversation."""

    speakers: list[ChatSpeaker]
    sampled: GenerationRequest
    max_new_tokens: int
    system: str | None = None
    as_json: bool = False
    messages: list[dict[str, str]] = field(default_factory=list)
    images: list[tuple[int, int, str]] = field(default_factory=list)
    """Images of the messages, see `GenerationRequest.images`."""
    pending: list[str] = field(default_factory=list)
    """Images of the next message, in base64."""

    def __post_init__(self) -> None:
        from tunesmith.tasks import TASKS

        self.is_chat = TASKS[self.speakers[-1].engine.model.renderer.task_name].is_chat
        if self.system and not self.is_chat:
            raise InputError("--system: only conversations have one, and this model was tuned for single prompts.")
        self.screen = console(stderr=self.as_json)
        self.reset()

    def reset(self) -> None:
        """Forget what was said and shown."""
        self.images, self.pending = [], []
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def show(self, file: Path) -> None:
        """Let the next message have an image, before its text. Raises InputError for
        a file that cannot be read."""
        if not self.speakers[-1].engine.model.card.sees:
            raise InputError(f"{file}: this model reads text alone. Use one that sees, or leave the image out.")
        try:
            content = file.read_bytes()
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {error.strerror}. Check the path.") from error
        self.pending.append(b64encode(content).decode())

    def send(self, text: str) -> dict[str, str]:
        """Every model's answer, shown as it is written. After a RequestError the conversation is as before."""
        messages = [*(self.messages if self.is_chat else []), {"role": "user", "content": text}]
        images = [*self.images, *((len(messages) - 1, 0, image) for image in self.pending)]
        self.pending = []
        answers = {speaker.name or "answer": self._answer(speaker, messages, images) for speaker in self.speakers}
        self.images = images
        self.messages = [*messages, {"role": "assistant", "content": list(answers.values())[-1]}]
        if self.as_json:
            json_line({"prompt": text, **answers})
        refuse_lost()
        return answers

    def _answer(
        self, speaker: ChatSpeaker, messages: Sequence[Mapping[str, str]], images: Sequence[tuple[int, int, str]]
    ) -> str:
        # No max_tokens: an answer is cut where the context window ends, and that is shown.
        options = EngineOptions(max_new_tokens=self.max_new_tokens, streams=1)
        request = replace(self.sampled, messages=tuple(messages), images=images)
        pieces, finished = [], None
        with closing(speaker.engine.generate(request, options, speaker.mode)) as events:
            if speaker.name:
                self.screen.print(f"{speaker.name:>6}: ", end="", style="bright_black")
            for event in events:
                if isinstance(event, Delta):
                    pieces.append(event.text)
                    if not self.as_json:
                        self.screen.print(visible(event.text), end="", style=STYLES[speaker.name], soft_wrap=True)
                        self.screen.file.flush()
                elif isinstance(event, Finished):
                    finished = event
        if not self.as_json:
            self.screen.print()
        if finished is not None and finished.reason == "length":
            way_out = "the model's context window is full; /reset forgets the conversation"
            if finished.completion_tokens >= self.max_new_tokens:
                way_out = "--max-tokens for more"
            cut = f"(cut after {plural(finished.completion_tokens, 'token')}: {way_out})"
            self.screen.print(cut, style="bright_black")
        return "".join(pieces)

    def run(self) -> None:
        """Answer what is typed, or piped in line by line, until it ends."""
        typed = sys.stdin.isatty()
        if typed:
            self.screen.print("/help lists the commands\n", style="bright_black")
        for text in self._lines(typed):
            if text in ("/exit", "/quit"):
                return
            if text == "/reset":
                self.reset()
            elif text == "/help":
                self.screen.print(CHAT_HELP, style="bright_black")
            elif text.startswith("/image "):
                self._try_to_show(Path(text.removeprefix("/image ").strip()), typed)
            elif typed and _COMMAND.fullmatch(text):
                self.screen.print(f"no command {text}; /help lists them", style="red")
            elif text:
                try:
                    self.send(text)
                except KeyboardInterrupt:  # Ctrl-C ends an answer, not the conversation
                    self.screen.print("\n(answer stopped)", style="bright_black")
                except RequestError as error:
                    if not typed:
                        raise InputError(str(error)) from error
                    way_out = ". /reset forgets the conversation" * (error.code == "context_length_exceeded")
                    self.screen.print(f"{visible(str(error))}{way_out}.", style="red")

    def _try_to_show(self, file: Path, typed: bool) -> None:
        try:
            self.show(file)
        except InputError as error:
            if not typed:
                raise
            self.screen.print(visible(str(error)), style="red")

    def _lines(self, typed: bool) -> Iterator[str]:
        if typed:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 (arrow keys and history)
        while True:
            try:
                yield (input("you ▸ ") if typed else input()).strip()
            except (EOFError, KeyboardInterrupt) as end:
                if typed or isinstance(end, KeyboardInterrupt):
                    self.screen.print()
                return
