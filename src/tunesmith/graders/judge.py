"""A judge: a model at an OpenAI-compatible address that gives a number.

POST ADDRESS/chat/completions {model, messages, response_format, temperature, ...}
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable

from tunesmith.graders.grade import GradeError
from tunesmith.graders.remote import RemoteError, key_of, post
from tunesmith.graders.schema import ScoreModel
from tunesmith.graders.templates import render
from tunesmith.types import Record

_OBJECT = re.compile(r"\{.*\}", re.DOTALL)
_SCHEMA = {
    "name": "score",
    "strict": True,
    "schema": {
        "type": "object",
        "properties": {"steps": {"type": "array", "items": {"type": "string"}}, "result": {"type": "number"}},
        "required": ["steps", "result"],
        "additionalProperties": False,
    },
}
"""Form of the judge's answer, for servers that keep an answer to a form."""


def ask(
    grader: ScoreModel,
    sample: Record,
    item: Record,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> float:
    """The judge's number, within the grader's range. Raises GradeError."""
    low, high = grader.range
    messages = [{"role": turn.role, "content": render(turn.content, sample, item)} for turn in grader.input]
    rule = f'Answer in JSON: {{"steps": [short reasons], "result": a number from {low:g} to {high:g}}}. Nothing else.'
    params = grader.sampling_params.model_dump(exclude_none=True)
    if (most := params.pop("max_completions_tokens", None)) is not None:
        params["max_tokens"] = most
    body = {"model": grader.model, "messages": [*messages, {"role": "user", "content": rule}], **params}
    body["response_format"] = {"type": "json_schema", "json_schema": _SCHEMA}
    return min(high, max(low, _number(_reply(grader, body, sleep))))


def _reply(grader: ScoreModel, body: Record, sleep: Callable[[float], None]) -> Record:
    key = key_of(grader.key_env)
    try:
        return post(grader.address, "chat/completions", body, key=key, seconds=grader.seconds, sleep=sleep)
    except RemoteError as error:
        raise GradeError(error.kind, str(error)) from None


def _number(reply: Record) -> float:
    try:
        message = reply["choices"][0]["message"]
        refusal, text = message.get("refusal"), message.get("content")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise GradeError("unreadable", f"the judge's reply has no message: {json.dumps(reply)[:200]}") from None
    if refusal:
        raise GradeError("refused", f"the judge refused: {str(refusal)[:200]}")
    match = _OBJECT.search(str(text))
    try:
        result = json.loads(match[0] if match else "")["result"]
        if isinstance(result, bool) or not math.isfinite(float(result)):
            raise ValueError
        return float(result)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        raise GradeError("unreadable", f'the judge wrote no {{"result": number}}: {str(text)[:200]}') from None
