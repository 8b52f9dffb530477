"""What travels between the server and the child: a JSON object a line, read by both sides. Nothing here is heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import orjson

from tunesmith.errors import InputError, TunesmithError
from tunesmith.serve.protocol import Ask, Begun, Ended, EngineOptions, Piece, Refused, Served, TokenChance, Told

MOST_LINE_BYTES = 1 << 28
"""Of one line: vectors of many texts are the longest."""

_TOLD: dict[str, Any] = {"begun": Begun, "piece": Piece, "ended": Ended}


def line(message: Mapping[str, Any]) -> bytes:
    """A message as it is written."""
    return orjson.dumps(message) + b"\n"


def parse(text: bytes) -> dict[str, Any]:
    """A message as it was meant. Raises ValueError."""
    message: dict[str, Any] = orjson.loads(text)
    return message


def ask_fields(ask: Ask) -> dict[str, Any]:
    return asdict(ask)


def as_ask(fields_: Mapping[str, Any]) -> Ask:
    prompt = fields_["prompt"]
    return Ask(
        **{
            **fields_,
            "messages": tuple(fields_["messages"]),
            "tools": tuple(fields_["tools"]),
            "stop": tuple(fields_["stop"]),
            "prompt": tuple(prompt) if isinstance(prompt, list) else prompt,
        }
    )


def as_options(plain: Mapping[str, Any]) -> EngineOptions:
    return EngineOptions(**plain)


def as_served(plain: Mapping[str, Any]) -> Served:
    return Served(**{**plain, "labels": tuple(plain["labels"])})


def told_fields(told: Told | Refused) -> dict[str, Any]:
    """What is told of an ask; the bytes of tokens as numbers."""
    if isinstance(told, Refused):
        return {"kind": "refused", "message": str(told), "status": told.status, "code": told.code, "param": told.param}
    kind = type(told).__name__.lower()
    plain = {field.name: getattr(told, field.name) for field in fields(told)}
    if isinstance(told, Piece):
        plain["tokens"] = [_chance_fields(token) for token in told.tokens]
    return {"kind": kind, **plain}


def as_told(plain: dict[str, Any]) -> Told | Refused:
    kind = plain.pop("kind")
    if kind == "refused":
        return Refused(plain["message"], status=plain["status"], code=plain["code"], param=plain["param"])
    if kind == "piece":
        plain["tokens"] = tuple(map(_as_chance, plain["tokens"]))
    told: Told = _TOLD[kind](**plain)
    return told


def _chance_fields(chance: TokenChance) -> list[Any]:
    return [chance.text, list(chance.bytes), chance.logprob, [_chance_fields(one) for one in chance.top]]


def _as_chance(plain: list[Any]) -> TokenChance:
    text, spelled, logprob, top = plain
    # JSON knows no infinity: what cannot come at all is sent as nothing.
    return TokenChance(text, bytes(spelled), float("-inf") if logprob is None else logprob, tuple(map(_as_chance, top)))


def error_fields(error: TunesmithError) -> dict[str, Any]:
    """An error that ends the start of a child."""
    return {"is_input": isinstance(error, InputError), "message": str(error)}


def as_error(plain: Mapping[str, Any]) -> TunesmithError:
    return (InputError if plain["is_input"] else TunesmithError)(plain["message"])
