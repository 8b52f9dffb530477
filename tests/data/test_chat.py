"""Which tokens of a conversation are trained, for each family of chat templates, against texts written by hand."""

import functools
import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import CHATML, chat, template, tiny_tokenizer
from tunesmith.data import chat as chat_module
from tunesmith.data.renderer import Renderer
from tunesmith.data.tokenizer import ControlTokens
from tunesmith.errors import ModelError
from tunesmith.tasks import TASKS
from tunesmith.types import Example, Problem, Row

USER = ("apple pie", "cherry pie?", "elder tea")
ANSWERS = ("Banana, first.", "Date 2nd\n\non both lines", "Fig 😀 山")

# How each family closes an answer, and what white space it has the model write before one.
FAMILIES = {
    "chatml": ("", "<|im_end|>"),
    "llama3": ("", "<|eot_id|>"),
    "gemma": ("", "<end_of_turn>"),
    "mistral": (" ", "</s>"),
    "phi3": ("", "<|end|>"),
    "bos": (" ", "</s>"),
    "trim": ("", "<|im_end|>"),
    "two_ends": ("", "<|end|><|im_end|>"),
    "qwen3": ("", "<|im_end|>"),
    "thinks_first": ("", "<|im_end|>"),
}


def renderer(family: str, *, metaspace: bool = False, **options: object) -> tuple[Renderer, object]:
    tokenizer = tiny_tokenizer(template(family), eos="</s>", metaspace=metaspace)
    settings = {"max_tokens": None, "too_long": "error", "control_tokens": "error", **options}
    return Renderer(tokenizer, TASKS["chat"], **settings), tokenizer  # type: ignore[arg-type]


def three_turns() -> Example:
    turns = [(("user", user), ("assistant", answer)) for user, answer in zip(USER, ANSWERS, strict=True)]
    return chat(*itertools.chain.from_iterable(turns))


def row_of(example: Example, family: str, **options: object) -> tuple[Row, object]:
    made, tokenizer = renderer(family, **options)
    row = made.encode([example])[0][0]
    assert isinstance(row, Row), row
    return row, tokenizer


def runs(row: Row, tokenizer: object, *, trained: bool) -> list[str]:
    """Texts of the stretches of tokens that are trained, or that are not."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], row.trained == trained, [False]]).astype(int)))
    decode = tokenizer.backend_tokenizer.decode  # type: ignore[attr-defined]
    return [decode(row.ids[a:b].tolist(), skip_special_tokens=False) for a, b in edges.reshape(-1, 2)]


def assert_answers_and_ends_are_trained(row: Row, tokenizer: object, expected: list[str]) -> None:
    assert runs(row, tokenizer, trained=True) == expected
    rest = "".join(runs(row, tokenizer, trained=False))
    assert all(text in rest for text in USER)
    assert not any(word in rest for answer in ANSWERS for word in answer.split())


# trap: T5
@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_and_nothing_else_is_trained(family: str) -> None:
    before, end = FAMILIES[family]
    row, tokenizer = row_of(three_turns(), family)
    assert_answers_and_ends_are_trained(row, tokenizer, [f"{before}{answer}{end}" for answer in ANSWERS])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_and_nothing_else_is_trained_by_pieces_with_spaces(family: str) -> None:
    """Metaspace decoding drops the space at the start of a stretch: white space is left out of the comparison."""
    row, tokenizer = row_of(three_turns(), family, metaspace=True)
    end = FAMILIES[family][1]
    found = ["".join(text.split()) for text in runs(row, tokenizer, trained=True)]
    assert found == ["".join(answer.split()) + end for answer in ANSWERS]


# trap: T5
@pytest.mark.parametrize("bug", ["from the first answer on", "the last answer only"])
def test_a_mask_by_prefix_length_would_be_seen(bug: str) -> None:
    row, tokenizer = row_of(three_turns(), "chatml")
    starts = np.flatnonzero(np.diff(row.trained.astype(int)) == 1) + 1
    first = starts[0] if bug == "from the first answer on" else starts[-1]
    buggy = Row(row.ids, np.arange(len(row.ids)) >= first, row.source)
    with pytest.raises(AssertionError):
        assert_answers_and_ends_are_trained(buggy, tokenizer, [f"{answer}<|im_end|>" for answer in ANSWERS])


def assert_every_answer_ends_in_a_stop(row: Row, stop_ids: tuple[int, ...]) -> None:
    ends = np.flatnonzero(row.trained & ~np.append(row.trained[1:], False))
    assert len(ends) == len(ANSWERS)
    assert all(row.ids[end] in stop_ids for end in ends)


# trap: T4
@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_every_answer_is_trained_and_is_a_stop_token(family: str) -> None:
    made, tokenizer = renderer(family)
    last_end = "<|im_end|>" if family == "two_ends" else FAMILIES[family][1]
    assert tokenizer.convert_ids_to_tokens(list(made.stop_ids)) == [last_end]  # type: ignore[attr-defined]
    row = made.encode([three_turns()])[0][0]
    assert isinstance(row, Row)
    assert_every_answer_ends_in_a_stop(row, made.stop_ids)


# trap: T4
def test_an_untrained_end_would_be_seen() -> None:
    made, _ = renderer("chatml")
    row = made.encode([three_turns()])[0][0]
    assert isinstance(row, Row)
    buggy = Row(row.ids, row.trained & ~np.isin(row.ids, made.stop_ids), row.source)
    with pytest.raises(AssertionError):
        assert_every_answer_ends_in_a_stop(buggy, made.stop_ids)


def test_a_template_that_never_ends_an_answer_is_refused() -> None:
    with pytest.raises(ModelError, match=r"closes an assistant's turn with '\\n\\n'.*never stop.*eos_token"):
        renderer("no_end")


def test_what_phi_writes_behind_the_last_turn_is_not_trained() -> None:
    row, tokenizer = row_of(three_turns(), "phi3")
    assert runs(row, tokenizer, trained=False)[-1] == "\n<|endoftext|>"


# trap: T6
def thinking(*, as_field: bool) -> Example:
    def answer(thought: str, text: str) -> tuple[str, str, dict[str, str]]:
        return ("assistant", text, {"reasoning_content": thought}) if as_field else (
            "assistant", f"<think>\n{thought}\n</think>\n\n{text}", {})  # fmt: skip

    return chat(("user", USER[0]), answer("hmm", "yes"), ("user", USER[1]), answer("well", "no"))


def assert_boilerplate_is_untrained(row: Row, tokenizer: object) -> None:
    assert runs(row, tokenizer, trained=True)[-1] == f"{ANSWERS[-1]}<|im_end|>"
    assert runs(row, tokenizer, trained=False)[-2].endswith("<think>\n\n</think>\n\n")


# trap: T6
@pytest.mark.parametrize("family", ["qwen3", "thinks_first"])
def test_an_empty_think_block_is_not_trained(family: str) -> None:
    assert_boilerplate_is_untrained(*row_of(three_turns(), family))


# trap: T6
def test_a_trained_empty_think_block_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_module, "_start", lambda prompt, before: len(prompt or before))
    with pytest.raises(AssertionError):
        assert_boilerplate_is_untrained(*row_of(three_turns(), "qwen3"))


# trap: T6
@pytest.mark.parametrize("as_field", [True, False])
def test_reasoning_is_trained_if_the_template_shows_it_else_noted(as_field: bool) -> None:
    made, tokenizer = renderer("qwen3")
    heard: list[Problem] = []
    row = made.encode([thinking(as_field=as_field)], on_warning=heard.append)[0][0]
    assert isinstance(row, Row)
    assert runs(row, tokenizer, trained=True) == ["yes<|im_end|>", "<think>\nwell\n</think>\n\nno<|im_end|>"]
    assert [(w.code, "messages[1]" in w.message) for w in heard] == [("not_shown", True)]


def test_reasoning_that_the_prompt_opens_is_trained_from_its_first_word() -> None:
    row, tokenizer = row_of(thinking(as_field=True), "thinks_first")
    assert runs(row, tokenizer, trained=True)[-1] == "well\n</think>\n\nno<|im_end|>"


def test_a_context_that_serving_would_not_show_is_a_counted_warning() -> None:
    made, _ = renderer("thinks_first")
    heard: list[Problem] = []
    assert isinstance(made.encode([three_turns()], on_warning=heard.append)[0][0], Row)
    # The last answer stands behind the <think> that the prompt opens, the earlier ones do not.
    assert [(w.code, w.severity) for w in heard] == [("context_rewritten", "warning")] * 2
    assert ["messages[1]" in heard[0].message, "messages[3]" in heard[1].message] == [True, True]


def test_a_template_that_rewrites_an_answer_is_refused_with_its_place() -> None:
    made, _ = renderer("rewrites")
    problems = made.encode([three_turns()])[0]
    assert [str(p.source) for p in problems] == ["chat.jsonl:1"]
    assert problems[0].code == "template_ambiguous"
    assert "messages[1] (assistant)" in problems[0].message


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def test_a_tool_call_without_text_is_trained() -> None:
    example = chat(
        ("user", "Rain?"), ("assistant", "", {"tool_calls": [CALL]}), ("tool", "no"), ("assistant", "It is dry."),
        tools=(TOOL,),
    )  # fmt: skip
    row, tokenizer = row_of(example, "qwen3")
    assert runs(row, tokenizer, trained=True) == [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>',
        "It is dry.<|im_end|>",
    ]
    assert '<tools>\n{"type": "function", "function": {"name": "weather"' in runs(row, tokenizer, trained=False)[0]


def test_a_tool_call_that_the_template_does_not_show_is_an_error() -> None:
    made, _ = renderer("chatml")
    problems = made.encode([chat(("user", "Rain?"), ("assistant", "", {"tool_calls": [CALL]}))])[0]
    assert (problems[0].code, problems[0].severity) == ("not_shown", "error")


def test_what_the_template_refuses_is_a_problem_in_its_words() -> None:
    made, _ = renderer("gemma")
    results = made.encode([chat(("system", "Be kind."), ("user", "a"), ("assistant", "b")), three_turns()])
    assert results[0][0].code == "template_error"
    assert "System role not supported" in results[0][0].message
    assert isinstance(results[1][0], Row)


TEXTS = st.text(
    st.one_of(
        st.sampled_from(" \n\t'\".,:;<>|[]{}()_-#*/\\1234567890 abcdefgh山水火木日本語😀👩\u200d👧🏽e\u0301Åß"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=30,
)


made_once = functools.cache(renderer)


@settings(max_examples=300, deadline=None)
@given(turns=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), family=st.sampled_from(sorted(FAMILIES)))
def test_any_text_is_trained_exactly_or_named(turns: list[tuple[str, str]], family: str) -> None:
    made, tokenizer = made_once(family)
    messages = [turn for user, answer in turns for turn in (("user", user), ("assistant", answer))]
    encoded = made.encode([chat(*messages)])[0]
    row = encoded[0]
    if isinstance(row, Problem):
        assert {problem.code for problem in encoded} <= {"token_boundary", "control_token"}
        return
    end = FAMILIES[family][1]
    found = runs(row, tokenizer, trained=True)
    assert [text.removesuffix(end).strip() for text in found] == [answer.strip() for _, answer in turns]
    assert all(text.endswith(end) for text in found)


def random_chats(num: int) -> list[Example]:
    words = random.Random(7)
    alphabet = [*"abc xyz  \n,.!?09", "山", "😀", "e\u0301", " the ", "\n\n", "user", "assistant", "<", "|", "im_end"]

    def text() -> str:
        return "".join(words.choices(alphabet, k=words.randint(1, 40))).strip() or "ok"

    return [
        chat(*(turn for _ in range(words.randint(1, 4)) for turn in (("user", text()), ("assistant", text()))), line=i)
        for i in range(num)
    ]


def assert_trained_prompts_are_served_prompts(row: Row, example: Example, tokenizer: object) -> None:
    """Before each answer stands, id for id, what transformers feeds to have that answer written."""
    starts = np.flatnonzero(row.trained & ~np.concatenate([[False], row.trained[:-1]]))
    answers = [i for i, part in enumerate(example.parts) if part.trained]
    assert len(starts) == len(answers)
    for start, index in zip(starts, answers, strict=True):
        messages = [{"role": part.role, "content": part.text} for part in example.parts[:index]]
        served = tokenizer.apply_chat_template(  # type: ignore[attr-defined]
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert row.ids[:start].tolist() == served


# trap: T7
@pytest.mark.parametrize("metaspace", [False, True])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"qwen3", "thinks_first"}))
def test_trained_prompts_are_served_prompts_for_50_chats(family: str, metaspace: bool) -> None:
    made, tokenizer = renderer(family, metaspace=metaspace)
    chats = random_chats(50)
    for example, (row,) in zip(chats, made.encode(chats), strict=True):
        assert isinstance(row, Row), row
        assert_trained_prompts_are_served_prompts(row, example, tokenizer)
        assert made.prompt_ids(example.parts[:1]) == row.ids[: int(np.argmax(row.trained))].tolist()


@pytest.mark.parametrize("metaspace", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_begin_alike_have_the_tokens_of_each_alone(
    family: str, metaspace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = renderer(family, metaspace=metaspace)
    first = (("user", USER[0]), ("assistant", ANSWERS[0]))
    chats = [chat(*first, ("user", user), ("assistant", answer)) for user, answer in zip(USER, ANSWERS, strict=True)]
    alone = [shown(*made.encode([one])) for one in chats]
    num_common, found = ControlTokens.num_common, []
    monkeypatch.setattr(ControlTokens, "num_common", lambda *given: found.append(num_common(*given)) or found[-1])
    assert [shown(rows) for rows in made.encode(chats)] == alone
    assert found[0] > len(USER[0])
    for inside in range(1, 9):  # where no control token begins: the tokens of whole texts are taken
        monkeypatch.setattr(ControlTokens, "num_common", lambda *_, inside=inside: inside)
        assert [shown(rows) for rows in made.encode(chats)] == alone


def shown(rows: list[Row] | list[Problem]) -> list[object]:
    return [(row.ids.tolist(), row.trained.tolist()) if isinstance(row, Row) else row for row in rows]


# trap: T7
def test_another_template_at_serving_would_be_seen() -> None:
    made, _ = renderer("chatml")
    served_by = tiny_tokenizer(CHATML.replace("assistant\\n' }}{% endif", "assistant' }}{% endif"), eos="</s>")
    example = random_chats(1)[0]
    row = made.encode([example])[0][0]
    assert isinstance(row, Row)
    with pytest.raises(AssertionError):
        assert_trained_prompts_are_served_prompts(row, example, served_by)


HARMONY = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] }}{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>final' }}{% endif %}{{ '<|user|>' + message['content'] }}"
    "{{ '<|endoftext|>' if loop.last and message['role'] == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
"""As gpt-oss: an answer at the end is closed by one token (<|return|>), one before it by another (<|end|>)."""


def assert_every_answer_is_trained(turns: int) -> None:  # trap: T22
    """Each answer is learnt, and the end of none but the last: after <|end|> the model would go on."""
    tokenizer = tiny_tokenizer(HARMONY, eos="<|endoftext|>")
    made = Renderer(tokenizer, TASKS["chat"], max_tokens=None, too_long="error", control_tokens="error")
    spoken = [(("user", user), ("assistant", answer)) for user, answer in zip(USER, ANSWERS, strict=True)][:turns]
    row = made.encode([chat(*itertools.chain.from_iterable(spoken))])[0][0]
    assert isinstance(row, Row), row
    closes = [""] * (turns - 1) + ["<|endoftext|>"]
    expected = [answer + close for answer, close in zip(ANSWERS, closes, strict=False)]
    assert runs(row, tokenizer, trained=True) == expected
    assert [made.tokenizer.decode(one) for one in made.stop_ids] == ["<|endoftext|>"]


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_answers_that_end_otherwise_at_the_end_are_all_trained(turns: int) -> None:
    assert_every_answer_is_trained(turns)


def test_an_end_that_is_no_end_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken for a stop, <|end|> is learnt; not known at all, the row is refused."""
    real = chat_module.find_stops

    def as_stops(*given: object, **how: object) -> object:
        run, stops, middle = real(*given, **how)  # type: ignore[arg-type]
        return run, (*stops, *middle), ()

    for planted in (as_stops, lambda *given, **how: (*real(*given, **how)[:2], ())):
        monkeypatch.setattr(chat_module, "find_stops", planted)
        with pytest.raises(AssertionError):
            assert_every_answer_is_trained(2)
