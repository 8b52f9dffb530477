"""A conversation at the terminal, with one model or with the tuned and the untouched one side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from tunesmith import generation, loading
from tunesmith.cli.output import console, json_line
from tunesmith.cli.text import visible
from tunesmith.errors import InputError
from tunesmith.generation import Sampling
from tunesmith.loading import Speaker
from tunesmith.run import Run, is_run
from tunesmith.types import Part

STYLES = {"before": "default", "after": "green", "": "default"}


@dataclass(frozen=True)
class Voice:
    """One that answers, and the name its answers go by ("" when it is alone)."""

    name: str
    speaker: Speaker
    mode: Callable[[], AbstractContextManager[None]] = nullcontext

    def answer(self, parts: list[Part], how: Sampling) -> Iterator[str]:
        with self.mode():
            yield from generation.stream(self.speaker.model, self.speaker.renderer, parts, how)


def open_speakers(
    target: str, *, root: Path, base: bool, compare: bool, offline: bool, note: Callable[[str], None]
) -> list[Voice]:
    """Who answers, in order; the last one's answers carry the conversation on."""
    voices = _voices(target, root=root, base=base, compare=compare, offline=offline, note=note)
    speaker = voices[-1].speaker
    if speaker.head != "next_token":
        verb = "eval" if speaker.head == "masked_token" else "predict"
        task = speaker.renderer.task_name
        raise InputError(f"{target}: of task {task}, it does not answer in words. Use: tunesmith {verb} {target}")
    return voices


def _voices(
    target: str, *, root: Path, base: bool, compare: bool, offline: bool, note: Callable[[str], None]
) -> list[Voice]:
    if not is_run(target, root):
        if base or compare:
            raise InputError(f"{target}: --base and --compare need a run: a model has no untouched version beside it.")
        note(f"loading {target}")
        return [Voice("", loading.load_model(target, offline=offline))]
    run = Run.open(target, root)
    note(f"loading {run.path}")
    if base:
        return [Voice("", loading.load_base(run, offline=offline))]
    tuned = loading.load_run(run, offline=offline)
    if tuned.note:
        note(tuned.note)
    if not compare:
        return [Voice("", tuned)]
    if tuned.can_untune:
        return [Voice("before", tuned, tuned.untuned), Voice("after", tuned)]
    return [Voice("before", loading.load_base(run, offline=offline)), Voice("after", tuned)]


class Talk:
    """Turns of one conversation; completions of single prompts when the task is no conversation."""

    def __init__(
        self,
        voices: list[Voice],
        how: Sampling,
        *,
        system: str | None = None,
        as_json: bool = False,
    ) -> None:
        self.voices = voices
        self.how = how
        self.as_json = as_json
        self.begin = [Part("system", system, trained=False)] if system else []
        self.parts = list(self.begin)
        self.screen = console(stderr=as_json)

    def ask(self, text: str) -> dict[str, str]:
        """Every voice's answer, shown as it is written."""
        if self.voices[-1].speaker.renderer.task_name != "chat":
            self.parts = []
        self.parts.append(Part("user", text, trained=False))
        answers = {voice.name or "answer": self._speak(voice) for voice in self.voices}
        self.parts.append(Part("assistant", list(answers.values())[-1], trained=False))
        if self.as_json:
            json_line({"prompt": text, **answers})
        return answers

    def _speak(self, voice: Voice) -> str:
        if voice.name:
            self.screen.print(f"{voice.name:>6}: ", end="", style="bright_black")
        pieces = []
        for piece in voice.answer(self.parts, self.how):
            pieces.append(piece)
            if not self.as_json:
                self.screen.print(visible(piece), end="", style=STYLES[voice.name], soft_wrap=True)
                self.screen.file.flush()
        if not self.as_json:
            self.screen.print()
        return generation.as_answer(voice.speaker.renderer, "".join(pieces))

    def hold(self) -> None:
        """Ask what is typed, or what is piped in line by line, until it ends."""
        typed = sys.stdin.isatty()
        if typed:
            self.screen.print("/reset forgets, /exit leaves\n", style="bright_black")
        for text in self._lines(typed):
            if text in ("/exit", "/quit"):
                return
            if text == "/reset":
                self.parts = list(self.begin)
            elif text:
                turns = len(self.parts)
                try:
                    self.ask(text)
                except KeyboardInterrupt:  # Ctrl-C ends an answer, not the conversation
                    del self.parts[turns:]
                    self.screen.print("\n(left unsaid)", style="bright_black")

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
