"""The unmodified openai package is the client."""

from __future__ import annotations

import openai
import pytest

from serve.running import Running
from tunesmith.serve.protocol import GenerationRequest

ASKED = [{"role": "user", "content": "one two three"}]


def test_models_are_listed_and_found_by_name(server: Running) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["support", "owner/base", "mood", "vectors"]
    found = client.models.retrieve("owner/base")
    assert (found.id, found.object, found.created) == ("owner/base", "model", 1_600_000_000)
    assert client.models.retrieve("mood").model_dump()["labels"] == ["good", "bad"]
    with pytest.raises(openai.NotFoundError, match="Served here: support, owner/base"):
        client.models.retrieve("gpt-4o")


def test_a_chat_is_answered_whole(server: Running) -> None:
    answer = server.client().chat.completions.create(model="support", messages=ASKED)
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "one two three", "stop")
    assert choice.logprobs is None
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8,
    }  # fmt: skip
    assert answer.object == "chat.completion"
    assert answer.model == "support"
    assert answer.id.startswith("chatcmpl-")
    server.wait_until_idle()
    assert [one.id for one in server.answered] == [answer._request_id]


def test_a_chat_is_streamed(server: Running) -> None:
    stream = server.client().chat.completions.create(model="support", messages=ASKED, stream=True)
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "one", " two", " three", None]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, None, "stop"]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_ends_with_its_usage_where_that_is_asked_for(server: Running) -> None:
    stream = server.client().chat.completions.create(
        model="support", messages=ASKED, stream=True, n=2, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (5, 6)
    assert all(chunk.usage is None for chunk in chunks)
    texts = ["".join(c.choices[0].delta.content or "" for c in chunks if c.choices[0].index == i) for i in range(2)]
    assert texts == ["one two three"] * 2


def test_the_streaming_helper_of_the_package_puts_the_answer_together(server: Running) -> None:
    with server.client().chat.completions.stream(model="support", messages=ASKED) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "one two three"


def test_all_that_steers_an_answer_reaches_the_engine(server: Running) -> None:
    tools = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    server.client().chat.completions.create(
        model="owner/base", messages=[{"role": "system", "content": "Be kind."}, *ASKED], max_completion_tokens=7,
        temperature=0.25, top_p=0.5, seed=-3, stop="\n", n=2, presence_penalty=0.5, frequency_penalty=-0.5,
        logprobs=True, top_logprobs=4, tools=tools, user="ada", metadata={"a": "b"}, store=False,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
    )  # fmt: skip
    assert server.engine.asks == [
        GenerationRequest(
            model="owner/base", messages=({"role": "system", "content": "Be kind."}, *ASKED), tools=tuple(tools),
            max_tokens=7, temperature=0.25, top_p=0.5, seed=-3, stop=("\n",), n=2, logprobs=4, presence_penalty=0.5,
            frequency_penalty=-0.5, json_schema=schema,
        )
    ]  # fmt: skip


def test_what_is_not_given_is_left_to_the_engine(server: Running) -> None:
    client = server.client()
    client.chat.completions.create(model="support", messages=ASKED)
    client.chat.completions.create(
        model="support", messages=ASKED, tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="none",
        response_format={"type": "text"}, logprobs=False, seed=None, stop=None,
    )  # fmt: skip
    client.chat.completions.create(model="support", messages=ASKED, response_format={"type": "json_object"})
    plain = GenerationRequest(model="support", messages=tuple(ASKED))
    assert server.engine.asks[:2] == [plain, plain]
    assert server.engine.asks[2].json_schema == {}


def test_a_message_of_an_earlier_answer_can_be_sent_back_as_it_came(server: Running) -> None:
    client = server.client()
    answer = client.chat.completions.create(model="support", messages=ASKED).choices[0].message
    client.chat.completions.create(model="support", messages=[*ASKED, answer, *ASKED])
    assert server.engine.asks[-1].messages[1] == {"role": "assistant", "content": "one two three"}


def test_parts_of_text_are_one_text(server: Running) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    server.client().chat.completions.create(model="support", messages=[{"role": "user", "content": parts}])
    assert server.engine.asks[0].messages == ({"role": "user", "content": "one two"},)


def test_logprobs_of_a_chat(server: Running) -> None:
    answer = server.client().chat.completions.create(
        model="support", messages=ASKED, logprobs=True, top_logprobs=2, max_tokens=2
    )
    [choice] = answer.choices
    assert choice.finish_reason == "length"
    assert choice.logprobs.content is not None
    first, second = choice.logprobs.content
    assert (first.token, first.logprob, bytes(first.bytes or [])) == ("one", -0.5, b"one")
    assert [(top.token, top.logprob) for top in second.top_logprobs] == [(" two", -0.5), ("other1", -1.5)]


def test_logprobs_of_a_streamed_chat(server: Running) -> None:
    stream = server.client().chat.completions.create(model="support", messages=ASKED, logprobs=True, stream=True)
    listed = [chunk.choices[0].logprobs for chunk in stream]
    assert [one.content[0].token for one in listed if one is not None and one.content] == ["one", " two", " three"]


def test_a_completion_goes_on_from_its_prompt(server: Running) -> None:
    answer = server.client().completions.create(model="support", prompt="a b c")
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason, answer.object) == ("a b c", "stop", "text_completion")
    assert server.engine.asks == [GenerationRequest(model="support", prompt="a b c", max_tokens=16)]


def test_a_prompt_can_be_alone_in_a_list_and_have_several_answers(server: Running) -> None:
    client = server.client()
    assert client.completions.create(model="support", prompt=["a b"]).choices[0].text == "a b"
    both = client.completions.create(model="support", prompt="a b", n=2)
    assert [(choice.index, choice.text) for choice in both.choices] == [(0, "a b"), (1, "a b")]
    chunks = client.completions.create(model="support", prompt="a b", n=2, stream=True)
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["a b", "a b"]


def test_vectors_come_as_the_package_asks_for_them(server: Running) -> None:
    """It asks for base64 by itself, and gives a list of floats."""
    client = server.client()
    for form in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        answer = client.embeddings.create(model="vectors", input=["ab", "abc d"], **form)
        if form.get("encoding_format") != "base64":
            assert [one.embedding for one in answer.data] == [[2.0, 0.5], [5.0, 0.5]]
        assert answer.usage.prompt_tokens == 3


@pytest.mark.parametrize(
    ("asked", "error", "code", "param"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "model_not_found", "model"),
        ({"model": "mood"}, openai.BadRequestError, "wrong_route", "model"),
        ({"temperature": 3}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"n": 0}, openai.BadRequestError, "invalid_value", "n"),
        ({"stop": ["a", "b", "c", "d", "e"]}, openai.BadRequestError, "invalid_value", "stop"),
        ({"top_logprobs": 2}, openai.BadRequestError, "invalid_value", "top_logprobs"),
        ({"extra_body": {"top_k": 3}}, openai.BadRequestError, "unknown_parameter", "top_k"),
        ({"reasoning_effort": "low"}, openai.BadRequestError, "unknown_parameter", "reasoning_effort"),
        ({"store": True}, openai.BadRequestError, "invalid_value", "store"),
        ({"tool_choice": "required"}, openai.BadRequestError, "invalid_value", "tool_choice"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, openai.BadRequestError, "invalid_value", "max_tokens"),
        ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "invalid_value", "stream_options"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            openai.BadRequestError, "invalid_value", "stream_options",
        ),
        ({"messages": []}, openai.BadRequestError, "invalid_value", "messages"),
        ({"messages": [{"role": "usr", "content": "x"}]}, openai.BadRequestError, "invalid_messages", "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]}]},
            openai.BadRequestError, "invalid_messages", "messages",
        ),
        ({"messages": [{"role": "user", "content": "FULL"}]}, openai.RateLimitError, "queue_full", None),
        ({"messages": [{"role": "user", "content": "CRASH"}]}, openai.InternalServerError, "engine_crashed", None),
    ],
)  # fmt: skip
def test_what_is_refused_says_what_and_why(
    server: Running, asked: dict[str, object], error: type[openai.APIStatusError], code: str, param: str | None
) -> None:
    with pytest.raises(error) as refused:
        server.client().chat.completions.create(**{"model": "support", "messages": ASKED, **asked})  # type: ignore[arg-type]
    assert (refused.value.code, refused.value.param) == (code, param)
    assert refused.value.body["message"]  # type: ignore[index]
    if code == "queue_full":
        assert refused.value.response.headers["retry-after"] == "1"


def test_a_crash_in_the_middle_of_a_stream_is_told_in_it(server: Running) -> None:
    stream = server.client().chat.completions.create(
        model="support", messages=[{"role": "user", "content": "CRASH now"}], stream=True
    )
    heard = []
    with pytest.raises(openai.APIError, match="started again"):
        heard.extend(chunk.choices[0].delta.content for chunk in stream)
    server.wait_until_idle()
    assert [one.usage.failed for one in server.answered] == ["engine_crashed"]


def test_a_client_that_goes_away_frees_its_place(server: Running) -> None:
    slow = [{"role": "user", "content": "SLOW " + "word " * 200}]
    stream = server.client().chat.completions.create(model="support", messages=slow, stream=True)
    next(iter(stream))
    assert server.engine.open == 1
    stream.close()
    server.wait_until_idle()
    with pytest.raises(openai.APITimeoutError):
        server.client(timeout=0.3).chat.completions.create(model="support", messages=slow)
    server.wait_until_idle()
    assert [answered.status for answered in server.answered] == [499, 499]
