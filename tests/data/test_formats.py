"""Each shape of row becomes the same kind of example, and everything that is wrong with a row is said at once."""

import itertools
from typing import Any

import pytest

from tunesmith.data.formats import FIELDS, FORMATS, NAMED, find_shape
from tunesmith.types import Example, Part, Problem, Shape, Source

SOURCE = Source("rows.jsonl", 7)
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello."}


def parsed(shape: Shape, record: dict[str, Any]) -> Example:
    example = FORMATS[shape].parse(record, SOURCE)
    assert isinstance(example, Example), [str(problem) for problem in example]
    assert (example.shape, example.source) == (shape, SOURCE)
    return example


def problems(shape: Shape, record: dict[str, Any]) -> list[Problem]:
    found = FORMATS[shape].parse(record, SOURCE)
    assert isinstance(found, list)
    assert all(problem.source == SOURCE for problem in found)
    return found


def turns(example: Example) -> list[tuple[str, str, bool]]:
    return [(part.role, part.text, part.trained) for part in example.parts]


GOOD: dict[Shape, dict[str, Any]] = {
    "messages": {"messages": [USER, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
    "alpaca": {"instruction": "Hi", "output": "Hello."},
    "prompt_completion": {"prompt": "Hi", "completion": "Hello."},
    "text": {"text": "Hi"},
    "document_summary": {"document": "Hi", "summary": "Hello."},
    "text_label": {"text": "Hi", "label": "greeting", "text_pair": "Hello."},
    "tokens_tags": {"tokens": ["Hi", "Ann"], "tags": ["O", "B-PER"]},
    "preference": {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go."},
    "unpaired": {"prompt": "Hi", "completion": "Hello.", "label": True},
    "scored_answers": {"prompt": "Hi", "answers": ["Go.", "Hello."], "scores": [1, 2.5]},
    "text_pairs": {"anchor": "Hi", "positive": "Hello.", "negatives": ["Go."]},
    "ranked_documents": {"query": "Hi", "documents": ["Hello.", "Go."], "labels": [1, 0]},
    "prompts": {"prompt": "Hi"},
}
PARTS: dict[Shape, list[tuple[str, str, bool]]] = {
    "text": [("text", "Hi", True)],
    "document_summary": [("document", "Hi", False), ("summary", "Hello.", True)],
    "text_label": [("text", "Hi", False), ("text_pair", "Hello.", False)],
    "tokens_tags": [("word", "Hi", False), ("word", "Ann", False)],
    "preference": [("user", "Hi", False)],
    "unpaired": [("user", "Hi", False)],
    "scored_answers": [("user", "Hi", False)],
    "text_pairs": [("anchor", "Hi", False)],
    "ranked_documents": [("query", "Hi", False)],
    "prompts": [("user", "Hi", False)],
}


@pytest.mark.parametrize("shape", FORMATS)
def test_every_shape_is_found_by_its_fields_and_gives_parts(shape: Shape):
    assert find_shape(GOOD[shape], task="reinforce" if shape in NAMED else None) == shape
    expected = PARTS.get(shape, [("user", "Hi", False), ("assistant", "Hello.", True)])
    assert turns(parsed(shape, GOOD[shape])) == expected
    assert set(FORMATS[shape].inputs) <= set(FORMATS[shape].fields)
    assert set(GOOD[shape]) <= set(FORMATS[shape].fields) <= set(FIELDS)


@pytest.mark.parametrize("shape", FORMATS)
def test_no_value_in_any_field_ends_in_an_exception(shape: Shape):
    values = (None, 0, 1.5, True, "", "x", [], ["x"], {}, {"a": 1}, [[]], [None], [{}], [{"role": []}])
    for field, value, answered in itertools.product(FORMATS[shape].fields, values, (True, False)):
        found = FORMATS[shape].parse({**GOOD[shape], field: value}, SOURCE, answered=answered)
        assert isinstance(found, Example) or found


def test_prompts_keep_all_of_their_row_and_are_never_detected():
    record = {"prompt": [USER], "reference": "Hello.", "number": 3}
    assert find_shape(record) != "prompts"
    assert parsed("prompts", record).kept == record
    assert turns(parsed("prompts", {"messages": [USER, ANSWER]})) == [("user", "Hi", False)]
    assert [problem.code for problem in problems("prompts", {"heading": "Hi"})] == ["missing_field"]
    assert [problem.code for problem in problems("prompts", {"prompt": "  "})] == ["empty_prompt"]


def test_prompts_alone_have_a_way_to_the_task_that_learns_from_them():
    for row in ({"prompt": "Hi"}, {"prompt": "Hi", "reference": "Ho"}):
        (problem,) = problems("prompt_completion", row)
        assert (problem.code, problem.message) == ("missing_field", "completion is missing.")
        assert problem.fix.endswith("Prompts without answers are for --task reinforce, with a --grader.")


def test_text_is_not_touched():
    text = "  \ufeffa\r\n\u2028é e\u0301\t "
    assert parsed("messages", {"messages": [USER, {"role": "assistant", "content": text}]}).parts[1].text == text
    assert parsed("prompt_completion", {"prompt": text, "completion": text}).parts[0].text == text


# messages


def test_weight_decides_which_answers_are_trained():
    messages = [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}, USER, ANSWER, {**USER, "weight": 0}]
    example = parsed("messages", {"messages": messages})
    assert [part.trained for part in example.parts] == [False, False, False, True, False, True, False]
    assert all("weight" not in part.fields for part in example.parts)


def test_tool_calls_and_what_else_a_message_carries_are_kept_as_they_are():
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"b": 1, "a": [2, null]}'}}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {**USER, "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Hm."},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
        ANSWER,
    ]
    example = parsed("messages", {"messages": messages, "tools": tools})
    assert [part.role for part in example.parts] == ["developer", "user", "assistant", "tool", "assistant"]
    assert [part.trained for part in example.parts] == [False, False, True, False, True]
    assert example.parts[1].fields == {"name": "Ann"}
    assert example.parts[2] == Part("assistant", "", True, {"tool_calls": [call], "reasoning_content": "Hm."})
    assert example.parts[3].fields == {"tool_call_id": "c1"}
    assert example.tools == tuple(tools)


def test_functions_are_the_older_tools():
    example = parsed("messages", {"messages": [USER, ANSWER], "functions": [{"name": "add"}]})
    assert example.tools == ({"type": "function", "function": {"name": "add"}},)
    [problem] = FORMATS["messages"].parse({"messages": [USER, ANSWER], "functions": [3]}, SOURCE)
    assert problem.code == "bad_tool"


# ShareGPT


def test_sharegpt_speakers_are_roles():
    conversation = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "1 + 2?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": 2}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "Three."},
        {"from": "user", "value": "And?"},
        {"from": "assistant", "value": "Enough.", "weight": 0},
    ]
    example = parsed("sharegpt", {"conversations": conversation})
    assert turns(example) == [
        ("system", "Be brief.", False),
        ("user", "1 + 2?", False),
        ("assistant", "", True),
        ("tool", "3", False),
        ("assistant", "Three.", True),
        ("user", "And?", False),
        ("assistant", "Enough.", False),
    ]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    assert example.parts[2].fields == {"tool_calls": [call]}


def test_a_list_of_turns_may_have_the_name_of_the_other_shape():
    swapped = {
        "messages": {"messages": GOOD["sharegpt"]["conversations"]},
        "sharegpt": {"conversations": GOOD["messages"]["messages"]},
    }
    for shape, record in swapped.items():
        assert turns(parsed(shape, record))[-1][0] == "assistant"
        assert parsed(shape, record).parts[-1].trained


# Alpaca


def test_alpaca_input_follows_the_instruction():
    row = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    assert turns(parsed("alpaca", row)) == [("user", "Add.\n\n1, 2", False), ("assistant", "3", True)]
    for nothing in ("", None):
        assert parsed("alpaca", {**row, "input": nothing}).parts[0].text == "Add."


def test_alpaca_system_and_history_come_before():
    row = {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]}
    assert turns(parsed("alpaca", row)) == [
        ("system", "s", False),
        ("user", "a", False),
        ("assistant", "b", True),
        ("user", "c", False),
        ("assistant", "d", True),
    ]


# prompt and completion


def test_messages_of_the_prompt_are_not_trained():
    example = parsed("prompt_completion", {"prompt": [USER, ANSWER, USER], "completion": [ANSWER, USER, ANSWER]})
    assert [part.trained for part in example.parts] == [False, False, False, True, False, True]


# texts and labels


@pytest.mark.parametrize(
    ("label", "labels", "many"),
    [
        ("eye", ("eye",), False),
        (" eye ", (" eye ",), False),
        (2, ("2",), False),
        (-1, ("-1",), False),
        (0.5, ("0.5",), False),
        (2.0, ("2.0",), False),
        (1e-7, ("1e-07",), False),
        (True, ("true",), False),
        (["b", "a"], ("b", "a"), True),
        ([1, False], ("1", "false"), True),
        ([], (), True),
    ],
)
def test_a_label_is_text_as_it_is_written(label: Any, labels: tuple[str, ...], many: bool):
    example = parsed("text_label", {"text": "a", "label": label})
    assert (example.labels, example.many, example.plain) == (labels, many, False)


def test_a_row_with_a_million_problems_lists_fifty():
    content = [5] * 100_000
    found = problems("messages", {"messages": [{"role": "user", "content": content}, ANSWER]})
    assert [problem.code for problem in found] == ["wrong_type"] * 50 + ["and_more"]


def sides(example: Example) -> list[list[str]]:
    """The texts of the prompt, and of each branch."""
    return [[part.text for part in parts] for parts in (example.parts, *example.branches)]


HI, HELLO, GO = USER, ANSWER, {"role": "assistant", "content": "Go."}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [HI], "chosen": [HELLO], "rejected": [GO]},
        {"chosen": [HI, HELLO], "rejected": [HI, GO]},
        {"prompt": "Hi", "chosen": [HI, HELLO], "rejected": [HI, GO], "score_chosen": 8, "score_rejected": 3},
        {"prompt": [HI], "chosen": "Hello.", "rejected": "Go."},
        {"prompt": "Hi", "chosen": HELLO, "rejected": GO},
        {"input": {"messages": [HI], "tools": []}, "preferred_output": [HELLO], "non_preferred_output": [GO]},
        {"conversations": [{"from": "human", "value": "Hi"}],
         "chosen": {"from": "gpt", "value": "Hello."}, "rejected": {"from": "gpt", "value": "Go."}},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: Go."},
    ],
    ids=["explicit", "implicit", "ultrafeedback", "texts", "messages", "openai", "llama-factory", "hh"],
)  # fmt: skip
def test_a_preference_is_read_however_it_is_written(record):
    assert find_shape(record) == "preference"
    example = parsed("preference", record)
    assert sides(example) == [["Hi"], ["Hello."], ["Go."]]
    assert (example.plain, example.values) == (False, (0.0,))
    assert [part.trained for branch in example.branches for part in branch] == [True, True]
    assert not any(part.trained for part in example.parts)


def test_later_turns_and_results_of_tools_belong_to_the_answer():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    tool = {"role": "tool", "content": "3"}
    example = parsed("preference", {"prompt": [HI], "chosen": [call, tool, HELLO], "rejected": [GO]})
    assert [part.trained for part in example.branches[0]] == [True, False, True]
