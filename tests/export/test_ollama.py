"""A Modelfile asks the model as it was tuned: its template is rendered and compared, its stops are its own."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from export.exports import of_architecture, quick
from tiny import template, tiny_tokenizer
from tunesmith.data.renderer import Renderer
from tunesmith.export.export_run import export_run
from tunesmith.export.ollama import go_template, modelfile
from tunesmith.tasks import TASKS

DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"
    + template("chatml")
)


def source(text: str, *, adds_bos: bool = False, task: Any = "chat") -> Any:
    tokenizer = tiny_tokenizer(text, adds_bos=adds_bos)
    settings: Any = {"max_tokens": None, "too_long": "error", "control_tokens": "error"}
    renderer = Renderer(tokenizer, TASKS[task], **settings)
    return SimpleNamespace(
        tokenizer=tokenizer, renderer=renderer, recipe=SimpleNamespace(task=task), weights=SimpleNamespace(name="tiny")
    )


def test_chatml_in_gos_terms() -> None:
    go, notes = go_template(source(template("chatml")))
    roles = "".join(
        f'{{{{ {word} eq .Role "{role}" }}}}<|im_start|>{role}\n{{{{ .Content }}}}<|im_end|>\n'
        for word, role in (("if", "system"), ("else if", "user"), ("else if", "assistant"))
    )
    assert go == "{{ range .Messages }}" + roles + "{{ end }}{{ end }}<|im_start|>assistant\n"
    assert notes == []


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "mistral", "phi3"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_families_have_one_bos_and_are_compared_with_their_own_template(name: str, adds_bos: bool) -> None:
    one = source(template(name), adds_bos=adds_bos)
    go, notes = go_template(one)  # which compares several conversations itself
    assert go is not None
    writes_bos = name in ("llama3", "gemma", "mistral")
    # One BOS: llama.cpp's where the tokenizer puts one in front of any text, else the template's own (trap T1).
    assert (one.tokenizer.bos_token in go) == (writes_bos and not adds_bos)
    knows_system = "its chat template has no system message: Ollama leaves them out" not in notes
    assert knows_system == (name not in ("gemma", "mistral"))


def test_a_bos_that_opens_turns_stays_where_it_is() -> None:
    """SmolLM2 calls <|im_start|> its BOS, and puts none in front of a text."""
    one = source(template("chatml"))
    one.tokenizer.bos_token = "<|im_start|>"
    go, _ = go_template(one)
    assert go.startswith('{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system')


def test_a_system_message_of_the_template_itself_is_kept() -> None:
    go, _ = go_template(source(DEFAULT_SYSTEM))
    assert go.startswith("{{ if not .System }}<|im_start|>system\nYou are kind.<|im_end|>\n{{ end }}")
    assert go.count("You are kind") == 1


def test_a_template_that_does_more_is_left_to_ollama_and_that_is_said() -> None:
    numbered = (
        "{% for m in messages %}{{ loop.index }}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    )
    opened = numbered + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    go, notes = go_template(source(opened))
    assert go is None
    assert "cannot be written for Ollama (it writes the first question differently from the second)" in notes[0]
    text, _ = modelfile(source(opened), "m.gguf")
    assert text == 'FROM ./m.gguf\nPARAMETER stop "<|im_end|>"\n'


def test_modelfile_has_the_stops_of_training() -> None:
    text, _ = modelfile(source(template("chatml")), "m.gguf", license="mit")
    assert text.startswith('FROM ./m.gguf\nTEMPLATE """{{ range .Messages }}')
    assert text.endswith('PARAMETER stop "<|im_end|>"\nLICENSE mit\n')


def test_text_is_gone_on_with_as_it_is() -> None:
    assert go_template(source(template("chatml"), task="generate")) == ("{{ .Prompt }}", [])


def test_exported_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    done = export_run(of_architecture("llama"), "ollama", out=tmp_path / "out", offline=True)
    assert done.found is not None
    assert {path.name for path in done.path.iterdir()} == {"llama-f16.gguf", "Modelfile", "README.md", "verify.json"}
    assert "FROM ./llama-f16.gguf" in (done.path / "Modelfile").read_text()
    assert "ollama create llama -f Modelfile" in (done.path / "README.md").read_text()


def on_day(head: str) -> Any:
    one = source("<|im_start|>system\n" + head + "<|im_end|>\n" + template("chatml"))
    options: Any = {"max_tokens": None, "too_long": "error", "control_tokens": "error", "date": "2026-11-20"}
    one.renderer = Renderer(one.tokenizer, TASKS["chat"], **options)
    return one


def test_a_date_in_another_form_stays_as_trained_and_that_is_said() -> None:
    go, notes = go_template(on_day("Today Date: {{ strftime_now('%d %b %Y') }}"))
    assert "Today Date: 20 Nov 2026" in go
    assert notes == ["its chat template writes the date: in Ollama it stays 2026-11-20, as in training"]
