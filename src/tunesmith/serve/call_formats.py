"""How a chat template writes a call of a tool, found by rendering one."""

from __future__ import annotations

import json
import re
from typing import Any

from tunesmith.data.chat import CALL, QUESTION
from tunesmith.data.chat_template import ChatTemplate, TemplateRefusal
from tunesmith.serve.protocol import CallFormat

TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look up a word.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
_MARKED = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


def call_format(tokenizer: Any) -> CallFormat | None:
    """None: the template knows no tools, or writes their calls in another way than those that are read here."""
    if not tokenizer.chat_template:
        return None
    template = ChatTemplate(tokenizer)
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    try:
        asked = template.render([QUESTION], tools=[TOOL], prompt=True)
        whole = template.render([QUESTION, called], tools=[TOOL], prompt=False)
    except TemplateRefusal:
        return None
    answer = whole.removeprefix(asked)
    if (marked := _MARKED.search(answer)) and _is_call(marked[1], "arguments"):
        return "hermes" if _survives(tokenizer) else None
    begin, end = answer.find("{"), answer.rfind("}") + 1
    return "json" if begin >= 0 and _is_call(answer[begin:end], "parameters") else None


def _is_call(text: str, key: str) -> bool:
    try:
        call = json.loads(text)
    except ValueError:
        return False
    return isinstance(call, dict) and call.get("name") == "look_up" and isinstance(call.get(key), dict)


def _survives(tokenizer: Any) -> bool:
    """Whether the mark is text to the tokenizer: a special token is not part of an answer."""
    ids = tokenizer("<tool_call>", add_special_tokens=False).input_ids
    return "<tool_call>" in str(tokenizer.decode(ids, skip_special_tokens=True))
