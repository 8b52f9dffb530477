"""What a template writes without being run is what it writes when it is run."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import TEMPLATES, template, tiny_tokenizer
from tunesmith.data import forms as forms_module
from tunesmith.data.forms import Finder, Forms
from tunesmith.data.template import ChatTemplate, TemplateRefusal

FAMILIES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
TEXTS = st.one_of(
    st.sampled_from(
        ["", " ", "Hi", " at its sides ", "a</think>b", "<think>x</think>\n\ny", "{{ x }}", "é😀\n", "[INST]"]
    ),
    st.text(max_size=12),
)
CHATS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), TEXTS), min_size=1, max_size=5)
ASKED = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(turns=CHATS, prompt=st.booleans())
def test_every_template_writes_the_same(family: str, turns: list[tuple[str, str]], prompt: bool) -> None:
    chats = ChatTemplate(tiny_tokenizer(template(family), eos="</s>"))
    messages = [{"role": role, "content": text} for role, text in turns]
    for _ in range(2):  # the first time a form is compared, the second time it is believed
        assert result(lambda: chats.render(messages, tools=(), prompt=prompt)) == result(
            lambda: chats.run(messages, (), prompt)
        )


def result(call: Any) -> tuple[str, str]:
    try:
        return "text", call()
    except TemplateRefusal as refusal:
        return "refused", str(refusal)


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma", "mistral", "phi3", "trim", "two_ends"])
def test_most_templates_run_once_for_all_texts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chats = ChatTemplate(tiny_tokenizer(template(family), eos="</s>"))
    chats.render(ASKED, tools=(), prompt=False)
    monkeypatch.setattr(chats, "run_all", lambda *_: pytest.fail("the template ran again"))
    other = [{"role": "user", "content": "What now?"}, {"role": "assistant", "content": "Nothing."}]
    assert "What now?" in chats.render(other, tools=(), prompt=False)


def test_what_is_not_plain_goes_to_the_template() -> None:
    chats = ChatTemplate(tiny_tokenizer("{% for m in messages %}{{ m.content }}{{ m.name }}{% endfor %}"))
    named = [{"role": "user", "content": "Hi", "name": "Ada"}]
    for messages, text in (([{"role": "user", "content": "Hi"}], "Hi"), (named, "HiAda")):
        assert [chats.render(messages, tools=(), prompt=False) for _ in range(2)] == [text, text]
    with_tools = ChatTemplate(tiny_tokenizer("{{ tools | length if tools else 0 }}{{ messages[0].content }}"))
    asked = [{"role": "user", "content": "?"}]
    assert with_tools.render(asked, tools=(), prompt=False) == "0?"
    assert with_tools.render(asked, tools=({"name": "f"},), prompt=False) == "1?"


LOOKS = {
    "for a word": "{{ 'yes' if 'a' in text else 'no' }}",
    "in a word of its own": "{{ 'yes' if text in 'abc' else 'no' }}",
    "in a list": "{{ 'yes' if text in ['a'] else 'no' }}",
    "at its equal": "{{ 'yes' if text == 'a' else 'no' }}",
    "from the other side": "{{ 'yes' if 'a' == text else 'no' }}",
    "whether it is empty": "{{ 'yes' if text else 'no' }}",
    "at its length": "{{ text | length }}",
    "at its letters": "{{ text | upper }}",
    "at its first": "{{ text[0] }}",
    "at its first by a filter": "{{ text | first }}",
    "letter by letter": "{% for letter in text %}({{ letter }}){% endfor %}",
    "by a method": "{{ text.upper() }}",
    "by a word's method": "{{ 'abc'.replace(text, 'x') }}",
    "by a word's start": "{{ 'yes' if 'abc'.startswith(text) else 'no' }}",
    "by a format": "{{ '%.1s' | format(text) }}",
    "by another format": "{{ '{:.1}'.format(text) }}",
    "by the remainder": "{{ '%.1s' % text }}",
    "at what was joined to it": "{{ ('x' + text).upper() }}",
    "at what was joined and stripped": "{{ ('\n' + text).strip() }}",
    "at what was written together": "{% set both = 'x' ~ text %}{{ both | upper }}",
    "at a block": "{% set block %}{{ text }}{% endset %}{{ block | upper }}",
    "in a macro": "{% macro say(x) %}{{ x }}{% endmacro %}{{ say(text) | upper }}",
    "as JSON": "{{ text | tojson }}",
    "at all of it as JSON": "{{ messages | tojson }}",
    "at all of it": "{{ messages }}",
    "whether it is small": "{{ 'yes' if text is lower else 'no' }}",
    "whether it is one of": "{{ 'yes' if text is in 'abc' else 'no' }}",
    "whether it is a sequence": "{{ 'yes' if text is sequence else 'no' }}",
    "by a namespace": "{% set ns = namespace(text=text) %}{{ 'yes' if ns.text in 'abc' else 'no' }}",
    "by its hash": "{{ {text: 1}[text] }}",
    "by turning it": "{{ text | reverse }}",
    "by some of its sides": "{{ text.strip('a') }}",
    "at what stands in a list": "{{ [text] | join(',') | upper }}",
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_template_that_looks_into_a_text_is_run_for_each(look: str) -> None:
    """One that is believed on two texts that it takes alike would write the wrong thing for the third."""
    text = "{% set text = messages[0].content %}" + LOOKS[look]
    chats = ChatTemplate(tiny_tokenizer(text))
    for content in ("QQ", "WW", "a", "", " a "):
        messages = [{"role": "user", "content": content}]
        assert result(lambda m=messages: chats.render(m, tools=(), prompt=False)) == result(
            lambda m=messages: chats.run(m, (), False)
        )


@pytest.mark.parametrize("look", ["in a word of its own", "by a word's method", "at a block"])
def test_without_the_guard_some_would_be_believed(look: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms_module._Guard, "visit", lambda self, tree: tree)
    here = lambda self, prompt, roles: Finder(self.text, {}).find(prompt, roles)  # noqa: E731
    monkeypatch.setattr(ChatTemplate, "_find", here)  # and not in a process, which would not have the bug
    text = "{% set text = messages[0].content %}" + LOOKS[look]
    with pytest.raises(AssertionError):
        test_a_template_that_looks_into_a_text_is_run_for_each(look)
    assert Forms(Finder(text, {}).find).write([{"role": "user", "content": "a"}], prompt=False) is not None


def test_a_form_that_disagrees_with_the_template_is_not_used_again() -> None:
    forms = Forms(Finder("{{ messages[0].content }}", {}).find)
    messages = [{"role": "user", "content": "a"}]
    first = forms.write(messages, prompt=False)
    assert first is not None
    assert not first.is_checked
    first.check(agrees=False)
    assert forms.write(messages, prompt=False) is None


def test_a_date_that_changes_is_not_remembered_and_one_that_stays_is() -> None:
    text = "{{ strftime_now('%d %b') }}{{ messages[0].content }}"
    messages = [{"role": "user", "content": "a"}]
    assert Forms(Finder(text, {}).find).write(messages, prompt=False) is None
    of_a_day = datetime(2026, 11, 27).strftime
    written = Forms(Finder(text, {}, of_a_day).find).write(messages, prompt=False)
    assert written is not None
    assert written.text == "27 Nova"
    looks = Finder("{{ strftime_now(messages[0].content) }}", {}, of_a_day)
    assert Forms(looks.find).write(messages, prompt=False) is None


def test_special_tokens_are_part_of_the_form() -> None:
    text = "{{ bos_token }}{{ messages[0].content | trim }}{{ eos_token }}"
    forms = Forms(Finder(text, {"bos_token": "<s>", "eos_token": "</s>"}).find)
    written = forms.write([{"role": "user", "content": "a b"}], prompt=False)
    assert written is not None
    assert written.text == "<s>a b</s>"
    assert forms.write([{"role": "user", "content": " a b"}], prompt=False) is None
