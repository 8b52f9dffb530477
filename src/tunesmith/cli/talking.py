"""A conversation at the terminal, with one model or with the tuned and the untouched one side by side."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from tunesmith.cli.render import visible
from tunesmith.cli.signals import forget_interrupt
from tunesmith.cli.streams import console, json_line, refuse_lost
from tunesmith.errors import InputError
from tunesmith.formatting import command, plural
from tunesmith.inference import load as loading
from tunesmith.inference.load import LoadedModel
from tunesmith.runs.folder import Run, is_run
from tunesmith.serve.alone import Alone
from tunesmith.serve.protocol import Ask, Ended, EngineOptions, Piece, Refused
from tunesmith.tasks import TASKS

HELP = """/reset  forget the conversation
/help   these lines
/exit   leave; so do /quit and Ctrl-D
//text  ask something that begins with a slash"""
_COMMAND = re.compile(r"/[A-Za-z]*(\s.*)?", re.DOTALL)

STYLES = {"before": "default", "after": "green", "": "default"}


@dataclass(frozen=True)
class Voice:
    """One that answers, and the name its answers go by ("" when it is alone)."""

    name: str
    alone: Alone
    mode: Callable[[], AbstractContextManager[None]] = nullcontext


def open_voices(
    target: str,
    *,
    root: Path,
    base: bool,
    compare: bool,
    model: str | None = None,
    offline: bool,
    note: Callable[[str], None],
) -> list[Voice]:
    """Who answers, in order; the last one's answers carry the conversation on."""
    run = Run.open(target, root, base=model) if is_run(target, root) else None
    if run is None:
        loading.refuse_needless(model, target)
        loading.refuse_unknown(target, root, offline=offline)
    speakers = _speakers(target, run, base=base, compare=compare, offline=offline, note=note)
    speaker = speakers[-1][1]
    if speaker.head != "next_token":
        verb = "eval" if speaker.head == "masked_token" else "predict"
        task = speaker.renderer.task_name
        way = command(verb, target, "FILE")
        raise InputError(f"{target}: a model for the task {task} does not answer in words. Use: {way}")
    if compare and speaker.has_base:  # one model, with its adapter and past it
        alone = Alone(speaker, note)
        return [Voice("before", alone, speaker.adapter_disabled), Voice("after", alone)]
    return [Voice(name, Alone(speaker, note)) for name, speaker in speakers]


def _speakers(
    target: str, run: Run | None, *, base: bool, compare: bool, offline: bool, note: Callable[[str], None]
) -> list[tuple[str, LoadedModel]]:
    if run is None:
        if base or compare:
            raise InputError(f"{target}: --base and --compare need a run: a model has no untouched version beside it.")
        note(f"loading {target}")
        return [("", loading.load_model(target, offline=offline))]
    note(f"loading {run.path}")
    if base:
        return [("", loading.load_base(run, offline=offline))]
    is_whole = compare and run.model_path.exists()  # its base is loaded for the other voice alone
    tuned = loading.load_run(replace(run, base=None) if is_whole else run, offline=offline)
    if tuned.note:
        note(tuned.note)
    if not compare:
        return [("", tuned)]
    before = [] if tuned.has_base else [("before", loading.load_base(run, offline=offline))]
    return [*before, ("after", tuned)]


@dataclass(frozen=True)
class Manner:
    """How answers are written."""

    max_new_tokens: int
    temperature: float
    top_p: float


class Talk:
    """Turns of one conversation; completions of single prompts when the task is no conversation."""

    def __init__(
        self,
        voices: list[Voice],
        manner: Manner,
        *,
        system: str | None = None,
        as_json: bool = False,
    ) -> None:
        self.voices = voices
        self.manner = manner
        self.as_json = as_json
        self.is_chat = TASKS[voices[-1].alone.voice.renderer.task_name].is_chat
        if system and not self.is_chat:
            raise InputError("--system: only conversations have one, and this one was tuned for single prompts.")
        self.begin = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.begin)
        self.screen = console(stderr=as_json)

    def ask(self, text: str) -> dict[str, str]:
        """Every voice's answer, shown as it is written. Raises Refused, after which the conversation is as before."""
        before = self.messages if self.is_chat else []
        asked = [*before, {"role": "user", "content": text}]
        answers = {voice.name or "answer": self._speak(voice, asked) for voice in self.voices}
        self.messages = [*asked, {"role": "assistant", "content": list(answers.values())[-1]}]
        if self.as_json:
            json_line({"prompt": text, **answers})
        refuse_lost()
        return answers

    def _speak(self, voice: Voice, messages: Sequence[Mapping[str, str]]) -> str:
        # As many tokens as there is room for: an answer is cut at the end of the window, which is then said.
        options = EngineOptions(max_new_tokens=self.manner.max_new_tokens, streams=1)
        temperature, top_p = self.manner.temperature, self.manner.top_p
        ask = Ask("", messages=tuple(messages), temperature=temperature, top_p=top_p)
        pieces, ended = [], None
        with closing(voice.alone.ask(ask, options, voice.mode)) as telling:
            if voice.name:
                self.screen.print(f"{voice.name:>6}: ", end="", style="bright_black")
            for told in telling:
                if isinstance(told, Piece):
                    pieces.append(told.text)
                    self._show(told.text, voice)
                elif isinstance(told, Ended):
                    ended = told
        if not self.as_json:
            self.screen.print()
        if ended is not None and ended.reason == "length":
            self._say_cut(ended.completion_tokens)
        return "".join(pieces)

    def _show(self, piece: str, voice: Voice) -> None:
        if not self.as_json:
            self.screen.print(visible(piece), end="", style=STYLES[voice.name], soft_wrap=True)
            self.screen.file.flush()

    def _say_cut(self, num_tokens: int) -> None:
        if num_tokens >= self.manner.max_new_tokens:
            why = f"cut after {plural(num_tokens, 'token')}: --max-tokens for more"
        else:
            why = f"cut after {plural(num_tokens, 'token')}: the model's window is full; /reset forgets what was said"
        self.screen.print(f"({why})", style="bright_black")

    def hold(self) -> None:
        """Ask what is typed, or what is piped in line by line, until it ends."""
        typed = sys.stdin.isatty()
        if typed:
            self.screen.print("/help lists the commands\n", style="bright_black")
        for text in self._lines(typed):
            if text in ("/exit", "/quit"):
                return
            if text == "/reset":
                self.messages = list(self.begin)
            elif text == "/help":
                self.screen.print(HELP, style="bright_black")
            elif _COMMAND.fullmatch(text):
                self._refuse(f"{text.split()[0]}: no such command. /help lists them.", typed)
            elif text:
                try:
                    self.ask(text.removeprefix("/") if text.startswith("//") else text)
                except KeyboardInterrupt:  # Ctrl-C ends an answer, not the conversation
                    forget_interrupt()
                    self.screen.print("\n(answer stopped)", style="bright_black")
                except Refused as refused:
                    if not typed:
                        raise InputError(str(refused)) from refused
                    way_out = " /reset forgets what was said." if refused.code == "context_length_exceeded" else ""
                    self.screen.print(visible(f"{refused}.{way_out}"), style="red")

    def _refuse(self, words: str, typed: bool) -> None:
        if not typed:
            raise InputError(words)
        self.screen.print(visible(words), style="red")

    def _lines(self, typed: bool) -> Iterator[str]:
        if typed:
            import contextlib

            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 (arrow keys and history come with it)
        while True:
            try:
                yield (input("you ▸ ") if typed else input()).strip()
            except EOFError:
                if typed:
                    self.screen.print()
                return
            except KeyboardInterrupt:
                self.screen.print()
                return
