"""`ollama`: a GGUF and the Modelfile that has Ollama ask it as it was tuned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from tunesmith.data.template import ChatTemplate, TemplateRefusal
from tunesmith.errors import ModelError
from tunesmith.export import gguf_file
from tunesmith.export.gguf_header import file_stem
from tunesmith.export.gguf_vocabulary import begins_with_bos
from tunesmith.export.go_template import literal, render
from tunesmith.export.options import Export, Options
from tunesmith.export.source import Source
from tunesmith.tasks import TASKS

MODELFILE = "Modelfile"
_ROLES = ("system", "user", "assistant")
_MARKS = ("Qx1zK", "Wv2yJ", "Ru3xH", "Ts4wG")
"""Contents that no template writes by itself."""
_PLAIN = "{{ .Prompt }}"

Messages = Sequence[Mapping[str, str]]


def as_go(source: Source) -> tuple[str, list[str]]:
    """The chat template in Go's terms, and what to say of it.

    A date that the template writes as Ollama's `currentDate` does, 2026-11-27, becomes that; any other stays the day
    that was trained with, which is said.
    """
    if TASKS[source.renderer.task_name].raw_text or not source.tokenizer.chat_template:
        return _PLAIN, []
    day = source.renderer.date
    go, notes = _on_day(source, day)
    if day is None:
        return go, notes
    other = str(date.fromisoformat(day) + timedelta(days=400))  # another day, month, year and day of the week
    elsewhere, _ = _on_day(source, other)
    if go == elsewhere:
        return go, notes
    today = "{{ currentDate }}"
    if (by_function := go.replace(day, today)) == elsewhere.replace(other, today):
        return by_function, [*notes, "its chat template writes the date: Ollama writes that of each day it answers on"]
    return go, [*notes, f"its chat template writes the date in a form that Ollama has not: {day} stays, as trained"]


def _on_day(source: Source, day: str | None) -> tuple[str, list[str]]:
    """The template in Go's terms as it is on one day.

    Found by what the template does: what it writes around a message of each role, before the first one, and to open an
    answer. Then tried on conversations. Raises ModelError where the two do not write the same.
    """
    template = ChatTemplate(source.tokenizer, day)
    bos = source.tokenizer.bos_token if begins_with_bos(source) else ""

    def shown(messages: Messages, *, prompt: bool = True) -> str:
        text = template.render(messages, tools=(), prompt=prompt)
        return text.removeprefix(bos or "")

    try:
        parts = _parts(shown)
    except (ValueError, TemplateRefusal) as reason:
        raise _cannot(source, str(reason)) from reason
    go = _assembled(parts)
    notes = [] if "system" in parts else ["its chat template knows no system message: Ollama leaves them out"]
    for messages in _conversations(with_system="system" in parts):
        expected, found = shown(messages), render(go, _data(messages))
        if expected != found:
            raise _cannot(source, f"{expected[:80]!r} would become {found[:80]!r}")
    if shown([_said("user", " Hi ")]) != render(go, _data([_said("user", " Hi ")])):
        notes.append("its chat template takes blanks off the ends of messages, which Ollama cannot")
    return go, notes


def _cannot(source: Source, why: str) -> ModelError:
    return ModelError(
        f"{source.weights.name}: ollama: its chat template cannot be said in Ollama's terms: {why}. Export gguf, and "
        "run it by `llama-server --jinja`, which runs the template itself."
    )


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _parts(shown: Any) -> dict[str, tuple[str, str]]:
    """What stands before and after the content of each role; "open" begins an answer, "default" a conversation without
    a system message. Raises ValueError where contents do not show as they are."""
    q, w, r, s = _MARKS
    talk = [_said("user", q), _said("assistant", w), _said("user", r)]
    whole, closed = shown(talk), shown(talk, prompt=False)
    if not whole.startswith(closed):
        closed = whole  # a template that opens nothing, or closes the text in another way
    head, after_q = _cut(whole, q)
    between, after_w = _cut(after_q, w)
    around, tail = _cut(after_w, r)
    # What stands between an answer and the next question closes the one and opens the other.
    _, end = _cut(shown(talk[:2], prompt=False), w)
    answer_after = _shared_start(end, around)
    user_before = around[len(answer_after) :]
    if not head.endswith(user_before):
        raise ValueError("the first question is written otherwise than the second")
    open_text = whole[len(closed) :]
    user_after = tail[: len(tail) - len(open_text)] if open_text else _shared_start(between, tail)
    open_text = tail[len(user_after) :]
    answer_before = between[len(user_after) :]
    parts = {
        "user": (user_before, user_after),
        "assistant": (answer_before, answer_after),
        "open": (open_text, ""),
        "default": (head[: len(head) - len(user_before)], ""),
    }
    try:
        given = shown([_said("system", s), *talk])
    except TemplateRefusal:
        return parts
    before, rest = _cut(given, s)
    after = rest[: rest.index(user_before + q)] if user_before + q in rest else None
    if after is None:
        raise ValueError("a system message changes what follows")
    return {**parts, "system": (before, after)}


def _cut(text: str, mark: str) -> tuple[str, str]:
    if text.count(mark) != 1:
        raise ValueError(f"it shows a message {text.count(mark)} times")
    before, _, after = text.partition(mark)
    return before, after


def _shared_start(left: str, right: str) -> str:
    num = 0
    while num < min(len(left), len(right)) and left[num] == right[num]:
        num += 1
    return left[:num]


def _assembled(parts: Mapping[str, tuple[str, str]]) -> str:
    default = parts["default"][0]
    go = f"{{{{ if not .System }}}}{literal(default)}{{{{ end }}}}" if default else ""
    go += "{{ range .Messages }}"
    for i, role in enumerate(role for role in _ROLES if role in parts):
        before, after = map(literal, parts[role])
        go += f'{{{{ {"else if" if i else "if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
    return go + "{{ end }}{{ end }}" + literal(parts["open"][0])


def _conversations(*, with_system: bool) -> list[Messages]:
    talk = [
        [_said("user", "Hi")],
        [_said("user", "What is 2 + 2?"), _said("assistant", "4"), _said("user", "And {{ 3 }}?\n\nSay it.")],
    ]
    if not with_system:
        return list(talk)
    return [*talk, *([_said("system", "Be brief.\nAlways."), *messages] for messages in talk)]


def _data(messages: Messages) -> dict[str, Any]:
    """What Ollama hands to a template."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    named = [{"Role": message["role"], "Content": message["content"]} for message in messages]
    return {"Messages": named, "System": system, "Prompt": messages[-1]["content"]}


def modelfile(source: Source, name: str, *, license: str | None = None) -> str:
    """The text of a Modelfile for the GGUF `name` beside it."""
    go, _ = as_go(source)
    quoted = '"""'
    if quoted in go:
        raise _cannot(source, "it holds three quotes in a row, which end a template in a Modelfile")
    stops = [source.tokenizer.decode([token_id]) for token_id in source.renderer.stop_ids]
    if odd := [stop for stop in stops if '"' in stop or not stop.isprintable()]:
        raise _cannot(source, f"its answers end with {odd[0]!r}, which a line of a Modelfile cannot hold")
    lines = [f"FROM ./{name}", f"TEMPLATE {quoted}{go}{quoted}", *(f'PARAMETER stop "{stop}"' for stop in stops)]
    return "\n".join([*lines, *([f"LICENSE {license}"] if license else [])]) + "\n"


def _check(source: Source, options: Options) -> list[str]:
    if source.kind == "encoder":
        raise ModelError(
            f"{source.weights.name}: ollama: only models that go on with a text get a Modelfile here. Export "
            "gguf: Ollama takes an encoder's file by `FROM` alone."
        )
    notes = gguf_file.check(source, options)
    modelfile(source, "", license=options.license)
    return [*notes, *as_go(source)[1], *_prompt_note(source)]


def _prompt_note(source: Source) -> list[str]:
    if not TASKS[source.renderer.task_name].has_prompt:
        return []
    return ["it was tuned with a prompt around each document: write that prompt (data.prompt in recipe.yaml) yourself"]


def _write(source: Source, folder: Path, options: Options) -> list[str]:
    notes = gguf_file.write(source, folder, options)
    text = modelfile(source, gguf_file.file_name(source, options), license=options.license)
    (folder / MODELFILE).write_text(text, encoding="utf-8", newline="")
    return notes


def _card(source: Source, folder: Path, options: Options) -> dict[str, Any]:
    name = file_stem(source)
    return {
        "library": "gguf",
        "relation": "quantized",
        "use": [("sh", f"ollama create {name} -f {MODELFILE}\nollama run {name}")],
        "servers": "The Modelfile's template was rendered: it writes what the chat template writes.",
    }


OLLAMA = Export(
    name="ollama",
    doc="A GGUF with the Modelfile that Ollama takes: template and stops as they were tuned with.",
    check=_check,
    write=_write,
    num_bytes=gguf_file.num_bytes,
    bounds=gguf_file.bounds,
    loader="gguf",
    rounds_less=gguf_file.rounds_less,
    card=_card,
    reads=("quant", "pre", "merge_into"),
    quants=gguf_file.GGUF.quants,
)
