"""JSON schemas: each keyword that is accepted is enforced, each other is refused by name, and none holds up others."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch

from tiny import tiny_tokenizer
from tunesmith.generation.sampling import JsonGrammars
from tunesmith.serve.protocol import RequestError

pytest.importorskip("llguidance", reason="llguidance is not installed: pip install 'tunesmith[json]'")

A = {"type": "integer"}
TOKENIZER = tiny_tokenizer()
ENFORCED: list[tuple[dict[str, Any], list[Any], list[Any]]] = [
    ({"type": "string", "pattern": "^a[0-9]{2}(b|c)$"}, ["a12b"], ["a1b", "a12", "xa12b"]),
    ({"type": "string", "pattern": "^a+$", "minLength": 2}, ["aa"], ["a", "ab"]),
    ({"type": "string", "format": "date"}, ["2024-02-01"], ["2024-13-01", "today"]),
    ({"type": "integer", "minimum": 3, "maximum": 17}, [3, 17], [2, 18, -5, 3.5, "3"]),
    ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, [0.5], [0, 1, 1.5, -0.5]),
    ({"enum": ["red", 1, None]}, ["red", 1, None], ["blue", 2]),
    ({"const": "yes"}, ["yes"], ["no"]),
    ({"type": "array", "items": A, "minItems": 1, "maxItems": 2}, [[1], [1, 2]], [[], [1, 2, 3], ["a"]]),
    ({"type": "object", "properties": {"a": A, "b": A}, "required": ["a"]}, [{"a": 1}], [{}, {"b": 1}]),
    ({"type": "object", "properties": {"a": A}, "additionalProperties": False}, [{"a": 1}, {}], [{"a": 1, "b": 2}]),
    ({"type": "object", "patternProperties": {"^x$": A}, "additionalProperties": False}, [{"x": 1}], [{"x": ""}]),
    ({"anyOf": [A, {"type": "string"}]}, [1, "a"], [True, None]),
    ({"oneOf": [A, {"type": "string"}]}, [1, "a"], [True, None]),
    ({"allOf": [A, {"minimum": 3}]}, [3], [2, "a"]),
    ({"$ref": "#/$defs/x", "$defs": {"x": A}}, [1], ["a"]),
]  # fmt: skip
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"not": {"type": "string"}}, "not"),
    ({"allOf": [{"type": "string"}, A]}, "Unsatisfiable"),
    ({"$ref": "http://x/y"}, "http://x/y"),
    ({"type": "array", "items": A, "uniqueItems": True}, "uniqueItems"),
    ({"type": "object", "properties": {"a": {"type": "array", "contains": A}}}, "contains"),
    ({"type": "nonsense"}, "nonsense"),
    ({"type": "string", "pattern": "^(?!a).*$"}, "look-ahead"),
    ({"type": "string", "enum": ["x" * 40_000]}, "characters"),
    ({"type": "object", "x-guidance": {"lenient": True}, "not": {}}, "x-guidance"),
]  # fmt: skip


@pytest.fixture(scope="module")
def grammars() -> JsonGrammars:
    return JsonGrammars(TOKENIZER, vocab_size=len(TOKENIZER), stop_ids=[2])


def accepts(grammars: JsonGrammars, schema: dict[str, Any], value: Any) -> bool:
    """Whether every token of the value is allowed in its turn, and the end behind the last."""
    grammar = grammars.compile(schema)()
    for token_id in [*TOKENIZER.encode(json.dumps(value), add_special_tokens=False), 2]:
        if token_id == 2 and grammar.is_complete():
            return True
        logits_V = torch.zeros(len(TOKENIZER))
        grammar.mask(logits_V)
        if not torch.isfinite(logits_V[token_id]):
            return False
        grammar.accept(token_id)
    return True


@pytest.mark.parametrize(("schema", "right", "wrong"), ENFORCED, ids=str)
def test_an_accepted_keyword_is_enforced(
    grammars: JsonGrammars, schema: dict[str, Any], right: list[Any], wrong: list[Any]
) -> None:
    assert [value for value in right if not accepts(grammars, schema, value)] == []
    assert [value for value in wrong if accepts(grammars, schema, value)] == []


@pytest.mark.parametrize(("schema", "said"), REFUSED, ids=lambda value: str(value)[:60])
def test_a_keyword_that_cannot_be_enforced_is_refused_by_name(
    grammars: JsonGrammars, schema: dict[str, Any], said: str
) -> None:
    with pytest.raises(RequestError, match=said) as error:
        grammars.compile(schema)
    assert (error.value.status, error.value.code) == (400, "invalid_schema")


def test_answers_of_one_schema_do_not_share_their_place(grammars: JsonGrammars) -> None:
    make = grammars.compile({"type": "object"})
    first, second = make(), make()
    before_V, after_V = torch.zeros(len(TOKENIZER)), torch.zeros(len(TOKENIZER))
    second.mask(before_V)
    first.accept(int(torch.isfinite(before_V).nonzero()[0]))
    second.mask(after_V)
    assert torch.equal(before_V, after_V)


def test_a_tokenizer_that_the_library_cannot_read_is_said() -> None:
    with pytest.raises(RequestError, match="cannot read this model's tokenizer") as error:
        JsonGrammars(object(), vocab_size=3, stop_ids=[2])
    assert error.value.code == "unsupported_parameter"


def test_schemas_of_pydantic_are_accepted(grammars: JsonGrammars) -> None:
    from enum import Enum
    from typing import Literal

    from pydantic import BaseModel, Field

    class Kind(Enum):
        A, B = "a", "b"

    class Cat(BaseModel):
        kind: Literal["cat"]

    class Dog(BaseModel):
        kind: Literal["dog"]
        age: int = Field(ge=0, le=30)

    class Order(BaseModel):
        name: str = Field(max_length=20, description="who")
        kind: Kind
        pets: list[Cat | Dog]
        best: Cat | Dog = Field(discriminator="kind")
        counts: dict[str, int]
        note: str | None = None

    grammars.compile(Order.model_json_schema())


@pytest.mark.parametrize("schema", [{"maxLength": 9}, {"minLength": 2}, {"format": "uri"}, {}], ids=str)
def test_a_string_has_no_unescaped_control_character(grammars: JsonGrammars, schema: dict[str, Any]) -> None:
    grammar = grammars.compile({"type": "string", **schema})()
    [quote] = TOKENIZER.encode('"', add_special_tokens=False)
    grammar.accept(quote)
    logits_V = torch.zeros(len(TOKENIZER))
    grammar.mask(logits_V)
    allowed = [TOKENIZER.decode([i]) for i in torch.isfinite(logits_V).nonzero()[:, 0].tolist()]
    assert allowed
    assert [text for text in allowed if any(sign < " " for sign in text)] == []


def heavy(num: int) -> dict[str, Any]:
    """A schema with patterns that repeat a large class thousands of times: minutes of work for some compilers."""
    properties = {f"k{i}": {"type": "string", "pattern": f"[\\u0080-\\uffff]{{1,{3000 + i}}}"} for i in range(num)}
    return {"type": "object", "properties": properties, "required": list(properties)}


def nested(depth: int) -> dict[str, Any]:
    return {"type": "array", "items": nested(depth - 1), "maxItems": 1000} if depth else {"enum": ["a" * 50] * 50}


@pytest.mark.parametrize("schema", [heavy(100), nested(60), {"type": "string", "maxLength": 10**9}], ids=lambda _: "")
def test_a_heavy_schema_takes_no_time_or_is_refused(grammars: JsonGrammars, schema: dict[str, Any]) -> None:
    started = time.monotonic()
    try:
        grammar = grammars.compile(schema)()
    except RequestError:
        grammar = None
    for _ in range(20):
        logits_V = torch.zeros(len(TOKENIZER))
        if grammar is not None and not grammar.is_complete():
            grammar.mask(logits_V)
            grammar.accept(int(logits_V.argmax()))
    assert time.monotonic() - started < 3  # hundredths of a second on a machine at rest
