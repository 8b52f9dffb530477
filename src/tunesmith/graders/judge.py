"""A judge: a model at an OpenAI-compatible address that gives a number.

POST ADDRESS/chat/completions {model, messages, response_format, temperature, ...}
"""

from __future__ import annotations

import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse

from tunesmith.errors import InputError
from tunesmith.graders.grade import GradeError
from tunesmith.graders.schema import ScoreModel
from tunesmith.graders.templates import render
from tunesmith.types import Record

JUDGE_TRIES = 3
FIRST_WAIT_S, LONGEST_RETRY_S = 1.0, 60.0
"""Before the second try, doubled before the third, unless the reply names a time."""
_OBJECT = re.compile(r"\{.*\}", re.DOTALL)
MOST_REPLY_BYTES = 4 * 2**20


def key_of(grader: ScoreModel) -> str:
    """The key that a judge asks for; "" for none. Raises InputError where its variable is not set."""
    if grader.key_env and not os.environ.get(grader.key_env):
        raise InputError(f"key_env: {grader.key_env}: this environment variable is not set. Set it to the judge's key.")
    return os.environ.get(grader.key_env, "") if grader.key_env else ""


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


_STEP = {"type": "string"}
_SCHEMA = {
    "name": "score",
    "strict": True,
    "schema": {
        "type": "object",
        "properties": {"steps": {"type": "array", "items": _STEP}, "result": {"type": "number"}},
        "required": ["steps", "result"],
        "additionalProperties": False,
    },
}


def _reply(grader: ScoreModel, body: Record, sleep: Callable[[float], None]) -> Record:
    address = f"{grader.address}/chat/completions"
    request = urllib.request.Request(address, json.dumps(body).encode(), method="POST")
    request.add_header("Content-Type", "application/json")
    if key := key_of(grader):
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    ends = time.monotonic() + grader.seconds
    for attempt in range(JUDGE_TRIES):
        try:
            with urllib.request.urlopen(request, timeout=max(0.1, ends - time.monotonic())) as reply:
                return dict(json.loads(_read(reply, ends)))
        except urllib.error.HTTPError as error:
            why, named = f"status {error.code}: {_words_of(error)}", error.headers.get("Retry-After", "")
            if error.code not in (408, 409, 429) and error.code < 500:
                raise GradeError("unreachable", f"{grader.address}: {why}") from None
        except (OSError, HTTPException) as error:
            why, named = str(getattr(error, "reason", error)) or type(error).__name__, ""
        except (ValueError, TypeError):
            raise GradeError("unreadable", f"{grader.address}: its reply is not a JSON object") from None
        wait = float(named) if re.fullmatch(r"\d+(\.\d+)?", named) else FIRST_WAIT_S * 2**attempt
        if attempt == JUDGE_TRIES - 1 or wait > LONGEST_RETRY_S or time.monotonic() + wait > ends:
            break
        sleep(wait)
    if time.monotonic() >= ends:
        raise GradeError("timeout", f"{grader.address}: it took more than {grader.seconds:g} s")
    raise GradeError("unreachable", f"{grader.address}: {why}, after {attempt + 1} tries")


def _read(reply: HTTPResponse, ends: float) -> bytes:
    """The body. Raises TimeoutError at time.monotonic() == `ends`, however slowly it drips."""
    body = b""
    while len(body) < MOST_REPLY_BYTES and (part := reply.read1(MOST_REPLY_BYTES - len(body))):
        body += part
        if time.monotonic() > ends:
            raise TimeoutError("the reply was not whole in time")
    return body


def _words_of(error: urllib.error.HTTPError) -> str:
    try:
        text = error.read(MOST_REPLY_BYTES).decode("utf-8", "replace")
    except (OSError, HTTPException):
        return str(error.reason)
    try:
        return str(json.loads(text)["error"]["message"])[:300]
    except (ValueError, TypeError, KeyError):
        return " ".join(text.split())[:300] or str(error.reason)


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
