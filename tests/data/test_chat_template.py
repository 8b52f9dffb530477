"""A chat template writes what transformers makes of it; a hostile one ends soon, with the limit that it met."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from data.other_processes import render_in_a_daemon
from tiny import CHATML, TEMPLATES, chat, template, tiny_tokenizer
from tiny_run import chats, model_folder, tiny_recipe
from tunesmith.cli.app import app
from tunesmith.data import chat_template as template_module
from tunesmith.data.chat_template import ChatTemplate, Request, TemplateRefusal
from tunesmith.data.renderer import Renderer
from tunesmith.environment import for_child
from tunesmith.errors import ModelError
from tunesmith.serve.protocol import EngineOptions
from tunesmith.serve.registry import open_registry, tool_call_format
from tunesmith.tasks import TASKS
from tunesmith.training import trainer as training

MOST_S = 20.0
TIME, MEMORY, DEEP = (
    "did not finish one row, or 64 together, in 0.6 s",
    "took more than 1,024 MiB of memory",
    "more deeply than Python",
)
LOOPS = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(9999) %}"
    "{% endfor %}{% endfor %}{% endfor %}"
)
HOSTILE = {
    "a power of a power": ("{{ 9**(9**9) }}", TIME),
    "a power of variables": ("{% set a = 9 %}{{ a**(a**a) }}", TIME),
    "a power that is negative": ("{{ (-7)**(7**9) % 3 }}", TIME),
    "loops in loops": (LOOPS, TIME),
    "a loop for one role": ("{% if messages[0].role == 'user' %}" + LOOPS + "{% endif %}", TIME),
    "a folded width": ("{{ '%3000000000d' % 1 }}", MEMORY),
    "a width of variables": ("{% set w = 3000000000 %}{{ ('%' ~ w ~ 'd') % 1 }}", MEMORY),
    "a width by the filter": ("{{ '%*d' | format(3000000000, 1) }}", MEMORY),
    "a width by the method": ("{{ '{:3000000000}'.format(1) }}", MEMORY),
    "a product": ("{{ 'a' * 3000000000 }}", MEMORY),
    "a product of variables": ("{% set n = 3000000000 %}{{ 'a' * n }}", MEMORY),
    "doubling": (
        "{% set n = namespace(s='x' * 1000) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
        f"{TIME}|{MEMORY}",
    ),
    "lists that double": (
        "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        f"{TIME}|{MEMORY}",
    ),
    "a namespace that grows": (
        "{% set n = namespace(s='') %}{% for i in range(9999) %}{% set n.s = n.s + 'x' * 1000000 %}{% endfor %}",
        f"{TIME}|{MEMORY}",
    ),
    "a centred word": ("{{ 'a' | center(4000000000) }}", MEMORY),
    "an indent": ("{{ ('a\n' * 100000) | indent(100000) }}", f"{TIME}|{MEMORY}"),
    "brackets in brackets": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", DEEP),
    "lists in lists": ("{{ " + "[" * 3000 + "]" * 3000 + " }}", DEEP),
    "a macro that calls itself": ("{% macro f(x) %}{{ f(x + 1) }}{% endmacro %}{{ f(1) }}", DEEP),
    "links of a long text": ("{{ ('a.com (' * 9000000) | urlize }}", f"{TIME}|{MEMORY}|it wrote"),
    "a text too long": ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "it wrote"),
    "a huge range": ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    "a mistake": ("{% for %}", "refuses a question and an answer"),
    "Python by a class": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "Python by a format": ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe"),
}


VARIANTS = {
    "a power of variables", "a loop for one role", "a width of variables", "a width by the filter",
    "a product of variables", "lists that double", "a namespace that grows", "lists in lists",
}  # fmt: skip
"""Each begins another process, which another attack ends in the same way: for the slow set."""


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "RENDER_S", 0.6)


def renderer(text: str) -> Renderer:
    return Renderer(tiny_tokenizer(text), TASKS["chat"], max_tokens=None, too_long="error", control_tokens="error")


FAMILIES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
TEXTS = st.one_of(
    st.sampled_from(
        ["", " ", "Hi", " at its sides ", "a</think>b", "<think>x</think>\n\ny", "{{ x }}", "é😀\n", "[INST]", "\ud800"]
    ),
    st.text(max_size=12),
)
CHATS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), TEXTS), min_size=1, max_size=5)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(turns=CHATS, prompt=st.booleans(), name=st.sampled_from([None, "Ada"]))
def test_every_template_writes_what_transformers_makes_of_it(
    family: str, turns: list[tuple[str, str]], prompt: bool, name: str | None
) -> None:
    tokenizer = tiny_tokenizer(template(family), eos="</s>")
    messages = [{"role": role, "content": text, **({"name": name} if name else {})} for role, text in turns]
    assert result(lambda: ChatTemplate(tokenizer).render(messages, prompt=prompt)) == result(
        lambda: tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    )


def result(render: Any) -> tuple[str, str]:
    try:
        return "text", render()
    except Exception as error:  # whatever a template raises
        return "refused", str(error).rstrip(".")


def test_many_texts_come_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "OUTPUT_CHARS", 5000)

    def shown(i: int) -> Generator[Request, str, str]:
        try:
            return (yield Request([{"role": "user", "content": str(i) * (2000 if i == 7 else 1)}], False))
        except TemplateRefusal as refusal:
            return str(refusal)

    found = ChatTemplate(tiny_tokenizer("{{ messages[0].content * 3 }}")).render_all([shown(i) for i in range(1000)])
    assert found[7] == "it wrote 6000 characters, more than 5000."
    assert [text for i, text in enumerate(found) if i != 7] == [str(i) * 3 for i in range(1000) if i != 7]


def test_a_template_sees_tools_fields_and_the_day() -> None:
    text = "{{ strftime_now('%d %b') }} {{ tools | length if tools else 0 }} {{ messages[0].name }}"
    text += "{{ messages[0].content }}"
    shown = ChatTemplate(tiny_tokenizer(text), "2026-11-27")
    assert shown.render([{"role": "user", "content": "a"}], prompt=False) == "27 Nov 0 a"
    assert shown.render([{"role": "user", "content": "a", "name": "Ada"}], prompt=False) == "27 Nov 0 Adaa"
    assert shown.render([{"role": "user", "content": "a"}], tools=({"name": "f"},), prompt=False) == "27 Nov 1 a"


@pytest.mark.parametrize(
    "attack", [pytest.param(name, marks=[pytest.mark.slow] if name in VARIANTS else []) for name in HOSTILE]
)
def test_a_hostile_template_ends_soon_with_the_bound_that_it_met(attack: str) -> None:
    body, says = HOSTILE[attack]
    begun = time.monotonic()
    with pytest.raises(ModelError, match=says) as error:
        renderer(body + CHATML)
    assert time.monotonic() - begun < MOST_S
    assert "chat template" in str(error.value)


def test_a_row_that_makes_a_template_slow_ends_it_too() -> None:
    """What a template needs may be one thing for short texts and another for a row."""
    slow = "{% for m in messages %}{% for a in m.content %}{% for b in m.content %}{% for c in m.content %}"
    made = renderer(slow + "{% endfor %}{% endfor %}{% endfor %}{% endfor %}" + CHATML)
    with pytest.raises(ModelError, match=TIME):
        made.encode([chat(("user", "a" * 5000), ("assistant", "b"))])


def test_a_template_does_not_multiply_a_row() -> None:
    repeats = "{% for i in range(90000) %}{{ messages[0].content }}{% endfor %}"
    with pytest.raises(TemplateRefusal, match="it wrote 90000000 characters"):
        ChatTemplate(tiny_tokenizer(repeats)).render([{"role": "user", "content": "a" * 1000}], tools=(), prompt=False)


def test_a_template_is_asked_again_after_another_was_ended() -> None:
    good = ChatTemplate(tiny_tokenizer(template("qwen3"), eos="</s>"))
    messages = [{"role": "user", "content": "Hi"}]
    before = good.render(messages, prompt=True)
    with pytest.raises(ModelError, match=TIME):
        renderer("{{ 9**(9**9) }}" + CHATML)
    assert good.render(messages, prompt=True) == before


def test_a_process_that_was_killed_is_started_again() -> None:
    good = ChatTemplate(tiny_tokenizer(template("qwen3"), eos="</s>"))
    messages = [{"role": "user", "content": "Hi"}]
    before = good.render(messages, prompt=True)
    template_module.PROCESS.process.kill()
    assert good.render(messages, prompt=True) == before


WITH_TOOLS = "{% if tools %}" + LOOPS + "{% endif %}"


def test_a_loop_for_tools_alone_does_not_hang_a_server(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    (Path(recipe.model) / "chat_template.jinja").write_text(WITH_TOOLS + CHATML, "utf-8")
    run = training.train(recipe, root=tmp_path / "runs", offline=True)  # no row has tools
    with pytest.raises(ModelError, match=TIME):
        open_registry([str(run.path)], root=tmp_path, options=EngineOptions(offline=True), note=lambda text: None)
    with pytest.raises(ModelError, match=TIME):
        tool_call_format(tiny_tokenizer(WITH_TOOLS + CHATML))


@pytest.mark.parametrize("command", ["check", "train"])
def test_each_command_names_the_template_and_the_bound(command: str, tmp_path: Path) -> None:
    model = hostile_model(tmp_path)
    data = str(chats(tmp_path / "chats.jsonl", 12))
    words = {"check": [data, "--model", model], "train": [model, data]}[command]
    done = CliRunner().invoke(app, [command, *words, "--offline"])
    assert done.exit_code == 2, done.output
    said = " ".join(done.output.split())
    assert f"its chat template {TIME}" in said


def hostile_model(folder: Path) -> str:
    model = model_folder(folder / "m")
    (model / "chat_template.jinja").write_text("{{ 9**(9**9) }}" + CHATML, "utf-8")
    return str(model)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_ends_a_command_while_a_template_runs(tmp_path: Path) -> None:
    code = (
        "from tunesmith.data import chat_template; chat_template.RENDER_S = 1.5; from tunesmith.cli import main; main()"
    )
    data = str(chats(tmp_path / "chats.jsonl", 12))
    command = [sys.executable, "-c", code, "check", data, "--model", hostile_model(tmp_path), "--offline"]
    process = subprocess.Popen(
        command,
        env=for_child(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Tests that run in the background ignore Ctrl-C, and what they start would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    try:
        child = the_renderer_of(process)
        time.sleep(0.5)  # at the power by now
        process.send_signal(signal.SIGINT)
        process.wait(12)
        assert process.returncode != 0
        wait_until(lambda: not is_there(child), seconds=200)  # it ends itself after twice its time on a processor
    finally:
        process.kill()
        process.wait()


def the_renderer_of(process: subprocess.Popen[Any]) -> int:
    found: list[int] = []

    def look() -> bool:
        path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        for text in path.read_text().split() if path.exists() else ():
            with open(f"/proc/{text}/cmdline", "rb") as file:
                if b"spawn_main" in file.read():
                    found.append(int(text))
        return bool(found)

    if not Path("/proc/self/task").exists():
        pytest.skip("no /proc")
    wait_until(look, seconds=60)
    return found[0]


def is_there(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text() and os.kill(pid, 0) is None
    except (ProcessLookupError, FileNotFoundError):
        return False


def wait_until(holds: Any, *, seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_daemonic_process_renders_too() -> None:
    """A worker of multiprocessing.Pool or Celery."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=render_in_a_daemon, args=(ChatTemplate(tiny_tokenizer()), theirs), daemon=True)
    process.start()
    theirs.close()
    text, pid, is_daemonic = ours.recv()
    process.join()
    assert text == ChatTemplate(tiny_tokenizer()).render([{"role": "user", "content": "Hi"}], prompt=True)
    assert is_daemonic
    wait_until(lambda: not is_there(pid))
