"""Parameters of OpenAI's API that are not done here: which of them say nothing about an answer, and which are refused.

Nothing is ignored that would change an answer. docs/serve.md has the same table, and a test holds both together.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic_core import PydanticCustomError

NO_EFFECT = (
    "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
)  # fmt: skip
"""Notes for the one who answers; taken and forgotten."""

ONLY: dict[str, tuple[Any, ...]] = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
"""Taken with the values that ask for nothing; refused with others."""

REFUSED = {
    "audio": "models here read and write text.",
    "function_call": "no function can be forced. Give tools, which the model's template shows it.",
    "functions": "give tools, which came in their place.",
    "moderation": "nothing is moderated here.",
    "prediction": "nothing is predicted ahead here.",
    "reasoning_effort": "a model reasons as it was tuned to.",
    "verbosity": "a model writes as it was tuned to.",
    "web_search_options": "nothing is searched here.",
    "dimensions": "a vector has the size that its model gives it.",
}


def refuse(code: str, param: str, message: str) -> PydanticCustomError:
    """An error with its code and parameter, for the answer that names them."""
    # pydantic fills in {names} of a message by itself: text of a sender must not be read as one.
    return PydanticCustomError("refused", "{message}", {"code": code, "param": param, "message": message})


def without_unused(given: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """What is given and means something here. Null is the same as not given.

    Raises PydanticCustomError naming every parameter that is unknown or would have to be ignored.
    """
    known = set(known)
    kept, problems = {}, []
    for name, value in given.items():
        if name in known:
            if value is not None:
                kept[name] = value
        elif problem := _problem(name, value, known):
            problems.append((name, *problem))
    if problems:
        name, code, _ = problems[0]
        raise refuse(code, name, " ".join(message for _, _, message in problems[:10]))
    return kept


def _problem(name: str, value: Any, known: Iterable[str]) -> tuple[str, str] | None:
    """(code, message) where a parameter cannot be left aside."""
    if name in NO_EFFECT or (value is None and (name in ONLY or name in REFUSED)):
        return None
    if name in ONLY:
        if any(type(value) is type(allowed) and value == allowed for allowed in ONLY[name]):
            return None
        allowed = " or ".join(repr(value) for value in ONLY[name])
        return "unsupported_value", f"{name}: not supported here but as {allowed}."
    if name in REFUSED:
        return "unsupported_parameter", f"{name}: not supported here: {REFUSED[name]}"
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f", did you mean {near[0]}?" if near else "."
    return "unknown_parameter", f"{name[:60]}: unknown parameter{hint}"
