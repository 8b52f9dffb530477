"""Schemas of answers: each keyword that is taken is kept, each other is refused by name, none holds up other asks."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from inference.engines import Asked, engine_over, heard, says, two_runs
from tunesmith.serve import grammar, schemas
from tunesmith.serve.protocol import Refused

xgrammar = pytest.importorskip("xgrammar", reason="xgrammar is not installed: pip install 'tunesmith[json]'")

A = {"type": "integer"}
KEPT: list[tuple[dict[str, Any], list[Any], list[Any]]] = [
    ({"type": "string", "minLength": 2, "maxLength": 3}, ["aa", "aaa"], ["a", "aaaa", 5]),
    ({"type": "string", "pattern": "^a[0-9]{2}(b|c)$"}, ["a12b"], ["a1b", "a12", "xa12b"]),
    ({"type": "string", "format": "date"}, ["2024-02-01"], ["2024-13-01", "today"]),
    ({"type": "string", "format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567"]),
    ({"type": "string", "format": "ipv4"}, ["10.0.0.1"], ["999.1.1.1", "x"]),
    ({"type": "integer", "minimum": 3, "maximum": 17}, [3, 17], [2, 18, -5, 3.5, "3"]),
    ({"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 17}, [4, 16], [3, 17]),
    ({"type": "number", "minimum": 0.25, "maximum": 0.75}, [0.25, 0.5, 0.75], [0.2, 0.76, 1, -1]),
    ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, [0.5], [0, 1, 1.5, -0.5]),
    ({"type": ["boolean", "null"]}, [True, False, None], [0, "true"]),
    ({"enum": ["red", 1, None]}, ["red", 1, None], ["blue", 2]),
    ({"enum": ["red", "blue"], "type": "string"}, ["red"], ["green"]),
    ({"const": "yes"}, ["yes"], ["no"]),
    ({"type": "array", "items": A, "minItems": 1, "maxItems": 2}, [[1], [1, 2]], [[], [1, 2, 3], ["a"]]),
    ({"type": "array", "prefixItems": [A, {"type": "null"}], "items": False}, [[1, None]], [[1, 2], [None]]),
    ({"type": "object", "properties": {"a": A, "b": A}, "required": ["a"]}, [{"a": 1}], [{}, {"b": 1}]),
    ({"type": "object", "properties": {"a": A}, "additionalProperties": False}, [{"a": 1}, {}], [{"a": 1, "b": 2}]),
    ({"type": "object", "additionalProperties": A, "maxProperties": 1}, [{}, {"a": 1}], [{"a": "x"}, {"a": 1, "b": 2}]),
    ({"type": "object", "properties": {"a": A, "b": A}, "minProperties": 1}, [{"b": 1}], [{}]),
    ({"anyOf": [A, {"type": "string"}]}, [1, "a"], [True, None]),
    ({"oneOf": [A, {"type": "string"}]}, [1, "a"], [True, None]),
    ({"allOf": [A]}, [1], ["a"]),
    ({"type": "array", "items": A, "uniqueItems": False}, [[1, 1]], [["a"]]),
    ({"type": "object", "additionalProperties": A, "propertyNames": {"type": "string"}}, [{"a": 1}], [{"a": "b"}]),
    ({"$ref": "#/$defs/x", "$defs": {"x": A}}, [1], ["a"]),
    ({"$ref": "#/definitions/x", "definitions": {"x": A}, "title": "X", "description": "y"}, [1], ["a"]),
]  # fmt: skip
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"not": {"type": "string"}}, "not is not kept"),
    ({"allOf": [{"type": "string"}, A]}, "allOf of several schemas"),
    ({"oneOf": [A, {"type": "number"}]}, "could fit more than one"),
    ({"anyOf": [A, {"type": "string"}], "type": "integer"}, "type is not kept beside anyOf"),
    ({"$ref": "http://x/y"}, "'http://x/y' is no place in this schema"),
    ({"$ref": "file:///etc/passwd"}, "is no place"),
    ({"$ref": "#/$defs/x", "$defs": {"x": {"not": {}}}}, "#/$defs/x: not is not kept"),
    ({"$ref": "#/$defs/x", "minimum": 5, "$defs": {"x": A}}, "minimum is not kept beside"),
    ({"type": "array", "items": A, "uniqueItems": True}, "uniqueItems is not kept"),
    ({"type": "array", "contains": A}, "contains is not kept"),
    ({"type": "object", "if": {}, "then": {}}, "if is not kept; then is not kept"),
    ({"type": "number", "multipleOf": 7}, "multipleOf is not kept"),
    ({"type": "string", "pattern": "^a+$", "minLength": 2}, "pattern and minLength or maxLength are not kept together"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired is not kept"),
    ({"type": "object", "propertyNames": {"pattern": "^z$"}}, "propertyNames is not kept"),
    ({"type": "object", "patternProperties": {"^x": A}}, "patternProperties is not kept"),
    ({"type": "object", "properties": {"a": A}, "required": ["b"]}, "required names 'b'"),
    ({"type": "object", "properties": {"a": A}, "additionalProperties": True}, "additionalProperties is not kept"),
    ({"type": "object", "properties": {"a": {"items": A, "type": "array", "contains": A}}}, "a: contains"),
    ({"minimum": 5}, "minimum needs a type"),
    ({"type": "nonsense"}, "there is no type 'nonsense'"),
    ({"type": "string", "format": "nonsense"}, "format 'nonsense' is not kept"),
    ({"type": "string", "format": "json-pointer"}, "format 'json-pointer' is not kept"),
    ({"type": "string", "pattern": "^(?!a).*$"}, "groups that begin with (?"),
    ({"type": "string", "pattern": "a$b"}, "at the ends alone"),
    ({"type": "string", "pattern": '^"$'}, "in it is not kept"),
    ({"type": "string", "pattern": "^a{1,5000}$"}, "more than 256 times"),
    ({"type": "string", "maxLength": 10**9}, "at most 100,000"),
    ({"enum": ["a", 1], "type": "string"}, "enum has a value that is not of its type"),
    ({"enum": ["a", "bb"], "minLength": 2}, "minLength is not kept beside enum"),
]  # fmt: skip


def accepts(schema: dict[str, Any], value: Any) -> bool:
    from xgrammar.testing import _is_grammar_accept_string

    made = xgrammar.Grammar.from_json_schema(json.dumps(schema), any_whitespace=False)
    return bool(_is_grammar_accept_string(made, json.dumps(value)))


@pytest.mark.parametrize(("schema", "right", "wrong"), KEPT, ids=str)
def test_a_keyword_that_is_taken_is_kept(schema: dict[str, Any], right: list[Any], wrong: list[Any]) -> None:
    assert schemas.check(schema) == ""
    assert [value for value in right if not accepts(schema, value)] == []
    assert [value for value in wrong if accepts(schema, value)] == []


def test_every_keyword_that_is_taken_is_tried() -> None:
    tried = {name for schema, _, _ in KEPT for name in schema}
    assert tried >= set(schemas.ALONE).union(*schemas.KEPT.values())


@pytest.mark.parametrize(("schema", "said"), REFUSED, ids=str)
def test_a_keyword_that_would_not_be_kept_is_refused_by_name(schema: dict[str, Any], said: str) -> None:
    assert said in schemas.check(schema)


def test_schemas_of_pydantic_are_taken() -> None:
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

    assert schemas.check(Order.model_json_schema()) == ""


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    folder = tmp_path_factory.mktemp("schemas")
    two_runs(folder)
    with engine_over(["first", "second"], folder / "runs") as engine:
        yield engine


def slow(num: int) -> dict[str, Any]:
    """A schema that takes its compiler long: every place of a pattern can be any of many characters."""
    properties = {f"k{i}": {"type": "string", "pattern": f"[\\u0080-\\uffff]{{1,{3000 + i}}}"} for i in range(num)}
    return {"type": "object", "properties": properties, "required": list(properties)}


def test_the_schema_of_one_holds_up_nobody_else(asked: Asked) -> None:
    async def scene() -> float:
        attacking = asyncio.ensure_future(heard(asked.engine.ask(says("first", "hi", json_schema=slow(10)))))
        await asyncio.sleep(0.3)
        begun = time.monotonic()
        await heard(asked.engine.ask(says("second", "hello", max_tokens=2)))
        seconds = time.monotonic() - begun
        with pytest.raises(Refused, match="more than 256 times"):
            await attacking
        return seconds

    assert asked.run(scene()) < 3  # hundredths of a second on a machine at rest; it was 52 s


def test_a_schema_is_kept_by_an_answer_and_compiled_once(asked: Asked) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    for _ in range(2):
        text = asked.answer(says("first", "hello", json_schema=schema, max_tokens=32)).texts[0]
        assert json.loads(text)["a"] in ("x", "y")


@pytest.mark.parametrize("schema", [{"maxLength": 9}, {"minLength": 2}, {"format": "uri"}, {}], ids=str)
def test_a_string_never_holds_a_control_character_as_it_is(schema: dict[str, Any]) -> None:
    from tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    made = grammar.Grammars(tokenizer, vocab_size=len(tokenizer), stop_ids=[2])
    one = made.compile({"type": "string", **schema}, lambda: True)()
    [quote] = tokenizer.encode('"', add_special_tokens=False)
    one.accept(quote)
    logits_V = torch.zeros(len(tokenizer))
    one.bar(logits_V)
    allowed = [tokenizer.decode([i]) for i in torch.isfinite(logits_V).nonzero()[:, 0].tolist()]
    assert allowed
    assert [text for text in allowed if any(sign < " " for sign in text)] == []


def test_a_schema_that_takes_too_long_is_given_up_with_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    made = grammar.Grammars(tokenizer, vocab_size=len(tokenizer), stop_ids=[2])
    plain = {"type": "object", "properties": {"a": A}}
    made.compile(plain, lambda: True)
    monkeypatch.setattr(schemas, "MOST_REPEATS", 10**6)  # what is refused beforehand takes long
    monkeypatch.setattr(grammar, "COMPILE_S", 0.3)
    begun = time.monotonic()
    with pytest.raises(Refused, match=r"takes more than 0.3 s"):
        made.compile(slow(30), lambda: True)
    assert time.monotonic() - begun < 3
    monkeypatch.setattr(grammar, "COMPILE_S", 60)
    wanted = iter([True, True, True])
    begun = time.monotonic()
    with pytest.raises(Refused, match="nobody waits"):
        made.compile(slow(30), lambda: next(wanted, False))
    assert time.monotonic() - begun < 30
    made.compile({"type": "array", "items": A}, lambda: True)
