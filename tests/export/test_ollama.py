"""A Modelfile asks the model as it was tuned: its template is rendered and compared, its stops are its own."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from export.exports import of_architecture, quick
from tiny import template, tiny_tokenizer
from tunesmith.data.render import Renderer
from tunesmith.errors import ModelError
from tunesmith.export.exporting import export_run
from tunesmith.export.go_template import literal, render
from tunesmith.export.ollama import as_go, modelfile

DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"
    + template("chatml")
)


def source(text: str, *, adds_bos: bool = False, task: str = "chat") -> Any:
    tokenizer = tiny_tokenizer(text, adds_bos=adds_bos)
    renderer = Renderer(tokenizer, "chat", max_tokens=None, too_long="error", control_tokens="error")
    return SimpleNamespace(
        tokenizer=tokenizer, renderer=renderer, recipe=SimpleNamespace(task=task), weights=SimpleNamespace(name="tiny")
    )


def test_chatml_in_gos_terms() -> None:
    go, notes = as_go(source(template("chatml")))
    roles = "".join(
        f'{{{{ {word} eq .Role "{role}" }}}}<|im_start|>{role}\n{{{{ .Content }}}}<|im_end|>\n'
        for word, role in (("if", "system"), ("else if", "user"), ("else if", "assistant"))
    )
    assert go == "{{ range .Messages }}" + roles + "{{ end }}{{ end }}<|im_start|>assistant\n"
    assert notes == []


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "mistral", "phi3"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_families_are_rendered_as_their_own_template_does(name: str, adds_bos: bool) -> None:
    one = source(template(name), adds_bos=adds_bos)
    go, notes = as_go(one)  # which compares several conversations itself
    asked = [
        {"role": "user", "content": "How?"},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "Oh"},
    ]
    data = {"Messages": [{"Role": m["role"], "Content": m["content"]} for m in asked], "System": ""}
    expected = one.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    bos = one.tokenizer.bos_token
    writes_bos = expected.startswith(bos)
    # One BOS: llama.cpp's where the tokenizer puts one in front of any text, else the template's own (trap T1).
    assert render(go, data) == (expected.removeprefix(bos) if adds_bos else expected)
    assert (bos in go) == (writes_bos and not adds_bos)
    assert writes_bos == (name in ("llama3", "gemma", "mistral"))
    assert ("its chat template knows no system message: Ollama leaves them out" in notes) == (
        name in ("gemma", "mistral")
    )


def test_a_bos_that_opens_turns_stays_where_it_is() -> None:
    """SmolLM2 calls <|im_start|> its BOS, and puts none in front of a text."""
    one = source(template("chatml"))
    one.tokenizer.bos_token = "<|im_start|>"
    go, _ = as_go(one)
    assert go.startswith('{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system')


def test_a_system_message_of_the_template_itself_is_kept() -> None:
    go, _ = as_go(source(DEFAULT_SYSTEM))
    assert go.startswith("{{ if not .System }}<|im_start|>system\nYou are kind.<|im_end|>\n{{ end }}")
    data = {"Messages": [{"Role": "system", "Content": "A"}, {"Role": "user", "Content": "B"}], "System": "A"}
    assert "You are kind" not in render(go, data)


def test_a_template_that_does_more_is_refused() -> None:
    numbered = (
        "{% for m in messages %}{{ loop.index }}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    )
    opened = numbered + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    with pytest.raises(ModelError, match=r"cannot be said in Ollama's terms: .*llama-server --jinja"):
        as_go(source(opened))


def test_modelfile_has_the_stops_of_training() -> None:
    text = modelfile(source(template("chatml")), "m.gguf", license="mit")
    assert text.startswith('FROM ./m.gguf\nTEMPLATE """{{ range .Messages }}')
    assert text.endswith('PARAMETER stop "<|im_end|>"\nLICENSE mit\n')


def test_text_is_gone_on_with_as_it_is() -> None:
    assert as_go(source(template("chatml"), task="generate")) == ("{{ .Prompt }}", [])


def test_exported_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    done = export_run(of_architecture("llama"), "ollama", out=tmp_path / "out", offline=True)
    assert done.found is not None
    assert {path.name for path in done.path.iterdir()} == {"llama-f16.gguf", "Modelfile", "README.md", "verify.json"}
    assert "FROM ./llama-f16.gguf" in (done.path / "Modelfile").read_text()
    assert "ollama create llama -f Modelfile" in (done.path / "README.md").read_text()


def test_go_templates_as_go_renders_them() -> None:
    data = {"Messages": [{"Role": "user", "Content": "a"}, {"Role": "x", "Content": "b"}], "System": "", "Prompt": "p"}
    looped = (
        '{{ range .Messages }}{{ if eq .Role "user" }}<{{ .Content }}>{{ else }}({{ .Content }}){{ end }},{{ end }}!'
    )
    assert render(looped, data) == "<a>,(b),!"
    assert render("{{ if .System }}yes{{ end }}{{ if not .System }}no{{ end }} {{ .Prompt }}", data) == "no p"
    assert render(literal("a {{ b }}"), data) == "a {{ b }}"
    with pytest.raises(ValueError, match="not of the part"):
        render("{{ len .Messages }}", data)
    with pytest.raises(ValueError, match="closes nothing"):
        render("a{{ end }}", data)


def on_day(head: str) -> Any:
    one = source("<|im_start|>system\n" + head + "<|im_end|>\n" + template("chatml"))
    options: Any = {"max_tokens": None, "too_long": "error", "control_tokens": "error", "date": "2026-11-20"}
    one.renderer = Renderer(one.tokenizer, "chat", **options)
    return one


def test_a_date_that_ollama_can_write_is_that_of_each_day() -> None:
    go, notes = as_go(on_day("Today is {{ strftime_now('%Y-%m-%d') }}."))
    assert "Today is {{ currentDate }}." in go
    assert "2026" not in go
    assert render(go, {"Messages": [], "System": ""}).startswith(f"<|im_start|>system\nToday is {date.today()}.")
    assert notes[-1] == "its chat template writes the date: Ollama writes that of each day it answers on"


def test_a_date_in_another_form_stays_as_trained_and_that_is_said() -> None:
    go, notes = as_go(on_day("Today Date: {{ strftime_now('%d %b %Y') }}"))
    assert "Today Date: 20 Nov 2026" in go
    assert notes[-1].endswith("in a form that Ollama has not: 2026-11-20 stays, as trained")
