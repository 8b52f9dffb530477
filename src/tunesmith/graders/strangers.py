"""Graders that clients send to a server: which of them may run here, and in which form.

A client decides what its grader reads. Whoever runs the server decides what it may use: code, addresses, keys,
files and limits.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tunesmith.errors import InputError
from tunesmith.graders import schema
from tunesmith.graders.texts import refuse_lacking
from tunesmith.phrases import listed
from tunesmith.types import JsonObject

RUNS_CODE = schema.types_in(schema.OfflineGrader)
"""Types that run code of clients."""
OF_SERVER = ("function", "reward_run")
"""Types that name files of the server."""
SERVERS_OPTIONS = ("address", "key_env", "env", "seconds", "memory_gib")
MOST_GRADERS = 32  # of a multi: some take a process each
TEXT_GRADERS = "string_check, text_similarity, regex, number, length or json_schema"


class JudgeAccess(BaseModel):
    """A model that grades answers, at an address with OpenAI's API."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    address: str = Field(pattern=r"^https?://[^/\s]+")
    model: str = ""
    """Its name there; empty: the name that clients use."""
    key_env: str = ""
    """Environment variable of the server that has the key."""


class GraderRules(BaseModel):
    """The things that graders of clients may use beyond the texts of rows and answers."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    python: bool = False
    """Whether code of clients runs here, in `python` and `unit_tests`: as the server's user,
    within limits of time and memory."""
    judges: dict[str, JudgeAccess] = Field(default_factory=dict)
    """Models of `score_model`, by the names that clients use."""


class GraderRefusedError(InputError):
    """A grader that is invalid ("invalid_grader") or may not run here ("grader_not_allowed"), with its place."""

    def __init__(self, message: str, *, code: str, place: str) -> None:
        super().__init__(message)
        self.code, self.place = code, place


def runnable(sent: Any, rules: GraderRules, place: str) -> JsonObject:
    """A client's grader in the form that `schema.from_value` takes, with the server's additions. No code runs.

    Raises GraderRefusedError.
    """
    made = dict(sent) if isinstance(sent, Mapping) else sent
    if isinstance(sent, Mapping) and sent.get("type") == "multi" and isinstance(sent.get("graders"), (Mapping, list)):
        inner = sent["graders"]
        if isinstance(inner, Mapping) and isinstance(inner.get("type"), str):  # one, as OpenAI's client types it
            made["graders"] = _allowed(inner, rules, f"{place}.graders")
        elif isinstance(inner, Mapping):
            made["graders"] = {name: _allowed(part, rules, f"{place}.graders.{name}") for name, part in inner.items()}
        else:
            made["graders"] = [_allowed(part, rules, f"{place}.graders[{i}]") for i, part in enumerate(inner)]
    else:
        made = _allowed(sent, rules, place)
    try:
        grader = schema.from_value(made, place=place, types=types_of(rules))
        schema.check_variables(grader, None, place)
        if (num := len(schema.parts_of(grader))) > MOST_GRADERS:
            raise InputError(f"{place}.graders: {num:,} graders. Send at most {MOST_GRADERS}.")
        for part in schema.parts_of(grader).values():
            refuse_lacking(part)
            _check_code(part, place)
    except (InputError, RecursionError) as error:
        raise GraderRefusedError(str(error), code="invalid_grader", place=place) from None
    assert isinstance(made, dict), "it is a grader"
    return made


def types_of(rules: GraderRules) -> list[str]:
    """The types of graders that clients may send."""
    refused = {*OF_SERVER, *(() if rules.python else RUNS_CODE), *(() if rules.judges else ("score_model",))}
    return [name for name in schema.TYPES if name not in refused]


def _allowed(part: Any, rules: GraderRules, place: str) -> Any:
    if not isinstance(part, Mapping):
        return part  # the schema says what it should be
    kind = part.get("type")
    if kind in OF_SERVER:
        raise _refused(place, f"type {kind}: names a file of the server. Use {TEXT_GRADERS}")
    if kind in RUNS_CODE and not rules.python:
        raise _refused(
            place,
            f"type {kind}: code of clients does not run here. Use {TEXT_GRADERS}; or who runs the server allows it, by "
            "--python-graders",
        )
    if options := [name for name in SERVERS_OPTIONS if name in part]:
        raise _refused(f"{place}.{options[0]}", "is decided by who runs the server. Leave it out")
    if kind != "score_model":
        return dict(part)
    name = part.get("model")
    if not isinstance(name, str) or name not in rules.judges:
        known = f"use {listed(rules.judges, 12)}" if rules.judges else f"there is none: use {TEXT_GRADERS}"
        way = "or who runs the server names it in graders.judges of the file of bases"
        raise _refused(f"{place}.model", f"{str(name)[:80]}: is no judge here; {known}; {way}")
    judge = rules.judges[name]
    return {**part, "model": judge.model or name, "address": judge.address, "key_env": judge.key_env}


def _refused(place: str, why: str) -> GraderRefusedError:
    return GraderRefusedError(f"{place}: {why}.", code="grader_not_allowed", place=place)


def _check_code(part: schema.Single, place: str) -> None:
    """Raise InputError for Python that has no function `grade`."""
    if not isinstance(part, schema.Python):
        return
    try:
        names = [getattr(node, "name", "") for node in ast.parse(part.source).body]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        raise InputError(f"{place}: source: {f'line {line}: ' if line else ''}{error.args[0]}.") from None
    if "grade" not in names:
        raise InputError(f"{place}: source: it has no function grade. Write def grade(sample, item).")
