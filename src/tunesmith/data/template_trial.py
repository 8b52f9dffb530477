"""A chat template is a program that somebody else wrote: it is tried in a process of its own before it runs.

    python -m tunesmith.data.template_trial

is that process, which may take little memory and time. It imports Jinja and nothing of torch: a tenth of a
second. What a template does only to later rows meets the bounds of `sandbox`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import product

from tunesmith.data.sandbox import Sandbox, TooLong, TooMuch
from tunesmith.environment.children import for_child, python_words
from tunesmith.environment.process import limit_process
from tunesmith.types import JsonObject

TRIAL_LIMIT_S = 2.0
"""Seconds of processor time for one conversation, which takes microseconds."""
WAIT_S = 60.0
"""Longest wait for the process, on a busy machine too."""
TRIAL_BYTES = 2**30
"""Memory that it may take."""
TRIAL_TICK_S = 0.1
TAKES_MEMORY = f"takes more than {TRIAL_BYTES / 2**30:g} GiB of memory"

_CALL = {"type": "function", "id": "a1", "function": {"name": "look_up", "arguments": {"days": 2}}}
_TOOL = {"name": "look_up", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": _TOOL}]
_USER, _ANSWER = {"role": "user", "content": "Will it rain?"}, {"role": "assistant", "content": "No.\n\nYes."}
CONVERSATIONS: tuple[list[JsonObject], ...] = (
    [_USER, _ANSWER],
    [{"role": "system", "content": "Be brief."}, _USER, _ANSWER, _USER],
    [
        _USER,
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Hm.",
            "tool_calls": [{"type": "function", "id": "a1", "function": _CALL}],
        },
        {"role": "tool", "name": "look_up", "tool_call_id": "a1", "content": '{"rain": true}'},
        _ANSWER,
    ],
    [{"role": "user", "content": [{"type": "text", "text": "Will it rain?"}]}, _ANSWER],
    [_USER, _ANSWER] * 20,
)


def fault_of(texts: Sequence[str], tokens: JsonObject) -> str:
    """Say what a tokenizer's templates do that they must not: words after "its chat template "; empty: nothing.

    `tokens`: the special tokens by their names, as templates read them.
    """
    return _fault_of(json.dumps({"texts": list(texts), "tokens": tokens, "limit_s": TRIAL_LIMIT_S}))


@lru_cache(maxsize=64)
def _fault_of(given: str) -> str:
    import psutil  # which the process itself does without

    too_long = f"ran for more than {json.loads(given)['limit_s']:g} s, in a loop or in one long operation"
    if not sys.executable:  # Python within another program: the bounds of `sandbox` hold there too
        return _first_fault(json.loads(given))
    ends, to_send = time.monotonic() + WAIT_S, str(given) or None
    with subprocess.Popen(
        python_words("tunesmith.data.template_trial"), env=for_child(), start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
    ) as process:  # fmt: skip
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    answer, _ = process.communicate(to_send, timeout=TRIAL_TICK_S)
                    break
                to_send = None
                if time.monotonic() > ends:
                    return too_long
                with suppress(psutil.Error):  # the system keeps no limit: macOS, Windows
                    if psutil.Process(process.pid).memory_info().rss > 2 * TRIAL_BYTES:
                        return TAKES_MEMORY
        finally:
            process.kill()
    if process.returncode == 0 and answer.endswith("\n"):
        return answer.strip()
    return too_long if process.returncode == -_SIGXCPU else f"{TAKES_MEMORY}, or ended its process"


_SIGXCPU = 24
"""As Linux and macOS number it; Windows has none."""


def main() -> None:
    """The process: writes a line."""
    job = json.load(sys.stdin)
    limit_process(memory_bytes=TRIAL_BYTES, seconds=2 * job["limit_s"] + 1)
    sys.stdout.write(f"{_first_fault(job)}\n")


def _first_fault(given: JsonObject) -> str:
    return next(filter(None, (_fault(text, given["tokens"], given["limit_s"]) for text in given["texts"])), "")


def _fault(text: str, tokens: JsonObject, limit_s: float) -> str:
    try:
        sandbox = Sandbox(text)
        for messages, tools, prompt in product(CONVERSATIONS, (None, TOOLS), (False, True)):
            variables = {"tools": tools, "documents": None, "add_generation_prompt": prompt, **tokens}
            sandbox.begin(limit_s)
            try:
                sandbox.template.render(messages=messages, strftime_now=lambda text: "01 Jan 2026", **variables)
            except Exception as error:
                if does := words_of(error, limit_s):
                    return does
    except Exception as error:
        return words_of(error, limit_s)
    return ""


def words_of(error: BaseException, limit_s: float) -> str:
    """Say what a template does where it takes too much; empty for any other error, such as its own refusal."""
    if isinstance(error, (TooMuch, TooLong)):
        return f"writes too long a text: {error}" if isinstance(error, TooLong) else str(error)
    if isinstance(error, TimeoutError):
        return f"ran for more than {limit_s:g} s, in a loop"
    if isinstance(error, RecursionError):
        return "nests or calls itself more deeply than Python can follow"
    return TAKES_MEMORY if isinstance(error, MemoryError) else ""


if __name__ == "__main__":
    main()
