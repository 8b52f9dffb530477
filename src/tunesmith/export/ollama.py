"""`ollama`: a GGUF and a Modelfile with the stop words and the chat template of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os.path import commonprefix
from pathlib import Path

from tunesmith.data.chat_template import ChatTemplate, TemplateRefusal
from tunesmith.errors import ModelError
from tunesmith.export.gguf import GGUF, check_model, file_name, file_stem, write_model
from tunesmith.export.gguf_tokenizer import begins_with_bos
from tunesmith.export.run_result import RunResult
from tunesmith.export.target import ExportOptions, ExportTarget
from tunesmith.tasks import TASKS
from tunesmith.types import JsonObject

MODELFILE = "Modelfile"
_ROLES = ("system", "user", "assistant")
_MARKS = ("Qx1zK", "Wv2yJ", "Ru3xH", "Ts4wG")
"""Message contents that no template writes by itself."""

Messages = Sequence[Mapping[str, str]]
Parts = Mapping[str, tuple[str, str]]
"""Text before and after the content of each role. "open" begins an answer, "default" a conversation without a
system message."""


def go_template(result: RunResult) -> tuple[str | None, list[str]]:
    """The chat template in Go's template language, and notes. None: it does more than Go's text can.

    Derived from what the chat template writes around messages of each role, then compared on conversations.
    """
    if TASKS[result.renderer.task_name].raw_text or not result.tokenizer.chat_template:
        return "{{ .Prompt }}", []
    template = ChatTemplate(result.tokenizer, result.renderer.date)
    bos = result.tokenizer.bos_token if begins_with_bos(result) else ""

    def render(messages: Messages, *, prompt: bool = True) -> str:
        return template.render(messages, tools=(), prompt=prompt).removeprefix(bos or "")

    notes = []
    try:
        parts = _find_parts(render)
        for messages in _conversations(with_system="system" in parts):
            expected, written = render(messages), _write_out(parts, messages)
            if expected != written:
                raise ValueError(f"{expected[:80]!r} would become {written[:80]!r}")
        if render([_message("user", " Hi ")]) != _write_out(parts, [_message("user", " Hi ")]):
            notes.append("its chat template strips spaces around messages, which Ollama does not")
    except (ValueError, TemplateRefusal) as reason:
        return None, [
            f"its chat template cannot be written for Ollama ({reason}): the Modelfile has no TEMPLATE, and "
            "Ollama guesses one. Check it with `ollama show --modelfile`, or run the GGUF by `llama-server "
            "--jinja`"
        ]
    if "system" not in parts:
        notes.append("its chat template has no system message: Ollama leaves them out")
    if result.renderer.date is not None:
        notes.append(f"its chat template writes the date: in Ollama it stays {result.renderer.date}, as in training")
    return _assemble(parts), notes


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _find_parts(render: Callable[..., str]) -> Parts:
    """Raises ValueError if the template changes contents, or writes a role differently in different places."""
    q, w, r, s = _MARKS
    talk = [_message("user", q), _message("assistant", w), _message("user", r)]
    conversation, closed = render(talk), render(talk, prompt=False)
    if not conversation.startswith(closed):
        closed = conversation  # the template opens no answer, or closes the text in another way
    head, after_q = _split(conversation, q)
    between, after_w = _split(after_q, w)
    around, tail = _split(after_w, r)
    # The text between an answer and the next question closes the one and opens the other.
    _, end = _split(render(talk[:2], prompt=False), w)
    answer_after = commonprefix([end, around])  # noqa: RUF071
    user_before = around[len(answer_after) :]
    if not head.endswith(user_before):
        raise ValueError("it writes the first question differently from the second")
    open_text = conversation[len(closed) :]
    user_after = tail[: len(tail) - len(open_text)] if open_text else commonprefix([between, tail])  # noqa: RUF071
    parts = {
        "user": (user_before, user_after),
        "assistant": (between[len(user_after) :], answer_after),
        "open": (tail[len(user_after) :], ""),
        "default": (head[: len(head) - len(user_before)], ""),
    }
    try:
        with_system = render([_message("system", s), *talk])
    except TemplateRefusal:
        return parts
    before, rest = _split(with_system, s)
    if user_before + q not in rest:
        raise ValueError("a system message changes what follows")
    return {**parts, "system": (before, rest[: rest.index(user_before + q)])}


def _split(text: str, mark: str) -> tuple[str, str]:
    if text.count(mark) != 1:
        raise ValueError(f"it writes a message {text.count(mark)} times")
    before, _, after = text.partition(mark)
    return before, after


def _write_out(parts: Parts, messages: Messages) -> str:
    """The text that Ollama makes of `_assemble(parts)`."""
    text = "" if messages[0]["role"] == "system" else parts["default"][0]
    for message in messages:
        before, after = parts[message["role"]]
        text += before + message["content"] + after
    return text + parts["open"][0]


def _assemble(parts: Parts) -> str:
    default = parts["default"][0]
    go = f"{{{{ if not .System }}}}{_literal(default)}{{{{ end }}}}" if default else ""
    go += "{{ range .Messages }}"
    for i, role in enumerate(role for role in _ROLES if role in parts):
        before, after = map(_literal, parts[role])
        go += f'{{{{ {"else if" if i else "if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
    return go + "{{ end }}{{ end }}" + _literal(parts["open"][0])


def _literal(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def _conversations(*, with_system: bool) -> list[Messages]:
    question, answer = _message("user", "What is 2 + 2?"), _message("assistant", "4")
    talk = [[_message("user", "Hi")], [question, answer, _message("user", "And {{ 3 }}?\n\nSay it.")]]
    led = [[_message("system", "Be brief.\nAlways."), *messages] for messages in talk if with_system]
    return [*talk, *led]


def modelfile(result: RunResult, name: str, *, license: str | None = None) -> tuple[str, list[str]]:
    """The text of a Modelfile for the GGUF `name` next to it, and notes. Raises ModelError for text that a
    Modelfile cannot hold."""
    go, notes = go_template(result)
    quotes = '"""'
    has_quotes = quotes in (go or "")
    problem = "its chat template has three quotes in a row, which end a template" if has_quotes else ""
    stops = [result.tokenizer.decode([token_id]) for token_id in result.renderer.stop_ids]
    if odd := [stop for stop in stops if '"' in stop or not stop.isprintable()]:
        problem = f"its answers end with {odd[0]!r}"
    if problem:
        raise ModelError(
            f"{result.weights.name}: ollama: a Modelfile cannot hold it: {problem}. Export gguf, and run it by "
            "`llama-server --jinja`."
        )
    lines = [f"FROM ./{name}", *([f"TEMPLATE {quotes}{go}{quotes}"] if go is not None else [])]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join([*lines, *([f"LICENSE {license}"] if license else [])]) + "\n", notes


def _check(result: RunResult, options: ExportOptions) -> list[str]:
    notes = check_model(result, options) + modelfile(result, "", license=options.license)[1]
    if TASKS[result.renderer.task_name].has_prompt:
        notes.append("its prompts have a text around each document: write it (data.prompt in recipe.yaml) yourself")
    return notes


def _write(result: RunResult, folder: Path, options: ExportOptions) -> list[str]:
    notes = write_model(result, folder, options)
    text, _ = modelfile(result, file_name(result, options), license=options.license)
    (folder / MODELFILE).write_text(text, encoding="utf-8", newline="")
    return notes


def _card(result: RunResult, folder: Path, options: ExportOptions) -> JsonObject:
    name = file_stem(result)
    use = [("sh", f"ollama create {name} -f {MODELFILE}\nollama run {name}")]
    return {"library": "gguf", "relation": "quantized", "use": use}


OLLAMA = ExportTarget(
    name="ollama",
    doc="A GGUF with a Modelfile: the chat template and stop words of training.",
    check=_check,
    write=_write,
    load=GGUF.load,
    tolerances=GGUF.tolerances,
    card=_card,
    reads=GGUF.reads,
    quants=GGUF.quants,
    check_base=GGUF.check_base,
)
