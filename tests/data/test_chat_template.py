"""A chat template writes what transformers makes of it, and cannot reach what is outside of it."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import CHATML, TEMPLATES, template, tiny_tokenizer
from tunesmith.data import chat_template, template_trial
from tunesmith.data.chat_template import ChatTemplate, TemplateRefusal
from tunesmith.data.renderer import Renderer
from tunesmith.data.sandbox import Sandbox
from tunesmith.errors import ModelError
from tunesmith.tasks import TASKS

HOSTILE = {
    "brackets in brackets": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "more deeply than"),
    "a macro that calls itself": ("{% macro f(x) %}{{ f(x + 1) }}{% endmacro %}{{ f(1) }}", "more deeply than"),
    "a text too long": ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "it wrote"),
    "a power": ("{{ 9 ** (9**9) }}", "computes a power"),
    "a huge range": ("{% for i in range(1000000000) %}x{% endfor %}", "Range too big"),
    "a mistake": ("{% for %}", "refuses a question and an answer"),
    "Python by a class": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "Python by a format": ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe"),
}


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


def test_a_template_sees_tools_fields_and_the_day() -> None:
    text = "{{ strftime_now('%d %b') }} {{ tools | length if tools else 0 }} {{ messages[0].name }}"
    text += "{{ messages[0].content }}"
    shown = ChatTemplate(tiny_tokenizer(text), "2026-11-27")
    assert shown.render([{"role": "user", "content": "a"}], prompt=False) == "27 Nov 0 a"
    assert shown.render([{"role": "user", "content": "a", "name": "Ada"}], prompt=False) == "27 Nov 0 Adaa"
    assert shown.render([{"role": "user", "content": "a"}], tools=({"name": "f"},), prompt=False) == "27 Nov 1 a"


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_template_is_refused_with_the_bound_that_it_met(attack: str) -> None:
    body, says = HOSTILE[attack]
    with pytest.raises(ModelError, match=says) as error:
        Renderer(
            tiny_tokenizer(body + CHATML), TASKS["chat"], max_tokens=None, too_long="error", control_tokens="error"
        )
    assert "chat template" in str(error.value)


def test_a_lack_of_memory_is_not_the_fault_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(sandbox: Sandbox, limit_s: float) -> None:
        raise MemoryError

    shown = ChatTemplate(tiny_tokenizer(CHATML))
    monkeypatch.setattr(Sandbox, "begin", ends)
    with pytest.raises(MemoryError):
        shown.render([], prompt=False)


def test_a_template_that_loops_without_end_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_trial, "TRIAL_LIMIT_S", 0.2)
    tokenizer = tiny_tokenizer("{% for i in range(99999) %}" * 3 + "{% set x = 1 %}" + "{% endfor %}" * 3)
    tokenizer.name_or_path = "owner/model"
    with pytest.raises(ModelError, match=r"^owner/model: its chat template ran for more than 0.2 s, in a loop"):
        ChatTemplate(tokenizer)


def test_the_watch_looks_at_each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn can take long: every hundredth is too few."""
    monkeypatch.setattr(chat_template, "RENDERING_S", 0.2)
    turn = "{% for i in range(9) %}{% if messages | length > 50 %}{{ range(99999) | map('string') | join | length }}"
    shown = ChatTemplate(tiny_tokenizer(turn + "{% endif %}{% endfor %}"))
    with pytest.raises(ModelError, match=r"ran for more than 0.2 s, in a loop"):
        shown.render([{"role": "user", "content": "a"}] * 51, prompt=False)


def test_a_template_does_not_multiply_a_row() -> None:
    repeats = "{% for i in range(90000) %}{{ messages[0].content }}{% endfor %}"
    with pytest.raises(TemplateRefusal, match="it wrote 90000000 characters"):
        ChatTemplate(tiny_tokenizer(repeats)).render([{"role": "user", "content": "a" * 1000}], tools=(), prompt=False)


@pytest.mark.parametrize(
    ("text", "shows"),
    [
        ("{{ '\"a\": {}, {{\"b\": {0}}}'.replace('{}', '1').format(2) }}", '"a": 1, {"b": 2}'),
        ("{{ '{:>5}|{x:.2f}'.format('a', x=1) }}", "    a|1.00"),
        ("{{ '%5s, 100%%, %(x)s' | replace('%(x)s', '') | format('a') }}", "    a, 100%, "),
        ("{{ [1, 2, 3] | map('string') | join('-') }}{{ range(3) | sum }}", "1-2-33"),
        ("{{ [[1], [2]] | sum(start=[]) | length }}{{ 2 ** 10 }}{{ 7 // 2 }}{{ [0] * 3 }}", "210243[0, 0, 0]"),
        (
            "{{ messages[0].content[::-1] }}{{ messages[:1] | length }}{{ {'a': [1, none]} | tojson }}",
            'ih1{"a": [1, null]}',
        ),
        ("{% macro f(x) %}{{ x }}{{ varargs }}{% endmacro %}{{ f(1, 2) }}{{ 'a' ~ 1 ~ none }}", "1(2,)a1None"),
        ("{% generation %}{{ 'x' + 'y' * 2 }}{% endgeneration %}{% set n = namespace(a=1) %}{{ n.a + 1 }}", "xyy2"),
        (
            "{% autoescape true %}{{ '<' ~ messages[0].content }}{% endautoescape %}{{ 'a\nb' | indent }}",
            "&lt;hia\n    b",
        ),
        (
            "{{ dict(a=1, **{'b': 2}) }}{{ 'x' is in ['x'] }}{{ 'aXbX'.split('X') }}",
            "{'a': 1, 'b': 2}True['a', 'b', '']",
        ),
    ],
)
def test_what_honest_templates_write_is_as_transformers_has_it(text: str, shows: str) -> None:
    tokenizer, messages = tiny_tokenizer(text), [{"role": "user", "content": "hi"}]
    assert ChatTemplate(tokenizer).render(messages, prompt=False) == shows
    assert tokenizer.apply_chat_template(messages, tokenize=False) == shows


def test_a_program_without_a_python_of_its_own_tries_templates_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "")
    ChatTemplate(tiny_tokenizer(CHATML + "{# embedded #}"))
    with pytest.raises(ModelError, match="makes a text of more than"):
        ChatTemplate(tiny_tokenizer("{{ 'a' * 300000000 }}{# embedded #}"))
