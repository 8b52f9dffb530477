"""Calls of tools are taken out of answers, whole and streamed; what is none stays text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from serve.running import Running
from tiny import template, tiny_tokenizer
from tunesmith.serve.protocol import Delta, Finished, StreamEvent, ToolCall, ToolCallFormat
from tunesmith.serve.registry import tool_call_format
from tunesmith.serve.responses import with_tool_calls

TOOLS = frozenset({"find", "look_up"})
CALL = '<tool_call>\n{"name": "find", "arguments": {"word": "fox ä", "num": 2}}\n</tool_call>'
ARGUMENTS = {"word": "fox ä", "num": 2}
NAMED = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]


def read(form: ToolCallFormat, pieces: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    """The text and the calls of one answer."""

    async def answer() -> AsyncGenerator[StreamEvent, None]:
        for piece in pieces:
            yield Delta(0, piece)
        yield Finished(0, "stop", 5)

    async def heard() -> list[StreamEvent]:
        return [event async for event in with_tool_calls(answer(), form, TOOLS)]

    *found, last = asyncio.run(heard())
    calls = [one for one in found if isinstance(one, ToolCall)]
    assert [call.number for call in calls] == list(range(len(calls)))
    assert all(len(one.call["id"]) == 9 and one.call["id"].isalnum() for one in calls)
    assert last == Finished(0, "tool_calls" if calls else "stop", 5)
    texts = [one.text for one in found if isinstance(one, Delta)]
    assert all(texts), "no empty text"
    functions = [one.call["function"] for one in calls]
    return "".join(texts), [(one["name"], json.loads(one["arguments"])) for one in functions]


HERMES: list[tuple[str, str, int]] = [
    (CALL, "", 1),
    (f"I look it up.\n{CALL}", "I look it up.", 1),
    (f"{CALL}\n{CALL}", "", 2),
    (CALL.removesuffix("</tool_call>"), "", 1),
    ("a <tool or <tool_cal", "a <tool or <tool_cal", 0),
    ("no call\n at all \n", "no call\n at all \n", 0),
    ("<tool_call>{broken}</tool_call> and on", "<tool_call>{broken}</tool_call> and on", 0),
    (CALL.replace("find", "unknown"), CALL.replace("find", "unknown"), 0),
    (CALL.replace('{"word": "fox ä", "num": 2}', "[1]"), CALL.replace('{"word": "fox ä", "num": 2}', "[1]"), 0),
]


@pytest.mark.parametrize(("answer", "text", "num_calls"), HERMES)
def test_marked_calls_wherever_the_text_is_cut(answer: str, text: str, num_calls: int) -> None:
    expected = (text, [("find", ARGUMENTS)] * num_calls)
    assert read("hermes", [answer]) == expected
    assert read("hermes", list(answer)) == expected
    for place in range(len(answer)):
        assert read("hermes", [answer[:place], answer[place:]]) == expected, place


JSON: list[tuple[str, str, int]] = [
    ('{"name": "find", "parameters": {"word": "fox ä", "num": 2}}', "", 1),
    (' {"name": "find", "arguments": {"word": "fox ä", "num": 2}} ', "", 1),
    ('{"name": "unknown", "parameters": {}}', '{"name": "unknown", "parameters": {}}', 0),
    ('{"name": ["find"], "parameters": {}}', '{"name": ["find"], "parameters": {}}', 0),
    ('{"a": 1}', '{"a": 1}', 0),
    ("{", "{", 0),
    ('Hello {"name": "find"}', 'Hello {"name": "find"}', 0),
    ("", "", 0),
]


@pytest.mark.parametrize(("answer", "text", "num_calls"), JSON)
def test_an_answer_that_is_a_call_as_a_whole(answer: str, text: str, num_calls: int) -> None:
    expected = (text, [("find", ARGUMENTS)] * num_calls)
    assert read("json", [answer]) == read("json", list(answer)) == expected


LLAMA = (
    "{% for m in messages %}{{ m.role + ': ' }}{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
    '{{ \'{"name": "\' + f.name + \'", "parameters": \' + (f.arguments | tojson) + "}" }}{% else %}{{ m.content }}'
    "{% endif %}</s>{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("text", "form"), [(template("qwen3"), "hermes"), (LLAMA, "json"), (template("chatml"), None), (None, None)]
)
def test_the_format_is_found_by_rendering_a_call(text: str | None, form: ToolCallFormat | None) -> None:
    assert tool_call_format(tiny_tokenizer(text, eos="</s>")) == form


def test_a_mark_that_is_no_part_of_answers_is_not_waited_for() -> None:
    tokenizer = tiny_tokenizer(template("qwen3"), eos="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>"]})
    assert tool_call_format(tokenizer) is None


def asked(text: str) -> dict[str, Any]:
    return {"model": "owner/base", "messages": [{"role": "user", "content": text}], "tools": NAMED}


def test_the_package_reads_calls_whole_and_streamed(server: Running) -> None:
    client = server.client()
    said = client.chat.completions.create(**asked(f"One moment. {CALL}")).choices[0]
    assert said.finish_reason == "tool_calls"
    assert said.message.content == "One moment."
    [call] = said.message.tool_calls or []
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == ("function", "find", ARGUMENTS)  # type: ignore[union-attr]
    with client.chat.completions.stream(**asked(CALL)) as stream:
        final = stream.get_final_completion().choices[0]
    [streamed] = final.message.tool_calls or []
    assert final.finish_reason == "tool_calls"
    assert not final.message.content
    assert json.loads(streamed.function.arguments) == ARGUMENTS
    # The answer goes back with what the tool said, as agents send it.
    result = {"role": "tool", "tool_call_id": call.id, "content": "a fox"}
    messages = [*asked("x")["messages"], said.message, result]
    client.chat.completions.create(model="owner/base", messages=messages, tools=NAMED)
    assert server.engine.asks[-1].messages[1]["tool_calls"][0]["id"] == call.id


def test_tools_and_calls_may_have_the_shapes_of_rows(server: Running) -> None:
    bare = [tool["function"] for tool in NAMED]
    status, answer, _ = server.ask("POST", "/v1/chat/completions", {**asked(CALL), "tools": bare})
    assert (status, answer["choices"][0]["finish_reason"]) == (200, "tool_calls")
    older = [
        *asked("x")["messages"],
        {"role": "assistant", "content": None, "function_call": {"name": "find", "arguments": "{}"}},
        {"role": "function", "name": "find", "content": "a fox"},
    ]
    assert server.ask("POST", "/v1/chat/completions", {"model": "support", "messages": older})[0] == 200
    _, call, result = server.engine.asks[-1].messages
    assert call["tool_calls"] == [{"type": "function", "function": {"name": "find", "arguments": "{}"}}]
    assert result == {"role": "tool", "content": "a fox", "name": "find"}


def test_what_is_no_call_stays_text(server: Running) -> None:
    client = server.client()
    cases = (
        asked("no call here"),
        {**asked(CALL), "tool_choice": "none"},
        {**asked(CALL), "model": "support"},  # whose template writes calls in another way
        {name: value for name, value in asked(CALL).items() if name != "tools"},
    )
    for case in cases:
        said = client.chat.completions.create(**case).choices[0]
        assert (said.finish_reason, said.message.tool_calls) == ("stop", None)
        assert said.message.content == case["messages"][0]["content"]


def test_tokens_of_a_call_are_told(server: Running) -> None:
    said = server.client().chat.completions.create(**asked(CALL), logprobs=True).choices[0]
    assert "".join(token.token for token in said.logprobs.content or []) == CALL
