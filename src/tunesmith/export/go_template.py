"""The part of Go's templates that a Modelfile needs, rendered, so that what is written can be tried before it is used.

Text, `{{ .Field }}`, `{{ "text" }}`, `{{ currentDate }}`, `{{ if .System }}`, `{{ if not .System }}`,
`{{ if eq .Role "user" }}`, `else if`, `else`, `end`, `range .Messages`. No trimming marks: nothing here writes any.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

_ACTION = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_EQUAL = re.compile(r'eq \.(\w+) ("[^"]*")')


def literal(text: str) -> str:
    """Text that a template shows as it is."""
    return text.replace("{{", '{{ "{{" }}')


def render(template: str, data: Mapping[str, Any]) -> str:
    """What Go writes for `data`. Raises ValueError for what is not of the part above."""
    pieces = _ACTION.split(template)
    out, end = _block(pieces, 0, data, data, shown=True)
    if end != len(pieces):
        raise ValueError(f"{pieces[end - 1].strip()}: closes nothing")
    return out


def _block(
    pieces: Sequence[str], at: int, dot: Mapping[str, Any], root: Mapping[str, Any], *, shown: bool
) -> tuple[str, int]:
    """Text and actions from piece `at` up to what closes the block: the text, and where that action is, plus one."""
    out = ""
    while True:
        out += pieces[at] if shown else ""
        at += 1
        if at >= len(pieces):
            return out, at
        action = pieces[at].strip()
        at += 1
        if action == "end" or action.startswith("else"):
            return out, at
        if action.startswith("if "):
            text, at = _if(pieces, at, action[3:], dot, root, shown=shown)
        elif action == "range .Messages":
            text, at = _range(pieces, at, dot, root, shown=shown)
        else:
            text = _value(action, dot) if shown else ""
        out += text


def _if(
    pieces: Sequence[str], at: int, condition: str, dot: Mapping[str, Any], root: Mapping[str, Any], *, shown: bool
) -> tuple[str, int]:
    done, out = False, ""
    while True:
        holds = shown and not done and _holds(condition, dot)
        text, at = _block(pieces, at, dot, root, shown=holds)
        out += text
        done = done or holds
        closing = pieces[at - 1].strip() if at <= len(pieces) - 1 else "missing end"
        if closing == "end":
            return out, at
        if not closing.startswith("else"):
            raise ValueError(f"if {condition}: has no end")
        condition = closing.removeprefix("else").strip().removeprefix("if").strip() or "true"


def _range(
    pieces: Sequence[str], at: int, dot: Mapping[str, Any], root: Mapping[str, Any], *, shown: bool
) -> tuple[str, int]:
    out = "".join(_block(pieces, at, message, root, shown=shown)[0] for message in dot["Messages"])
    return out, _block(pieces, at, dot, root, shown=False)[1]


def _holds(condition: str, dot: Mapping[str, Any]) -> bool:
    if condition == "true":
        return True
    if found := _EQUAL.fullmatch(condition):
        return bool(dot[found[1]] == json.loads(found[2]))
    if condition.startswith("not "):
        return not _holds(condition[4:], dot)
    return bool(dot[condition.removeprefix(".")])


def _value(action: str, dot: Mapping[str, Any]) -> str:
    if action.startswith('"'):
        return str(json.loads(action))
    if action == "currentDate":
        return date.today().isoformat()
    if not re.fullmatch(r"\.\w+", action):
        raise ValueError(f"{{{{ {action} }}}}: not of the part of Go's templates that is known here")
    return str(dot[action[1:]])
